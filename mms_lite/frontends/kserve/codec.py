"""Bodies of inference requests and answers: JSON, and the binary tensor extension (docs/protocol of Triton).

Binary tensors are parts of the request's body and pieces of the answer's: neither is copied here. In JSON an
element of a BYTES tensor is text; what is no text is base64, in a tensor with the parameter "content_type":
"base64" (as in MLServer), or a single element {"b64": "..."} (as in TensorFlow Serving) of a request. Numbers
that are not finite are NaN, Infinity and -Infinity both ways, as Triton writes and its clients read them.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson

from mms_lite import json_arrays
from mms_lite.errors import BadTensor, HandlerError, InvalidRequest, Unsupported
from mms_lite.frontends import json_bodies
from mms_lite.frontends.kserve.errors import of_request
from mms_lite.frontends.kserve.expected import Expected
from mms_lite.frontends.kserve.service import RequestedOutput
from mms_lite.frontends.message import shown
from mms_lite.frontends.tensor_calls import check_shape
from mms_lite.shared import SharedBytes
from mms_lite.tensors import DTYPES, pack, to_array
from mms_lite.types import BYTES, InferResponse, Tensor, TensorSpec

Body = bytearray | SharedBytes
Piece = bytes | bytearray | memoryview

BASE64 = "base64"
_SIZE, _KIND = "binary_data_size", "content_type"
_ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters',"
    " 'shared_memory_region' in 'parameters'."
)
_FOLLOWED = re.compile("utf-8|after document|extra data", re.IGNORECASE)  # how parsers find what is no JSON
_HINT = "; if tensors follow the JSON, the header Inference-Header-Content-Length must tell the JSON's length"
_MOST_LENGTH = 2**63 - 1
_MOST_DIGITS = 15  # of a header's length
# For `struct`, which takes no text, no fraction for an integer and nothing too large; but true as 1.
_FORMATS = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}


@dataclass(slots=True)
class Asked:
    """What the body of an inference request says. `binary` is how outputs are wanted that do not say it."""

    id: str
    inputs: list[Tensor]
    outputs: list[RequestedOutput]
    parameters: dict[str, Any]
    binary: bool = False


def read_header_length(text: str | None, size: int) -> int:
    """Return how much of a body of `size` bytes is JSON, by its Inference-Header-Content-Length; else all.

    Raises:
        InvalidRequest: the header is no number, or more than there is.
    """
    if text is None:
        return size
    digits = text.strip()
    if not digits.removeprefix("-").isdecimal() or not digits.isascii():
        raise InvalidRequest(f"Unable to parse Inference-Header-Content-Length, got: {shown(text)}")
    if len(digits) > _MOST_DIGITS or not 0 <= int(digits) <= size:
        raise InvalidRequest(f"inference header size should be in range (0, {size}), got: {shown(text)}")
    return int(digits)


def read(body: Body, header_length: int, expected: Expected) -> Asked:
    """Read a request for a model: its JSON, of `header_length` bytes, and the tensors behind it.

    Raises:
        InvalidRequest: it is not one, or has too many inputs; the message names the input.
        RequestTooLarge: its JSON is more than is read.
    """
    view = body.view if isinstance(body, SharedBytes) else memoryview(body)
    try:
        head = json_bodies.loads(view[:header_length])
    except ValueError as error:
        hint = _HINT if header_length == len(body) and _FOLLOWED.search(str(error)) else ""
        raise InvalidRequest(f"failed to parse the request JSON buffer: {error}{hint}") from error
    if type(head) is not dict:
        raise InvalidRequest("failed to parse the request JSON buffer: it is not an object")
    name = "" if head.get("id") is None else head["id"]
    if type(name) is not str or _is_broken(name):
        raise InvalidRequest("Unable to parse 'id'")
    inputs = head.get("inputs")
    if type(inputs) is not list:
        raise InvalidRequest("Unable to parse 'inputs'")
    parts = _Parts(body, header_length, expected.spec.name)
    try:
        expected.check_count([_read_name(each, "input") for each in inputs])
        read_inputs = [_read_input(each, parts, alone=len(inputs) == 1) for each in inputs]
    except BadTensor as error:
        raise of_request(error, name) from error
    parts.check_end()
    given = parameters(head)
    binary = given.get("binary_data_output", False)
    if type(binary) is not bool:
        raise InvalidRequest("Unable to parse 'binary_data_output'")
    return Asked(name, read_inputs, _read_outputs(head.get("outputs")), given, binary)


def _is_broken(text: str) -> bool:
    """Tell whether a text has half of a surrogate pair, which cannot be written again."""
    return text.encode("utf-8", "ignore").decode() != text


class _Parts:
    """The bytes behind the JSON of a body, taken in order."""

    __slots__ = ("_at", "_body", "_model", "_size", "_view")

    def __init__(self, body: Body, at: int, model: str) -> None:
        self._body = body
        self._view = body.view if isinstance(body, SharedBytes) else memoryview(body)
        self._at = at
        self._size = len(body)
        self._model = model

    @property
    def left(self) -> int:
        return self._size - self._at

    def take(self, size: int, name: str) -> SharedBytes | memoryview:
        """Return the next `size` bytes, which are an input's.

        Raises:
            InvalidRequest: there are fewer.
        """
        start, end = self._at, self._at + size
        if end > self._size:
            raise InvalidRequest(
                f"unexpected size for input '{name}', expecting {end - self._size} additional bytes for model"
                f" '{self._model}'"
            )
        self._at = end
        return self._body.part(start, end) if isinstance(self._body, SharedBytes) else self._view[start:end]

    def check_end(self) -> None:
        """Check that nothing is left.

        Raises:
            InvalidRequest: something is.
        """
        if self.left:
            raise InvalidRequest(f"unexpected additional input data for model '{self._model}'")


def _read_name(described: Any, what: str) -> str:
    """Return the name of an input or output.

    Raises:
        InvalidRequest: it has none, or is no object.
    """
    if type(described) is not dict:
        raise InvalidRequest(f"Unable to parse '{what}s': an {what} is not an object")
    name = described.get("name")
    if type(name) is not str:
        raise InvalidRequest("Unable to parse 'name'")
    return name


def _read_input(described: dict[str, Any], parts: _Parts, *, alone: bool) -> Tensor:
    name, datatype = shown(described["name"]), described.get("datatype")
    if type(datatype) is not str or datatype not in DTYPES:
        raise InvalidRequest(f"invalid datatype for input {name}")
    shape = _read_shape(described.get("shape"), name)
    given = parameters(described)
    kind = given.get(_KIND, "")
    if type(kind) is not str:
        raise InvalidRequest(f"Unable to parse 'content_type' of input '{name}'")
    if "shared_memory_region" in given:
        raise Unsupported(f"input '{name}' is in shared memory, which this server does not read")
    size = given.get(_SIZE)
    data: bytes | memoryview | SharedBytes
    if "data" in described:
        if size is not None:
            raise InvalidRequest(f"{_ONE_SOURCE} But '{name}' set 'data' 'binary_data_size'")
        data = _read_values(TensorSpec(name, datatype, shape), described["data"], kind)
        return Tensor(described["name"], datatype, shape, data, "" if kind == BASE64 else kind)
    if size is None:
        size = _size_by_shape(name, datatype, shape, parts, alone=alone)
    elif type(size) is not int or size < 0:
        raise InvalidRequest(f"Unable to parse 'binary_data_size' of input '{name}'")
    return Tensor(described["name"], datatype, shape, parts.take(size, name), kind)


def _size_by_shape(name: str, datatype: str, shape: Sequence[int], parts: _Parts, *, alone: bool) -> int:
    """Return the size of an input that has neither data nor size, but may lie behind the JSON all the same.

    So OpenVINO Model Server has it: a single input of BYTES is all that is left.
    """
    if not math.prod(shape):
        return 0
    if not parts.left or (datatype == BYTES and not alone):
        raise InvalidRequest(f"{_ONE_SOURCE} But no field is set for '{name}'")
    return parts.left if datatype == BYTES else math.prod(shape) * DTYPES[datatype].itemsize


def _read_shape(described: Any, name: str) -> tuple[int, ...]:
    if type(described) is not list or any(
        type(length) is not int or not 0 <= length <= _MOST_LENGTH for length in described
    ):
        raise InvalidRequest(f"Unable to parse 'shape' of input '{name}'")
    check_shape(name, described)
    return tuple(described)


def parameters(described: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a request, an input or an output, if it has any.

    Raises:
        InvalidRequest: they are no object.
    """
    found = described.get("parameters")
    if found is None:
        return {}
    if type(found) is not dict:
        raise InvalidRequest("Unable to parse 'parameters': it is not an object")
    return found


def _read_outputs(described: Any) -> list[RequestedOutput]:
    if described is None:
        return []
    if type(described) is not list:
        raise InvalidRequest("Unable to parse 'outputs'")
    return [_read_output(each) for each in described]


def _read_output(described: Any) -> RequestedOutput:
    name = _read_name(described, "output")
    given = parameters(described)
    binary, count = given.get("binary_data"), given.get("classification", 0)
    if binary is not None and type(binary) is not bool:
        raise InvalidRequest(f"Unable to parse 'binary_data' of output '{shown(name)}'")
    if type(count) is not int or count < 0:
        raise InvalidRequest(f"Unable to set 'classification' of output '{shown(name)}'")
    if "shared_memory_region" in given:
        raise Unsupported(
            f"output '{shown(name)}' is wanted in shared memory, where this server does not write"
        )
    return RequestedOutput(name, binary, count)


def _read_values(spec: TensorSpec, value: Any, kind: str) -> bytes:
    """Return the data of an input whose values are in JSON, flat in C order or nested as its shape says.

    Raises:
        BadTensor: a value is none of the datatype's, or there are more or fewer than the shape has.
    """
    name, datatype, shape = spec.name, spec.datatype, spec.shape or ()
    if datatype == "BF16":
        raise BadTensor(
            "receiving BF16 data via JSON is not supported. Please use the binary data format for input"
            f" {name}"
        )
    packed = _pack_numbers(value, datatype)
    if packed is not None:
        data, found = packed
    else:  # what is no plain number: slower, and every element is looked at
        array = json_arrays.to_array(value, spec)
        found = array.shape
        if datatype == BYTES:
            elements = array.reshape(-1)
            data = bytes(pack(_from_base64(name, elements) if kind == BASE64 else elements))
        else:
            data = array.tobytes()
    size = math.prod(shape)
    if found not in (shape, (size,)) and (size or math.prod(found)):  # empty lists do not tell their depth
        raise BadTensor(
            f"Unable to parse 'data' of input '{name}': its shape is {_spelt(found)}, not {_spelt(shape)}"
        )
    return data


def _pack_numbers(value: Any, datatype: str) -> tuple[bytes, tuple[int, ...]] | None:
    """Return the bytes of evenly nested lists of numbers, and the lists' shape; None if there is a doubt."""
    code = _FORMATS.get(datatype)
    if code is None or type(value) is not list:
        return None
    items, shape = value, [len(value)]
    try:
        while items and type(items[0]) is list:
            (length,) = set(map(len, items))
            shape.append(length)
            items = list(chain.from_iterable(items))
        packed = struct.pack(f"<{len(items)}{code}", *items)
    except (struct.error, OverflowError, TypeError, ValueError):
        return None
    array = np.frombuffer(packed, DTYPES[datatype])
    # Looking at all types takes as long as packing: only where a number could have been true or false.
    if ((array == 0) | (array == 1)).any() and bool in set(map(type, items)):
        return None
    return packed, tuple(shape)


def _from_base64(name: str, elements: Any) -> list[bytes]:
    try:
        return [base64.b64decode(each, validate=True) for each in elements]
    except (binascii.Error, ValueError) as error:
        raise BadTensor(
            f"input '{name}' has the content type base64, and an element that is not: {error}"
        ) from error


class Format:
    """How the outputs of an answer are to be written: `binary` counts for those of which nothing is said."""

    __slots__ = ("_binary", "_named")

    def __init__(self, wanted: Sequence[RequestedOutput], *, binary: bool) -> None:
        self._named = {each.name: each.binary for each in wanted if each.binary is not None}
        self._binary = binary

    def is_binary(self, name: str) -> bool:
        """Tell whether an output follows the JSON."""
        return self._named.get(name, self._binary)


def write(answer: InferResponse, how: Format) -> tuple[list[Piece], int | None]:
    """Return the pieces of an answer's body, and the length of its JSON if tensors follow it.

    Raises:
        BadTensor, HandlerError: an output, or a parameter of the model's, cannot be JSON.
    """
    outputs: list[dict[str, Any]] = []
    pieces: list[Piece] = [b""]
    followed = False
    for tensor in answer.outputs:
        described: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        outputs.append(described)
        told: dict[str, Any] = {_KIND: tensor.content_type} if tensor.content_type else {}
        if how.is_binary(tensor.name):
            followed = True
            told[_SIZE] = tensor.nbytes
            pieces.append(tensor.data)
        elif tensor.datatype == BYTES:
            described["data"] = _texts(tensor, told)
        else:
            described["data"] = _numbers(tensor)
        if told:
            described["parameters"] = told
    head: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version, "outputs": outputs}
    if answer.id:
        head["id"] = answer.id
    if answer.parameters:
        head["parameters"] = answer.parameters
    try:
        pieces[0] = orjson.dumps(head)
    except TypeError as error:
        raise HandlerError(f"the model's answer has names or parameters that are no JSON: {error}") from error
    return pieces, len(pieces[0]) if followed else None


def _numbers(tensor: Tensor) -> orjson.Fragment:
    if tensor.datatype == "BF16":
        raise BadTensor(
            "sending BF16 data via JSON is not supported. Please use the binary data format for output"
            f" {tensor.name}"
        )
    return orjson.Fragment(json_arrays.encode(np.frombuffer(tensor.data, DTYPES[tensor.datatype])))


def _texts(tensor: Tensor, told: dict[str, Any]) -> list[str]:
    """Return a BYTES tensor's elements as text; the parameters `told` say if they had to become base64."""
    elements = to_array(tensor).reshape(-1)
    try:
        return [each.decode("utf-8") for each in elements]
    except UnicodeDecodeError:
        if _KIND in told:
            told["media_type"] = told[_KIND]
        told[_KIND] = BASE64
        return [base64.b64encode(each).decode("ascii") for each in elements]


def _spelt(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
