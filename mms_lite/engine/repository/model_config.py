"""What config.pbtxt says of a model: read, checked and completed as Triton does (model_config.proto).

Apart from `triton`, which knows folders. protobuf is imported when the first configuration is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from mms_lite.engine.repository import advice
from mms_lite.errors import BackendMissing, LoadError

Values = dict[
    str, Any
]  # a ModelConfig as JSON: its own field names, enums by name, 64-bit integers as numbers

_FILE = "config.pbtxt"
_DATATYPES = {"STRING": "BYTES"}  # the others are called as in KServe v2


@dataclass(frozen=True, slots=True)
class _Backend:
    """A backend by its name in Triton: its name here, its usual file, and its platform, if it has one."""

    name: str
    file: str
    platform: str = ""


BACKENDS = {
    "onnxruntime": _Backend("onnxruntime", "model.onnx", "onnxruntime_onnx"),
    "openvino": _Backend("openvino", "model.xml"),
    "pytorch": _Backend("torch", "model.pt", "pytorch_libtorch"),
    "python": _Backend("python", "model.py"),
    "opencv": _Backend("opencv", "model.onnx"),
}
MODEL_FILES = tuple(dict.fromkeys(known.file for known in BACKENDS.values()))
_PLATFORMS = {
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "torch_aoti": "pytorch",
    "tensorrt_plan": "tensorrt",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
    "ensemble": "",
}
_THREADS = "intra_op_thread_count"  # the ONNX Runtime backend's parameter
_ENVIRONMENT = "EXECUTION_ENV_PATH"  # the Python backend's parameter
# Parameters of Triton's OpenVINO backend itself, older releases included; others are OpenVINO's properties.
_OPENVINO_BACKENDS = frozenset(
    (
        "TARGET_DEVICE", "SKIP_OV_DYNAMIC_BATCHSIZE", "ENABLE_BATCH_PADDING", "RESHAPE_IO_LAYOUTS",
        "COMPILATION_NUM_THREADS", "CPU_EXTENSION_PATH", "CPU_THREADS_NUM", "CPU_BIND_THREAD",
        "CPU_THROUGHPUT_STREAMS", "HINT_BF16", "ENFORCE_BF16",
    )
)  # fmt: skip
_FILES = {"torch_aoti": "model.pt2"}  # where a platform's file is not its backend's
# What counts here; with a field all that is in it. The others are warned of.
_HONOURED = (
    "name", "platform", "backend", "version_policy", "max_batch_size", "default_model_filename", "parameters",
    "model_transaction_policy",
    "instance_group.name", "instance_group.count", "instance_group.kind", "instance_group.gpus",
    "input.name", "input.data_type", "input.format", "input.dims", "input.reshape", "input.optional",
    "output.name", "output.data_type", "output.dims", "output.reshape", "output.label_filename",
    "dynamic_batching.preferred_batch_size", "dynamic_batching.max_queue_delay_microseconds",
    "dynamic_batching.default_queue_policy.max_queue_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A configuration as it was written. `ignored` names the fields that are set and have no effect here."""

    values: Values
    ignored: tuple[str, ...] = ()


def parse_text(name: str, text: bytes) -> ModelConfig:
    """Read a config.pbtxt.

    Raises:
        LoadError: it is none; tells line and column.
        BackendMissing: protobuf is not installed.
    """
    message, text_format, json_format = _protobuf()
    try:
        text_format.Parse(text.decode("utf-8-sig"), message)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise LoadError(f"model '{name}': failed to read text proto from {_FILE}: {error}") from error
    return _read(message, json_format)


def parse_json(name: str, text: str) -> ModelConfig:
    """Read a configuration in JSON, in which numbers may be strings (protobuf, JSON mapping).

    Raises:
        LoadError: it is none.
        BackendMissing: protobuf is not installed.
    """
    message, _, json_format = _protobuf()
    if not text.lstrip().startswith("{"):  # protobuf takes an empty list for an empty message
        raise LoadError(f"model '{name}': failed to read the model configuration: it is not an object")
    try:
        json_format.Parse(text, message)
    except (json_format.ParseError, RecursionError) as error:
        told = _as_in_the_file(str(error))
        raise LoadError(f"model '{name}': failed to read the model configuration: {told}") from error
    return _read(message, json_format)


def unstated() -> ModelConfig:
    """Return the configuration of a model that has none.

    Raises:
        BackendMissing: protobuf is not installed.
    """
    message, _, json_format = _protobuf()
    return _read(message, json_format)


def complete(values: Values, name: str, files: Mapping[int, Collection[str]], *, gpus: int) -> None:
    """Check a configuration and fill in what it leaves out; `files` are what each version's folder holds.

    Raises:
        LoadError: it cannot be used.
    """
    if values["name"] not in ("", name):
        raise LoadError(
            f"unexpected directory name '{name}' for model '{values['name']}', directory name must equal "
            "model name"
        )
    values["name"] = name
    _refuse_unsupported(values, name)
    _complete_backend(values, name, files)
    _check_batching(values, name)
    for side in ("input", "output"):
        for tensor in values[side]:
            _check_tensor(tensor, side, name)
            if "reshape" in tensor:
                _check_reshape(tensor, f"model {side} '{tensor['name']}'", values)
    values["version_policy"] = _policy(values)
    values.setdefault("model_transaction_policy", {"decoupled": False})
    _complete_instances(values, name, gpus)


def with_completed(values: Mapping[str, Any], said: Mapping[str, Any]) -> Values:
    """Return a complete configuration with the fields that the model itself says when it is loaded.

    Raises:
        LoadError: what it says is no configuration.
    """
    name = str(values["name"])
    found = parse_json(name, json.dumps({**values, **said})).values
    _check_batching(found, name)
    return found


def batch_size(values: Mapping[str, Any]) -> int:
    """Return up to how many rows the server joins requests."""
    batching = values.get("dynamic_batching") or {}
    return max(batching.get("preferred_batch_size", ()), default=1)


def batch_delay_ms(values: Mapping[str, Any]) -> float:
    """Return how long a batch waits to be full; whole milliseconds are an int, as MMS has them."""
    batching = values.get("dynamic_batching") or {}
    delay_us: int = batching.get("max_queue_delay_microseconds", 0)
    return delay_us / 1000 if delay_us % 1000 else delay_us // 1000


def versions(values: Values, present: Collection[int]) -> tuple[list[int], list[int]]:
    """Return, in ascending order, the versions that the policy serves, and those that it names in vain."""
    (kind, policy), *_ = _policy(values).items()
    if kind == "all":
        return sorted(present), []
    if kind == "specific":
        wanted = set(policy["versions"])
        return sorted(wanted & set(present)), sorted(wanted - set(present))
    count = policy["num_versions"]
    return sorted(present)[-count:] if count else [], []


def tensors(values: Values, side: str) -> list[Values]:
    """Return one side's tensors as a handler config states them: as the model's file has them.

    Shapes have the batch axis; where clients see another shape, it is that of `reshape`.
    """
    batch = [-1] if values["max_batch_size"] > 0 else []
    found = []
    for each in values[side]:
        shape = each["reshape"]["shape"] if "reshape" in each else each["dims"]
        kind = datatype(each["data_type"])
        found.append({"name": each["name"], "datatype": kind, "shape": [*batch, *shape]})
    return found


def parameters(values: Values) -> tuple[dict[str, Any], list[str]]:
    """Return what the parameters mean to the backend, and those that mean nothing.

    Python code gets its own with its configuration.
    """
    stated = {key: each["string_value"] for key, each in values["parameters"].items()}
    settings: dict[str, Any] = {}
    used: Iterable[str] = ()
    if values["backend"] == "python":
        used = stated.keys() - {_ENVIRONMENT}
    elif values["backend"] == "openvino":
        used = {key for key in stated if key.isupper()} - _OPENVINO_BACKENDS
        settings = {"options": {key: value for key, value in stated.items() if key in used}}
    elif values["backend"] == "onnxruntime" and stated.get(_THREADS, "").isdecimal():
        used = (_THREADS,)
        threads = int(stated[_THREADS])
        settings = {"threads": threads} if threads else {}
    return settings, sorted(key for key in stated if key not in used)


def datatype(data_type: str) -> str:
    """Return what KServe v2 calls a TYPE_..."""
    kind = data_type.removeprefix("TYPE_")
    return _DATATYPES.get(kind, kind)


def _protobuf() -> tuple[Any, Any, Any]:
    """Return an empty ModelConfig, and what reads and writes one as text and as JSON."""
    try:
        from google.protobuf import json_format, text_format

        from mms_lite.protos import message

        return message("inference.ModelConfig")(), text_format, json_format
    except ModuleNotFoundError as error:
        raise BackendMissing(
            f"a Triton model repository needs {error.name}, which is not installed: "
            "pip install 'mms-lite[grpc]'"
        ) from error


def _as_in_the_file(told: str) -> str:
    """Spell the fields that protobuf names as config.pbtxt does; in JSON both spellings are read."""
    what, mark, fields = told.partition("Available Fields")
    return what + mark + re.sub("(?<=[a-z])[A-Z]", lambda letter: f"_{letter[0].lower()}", fields)


def _read(message: Any, json_format: Any) -> ModelConfig:
    values = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _restore_numbers(values, message.DESCRIPTOR)
    return ModelConfig(values, tuple(dict.fromkeys(_ignored(message))))


def _restore_numbers(values: Values, descriptor: Any) -> None:
    """Turn the strings that 64-bit integers are in protobuf's JSON back into numbers, as Triton has them."""
    for field in descriptor.fields:
        if field.name in values:
            values[field.name] = _restored(values[field.name], field)


def _restored(value: Any, field: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name["value"]
        return {key: _restored(each, entry) for key, each in value.items()}
    if isinstance(value, list):
        return [_restored(each, field) for each in value]
    if field.message_type is not None:
        _restore_numbers(value, field.message_type)
        return value
    return int(value) if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else value


def _ignored(message: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields that are set and not honoured."""
    for field, value in message.ListFields():
        path = prefix + field.name
        if path in _HONOURED:
            continue
        if not any(known.startswith(f"{path}.") for known in _HONOURED):
            yield path
            continue
        for each in [value] if hasattr(value, "ListFields") else value:
            yield from _ignored(each, f"{path}.")


def _refuse_unsupported(values: Values, name: str) -> None:
    if values["platform"] == "ensemble" or "ensemble_scheduling" in values:
        unsupported = "ensemble_scheduling"
    elif "sequence_batching" in values:
        unsupported = "sequence_batching"
    elif values.get("model_transaction_policy", {}).get("decoupled"):
        unsupported = "the decoupled model_transaction_policy"
    else:
        return
    raise LoadError(f"model '{name}': {unsupported} is not supported yet")


def _complete_backend(values: Values, name: str, files: Mapping[int, Collection[str]]) -> None:
    platform = values["platform"]
    if platform and platform not in _PLATFORMS:
        known = ", ".join(each for each, backend in _PLATFORMS.items() if backend in BACKENDS)
        raise LoadError(f"unexpected platform type '{platform}' for {name}; there are: {known}")
    backend = values["backend"] or _PLATFORMS.get(platform, "") or _guessed_backend(values, name, files)
    if backend not in BACKENDS:
        raise LoadError(
            f"model '{name}': there is no backend '{backend}' here; there are: {', '.join(BACKENDS)}"
        )
    own = BACKENDS[backend]
    values["backend"] = backend
    values["platform"] = platform or own.platform
    values["default_model_filename"] = (
        values["default_model_filename"] or _FILES.get(platform, "") or own.file
    )


def _guessed_backend(values: Values, name: str, files: Mapping[int, Collection[str]]) -> str:
    """Return the backend that the model's file tells, or the end of its name.

    Raises:
        LoadError: neither does.
    """
    stated = values["default_model_filename"]
    for backend, known in BACKENDS.items():
        if stated == known.file or (not stated and any(known.file in each for each in files.values())):
            return backend
    suffix = name.rpartition(".")[2] if "." in name else ""
    if suffix in BACKENDS:
        return suffix
    why = f"default_model_filename '{stated}' does not tell" if stated else _no_model_file(files)
    raise LoadError(f"must specify 'platform' or 'backend' for '{name}': {why}")


def _no_model_file(files: Mapping[int, Collection[str]]) -> str:
    version = max(files)
    fields = "'backend' and 'default_model_filename'"
    other = advice.other_file(str(version), files[version], MODEL_FILES, fields=fields)
    return other or f"{version}/ has none of {', '.join(MODEL_FILES)}"


def _check_batching(values: Values, name: str) -> None:
    most = values["max_batch_size"]
    if most < 0:
        raise LoadError(f"'max_batch_size' must be non-negative value for {name}")
    batching = values.get("dynamic_batching")
    if batching is None:
        return
    for size in batching["preferred_batch_size"]:
        if size <= 0:
            raise LoadError(f"dynamic batching preferred size must be positive for {name}")
        if size > most:
            raise LoadError(f"dynamic batching preferred size must be <= max batch size for {name}")
    levels, default = batching["priority_levels"], batching["default_priority_level"]
    if levels and not 1 <= default <= levels:
        raise LoadError(f"default priority level must be in range [1, {levels}] for {name}")
    if most and not batching["preferred_batch_size"]:
        batching["preferred_batch_size"] = [most]


def _check_tensor(tensor: Values, side: str, name: str) -> None:
    if not tensor["name"]:
        raise LoadError(f"model {side} must specify 'name' for {name}")
    named, dims = f"model {side} '{tensor['name']}'", tensor["dims"]
    if tensor["data_type"] == "TYPE_INVALID":
        raise LoadError(f"{named} must specify 'data_type' for {name}")
    if not dims:
        raise LoadError(f"{named} must specify 'dims' for {name}")
    _check_lengths(dims, f"{named} dimension", name)
    if tensor.get("format", "FORMAT_NONE") != "FORMAT_NONE" and len(dims) != 3:
        raise LoadError(f"model {side} NHWC/NCHW require 3 dims for {name}")


def _check_reshape(tensor: Values, named: str, values: Values) -> None:
    """Check that both shapes hold as many elements, whatever the lengths that they leave open."""
    name, shape = values["name"], tensor["reshape"]["shape"]
    if not shape and not values["max_batch_size"]:
        raise LoadError(
            f"{named} cannot have empty reshape for non-batching model as scalar tensors are not supported "
            f"for {name}"
        )
    _check_lengths(shape, f"{named} reshape dimensions", name)
    ours, theirs = _counts(tensor["dims"]), _counts(shape)
    if len(ours) > 1 and len(theirs) > 1 and len(ours) != len(theirs):
        raise LoadError(
            f"{named} has different number of variable-size dimensions for dims and reshape for {name}"
        )
    if ours != theirs:
        raise LoadError(f"{named} has different size for dims and reshape for {name}")


def _check_lengths(lengths: Sequence[int], what: str, name: str) -> None:
    if any(length < 1 and length != -1 for length in lengths):
        raise LoadError(
            f"{what} must be integer >= 1, or -1 to indicate a variable-size dimension for {name}"
        )


def _counts(lengths: Sequence[int]) -> list[int]:
    """Return how many elements there are before, between and behind the lengths that are open."""
    ends = [-1, *(axis for axis, length in enumerate(lengths) if length == -1), len(lengths)]
    return [prod(lengths[start + 1 : end]) for start, end in pairwise(ends)]


def _policy(values: Values) -> Mapping[str, Any]:
    policy: Mapping[str, Any] = values.get("version_policy") or {"latest": {"num_versions": 1}}
    return policy


def _complete_instances(values: Values, name: str, gpus: int) -> None:
    if not values["instance_group"]:
        values["instance_group"] = [{"name": "", "kind": "KIND_AUTO", "count": 1, "gpus": []}]
    for index, group in enumerate(values["instance_group"]):
        group["name"] = group["name"] or f"{name}_{index}"
        group["count"] = group["count"] or 1
        if group["count"] < 0:
            raise LoadError(f"instance group '{group['name']}' of {name}: 'count' must be positive")
        if group["kind"] == "KIND_AUTO":
            group["kind"] = "KIND_GPU" if gpus else "KIND_CPU"
