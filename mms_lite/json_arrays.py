"""Arrays as JSON, both ways: nested lists checked element by element, numbers in their shortest digits.

For front ends and handlers alike, and apart from both because it knows no protocol. A model's own Python may
lack orjson: there the standard library has its place, which is slower.
"""

from __future__ import annotations

import base64
import functools
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from itertools import chain, islice
from operator import countOf
from typing import Any

import numpy as np

from mms_lite.errors import BadTensor
from mms_lite.tensors import DTYPES, Array
from mms_lite.types import TensorSpec

_MOST_AXES = 32  # numpy's own limit before 2.0
_MOST_SHOWN = 80  # characters of a value in a message
_EXACT = 1 << 53  # from it on a float may not be the integer that was written
_SHORT = (np.dtype(np.float16), np.dtype(np.float32))
_COMPACT = (",", ":")  # between elements, after names
_NUMBERS = frozenset({int, float})
_TYPES: dict[str, frozenset[type]] = {  # by numpy's kind: what JSON may bring for it
    "b": frozenset({bool, int}),
    "i": _NUMBERS,
    "u": _NUMBERS,
    "f": _NUMBERS,
    "O": frozenset({str, dict}),
}
_FEW = 1 << 12  # elements, which take longer together than a table of all
_NAMES = {str: "text", bool: "a boolean", dict: "an object", int: "a number", float: "a number"}


def encode(array: Array, *, as_base64: bool = False) -> bytes:
    """Return an array as nested lists: each number in the fewest digits of its datatype.

    What is not finite becomes NaN, Infinity or -Infinity. Elements of BYTES become texts; those that are not
    UTF-8, and all with `as_base64`, {"b64": "..."}.
    """
    if array.dtype.kind in "OSU":
        return _dumps(_nested([_text_or_object(e, as_base64) for e in array.flat], array.shape))
    wide = DTYPES.get("BF16")
    if wide is not None and array.dtype == wide:  # None equals float64
        array = array.astype(np.float32)
    orjson = _orjson()
    if orjson is None or (array.dtype == np.float16 and array.size < _FEW):
        return _encode_slowly(array)
    if array.dtype == np.float16:  # which orjson writes with the digits of a float32
        array = _halves()[array.view(np.uint16)]
    if not array.shape:
        return encode(array.reshape(1))[1:-1]
    text: bytes = orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return text
    flat = array.reshape(-1)
    tokens = [json.dumps(each).encode() for each in flat[~np.isfinite(flat)].tolist()]
    pieces = text.split(b"null")  # what orjson writes for each of them
    return b"".join(chain.from_iterable(zip(pieces, [*tokens, b""], strict=True)))


def encode_rows(array: Array, *, as_base64: bool = False) -> list[bytes]:
    """Return what `encode` writes of each part along the first axis: a call for each takes far longer."""
    if array.dtype.kind in "OSU":
        rows = _nested([_text_or_object(e, as_base64) for e in array.flat], array.shape)
        return [_dumps(row) for row in rows]
    if not array.size:
        return [encode(each) for each in array]
    depth = array.ndim - 1
    start, end = b"[" * depth, b"]" * depth
    pieces = encode(array)[depth + 1 : -depth - 1].split(end + b"," + start)
    return [start + piece + end for piece in pieces] if depth else pieces


def to_array(value: Any, spec: TensorSpec, *, finite: bool = False) -> Array:
    """Return the array of the datatype of `spec` that a number or nested lists hold; its shape is theirs.

    Floats are rounded to the datatype; numbers for integers must be whole. Elements of BYTES are texts, or
    {"b64": "..."} for what is no text. With `finite`, neither NaN nor Infinity is a number.

    Raises:
        BadTensor: the lists are ragged (details: ragged), or an element is none of the datatype's.
    """
    flat, shape = _flatten(value, spec)
    kind = kind_of(spec.datatype)
    if kind != "f" or countOf(map(type, flat), float) != len(flat):  # else: nothing to look for
        allowed = _TYPES[kind]
        if not allowed.issuperset(map(type, flat)):
            at = _first(flat, lambda each: type(each) not in allowed)
            if type(flat[at]) is list:
                raise _ragged(spec, f"not all elements {len(shape)} deep are lists")
            raise _bad_element(spec, flat, shape, at, _NAMES.get(type(flat[at]), "null"))
    if kind == "f":
        array = _floats(flat, shape, spec, finite=finite)
    elif kind in "iu":
        array = _integers(flat, shape, spec)
    elif kind == "O":
        array = _texts(flat, shape, spec)
    else:
        array = _booleans(flat, shape, spec)
    return array.reshape(shape)


def kind_of(datatype: str) -> str:
    """Return numpy's kind of a datatype; BF16, of which numpy knows nothing, is a float, too."""
    return "f" if datatype == "BF16" else DTYPES[datatype].kind


def misfit(spec: TensorSpec, got: str, **details: Any) -> BadTensor:
    """Return the error for an input whose value cannot be the model's."""
    expected = str(spec).removeprefix(f"{spec.name} ")
    return BadTensor(f"input {spec.name!r} does not fit: the model expects {expected}, got {got}", **details)


@functools.cache
def _orjson() -> Any:
    """Return orjson, or None where it is not installed."""
    try:
        return importlib.import_module("orjson")
    except ModuleNotFoundError:
        return None


@functools.cache
def _halves() -> Array:
    """Return each float16, by its bits, as the float64 that is written with the same digits [65536]."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return np.array([float(str(each)) for each in every])


def _dumps(value: Any) -> bytes:
    """Return a value without floats as compact JSON."""
    orjson = _orjson()
    if orjson is None:
        return json.dumps(value, ensure_ascii=False, separators=_COMPACT).encode()
    text: bytes = orjson.dumps(value)
    return text


def _encode_slowly(array: Array) -> bytes:
    flat = array.reshape(-1)
    # Python's float of a float32 is 0.10000000149011612: longer than its own 0.1.
    values = [float(str(each)) for each in flat] if array.dtype in _SHORT else flat.tolist()
    return json.dumps(_nested(values, array.shape), separators=_COMPACT).encode()


def _nested(flat: list[Any], shape: Sequence[int]) -> Any:
    for axis in range(len(shape) - 1, 0, -1):
        length, count = shape[axis], math.prod(shape[:axis])
        flat = [flat[at * length : (at + 1) * length] for at in range(count)]
    return flat if shape else flat[0]


def _text_or_object(element: Any, as_base64: bool) -> Any:
    if not isinstance(element, bytes):
        return str(element)
    if not as_base64:
        try:
            return element.decode("utf-8")
        except UnicodeDecodeError:
            pass
    return {"b64": base64.b64encode(element).decode("ascii")}


def _flatten(value: Any, spec: TensorSpec) -> tuple[list[Any], list[int]]:
    """Return the elements of nested lists in C order, and the lists' shape."""
    items, shape = [value], list[int]()
    while items and type(items[0]) is list:
        if countOf(map(type, items), list) != len(items):
            raise _ragged(spec, f"not all elements {len(shape)} deep are lists")
        lengths = sorted(set(map(len, items)))
        if len(lengths) != 1:
            counts = " and ".join(map(str, lengths[:3]))
            raise _ragged(spec, f"lists beside each other, {len(shape)} deep, have {counts} elements")
        if len(shape) == _MOST_AXES:
            raise misfit(spec, f"lists nested more than {_MOST_AXES} deep")
        shape += lengths
        items = list(chain.from_iterable(items))
    return items, shape


def _ragged(spec: TensorSpec, fault: str) -> BadTensor:
    return misfit(spec, f"a ragged list: {fault}", ragged=True)


def _first(flat: Sequence[Any], matches: Callable[[Any], bool]) -> int:
    return next(index for index, each in enumerate(flat) if matches(each))


def _bad_element(
    spec: TensorSpec, flat: Sequence[Any], shape: Sequence[int], at: int, fault: str
) -> BadTensor:
    """Return the error for one element, which says where it stands: [row, column, ...]."""
    element = flat[at][:_MOST_SHOWN] if type(flat[at]) is str else flat[at]
    try:  # no more of it than is shown: it may be as long as the request
        shown = "".join(islice(json.JSONEncoder().iterencode(element), _MOST_SHOWN + 1))
    except RecursionError:
        shown = "..."
    if len(shown) > _MOST_SHOWN:
        shown = shown[:_MOST_SHOWN] + "..."
    place = [int(index) for index in np.unravel_index(at, tuple(shape))] if shape else []
    return misfit(spec, f"{fault}: {shown} at {place}")


def _integers(flat: list[Any], shape: Sequence[int], spec: TensorSpec) -> Array:
    if countOf(map(type, flat), int) != len(flat):
        if not all(type(each) is int or _is_whole(each) for each in flat):
            at = _first(flat, lambda each: type(each) is float and not _is_whole(each))
            fault = "too large to be exact" if flat[at].is_integer() else "that is not whole"
            raise _bad_element(spec, flat, shape, at, f"a number {fault}")
        flat = list(map(int, flat))
    dtype = DTYPES[spec.datatype]
    bounds = np.iinfo(dtype)
    try:
        wide = np.array(flat, dtype if dtype == np.uint64 and min(flat, default=0) >= 0 else np.int64)
        fits = not wide.size or (bounds.min <= int(wide.min()) and int(wide.max()) <= bounds.max)
    except OverflowError:
        fits = False
    if not fits:
        at = _first(flat, lambda each: not bounds.min <= each <= bounds.max)
        raise _bad_element(spec, flat, shape, at, f"a number out of range ({bounds.min} to {bounds.max})")
    return wide.astype(dtype, copy=False)


def _is_whole(number: float) -> bool:
    return number.is_integer() and abs(number) < _EXACT


def _booleans(flat: list[Any], shape: Sequence[int], spec: TensorSpec) -> Array:
    if not {0, 1}.issuperset(flat):
        at = _first(flat, lambda each: each not in (0, 1))
        raise _bad_element(spec, flat, shape, at, "a number that is neither 0 nor 1")
    return np.array(flat, np.bool_)


def _floats(flat: list[Any], shape: Sequence[int], spec: TensorSpec, *, finite: bool) -> Array:
    try:
        exact = np.array(flat, np.float64)
    except OverflowError:
        at = _first(flat, lambda each: abs(each) > sys.float_info.max)
        raise _bad_element(spec, flat, shape, at, "a number out of range") from None
    with np.errstate(over="ignore"):
        array: Array = exact.astype(DTYPES[spec.datatype])
    if np.isfinite(array).all():
        return array
    bad = ~np.isfinite(array) if finite else np.isfinite(exact) & ~np.isfinite(array)
    if bad.any():
        at = int(bad.argmax())
        fault = "a number out of range" if math.isfinite(flat[at]) else "no finite number"
        raise _bad_element(spec, flat, shape, at, fault)
    return array


def _texts(flat: list[Any], shape: Sequence[int], spec: TensorSpec) -> Array:
    array = np.empty(len(flat), np.object_)
    for index, each in enumerate(flat):
        try:
            array[index] = each.encode("utf-8") if type(each) is str else from_base64(each)
        except (TypeError, ValueError) as error:
            fault = 'neither a text nor {"b64": "..."}'
            raise _bad_element(spec, flat, shape, index, fault) from error
    return array


def from_base64(element: dict[str, Any]) -> bytes:
    """Return the bytes that {"b64": "..."} stands for.

    Raises:
        TypeError, ValueError: it is something else.
    """
    (encoded,) = element.values()
    if "b64" not in element:
        raise ValueError("no b64")
    return base64.b64decode(encoded, validate=True)
