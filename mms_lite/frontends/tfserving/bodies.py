"""The bodies of predictions over REST: rows (`instances`) and columns (`inputs`), and their answers.

Source: "RESTful API", TensorFlow Serving; sentences for what cannot be read are OpenVINO Model Server's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mms_lite.errors import BadTensor, InvalidRequest, ServingError
from mms_lite.frontends.json_bodies import loads
from mms_lite.frontends.message import shown
from mms_lite.frontends.tfserving.service import DATATYPES, check_names, check_tensor
from mms_lite.json_arrays import encode, encode_rows, to_array
from mms_lite.shared import SharedBytes
from mms_lite.tensors import Array, to_tensor
from mms_lite.tensors import to_array as array_of
from mms_lite.types import BYTES, ModelSpec, Signature, Tensor, TensorSpec

_NO_ROWS = "Could not parse instance content. Not valid ndarray detected"
_NO_COLUMNS = "Could not parse input content. Not valid ndarray detected"
_BYTES_SUFFIX = "_bytes"  # of outputs whose elements are no text, as TensorFlow Serving has it


def read(body: bytearray | SharedBytes, spec: ModelSpec, signature: Signature) -> tuple[list[Tensor], bool]:
    """Return the inputs that a request holds, and whether they came, and so the outputs shall go, as rows.

    Raises:
        InvalidRequest: it cannot be read, or does not fit the model.
        RequestTooLarge: it is more than is read.
    """
    request = _parsed(body.view if isinstance(body, SharedBytes) else body)
    if ("instances" in request) == ("inputs" in request):
        raise InvalidRequest("Invalid JSON structure. Could not detect row or column format")
    by_row = "instances" in request
    values = _rows(request["instances"]) if by_row else _columns(request["inputs"])
    if None in values:
        if len(signature.inputs) != 1:
            raise BadTensor(f"Invalid number of inputs - Expected: {len(signature.inputs)}; Actual: 1")
        values = {signature.inputs[0].name: values[None]}
    named = {str(name): value for name, value in values.items()}
    check_names(named, spec, signature)
    specs = {spec.name: spec for spec in signature.inputs}
    fault = _NO_ROWS if by_row else _NO_COLUMNS
    return [_tensor(name, value, _spec(name, specs), fault) for name, value in named.items()], by_row


def write(outputs: Sequence[Tensor], *, by_row: bool) -> list[bytes]:
    """Return the body of an answer, in pieces.

    Raises:
        ServingError: the outputs cannot be written as rows.
    """
    arrays = {tensor.name: array_of(tensor) for tensor in outputs}
    if not arrays:
        raise _unwritable("Cannot convert empty tensor map to JSON")
    if by_row:
        _check_rows(arrays)
    key = b'{"predictions":' if by_row else b'{"outputs":'
    if len(arrays) == 1:
        return [key, *(_encoded(name, array) for name, array in arrays.items()), b"}"]
    if by_row:
        columns = [encode_rows(array, as_base64=_as_base64(name)) for name, array in arrays.items()]
        form = _object((name.replace("%", "%%"), b"%b") for name in arrays)
        return [key, b"[", b",".join([form % row for row in zip(*columns, strict=True)]), b"]}"]
    return [key, _object((name, _encoded(name, array)) for name, array in arrays.items()), b"}"]


def _parsed(body: bytearray | memoryview) -> dict[str, Any]:
    try:
        request = loads(body)
    except json.JSONDecodeError as error:
        text = f"The file is not valid json - Error: {error.msg}. Offset: {error.pos}"
        raise InvalidRequest(text, status=412) from error
    except ValueError as error:
        raise InvalidRequest(f"The file is not valid json - Error: {error}", status=412) from error
    if not isinstance(request, dict):
        raise InvalidRequest("Request body should be JSON object")
    return request


def _rows(instances: Any) -> Mapping[str | None, Any]:
    """Return the values of each input, by its name or, where they have none, None."""
    if not isinstance(instances, list):
        raise InvalidRequest("Invalid JSON structure. Nonamed instance is not an array.")
    if not instances:
        raise InvalidRequest("Invalid JSON structure. Missing instances in row format")
    first = instances[0]
    if first is None:
        raise InvalidRequest("Could not detect neither named or nonamed format")
    if not _is_object(first):
        return {None: instances}
    if not all(map(_is_object, instances)):
        raise InvalidRequest("Invalid JSON structure. One of named instances is not a JSON object.")
    if not first:
        raise InvalidRequest(_NO_ROWS)
    if any(row.keys() != first.keys() for row in instances):
        raise InvalidRequest("Invalid JSON structure. Request inputs have different batch sizes")
    return {name: [row[name] for row in instances] for name in first}


def _columns(inputs: Any) -> Mapping[str | None, Any]:
    if inputs is None:
        raise InvalidRequest("Invalid JSON structure. One of inputs is not a JSON object.")
    if not _is_object(inputs):
        return {None: inputs}
    if not inputs:
        raise InvalidRequest("Invalid JSON structure. Missing inputs in column format")
    named: dict[str | None, Any] = inputs
    return named


def _is_object(value: Any) -> bool:
    """Tell whether a value is an object that is not {"b64": "..."}, which stands for bytes."""
    return isinstance(value, dict) and not (len(value) == 1 and isinstance(value.get("b64"), str))


def _spec(name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return what an input is; one that only a model of bodies can have is a body."""
    return specs.get(name) or TensorSpec(shown(name), BYTES, (-1,))


def _tensor(name: str, value: Any, spec: TensorSpec, fault: str) -> Tensor:
    try:
        array = to_array(value, spec)
    except BadTensor as error:
        raise BadTensor(f"{fault} - {error.message}") from error
    if spec.datatype == BYTES and not array.shape:
        array = array.reshape(1)
    check_tensor(spec, DATATYPES[spec.datatype][2], array.shape)
    return to_tensor(name, array)


def _check_rows(arrays: Mapping[str, Array]) -> None:
    """Check that all outputs have as many rows.

    Raises:
        ServingError: they have not.
    """
    expected = None
    for name, array in arrays.items():
        if not array.shape:
            raise _unwritable(f"Tensor name: {name} has no shape information")
        if expected not in (None, array.shape[0]):
            raise _unwritable(
                f"Tensor name: {name} has inconsistent batch size: {array.shape[0]} expecting: {expected}"
            )
        expected = array.shape[0]


def _object(pairs: Iterable[tuple[str, bytes]]) -> bytes:
    return b"{" + b",".join([json.dumps(name).encode() + b":" + text for name, text in pairs]) + b"}"


def _encoded(name: str, array: Array) -> bytes:
    return encode(array, as_base64=_as_base64(name))


def _as_base64(name: str) -> bool:
    return name.endswith(_BYTES_SUFFIX)


def _unwritable(fault: str) -> ServingError:
    return ServingError(f"Response parsing to JSON error - {fault}")
