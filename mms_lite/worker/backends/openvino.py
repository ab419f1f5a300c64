"""Models that OpenVINO reads: hides their formats, the names of its ports, its devices and fault messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import openvino as ov

from mms_lite.errors import BadTensor, InvalidArchive
from mms_lite.tensors import Array, texts
from mms_lite.types import BYTES, TensorSpec
from mms_lite.worker.backends import BackendSettings, declared, on_cpu
from mms_lite.worker.backends.faults import raise_if_no_memory, reason

_DATATYPES = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
    "string": BYTES,
}
# Workers share the cores: pinned, the threads of each would sit on the same first ones. Left to itself
# OpenVINO computes in bfloat16 where the CPU has it, which moves probabilities by hundredths.
_ON_CPU = {
    "PERFORMANCE_HINT": "LATENCY",
    "ENABLE_CPU_PINNING": False,
    "INFERENCE_PRECISION_HINT": "f32",
    # What it keeps of layers for each shape that came. With its own 5,000 PP-OCR's recogniser grows from 156
    # to 1,051 MiB over 1,500 lines of random widths, with 1,000 to 409; 20 widths that recur stay as fast.
    "CPU_RUNTIME_CACHE_CAPACITY": 1_000,
}
_ON_GPU = {"PERFORMANCE_HINT": "LATENCY"}
_NOISE = re.compile(
    r"^(?:Caught exception: )?Exception from .*|^.* failed at \S+:\d+:$|^FrontEnd API failed .*", re.M
)
_SHAPES = re.compile(r"shape|dimension|rank|incompatible", re.I)


class OpenVinoBackend:
    """A model compiled by OpenVINO: IR, ONNX, TensorFlow (frozen graph, SavedModel, Lite) or Paddle.

    The options that an archive may give are OpenVINO's properties, such as {"INFERENCE_PRECISION_HINT":
    "bf16"}: faster where the CPU has it, and less exact than our default of f32. Inputs that the archive
    declares get the declared shape before the model is compiled, so that a batch that is fixed in the file
    can be freed.
    """

    def __init__(
        self,
        start: Callable[[], ov.InferRequest],
        request: ov.InferRequest,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.metadata = metadata
        self._start = start
        self._request = request
        self._ports = {spec.name: index for index, spec in enumerate(inputs)}
        self._results = {spec.name: (index, spec) for index, spec in enumerate(outputs)}

    @classmethod
    def open(cls, settings: BackendSettings) -> OpenVinoBackend:
        """Read and compile a model.

        Raises:
            InvalidArchive: it is damaged or of another kind, cannot have a declared shape, or an option is
                not a property of OpenVINO.
            OutOfMemory: of the host or the device.
        """
        core, path = ov.Core(), settings.files[0]
        try:
            model = core.read_model(path)
        except Exception as error:
            _refuse(f"{path.name} cannot be read by OpenVINO", error, path)
        if not model.outputs:
            raise InvalidArchive(f"{path.name} cannot be read by OpenVINO: it holds no model")
        _reshape(model, settings)
        inputs = _specs(model.inputs, path)
        outputs = _declared(_specs(model.outputs, path), settings.outputs, "output")
        for spec in inputs:
            if spec.shape is None:
                raise InvalidArchive(
                    f"the model leaves open how many axes its input {spec.name!r} has: declare its shape in "
                    "the handler config's backend.inputs"
                )
        device, properties = _device(core, settings)

        def start() -> ov.InferRequest:
            try:
                return core.compile_model(model, device, properties).create_infer_request()
            except Exception as error:
                _refuse(f"{path.name} cannot be compiled by OpenVINO", error, path)

        return cls(start, start(), inputs, outputs, _metadata(model))

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the model once, on the inputs' own memory; the arrays that it returns are the caller's.

        Raises:
            BadTensor: the shapes of the inputs do not suit the model.
            OutOfMemory: of the host or the device.
        """
        feed = {
            self._ports[name]: texts(name, array).astype(np.str_) if array.dtype == np.object_ else array
            for name, array in inputs.items()
        }
        try:
            # With one thread, `infer` keeps quiet about shapes that do not suit each other and leaves the
            # last answer in place of this one (2026.4.1).
            self._request.start_async(feed, share_inputs=True)
            self._request.wait()
        except RuntimeError as error:
            self._request = self._start()  # the old one may go on failing, or answer with what it has left
            raise_if_no_memory(error, "OpenVINO")
            told = reason(error, _NOISE)
            if _SHAPES.search(told):
                raise BadTensor(f"the model refuses the inputs: {told}") from error
            raise
        return {name: self._result(*self._results[name]) for name in outputs}

    def close(self) -> None:
        """Let go of the model and its threads."""
        del self._request, self._start

    def _result(self, index: int, spec: TensorSpec) -> Array:
        tensor = self._request.get_output_tensor(index)
        return tensor.str_data if spec.datatype == BYTES else np.array(tensor.data)


def _reshape(model: ov.Model, settings: BackendSettings) -> None:
    """Give the model's inputs the shapes that the archive declares of them."""
    path = settings.files[0]
    if not settings.inputs:
        return
    found = _specs(model.inputs, path)
    wanted = _declared(found, settings.inputs, "input")
    try:
        model.reshape({i: list(spec.shape) for i, spec in enumerate(wanted) if spec.shape is not None})
    except Exception as error:
        _refuse("the model cannot have the declared input shapes", error, path)


def _declared(found: Sequence[TensorSpec], stated: Sequence[TensorSpec], side: str) -> tuple[TensorSpec, ...]:
    """Return the specs with the archive's in their place, which may differ from the model's in lengths."""
    wanted = declared(found, stated, side)
    for own, spec in zip(found, wanted, strict=True):
        same_rank = own.shape is None or spec.shape is None or len(own.shape) == len(spec.shape)
        if spec.datatype != own.datatype or not same_rank:
            raise InvalidArchive(f"the handler config declares the {side} {spec}; the model says {own}")
    return wanted


def _device(core: ov.Core, settings: BackendSettings) -> tuple[str, dict[str, Any]]:
    """Return the device to compile for, and its properties."""
    for key, value in settings.options.items():
        if not isinstance(value, str | int | float):
            raise InvalidArchive(
                f"the option {key!r} of the backend openvino is not text, a number, true or false"
            )
    if settings.device is not None:
        names = [f"GPU.{settings.device}", *(["GPU"] if settings.device == 0 else [])]
        for name in names:
            if name in core.available_devices:
                return name, {**_ON_GPU, **settings.options}
        on_cpu(settings, "OpenVINO finds no such device; it uses Intel's")
    return "CPU", {**_ON_CPU, "INFERENCE_NUM_THREADS": settings.threads, **settings.options}


def _specs(ports: Sequence[Any], path: Path) -> tuple[TensorSpec, ...]:
    return tuple(_spec(port, name) for port, name in zip(ports, _names(ports, path), strict=True))


def _spec(port: Any, name: str) -> TensorSpec:
    kind, shape = port.get_element_type().get_type_name(), port.get_partial_shape()
    if kind not in _DATATYPES:
        raise InvalidArchive(f"the model's {name!r} is of type {kind}, which cannot be served")
    if shape.rank.is_dynamic:
        return TensorSpec(name, _DATATYPES[kind], None)
    lengths = tuple(-1 if length.is_dynamic else length.get_length() for length in shape)
    return TensorSpec(name, _DATATYPES[kind], lengths)


def _names(ports: Sequence[Any], path: Path) -> list[str]:
    """Return a name for each port: without TensorFlow's `:0`, where ports still differ without it."""
    full = [_name(port) for port in ports]
    short = [name.removesuffix(":0") for name in full]
    return short if path.suffix != ".onnx" and len(set(short)) == len(short) else full


def _name(port: Any) -> str:
    """Return the node's own name if that is one of the port's, else the port's shortest, else the node's."""
    own, names = str(port.get_node().get_friendly_name()), port.get_names()
    if own not in names and names:
        own = min(names, key=lambda name: (len(name), name))
    return own.removesuffix("/sink_port_0")  # which OpenVINO adds to results


def _metadata(model: ov.Model) -> dict[str, str]:
    """Return what the file says of itself: the metadata of ONNX models, which IR keeps."""
    found = model.get_rt_info(["framework"]).value if model.has_rt_info(["framework"]) else {}
    own = {key: value for key, value in found.items() if isinstance(value, str)}
    return {"graph": model.get_friendly_name(), **own}


def _refuse(what: str, error: Exception, path: Path) -> NoReturn:
    """Raise for an archive that is at fault; `what` begins the message."""
    raise_if_no_memory(error, "OpenVINO")
    told = reason(error, _NOISE, folder=path.parent)
    if "Unable to read the model" in told:
        told = "it is not a model of this kind, or is damaged"
    raise InvalidArchive(f"{what}: {told}") from error
