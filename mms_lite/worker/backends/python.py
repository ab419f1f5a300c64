"""Python code: a model.py as the Triton Python backend takes it, with a class TritonPythonModel.

It hides Triton's conventions: the configuration as JSON, requests and responses, and who states the tensors.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mms_lite.errors import BadTensor, HandlerError, InvalidArchive
from mms_lite.tensors import DTYPES, Array
from mms_lite.types import BYTES, TensorSpec
from mms_lite.worker.backends import BackendSettings, declared
from mms_lite.worker.compat import triton_python_backend_utils as pb_utils

_CLASS = "TritonPythonModel"
_EXAMPLE = (
    '{"backend": {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [-1, 3]}], '
    '"outputs": [{"name": "OUTPUT0", "datatype": "FP32", "shape": [-1, 2]}]}}'
)


class PythonBackend:
    """A TritonPythonModel: what `infer` gets is given to `execute` as one request.

    Its tensors are those that the archive states, or that its `auto_complete_config` adds. Options become
    the configuration's `parameters`. A TritonError in its response is raised: as BadTensor with the code
    INVALID_ARG, else as HandlerError.
    """

    def __init__(
        self, model: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], most_rows: int
    ) -> None:
        self.inputs: Sequence[TensorSpec] = inputs
        self.outputs: Sequence[TensorSpec] = outputs
        self.metadata: Mapping[str, str] = {}
        self._model = model
        self._most_rows = most_rows

    @classmethod
    def open(cls, settings: BackendSettings) -> PythonBackend:
        """Import the model's file and initialize its model.

        Raises:
            InvalidArchive: it cannot be imported, is no such model, or nobody says what it takes and gives.
            Exception: whatever the model's `initialize` raises.
        """
        source = settings.files[0]
        sys.modules[pb_utils.__name__.rpartition(".")[2]] = pb_utils  # the name by which models import it
        model_class = _model_class(_import(source), source)
        config, complete = _config(source, settings), getattr(model_class, "auto_complete_config", None)
        if complete is not None:
            completed = complete(pb_utils.ModelConfig(json.dumps(config)))
            if not isinstance(completed, pb_utils.ModelConfig):
                raise InvalidArchive("auto_complete_config does not return the configuration that it gets")
            config = completed.as_dict()
        inputs = _specs(config, "input", settings.inputs)
        outputs = _specs(config, "output", settings.outputs)
        if not inputs or not outputs:
            raise InvalidArchive(
                f"{source.name} does not say what the model takes and gives: state it in the handler config, "
                f"such as {_EXAMPLE}, or add it in {_CLASS}.auto_complete_config"
            )
        batched = config["max_batch_size"] > 0
        config["input"] = [_triton(spec, batched) for spec in inputs]
        config["output"] = [_triton(spec, batched) for spec in outputs]
        model = model_class()
        if hasattr(model, "initialize"):
            model.initialize(_arguments(config, source, settings))
        return cls(model, inputs, outputs, config["max_batch_size"])

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the model once; see `Backend`.

        Raises:
            BadTensor: the model answers so, or takes fewer rows.
            HandlerError: the model answers with an error, or with nonsense.
        """
        rows = max((len(array) for array in inputs.values() if array.ndim), default=0)
        if 0 < self._most_rows < rows:
            raise BadTensor(f"the model takes at most {self._most_rows} rows at once, got {rows}")
        request = pb_utils.InferenceRequest(
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            requested_output_names=outputs,
        )
        answer = self._model.execute([request])
        if inspect.iscoroutine(answer):
            answer = asyncio.run(answer)
        found = {tensor.name(): tensor.as_numpy() for tensor in _response(answer).output_tensors()}
        for name in outputs:
            if name not in found:
                gave = ", ".join(map(repr, found)) or "none"
                raise HandlerError(f"the model's execute gave no output {name!r}; it gave: {gave}")
        return {name: found[name] for name in outputs}

    def close(self) -> None:
        """Let the model finalize, and let go of it."""
        model, self._model = self._model, None
        if hasattr(model, "finalize"):
            model.finalize()


def _import(source: Path) -> ModuleType:
    """Import the file, whose folder's other modules it may import."""
    folder = str(source.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = source.stem if source.stem not in sys.modules else f"python_backend_{source.stem}"
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise InvalidArchive(f"{source.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except MemoryError:
        raise
    except Exception as error:
        raise InvalidArchive(f"{_place(error, source)}: {_said(error)}") from error
    return module


def _place(error: Exception, source: Path) -> str:
    """Return the file and line of the archive's code in which an import failed."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{Path(error.filename).name}, line {error.lineno}"
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == source.parent
    ]
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else source.name


def _said(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}"


def _model_class(module: ModuleType, source: Path) -> Any:
    found = getattr(module, _CLASS, None)
    if not isinstance(found, type):
        raise InvalidArchive(
            f"{source.name} has no class {_CLASS}, which is the Triton Python backend's model"
        )
    if not callable(getattr(found, "execute", None)):
        raise InvalidArchive(f"the class {_CLASS} of {source.name} has no method execute")
    return found


def _config(source: Path, settings: BackendSettings) -> dict[str, Any]:
    """Return the model's configuration without its tensors (Triton, model_config.proto)."""
    return {
        "name": settings.model,
        "platform": "",
        "backend": "python",
        "max_batch_size": 0,
        "input": [],
        "output": [],
        "default_model_filename": source.name,
        "model_transaction_policy": {"decoupled": False},
        "parameters": {key: {"string_value": str(value)} for key, value in settings.options.items()},
    }


def _arguments(config: Mapping[str, Any], source: Path, settings: BackendSettings) -> dict[str, str]:
    """Return what `initialize` gets (Triton Python backend, README, "initialize")."""
    return {
        "model_config": json.dumps(config),
        "model_instance_kind": "CPU" if settings.device is None else "GPU",
        "model_instance_name": f"{config['name']}_0_0",
        "model_instance_device_id": str(settings.device or 0),
        "model_repository": str(source.parent),
        "model_version": settings.version,
        "model_name": config["name"],
    }


def _specs(config: Mapping[str, Any], side: str, stated: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Return one side's tensors: the model's own with those that the archive states in their place."""
    batch = (-1,) if config["max_batch_size"] > 0 else ()
    found = []
    for each in config[side]:
        name = str(each["data_type"]).removeprefix("TYPE_")
        datatype = BYTES if name == "STRING" else name
        if datatype not in DTYPES:
            raise InvalidArchive(
                f"the {side} {each['name']!r} has the data_type {each['data_type']!r}, "
                f"which is none of {', '.join(pb_utils.TRITON_STRING_TO_NUMPY)}"
            )
        found.append(TensorSpec(str(each["name"]), datatype, (*batch, *each["dims"])))
    return declared(found, stated, side) if found else stated


def _triton(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    data_type = "TYPE_STRING" if spec.datatype == BYTES else f"TYPE_{spec.datatype}"
    return {"name": spec.name, "data_type": data_type, "dims": list(spec.shape or (-1,))[batched:]}


def _response(answer: Any) -> pb_utils.InferenceResponse:
    """Return the one response that `execute` gave for one request.

    Raises:
        BadTensor: it is an error that blames the request.
        HandlerError: it is another error, or there is none.
    """
    if not isinstance(answer, list):
        raise HandlerError(f"the model's execute returned {type(answer).__name__}, not a list of responses")
    if len(answer) != 1:
        raise HandlerError(f"the model's execute returned {len(answer)} responses for 1 request")
    response = answer[0]
    if not isinstance(response, pb_utils.InferenceResponse):
        raise HandlerError(
            f"the model's execute returned a list of {type(response).__name__}, not of InferenceResponse"
        )
    error = response.error()
    if error is not None:
        fault = BadTensor if error.code() == pb_utils.TritonError.INVALID_ARG else HandlerError
        raise fault(error.message())
    return response
