"""Arrays and the tensors in which they cross: the one place that knows datatypes and the layout of BYTES.

For workers and front ends alike. Needs numpy, so a worker imports it only once a tensor is at hand.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mms_lite.errors import BadTensor
from mms_lite.types import BYTES, Tensor

Array = NDArray[Any]

# KServe v2, "Tensor data types"; numpy has no type of its own for BF16.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    BYTES: np.dtype(np.object_),
}
with contextlib.suppress(ImportError):  # in a model's own Python
    import ml_dtypes

    DTYPES["BF16"] = np.dtype(ml_dtypes.bfloat16)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<I")  # before each element of a BYTES tensor


def datatype(array: Array) -> str:
    """Return the KServe v2 name of an array's type; text and byte strings are BYTES.

    Raises:
        BadTensor: there is no name for it.
    """
    if array.dtype.kind in "SU":
        return BYTES
    name = _NAMES.get(array.dtype) or _NAMES.get(array.dtype.newbyteorder("="))
    if name is None:
        raise BadTensor(f"arrays of type {array.dtype} cannot be sent")
    return name


def describe(array: Array) -> str:
    """Return datatype and shape as messages show them, such as `FP32 [1,3,224,224]`."""
    name = _NAMES.get(array.dtype.newbyteorder("="), BYTES if array.dtype.kind in "SU" else str(array.dtype))
    return f"{name} [{','.join(map(str, array.shape))}]"


def to_array(tensor: Tensor) -> Array:
    """Return a tensor's array, without a copy but for BYTES, whose elements become `bytes` objects.

    Raises:
        BadTensor: unknown datatype, or another number of bytes than the shape needs.
    """
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None:
        raise BadTensor(f"input {tensor.name!r} has the unknown datatype {tensor.datatype}")
    if any(length < 0 for length in tensor.shape):
        raise BadTensor(f"input {tensor.name!r} has a negative length in its shape")
    if tensor.datatype == BYTES:
        return _elements(tensor)
    needed, found = math.prod(tensor.shape) * dtype.itemsize, memoryview(tensor.data).nbytes
    if found != needed:
        shape = ",".join(map(str, tensor.shape))
        raise BadTensor(
            f"input {tensor.name!r} is declared as {tensor.datatype} [{shape}], "
            f"which is {needed} bytes, and has {found}"
        )
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)


def to_tensor(name: str, array: Array) -> Tensor:
    """Return the tensor of an array; its data is a view of the array where that is contiguous.

    A text without an axis gets one: BYTES without a shape is a raw body.

    Raises:
        BadTensor: there is no datatype for it.
    """
    kind = datatype(array)
    if kind == BYTES:
        return Tensor(name, kind, array.shape or (1,), _joined(array))
    native = np.ascontiguousarray(array, DTYPES[kind])
    return Tensor(name, kind, array.shape, native.reshape(-1).view(np.uint8).data)


def pack(elements: Iterable[bytes | bytearray | memoryview]) -> bytearray:
    """Return the data of a BYTES tensor: each element after its length, four bytes, little endian."""
    joined = bytearray()
    for element in elements:
        joined += _LENGTH.pack(len(element))
        joined += element
    return joined


def texts(name: str, array: Array) -> Array:
    """Return an input of datatype BYTES with elements of type `str`, which is what frameworks take.

    Raises:
        BadTensor: an element is not UTF-8.
    """
    found = np.empty(array.size, np.object_)
    try:
        found[:] = [e.decode("utf-8") if isinstance(e, bytes) else str(e) for e in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise BadTensor(f"input {name!r} has text that is not UTF-8") from error
    return found.reshape(array.shape)


def _elements(tensor: Tensor) -> Array:
    data, at = memoryview(tensor.data), 0
    count = math.prod(tensor.shape)
    array = np.empty(
        min(count, len(data)), np.object_
    )  # each element takes bytes: no claim of a shape counts
    found = 0
    while at + _LENGTH.size <= len(data) and found < len(array):
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + size > len(data):
            break
        array[found] = bytes(data[at : at + size])
        found, at = found + 1, at + size
    if found != count or at != len(data):
        raise BadTensor(
            f"input {tensor.name!r} is declared with {count} elements, which its bytes do not hold"
        )
    return array.reshape(tensor.shape)


def _joined(array: Array) -> bytearray:
    return pack(
        each if isinstance(each, bytes | bytearray | memoryview) else str(each).encode("utf-8")
        for each in array.reshape(-1)
    )
