"""triton_python_backend_utils: what models of the Triton Python backend import as pb_utils.

Tensors, requests, responses, errors and metrics; calling other models and decoupled answers are not here yet,
and a model that uses them is told so. Source: github.com/triton-inference-server/python_backend, README.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mms_lite.tensors import DTYPES
from mms_lite.worker.compat.triton_metrics import MetricFamily
from mms_lite.worker.parameters import fault

__all__ = ["MetricFamily"]

TRITON_STRING_TO_NUMPY: dict[str, Any] = {
    "TYPE_BOOL": bool,
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT16": np.uint16,
    "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT8": np.int8,
    "TYPE_INT16": np.int16,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}
_TYPES = list(TRITON_STRING_TO_NUMPY.values())  # Triton numbers them from 1
_STRING = len(_TYPES)
if "BF16" in DTYPES:  # not in the table, as in Triton: numpy has no such type of its own
    _TYPES.append(DTYPES["BF16"].type)
_LENGTH = struct.Struct("<I")

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_RELEASE_ALL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2

_model_dirs: list[str] = []  # the one of this worker's model


class TritonModelException(Exception):
    """What a model may raise, and what is raised where it uses what this server lacks."""

    def message(self) -> str:
        """Return the text."""
        return str(self)


def _later(what: str) -> NoReturn:
    raise TritonModelException(f"{what} is not supported by mms-lite yet")


class TritonError:
    """Why one request got no answer."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG = range(4)
    UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(4, 8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        # An error here would fail the whole batch, for the sake of one answer that fails anyhow.
        if not isinstance(message, str):
            message, code = f"a TritonError's message is no text: {message}", TritonError.INTERNAL
        if not isinstance(code, int) or code not in range(8):
            message += f" (its code is no code of TritonError: {code})"
            code = TritonError.INTERNAL
        self._message = message.encode("utf-8", "replace").decode("utf-8")
        self._code = code

    def message(self) -> str:
        """Return the text."""
        return self._message

    def code(self) -> int:
        """Return one of the class's codes."""
        return self._code

    def __str__(self) -> str:
        return self._message


class Tensor:
    """A named array in the memory of the host."""

    def __init__(self, name: str, numpy_array: NDArray[Any]) -> None:
        if not name:
            raise TritonModelException("a tensor needs a name")
        self._name = name
        self._array = np.asarray(numpy_array, order="C")

    def name(self) -> str:
        """Return the tensor's name."""
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        """Return the array; the elements of TYPE_STRING inputs are `bytes`."""
        return self._array

    def shape(self) -> list[int]:
        """Return the array's shape."""
        return list(self._array.shape)

    def triton_dtype(self) -> int | None:
        """Return Triton's number for the array's type."""
        return numpy_to_triton_type(self._array.dtype)

    def is_cpu(self) -> bool:
        """Return True: tensors are always in the host's memory."""
        return True

    def to_dlpack(self) -> Any:
        """Return a DLPack capsule that shares the array's memory."""
        return self.__dlpack__()

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return _Capsule.DEVICE

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        """Return the tensor of a capsule, or of an object with `__dlpack__`, in the memory of the host."""
        if hasattr(tensor, "__dlpack__"):
            return Tensor(name, np.from_dlpack(tensor))
        return Tensor(name, np.from_dlpack(_Capsule(tensor)))


class _Capsule:
    """A DLPack capsule as the object that numpy takes."""

    DEVICE = (1, 0)  # kDLCPU

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.DEVICE


class InferenceRequest:
    """What a model is asked; a model may make one only to call another, which is not supported yet."""

    def __init__(
        self,
        *,
        inputs: Sequence[Tensor],
        requested_output_names: Iterable[str],
        model_name: str = "",
        request_id: str = "",
        correlation_id: int | str = 0,
        flags: int = 0,
        timeout: int = 0,
        parameters: Mapping[str, Any] | None = None,
        **_of_calls: Any,  # how another model would be called
    ) -> None:
        self._inputs = list(inputs)
        self._requested = set(requested_output_names)
        self._model_name = model_name
        self._request_id = request_id
        self._correlation_id = correlation_id
        self._flags = flags
        self._timeout = timeout
        self._parameters = dict(parameters or {})

    def inputs(self) -> list[Tensor]:
        """Return the input tensors."""
        return self._inputs

    def requested_output_names(self) -> set[str]:
        """Return the outputs that the client wants; a model need not compute others."""
        return self._requested

    def request_id(self) -> str:
        """Return the request's id, "" where it has none."""
        return self._request_id

    def parameters(self) -> str:
        """Return the request's parameters as JSON."""
        return json.dumps(self._parameters)

    def correlation_id(self) -> int | str:
        """Return the id of the sequence that the request belongs to, 0 for none."""
        return self._correlation_id

    def flags(self) -> int:
        """Return the request's TRITONSERVER_REQUEST_FLAG_* bits."""
        return self._flags

    def set_flags(self, flags: int) -> None:
        """Set the request's TRITONSERVER_REQUEST_FLAG_* bits."""
        self._flags = flags

    def timeout(self) -> int:
        """Return the request's time-out in microseconds, 0 for none."""
        return self._timeout

    def is_cancelled(self) -> bool:
        """Return False: requests that were cancelled are not given to models."""
        return False

    def exec(self, decoupled: bool = False) -> NoReturn:
        """Raise TritonModelException."""
        _later(f"calling the model {self._model_name!r} from a model (exec)")

    def async_exec(self, decoupled: bool = False) -> NoReturn:
        """Raise TritonModelException."""
        _later(f"calling the model {self._model_name!r} from a model (async_exec)")

    def get_response_sender(self) -> NoReturn:
        """Raise TritonModelException."""
        _later("answering through a response sender (decoupled mode)")


class InferenceResponse:
    """What a model answers: tensors, or an error. With parameters that cannot be sent it is an error."""

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if not all(isinstance(tensor, Tensor) for tensor in output_tensors):
            raise TypeError("output_tensors of an InferenceResponse are Tensor objects")
        if error is not None and not isinstance(error, TritonError):
            raise TypeError("the error of an InferenceResponse is a TritonError")
        self._tensors = list(output_tensors)
        self._error = error
        self._parameters = dict(parameters or {})
        faults = [fault(key, value) for key, value in self._parameters.items()]
        told = next(filter(None, faults), None)
        if told is not None and error is None:
            self._error = TritonError(told)

    def output_tensors(self) -> list[Tensor]:
        """Return the output tensors."""
        return self._tensors

    def has_error(self) -> bool:
        """Tell whether it is an error."""
        return self._error is not None

    def error(self) -> TritonError | None:
        """Return the error, None where there is none."""
        return self._error

    def parameters(self) -> str:
        """Return the response's parameters as JSON."""
        return json.dumps(self._parameters)


class ModelConfig:
    """The configuration that `auto_complete_config` gets, completes and returns."""

    def __init__(self, model_config: str) -> None:
        self._config: dict[str, Any] = json.loads(model_config)

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as it is now."""
        return self._config

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Say how many rows the model takes at once; 0: its dims have no axis for them.

        Raises:
            ValueError: it is no such number, or the configuration has a larger one.
        """
        if not isinstance(max_batch_size, int) or max_batch_size not in range(1 << 31):
            raise ValueError(f"max_batch_size is {max_batch_size!r}, not a number from 0 to {(1 << 31) - 1}")
        if self._config["max_batch_size"] > max_batch_size:
            raise ValueError(f"the model is configured with max_batch_size {self._config['max_batch_size']}")
        self._config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """Say that the model takes batches of several requests."""
        self._config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy: Mapping[str, Any]) -> None:
        """Take {"decoupled": False}.

        Raises:
            TritonModelException: the model wants to be decoupled.
        """
        if transaction_policy.get("decoupled"):
            _later("decoupled mode")

    def add_input(self, input: Mapping[str, Any]) -> None:
        """Add an input: {"name": "x", "data_type": "TYPE_FP32", "dims": [3]}; also "optional": True.

        Raises:
            ValueError: it has other properties, or differs from the configured input of this name.
        """
        self._add("input", input, {"name", "data_type", "dims", "optional"})

    def add_output(self, output: Mapping[str, Any]) -> None:
        """Add an output: {"name": "y", "data_type": "TYPE_FP32", "dims": [2]}.

        Raises:
            ValueError: it has other properties, or differs from the configured output of this name.
        """
        self._add("output", output, {"name", "data_type", "dims"})

    def _add(self, side: str, tensor: Mapping[str, Any], allowed: set[str]) -> None:
        unknown = set(tensor) - allowed
        missing = {"name", "data_type", "dims"} - set(tensor)
        if unknown or missing:
            what = f"lacks {', '.join(sorted(missing))}" if missing else f"has {', '.join(sorted(unknown))}"
            raise ValueError(f"the {side} {tensor.get('name', '')!r} of auto_complete_config {what}")
        for known in self._config[side]:
            if known["name"] == tensor["name"]:
                if any(known[key] != tensor[key] for key in ("data_type", "dims")):
                    raise ValueError(f"the {side} {known['name']!r} is configured in another way: {known}")
                return
        self._config[side].append(dict(tensor))


class Logger:
    """Writes to the model's log, where warnings and errors are warnings."""

    INFO, WARNING, ERROR, VERBOSE = range(4)

    @staticmethod
    def log(message: str, level: int = INFO) -> None:
        """Write a line at a level of this class; VERBOSE writes none."""
        if level != Logger.VERBOSE:
            print(message, file=sys.stderr if level in (Logger.WARNING, Logger.ERROR) else sys.stdout)

    @staticmethod
    def log_info(message: str) -> None:
        """Write a line of information."""
        Logger.log(message)

    @staticmethod
    def log_warn(message: str) -> None:
        """Write a warning."""
        Logger.log(message, Logger.WARNING)

    @staticmethod
    def log_error(message: str) -> None:
        """Write an error."""
        Logger.log(message, Logger.ERROR)

    @staticmethod
    def log_verbose(message: str) -> None:
        """Write nothing: the level is off."""
        Logger.log(message, Logger.VERBOSE)


def parameters_of(response: InferenceResponse) -> Mapping[str, Any]:
    """Return a response's parameters. For the backend: the method of this name gives JSON."""
    return response._parameters


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    """Return a request's input of this name, or None."""
    return next((tensor for tensor in inference_request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    """Return a response's output of this name, or None."""
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return what a model's configuration says of an input, or None."""
    return next((each for each in model_config.get("input", ()) if each["name"] == name), None)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return what a model's configuration says of an output, or None."""
    return next((each for each in model_config.get("output", ()) if each["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    """Tell whether a model's configuration says that it is decoupled."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def get_model_dir() -> str:
    """Return the folder of the model's file; in a repository it is that of the version."""
    return _model_dirs[-1]


def enter_model_dir(folder: str) -> None:
    """Say where the model's file is. For the backend, once: a worker has one model."""
    _model_dirs[:] = [folder]


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """Return numpy's type for a name of Triton's, such as TYPE_FP32."""
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def triton_to_numpy_type(data_type: int) -> Any:
    """Return numpy's type for a number of Triton's, None for one that it lacks."""
    return _TYPES[data_type - 1] if 1 <= data_type <= len(_TYPES) else None


def numpy_to_triton_type(data_type: Any) -> int | None:
    """Return Triton's number for a type of numpy's, None for one that it lacks."""
    dtype = np.dtype(data_type)
    if dtype.kind in "SU":
        return _STRING
    return next((number for number, each in enumerate(_TYPES, 1) if np.dtype(each) == dtype), None)


def serialize_byte_tensor(input_tensor: NDArray[Any]) -> bytes:
    """Return the elements of an array of text or bytes, each after its length in 4 bytes."""
    joined = bytearray()
    for element in input_tensor.reshape(-1):
        raw = bytes(element) if isinstance(element, bytes | bytearray) else str(element).encode("utf-8")
        joined += _LENGTH.pack(len(raw)) + raw
    return bytes(joined)


def deserialize_bytes_tensor(encoded_tensor: bytes) -> NDArray[np.object_]:
    """Return the elements that `serialize_byte_tensor` joined, as a flat array of `bytes`."""
    found, at = [], 0
    while at < len(encoded_tensor):
        (size,) = _LENGTH.unpack_from(encoded_tensor, at)
        at += _LENGTH.size + size
        found.append(encoded_tensor[at - size : at])
    array = np.empty(len(found), np.object_)
    array[:] = found
    return array


def load_model(*arguments: Any, **options: Any) -> NoReturn:
    """Raise TritonModelException."""
    _later("loading a model from a model (load_model)")


def unload_model(*arguments: Any, **options: Any) -> NoReturn:
    """Raise TritonModelException."""
    _later("unloading a model from a model (unload_model)")


def is_model_ready(*arguments: Any, **options: Any) -> NoReturn:
    """Raise TritonModelException."""
    _later("asking for the state of a model from a model (is_model_ready)")
