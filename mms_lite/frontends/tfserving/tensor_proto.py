"""TensorProto, TensorFlow's message for an array, to and from our tensors: one buffer is never copied.

Source: tensorflow/core/framework/tensor.proto, and make_ndarray of tensor_util.py for short lists of values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mms_lite.errors import BadTensor, RequestTooLarge
from mms_lite.frontends.fields import field, value
from mms_lite.frontends.message import Buffer, shown
from mms_lite.frontends.tensor_calls import check_shape
from mms_lite.frontends.tfserving.service import DATATYPES, check_tensor
from mms_lite.tensors import DTYPES, Array, pack
from mms_lite.tensors import to_array as array_of
from mms_lite.types import BYTES, Tensor, TensorSpec

_CONTENT, _STRINGS = 4, 8  # fields of TensorProto
_MOST_AXES = 32  # as many as arrays have
_MOST_REPEATED = 1 << 16  # texts that one text may stand for: each is an object to make, for us and the model
_KEY, _VALUE = 1, 2  # of a map's entry
_NAMES = {number: name for name, (_, number, _) in DATATYPES.items()}
_LISTS: dict[str, tuple[str, type[np.generic]]] = {  # the field for single values, and what it holds
    "FP32": ("float_val", np.float32),
    "FP64": ("double_val", np.float64),
    "INT32": ("int_val", np.int32),
    "INT16": ("int_val", np.int32),
    "INT8": ("int_val", np.int32),
    "UINT16": ("int_val", np.int32),
    "UINT8": ("int_val", np.int32),
    "INT64": ("int64_val", np.int64),
    "UINT32": ("uint32_val", np.uint32),
    "UINT64": ("uint64_val", np.uint64),
    "BOOL": ("bool_val", np.bool_),
    "FP16": ("half_val", np.int32),  # its bits
    "BF16": ("half_val", np.int32),
}


@dataclass(frozen=True, slots=True)
class Lifted:
    """What `fields` took out of a message: of its fields tensor_content, and of its fields string_val."""

    contents: Sequence[memoryview] = ()
    texts: Sequence[memoryview] = ()


def made_bytes(proto: Any) -> int:
    """Return how many bytes `decode` makes that the message does not have: of single values, the array's."""
    datatype = _NAMES.get(proto.dtype, "")
    dims, texts = proto.tensor_shape.dim, proto.string_val
    if proto.tensor_content or not datatype or len(dims) > _MOST_AXES:
        return 0
    count = math.prod([max(0, int(dim.size)) for dim in dims])
    if datatype == BYTES:
        return max(0, count - len(texts)) * len(texts[-1]) if texts else 0
    return count * DTYPES[datatype].itemsize


def decode(name: str, proto: Any, spec: TensorSpec | None, *, lifted: Lifted, most_bytes: int) -> Tensor:
    """Return an input from its TensorProto; `spec` is what the model says of it, None if nothing.

    A list with fewer values than the shape has elements goes on with its last one; what that may make of a
    small message is bounded by `most_bytes`.

    Raises:
        BadTensor: it is not whole, or does not fit.
        RequestTooLarge: it would take more than `most_bytes`.
    """
    datatype, told = _NAMES.get(proto.dtype, ""), shown(name)
    if proto.tensor_shape.unknown_rank:
        raise BadTensor(f"Invalid input shape - The rank must be known; input name: {told}")
    dims = proto.tensor_shape.dim
    check_shape(told, (1,) * len(dims))  # before millions of them are looked at
    shape = tuple([dim.size for dim in dims])
    check_shape(told, shape)
    if datatype == BYTES and not shape:
        shape = (1,)  # a text alone is a list of one
    precision = DATATYPES[datatype][2] if datatype else "INVALID"
    check_tensor(spec or TensorSpec(told, datatype or "FP32", None), precision, shape)
    if datatype == BYTES:
        return Tensor(name, datatype, shape, _strings(told, proto, shape, lifted.texts, most_bytes))
    needed = math.prod(shape) * DTYPES[datatype].itemsize
    content = value(proto.tensor_content, lifted.contents)
    if content or not needed:
        if len(content) != needed:
            raise _wrong_size(told, needed, len(content))
        return Tensor(name, datatype, shape, content)
    if needed > most_bytes:
        raise RequestTooLarge(f"The input {told} takes {needed} bytes; the limit is {most_bytes}.")
    return Tensor(name, datatype, shape, _listed(told, proto, datatype, math.prod(shape)))


def encode(number: int, tensors: Sequence[Tensor]) -> list[Buffer]:
    """Return a field of type map<string, TensorProto> with this number, in pieces: arrays are not copied."""
    pieces: list[Buffer] = []
    for tensor in tensors:
        content = _content(tensor)
        head, name = _head(tensor.datatype, tuple(tensor.shape)), tensor.name.encode()
        content_size = sum(map(len, content))
        entry = b"".join((field(_KEY, len(name)), name, field(_VALUE, len(head) + content_size), head))
        pieces += field(number, len(entry) + content_size), entry, *content
    return pieces


def _strings(
    name: str, proto: Any, shape: Sequence[int], lifted: Sequence[memoryview], most_bytes: int
) -> bytearray:
    count, given = math.prod(shape), len(proto.string_val)
    if given > count or (count and not given):
        raise _wrong_count(name, count, given)
    packed = pack(value(each, lifted) for each in proto.string_val)
    if given < count:
        missing, last = count - given, pack([value(proto.string_val[-1], lifted)])
        if len(packed) + missing * len(last) > most_bytes:
            raise RequestTooLarge(f"The input {name} takes more than {most_bytes} bytes.")
        if missing > _MOST_REPEATED:
            raise RequestTooLarge(f"The input {name} has {missing} texts more than were sent.")
        packed += last * missing
    return packed


def _listed(name: str, proto: Any, datatype: str, count: int) -> memoryview:
    """Return the bytes of an array whose elements are in a list of values."""
    field_name, kind = _LISTS[datatype]
    values = getattr(proto, field_name)
    if len(values) > count:
        raise _wrong_count(name, count, len(values))
    dtype = np.dtype(np.uint16) if field_name == "half_val" else DTYPES[datatype]
    if not values:
        raise _wrong_size(name, count * dtype.itemsize, 0)
    found: Array = np.fromiter(values, kind, len(values))
    if kind is np.int32 and dtype != np.int32:
        bounds = np.iinfo(dtype)
        if found.min() < bounds.min or found.max() > bounds.max:
            raise BadTensor(f"Invalid value in tensor proto container - {field_name}; input name: {name}")
    array = np.full(count, found[-1], dtype)
    array[: len(found)] = found
    return array.view(np.uint8).data


def _content(tensor: Tensor) -> list[Buffer]:
    if tensor.datatype != BYTES:
        return [field(_CONTENT, len(tensor.data)), tensor.data]
    pieces: list[Buffer] = []
    for element in array_of(tensor).reshape(-1):
        pieces += field(_STRINGS, len(element)), element
    return pieces


@lru_cache(maxsize=1024)
def _head(datatype: str, shape: tuple[int, ...]) -> bytes:
    """Return the serialized TensorProto with datatype and shape, to which the content is appended."""
    from mms_lite.protos import message

    head = message("tensorflow.TensorProto")(dtype=DATATYPES[datatype][1])
    head.tensor_shape.SetInParent()  # of rank 0, not unknown
    for length in shape:
        head.tensor_shape.dim.add(size=length)
    done: bytes = head.SerializeToString()
    return done


def _wrong_size(name: str, expected: int, actual: int) -> BadTensor:
    return BadTensor(
        f"Invalid content size of tensor proto - Expected: {expected} bytes; "
        f"Actual: {actual} bytes; input name: {name}"
    )


def _wrong_count(name: str, expected: int, actual: int) -> BadTensor:
    return BadTensor(
        f"Invalid number of values in tensor proto container - Expected: {expected}; "
        f"Actual: {actual}; input name: {name}"
    )
