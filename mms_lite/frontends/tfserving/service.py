"""What REST and gRPC of the TensorFlow Serving API have in common: versions, statuses, checks and errors.

Rules are those of OpenVINO Model Server, and so are the errors' sentences: clients look for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mms_lite.engine.engine import Engine
from mms_lite.errors import (
    BadTensor,
    ModelNotFound,
    ModelNotReady,
    ServingError,
    VersionNotFound,
)
from mms_lite.frontends.call import chosen_code
from mms_lite.frontends.message import shown
from mms_lite.frontends.tensor_calls import MOST_INPUTS
from mms_lite.types import (
    BYTES,
    NO_WORKERS,
    UNLOADED,
    ModelSpec,
    ModelStatus,
    RepositoryEntry,
    RepositoryState,
    Signature,
    TensorSpec,
)

DATATYPES = {  # KServe's name -> TensorFlow's DataType and its number, and what OpenVINO's messages call it
    "FP32": ("DT_FLOAT", 1, "FP32"),
    "FP64": ("DT_DOUBLE", 2, "FP64"),
    "INT32": ("DT_INT32", 3, "I32"),
    "UINT8": ("DT_UINT8", 4, "U8"),
    "INT16": ("DT_INT16", 5, "I16"),
    "INT8": ("DT_INT8", 6, "I8"),
    BYTES: ("DT_STRING", 7, "STRING"),
    "INT64": ("DT_INT64", 9, "I64"),
    "BOOL": ("DT_BOOL", 10, "BOOL"),
    "BF16": ("DT_BFLOAT16", 14, "BF16"),
    "UINT16": ("DT_UINT16", 17, "U16"),
    "FP16": ("DT_HALF", 19, "FP16"),
    "UINT32": ("DT_UINT32", 22, "U32"),
    "UINT64": ("DT_UINT64", 23, "U64"),
}
SIGNATURE_NAME = "serving_default"  # every model has this one signature, under whatever name it is asked for
_MOST_VERSION = (1 << 63) - 1
_DOTTED = re.compile(r"([1-9][0-9]{0,17})(?:\.[0-9]+)*")
# One that failed is still loading, with an error, as OpenVINO has it.
_STATES: dict[RepositoryState | None, tuple[str, str]] = {
    RepositoryState.READY: ("AVAILABLE", "OK"),
    RepositoryState.LOADING: ("LOADING", "OK"),
    RepositoryState.UNLOADING: ("UNLOADING", "OK"),
    RepositoryState.UNAVAILABLE: ("LOADING", "UNKNOWN"),
}
_IDLE = ("LOADING", "OK")  # it waits for workers, and nothing failed


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """How a version is doing: a state and an error code of TensorFlow Serving, as words."""

    version: int
    state: str
    error_code: str


def numbers(versions: Collection[str]) -> dict[str, int]:
    """Return the number by which each version is known here, where versions are int64.

    That is the version itself if it is decimal. Any other dotted one, such as the "1.0" of many archives, has
    its leading number if no other version of the model would have it too. The rest have none: they answer
    where no version is named, if they are the default.
    """
    found = {version: int(version) for version in versions if _is_number(version)}
    leading = {
        version: int(match[1])
        for version in versions
        if version not in found and (match := _DOTTED.fullmatch(version))
    }
    claims = Counter([*found.values(), *leading.values()])
    return found | {version: number for version, number in leading.items() if claims[number] == 1}


def version_of(engine: Engine, name: str, number: int | None) -> str | None:
    """Return the version that a number means; None, for the default one, where it is 0 or None.

    A number that no version has is returned as text, for the engine to say so.
    """
    if not number:
        return None
    version = str(number)
    if not engine.has_version(name, version):
        with suppress(ModelNotFound):
            for other, its_number in _numbered(engine.versions(name)).items():
                if its_number == number:
                    return other
    return version


def number_of(engine: Engine, name: str, version: str) -> int:
    """Return the number of a version; 0, by which the default one can be asked for, if it has none."""
    if _is_number(version):
        return int(version)
    with suppress(ModelNotFound):
        return _numbered(engine.versions(name)).get(version, 0)
    return 0


def statuses(engine: Engine, name: str, number: int | None = None) -> list[VersionStatus]:
    """Return the status of a version, or of all that have a number if none is named, by number.

    Raises:
        ModelNotFound, VersionNotFound: it is not there and never was.
    """
    found = all_statuses(engine).get(name)
    if found is None:
        raise ModelNotFound(f"Model not found: {name}", name=name)
    if not number:
        return found
    for status in found:
        if status.version == number:
            return [status]
    raise VersionNotFound(f"Model not found: {name}, version {number}", name=name, version=str(number))


def all_statuses(engine: Engine) -> dict[str, list[VersionStatus]]:
    """Return the statuses of all models that are or were to be loaded, by name."""
    models: dict[str, list[RepositoryEntry]] = {}
    for entry in engine.version_entries():
        if entry.state is not None:
            models.setdefault(entry.name, []).append(entry)
    return {name: _statuses(entries) for name, entries in models.items()}


def check_names(names: Collection[str], spec: ModelSpec, signature: Signature) -> None:
    """Check which inputs a request has. A model of bodies takes any: they are the parts of its requests.

    Raises:
        BadTensor: they are not the model's, or too many.
    """
    if not signature.takes_tensors and names:
        if len(names) > MOST_INPUTS:
            raise BadTensor(f"the model takes at most {MOST_INPUTS} inputs, got {len(names)}")
        return
    config = spec.config or {}
    optional = {each["name"] for each in config.get("input", ()) if each.get("optional")}
    wanted = [each.name for each in signature.inputs if each.name in names or each.name not in optional]
    if len(names) != len(wanted):
        raise BadTensor(f"Invalid number of inputs - Expected: {len(wanted)}; Actual: {len(names)}")
    for name in wanted:
        if name not in names:
            raise BadTensor(f"Missing input with specific name - Required input: {name}")


def check_tensor(spec: TensorSpec, precision: str, shape: Sequence[int]) -> None:
    """Check an input's datatype, as OpenVINO names it, and its shape against what the model says.

    Raises:
        BadTensor: they do not fit.
    """
    if any(length < 0 for length in shape):
        fault = f"Negative or zero dimension size is not acceptable: {_spelt(shape)}"
        raise BadTensor(f"Invalid input shape - {fault}; input name: {spec.name}")
    wanted = DATATYPES[spec.datatype][2]
    if precision != wanted:
        hint = " (encoded images are not decoded here)" if precision == "STRING" else ""
        fault = f"Expected: {wanted}; Actual: {precision}; input name: {spec.name}{hint}"
        raise BadTensor(f"Invalid input precision - {fault}")
    if spec.shape is None or (len(shape) == len(spec.shape) and _fits(shape, spec.shape)):
        return
    expected, actual = _spelt(spec.shape), _spelt(shape)
    if len(shape) != len(spec.shape):
        fault = "number of shape dimensions"
    elif _fits(shape[:1], spec.shape[:1]):
        fault = "input shape"
    else:
        fault, expected, actual = "input batch size", str(spec.shape[0]), str(shape[0])
    raise BadTensor(f"Invalid {fault} - Expected: {expected}; Actual: {actual}; input name: {spec.name}")


def check_outputs(names: Iterable[str], signature: Signature) -> None:
    """Check the names of the outputs that a client wants.

    Raises:
        BadTensor: the model has no such output, or one is wanted twice.
    """
    known = [spec.name for spec in signature.outputs]
    seen: set[str] = set()
    for name in names:
        if name not in known:
            raise BadTensor(
                f"output tensor alias not found in signature: {shown(name)} "
                f"Outputs expected to be in the set {{{','.join(known)}}}."
            )
        if name in seen:
            raise BadTensor(f"duplicate output tensor alias: {name}")
        seen.add(name)


def message_of(error: ServingError) -> str:
    """Return what clients are told of an error."""
    if isinstance(error, VersionNotFound):
        return "Model with requested version is not found"
    if isinstance(error, ModelNotFound):
        return "Model with requested name is not found"
    if isinstance(error, ModelNotReady):
        return f"Model with requested version is not loaded yet - {error.message}"
    return error.message


def status_of(error: ServingError) -> int:
    """Return the HTTP status of an error: the one that the handler chose, else that of its kind."""
    chosen = error.details.get("status")
    return chosen if type(chosen) is int and 400 <= chosen <= 599 else error.http


def code_of(error: ServingError) -> str:
    """Return the gRPC status code of an error: that of the handler's choice, else that of its kind."""
    return chosen_code(error) or error.grpc


def _is_number(version: str) -> bool:
    return version.isascii() and version.isdecimal() and version[0] != "0" and int(version) <= _MOST_VERSION


def _numbered(versions: Iterable[ModelStatus]) -> dict[str, int]:
    return numbers([status.spec.version for status in versions])


def _statuses(entries: Sequence[RepositoryEntry]) -> list[VersionStatus]:
    """Return the statuses of a model's versions; one that is gone has its number if no other has it now."""
    found: dict[int, VersionStatus] = {}
    for gone in (False, True):
        versions = {each.version: each for each in entries if _is_gone(each) is gone}
        for version, number in numbers(versions).items():
            found.setdefault(number, VersionStatus(number, *_state(versions[version])))
    return [found[number] for number in sorted(found)]


def _state(entry: RepositoryEntry) -> tuple[str, str]:
    if _is_gone(entry):
        return "END", "OK"
    return _IDLE if entry.reason == NO_WORKERS else _STATES[entry.state]


def _is_gone(entry: RepositoryEntry) -> bool:
    return entry.state is RepositoryState.UNAVAILABLE and entry.reason == UNLOADED


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return all(want in (-1, length) for length, want in zip(shape, wanted, strict=True))


def _spelt(shape: Sequence[int]) -> str:
    return f"({','.join(map(str, shape))})"
