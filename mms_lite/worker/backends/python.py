"""Python code: a model.py as the Triton Python backend takes it, with a class TritonPythonModel.

It hides Triton's conventions: how the file is imported, what `execute` is given, and what its answers mean.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mms_lite.errors import BadTensor, HandlerError, InvalidArchive, ServingError
from mms_lite.tensors import Array
from mms_lite.types import TensorSpec
from mms_lite.worker import outputs as wanted_outputs
from mms_lite.worker import sources
from mms_lite.worker.backends import Answer, BackendSettings, Request, python_config
from mms_lite.worker.compat import triton_python_backend_utils as pb_utils

_CLASS = "TritonPythonModel"
# What the server or another part of Triton's protocol reads of a request's parameters, not the model.
_RESERVED = {
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "priority",
    "timeout",
    "headers",
    "binary_data_output",
}
# The statuses with which Triton's front ends answer an error of a model: HTTP and gRPC.
_STATUSES: dict[int, dict[str, Any]] = {
    pb_utils.TritonError.UNKNOWN: {"status": 400, "grpc": "UNKNOWN"},
    pb_utils.TritonError.NOT_FOUND: {"status": 404, "grpc": "NOT_FOUND"},
    pb_utils.TritonError.UNAVAILABLE: {"status": 503, "grpc": "UNAVAILABLE"},
    pb_utils.TritonError.UNSUPPORTED: {"status": 501, "grpc": "UNIMPLEMENTED"},
    pb_utils.TritonError.ALREADY_EXISTS: {"status": 400, "grpc": "ALREADY_EXISTS"},
    pb_utils.TritonError.CANCELLED: {"status": 400, "grpc": "CANCELLED"},
}


class PythonBackend:
    """A TritonPythonModel: its `execute` is given the requests of a batch as they came, not joined.

    Its tensors are those that its configuration states, in a Triton repository, or that the archive states,
    or that its `auto_complete_config` adds. Options become the configuration's `parameters`. A TritonError in
    a response fails that request: as BadTensor with the code INVALID_ARG, else as HandlerError, whose details
    hold the status (HTTP) and grpc that the code stands for. BF16 arrays are those of ml_dtypes.
    """

    def __init__(
        self,
        model: Any,
        config: Mapping[str, Any],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        instance: str,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.metadata: Mapping[str, str] = {}
        self.config = config
        self.optional: Collection[str] = {each["name"] for each in config["input"] if each.get("optional")}
        self._model = model
        self._names = [spec.name for spec in outputs]
        self._name = str(config["name"])
        self._instance = instance
        self._loop: asyncio.AbstractEventLoop | None = None  # of an `execute` that is a coroutine

    @classmethod
    def open(cls, settings: BackendSettings) -> PythonBackend:
        """Import the model's file and initialize its model.

        Raises:
            InvalidArchive: it cannot be imported, is no such model, or nobody says what it takes and gives.
            Exception: whatever the model's `initialize` raises.
        """
        source = settings.files[0]
        sys.modules[pb_utils.__name__.rpartition(".")[2]] = pb_utils  # the name by which models import it
        pb_utils.enter_model_dir(str(source.parent))
        model_class = _model_class(_import(source, in_repository=settings.config is not None), source)
        config, inputs, outputs = python_config.read(source, settings, model_class)
        model = model_class()
        if hasattr(model, "initialize"):
            model.initialize(python_config.arguments(config, source, settings))
        return cls(model, config, inputs, outputs, python_config.instance(settings))

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the model once; see `Backend`.

        Raises:
            BadTensor: the model answers so.
            HandlerError: the model answers with an error, without an output, or with nonsense.
        """
        (answer,) = self.infer_requests([Request(inputs, outputs=outputs)])
        if isinstance(answer, ServingError):
            raise answer
        for name in outputs:
            if name not in answer:
                raise _no_output(name, answer)
        return answer

    def infer_requests(self, requests: Sequence[Request]) -> list[Answer | ServingError]:
        """Answer each request; all go to `execute` together.

        Raises:
            HandlerError: `execute` raised something, or returned no list of responses.
        """
        responses = self._execute(requests)
        return [self._answer(each, request) for each, request in zip(responses, requests, strict=True)]

    def close(self) -> None:
        """Let the model finalize, and let go of it."""
        model, self._model = self._model, None
        loop, self._loop = self._loop, None
        if hasattr(model, "finalize"):
            model.finalize()
        if loop is not None:
            loop.close()

    def _execute(self, requests: Sequence[Request]) -> list[Any]:
        try:
            responses = self._model.execute([self._ask(request) for request in requests])
            if inspect.iscoroutine(responses):
                self._loop = self._loop or asyncio.new_event_loop()
                responses = self._loop.run_until_complete(responses)
        except MemoryError:
            raise
        except (Exception, asyncio.CancelledError, SystemExit) as error:  # no reason to end the worker
            traceback.print_exc()
            raise self._failure(f"{type(error).__name__}: {error}") from error
        if not isinstance(responses, list):
            raise self._failure(f"Expected a list in the execute return, found type '{type(responses)}'.")
        if len(responses) != len(requests):
            raise self._failure(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(requests)}, "
                f"and InferenceResponse(s) size is:{len(responses)}"
            )
        return responses

    def _ask(self, request: Request) -> pb_utils.InferenceRequest:
        said = request.parameters
        sequence, timeout = said.get("sequence_id", 0), said.get("timeout", 0)
        flags = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START * bool(said.get("sequence_start"))
        flags |= pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END * bool(said.get("sequence_end"))
        return pb_utils.InferenceRequest(
            inputs=[pb_utils.Tensor(name, array) for name, array in request.items()],
            requested_output_names=request.outputs or self._names,
            model_name=self._name,
            request_id=request.id,
            correlation_id=sequence if isinstance(sequence, int | str) else 0,
            flags=flags,
            timeout=timeout if isinstance(timeout, int) else 0,
            parameters={key: value for key, value in said.items() if key not in _RESERVED},
        )

    def _answer(self, response: Any, request: Request) -> Answer | ServingError:
        if not isinstance(response, pb_utils.InferenceResponse):
            return self._failure(
                "Expected an 'InferenceResponse' object in the execute function return list, "
                f"found type '{type(response)}'."
            )
        error = response.error()
        if error is not None:
            return _fault(error)
        found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        # As in Triton a model may leave an output out; one that it misnames is a mistake.
        wanted = request.outputs or self._names
        missing = [name for name in wanted if name not in found]
        if missing and not found.keys() <= set(self._names):
            return _no_output(missing[0], found)
        picked = wanted_outputs.pick(found, wanted)
        return Answer(picked, parameters=pb_utils.parameters_of(response))

    def _failure(self, message: str) -> HandlerError:
        return HandlerError(
            f"Failed to process the request(s) for model '{self._instance}', message: {message}"
        )


def _import(source: Path, *, in_repository: bool) -> ModuleType:
    """Import the file, which may import other modules of its folder, and of the model's in a repository."""
    folder, model_folder = str(source.parent), str(source.parent.parent)
    if folder not in sys.path:
        sys.path.insert(len(sys.path) if in_repository else 0, folder)
    if in_repository and model_folder not in sys.path:
        sys.path.append(model_folder)
    if in_repository:  # as Triton calls it
        name = f"{sources.package(folder)}.{source.stem}"
    else:
        name = source.stem if source.stem not in sys.modules else f"python_backend_{source.stem}"
    try:
        return sources.import_file(name, str(source))
    except MemoryError:
        raise
    except Exception as error:
        raise InvalidArchive(f"{_place(error, source)}: {_said(error)}") from error


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


def _no_output(name: str, found: Mapping[str, Array]) -> HandlerError:
    gave = ", ".join(map(repr, found)) or "none"
    return HandlerError(f"the model's execute gave no output {name!r}; it gave: {gave}")


def _fault(error: pb_utils.TritonError) -> ServingError:
    if error.code() == pb_utils.TritonError.INVALID_ARG:
        return BadTensor(error.message())
    return HandlerError(error.message(), **_STATUSES.get(error.code(), {}))
