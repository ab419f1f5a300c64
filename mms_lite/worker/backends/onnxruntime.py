"""ONNX models with ONNX Runtime: hides its type names, its sessions and providers, and its fault messages."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from mms_lite.errors import BadTensor, InvalidArchive
from mms_lite.tensors import Array, texts
from mms_lite.types import BYTES, TensorSpec
from mms_lite.worker.backends import BackendSettings, declared, on_cpu
from mms_lite.worker.backends.faults import raise_if_no_memory, reason

_log = logging.getLogger("mms_lite.backend")

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_WARNINGS = 2  # severity: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal
_OPTIONS = ("session", "cuda")
_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": BYTES,
}
_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : "
    r"|Load model from .*? failed:"
    r"|/onnxruntime_src/\S+:\d+ .*?\) (?:const )?(?=[A-Z])"  # source file, line, signature
    r"|\b\w+\.(?:cc|h):\d+ \w+ "
)

# Raised for inputs that its nodes cannot work on: lengths that do not suit each other, an index out of range.
_REFUSALS = (runtime.InvalidArgument, runtime.Fail, runtime.RuntimeException)


class OnnxRuntimeBackend:
    """An ONNX Runtime session of one .onnx file, its external data beside it.

    The options that an archive may give: `session`, an object of session config entries, such as
    {"session.intra_op.allow_spinning": "1"}, and `cuda`, an object of options of the CUDA provider, such as
    {"gpu_mem_limit": 2147483648}, which counts on a GPU only. Both are ONNX Runtime's own names; their
    values are text, numbers, or true and false.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.metadata = metadata
        self._session = session
        self._texts = [spec.name for spec in inputs if spec.datatype == BYTES]

    @classmethod
    def open(cls, settings: BackendSettings) -> OnnxRuntimeBackend:
        """Open a model's file.

        Raises:
            InvalidArchive: it is damaged, of another kind or too new, or an option is not one.
            OutOfMemory: of the host or the device.
        """
        options = _checked(settings.options)
        if settings.device is not None and _CUDA not in ort.get_available_providers():
            settings = on_cpu(
                settings, "this ONNX Runtime has no CUDA provider (pip install onnxruntime-gpu)"
            )
        session = _session(settings, options)
        inputs = [_spec(arg, None) for arg in session.get_inputs()]
        # A scalar and an unknown rank look the same here; as a scalar an output is never split into rows.
        outputs = [_spec(arg, ()) for arg in session.get_outputs() if _is_tensor(arg)]
        return cls(
            session,
            _declared(inputs, settings.inputs, "input"),
            _declared(outputs, settings.outputs, "output"),
            _metadata(session.get_modelmeta()),
        )

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the model once; the arrays that it returns are the caller's.

        Raises:
            BadTensor: the model refuses the inputs, or text is not UTF-8.
            OutOfMemory: of the host or the device.
        """
        feed = {**inputs, **{name: texts(name, inputs[name]) for name in self._texts}}
        try:
            found = self._session.run(list(outputs), feed)
        except _REFUSALS as error:
            raise_if_no_memory(error, "ONNX Runtime")
            raise BadTensor(f"the model refuses the inputs: {reason(error, _NOISE)}") from error
        except Exception as error:
            raise_if_no_memory(error, "ONNX Runtime")
            raise
        return dict(zip(outputs, found, strict=True))

    def close(self) -> None:
        """Let go of the session and its threads."""
        del self._session


def _checked(options: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    for key, entries in options.items():
        if key not in _OPTIONS:
            raise InvalidArchive(
                f"the backend onnxruntime has no option {key!r}; there are: {', '.join(_OPTIONS)}"
            )
        if not isinstance(entries, Mapping) or not all(
            isinstance(v, str | int | float) for v in entries.values()
        ):
            raise InvalidArchive(
                f"the option {key!r} of the backend onnxruntime is not an object of plain values"
            )
    return {key: {k: _text(v) for k, v in options.get(key, {}).items()} for key in _OPTIONS}


def _text(value: str | float) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _session(settings: BackendSettings, options: Mapping[str, Mapping[str, str]]) -> ort.InferenceSession:
    path = settings.files[0]
    config = ort.SessionOptions()
    config.intra_op_num_threads = settings.threads
    config.inter_op_num_threads = 1
    config.log_severity_level = _WARNINGS
    # Threads that spin for work after each run take the cores of the other workers.
    for key, value in {"session.intra_op.allow_spinning": "0", **options["session"]}.items():
        config.add_session_config_entry(key, value)
    providers: list[tuple[str, dict[str, str]]] = [(_CPU, {})]
    if settings.device is not None:
        if hasattr(ort, "preload_dlls"):  # finds CUDA's libraries that pip has installed; since 1.21
            ort.preload_dlls()
        providers.insert(0, (_CUDA, {**options["cuda"], "device_id": str(settings.device)}))
    try:
        # Its own fallback would run without the GPU's options and print to the standard output.
        session = ort.InferenceSession(str(path), config, providers=providers, enable_fallback=0)
    except Exception as error:
        raise_if_no_memory(error, "ONNX Runtime")
        told = reason(error, _NOISE, folder=path.parent)
        if isinstance(error, runtime.InvalidProtobuf):
            told = "it is not an ONNX model, or is damaged"
        raise InvalidArchive(
            f"{path.name} cannot be loaded by ONNX Runtime {ort.__version__}: {told}"
        ) from error
    if settings.device is not None and _CUDA not in session.get_providers():
        on_cpu(settings, "ONNX Runtime cannot load its CUDA provider: see the lines above")
    return session


def _metadata(meta: ort.ModelMetadata) -> dict[str, str]:
    """Return what the file says of itself; its own entries come before the fields that all files have."""
    fields = {"producer": meta.producer_name, "graph": meta.graph_name, "description": meta.description}
    return {**{key: value for key, value in fields.items() if value}, **meta.custom_metadata_map}


def _spec(arg: ort.NodeArg, without_lengths: tuple[int, ...] | None) -> TensorSpec:
    if arg.type not in _DATATYPES:
        raise InvalidArchive(f"the model's {arg.name!r} is a {arg.type}, which cannot be served")
    shape = tuple(length if isinstance(length, int) else -1 for length in arg.shape)
    return TensorSpec(arg.name, _DATATYPES[arg.type], shape or without_lengths)


def _declared(found: Sequence[TensorSpec], stated: Sequence[TensorSpec], side: str) -> tuple[TensorSpec, ...]:
    """Return the specs with the archive's in their place, which cannot change what the session takes."""
    wanted = declared(found, stated, side)
    for own, spec in zip(found, wanted, strict=True):
        lengths = list(zip(own.shape or (), spec.shape or (), strict=False))
        same_rank = not own.shape or spec.shape is None or len(own.shape) == len(spec.shape)
        # The session refuses inputs of other lengths than the file's; those of outputs it only tells.
        fixed = side == "input" and any(length not in (-1, new) for length, new in lengths)
        if spec.datatype != own.datatype or not same_rank or fixed:
            raise InvalidArchive(f"the handler config declares the {side} {spec}; the file says {own}")
    return wanted


def _is_tensor(arg: ort.NodeArg) -> bool:
    """Tell a tensor from a sequence or map (as scikit-learn's ZipMap makes), which cannot be sent."""
    if not arg.type.startswith("tensor("):
        _log.warning("The model's output %s is a %s and is left out", arg.name, arg.type)
        return False
    return True
