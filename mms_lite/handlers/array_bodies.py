"""Arrays as the bodies of requests and answers: .npy and .npz, checked before memory is taken, and JSON.

Apart from the tensor handler because what a hostile file may hold is known here, and nowhere else. Values in
JSON are read by `mms_lite.json_arrays`.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mms_lite import json_arrays
from mms_lite.errors import BadTensor, HandlerError
from mms_lite.json_arrays import kind_of, misfit
from mms_lite.tensors import DTYPES, Array
from mms_lite.types import TensorSpec

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK\x03\x04"
_ZIP_ENTRY = b"PK\x01\x02"  # begins each entry of a zip's list
_MOST_AXES = 32  # numpy's own limit before 2.0
_MOST_SHOWN = 80  # characters of a value in a message
_MOST_ELEMENTS = 1 << 60
_MOST_HEADER_BYTES = 10_000  # numpy's own limit
_MOST_ENTRIES = 1_000
_UNPACKED_BYTES = 16 << 20  # that any .npz may unpack to; a larger one to this many times its own size:
_MOST_TIMES = 8
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
# numpy.lib.format: the header is a Python dict of three keys; it is matched here, never evaluated.
_NPY_FIELD = re.compile(
    r"""(['"])(?P<key>descr|fortran_order|shape)\1\s*:\s*"""
    r"""(?P<value>'[^']*'|"[^"]*"|True|False|\([\d,\s]*\))\s*(?:,|$)"""
)
_NPY_DTYPE = re.compile(r"[<>|=]?[biuf]\d")
_CASTS = frozenset({"ii", "iu", "ui", "uu", "if", "uf", "ff"})  # numpy's kinds, from and to


def to_json(outputs: Mapping[str, Array]) -> bytes:
    """Return {name: nested lists} as compact JSON; each number in the fewest digits of its datatype.

    Raises:
        HandlerError: an output holds what JSON cannot carry.
    """
    return b"{" + b",".join(_json_pair(name, array) for name, array in outputs.items()) + b"}"


def from_npy(data: Any, name: str) -> Array:
    """Return the array of an .npy file (a buffer): native byte order, C order, aligned, writable.

    `name` is the input's, for messages. Source: the format's description, numpy.lib.format.

    Raises:
        BadTensor: no such file, one of objects, or one of another length than its header says.
    """
    view = memoryview(data)
    header, start = _npy_header(view, name)
    dtype, order, shape = _npy_fields(header, name)
    shown = _shortened(header)
    needed, found = math.prod(shape) * dtype.itemsize, len(view) - start
    if needed != found:
        raise BadTensor(
            f"input {name!r} is not a whole .npy file: its header says {shown}, "
            f"which is {needed} bytes, and {found} bytes follow"
        )
    if not needed:
        raise BadTensor(f"input {name!r} is empty: the header of its .npy file says {shown}")
    array = np.frombuffer(view[start:], dtype).reshape(shape, order="F" if order == "True" else "C")
    return np.require(array, dtype.newbyteorder("="), ["C", "A", "W"])


def from_npz(data: Any, names: Sequence[str]) -> dict[str, Array]:
    """Return the arrays of an .npz file (a buffer), whose entries may have these names.

    Raises:
        BadTensor: no such file, another entry, or too much in it.
    """
    raw = bytes(data)
    if raw.count(_ZIP_ENTRY) > _MOST_ENTRIES:  # at most as many; told before a list is made of them
        raise BadTensor(f"the .npz file has more than {_MOST_ENTRIES} entries")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return {name: from_npy(file, name) for name, file in _npz_entries(archive, names, len(raw))}
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        OSError,
        OverflowError,
        ValueError,
    ) as error:
        raise BadTensor(f"the .npz file cannot be read: {str(error) or 'it is cut short'}") from error


def can_be_cast(array: Array, spec: TensorSpec) -> bool:
    """Tell whether an array is of another datatype than the model's, of which `cast` might make it."""
    return array.dtype != DTYPES[spec.datatype] and array.dtype.kind + kind_of(spec.datatype) in _CASTS


def cast(array: Array, spec: TensorSpec) -> Array:
    """Return an array in the model's datatype where that keeps its values (floats are rounded).

    What has no such cast (floats for integers, booleans) is returned as it is.

    Raises:
        BadTensor: a value is out of the datatype's range.
    """
    if not can_be_cast(array, spec) or not array.size:
        return array
    wanted = DTYPES[spec.datatype]
    with np.errstate(over="ignore"):
        done: Array = array.astype(wanted)
    if kind_of(spec.datatype) == "f":
        fits = bool((np.isfinite(done) == np.isfinite(array)).all())
    else:
        bounds = np.iinfo(wanted)
        fits = bounds.min <= int(array.min()) and int(array.max()) <= bounds.max
    if not fits:
        raise misfit(spec, f"{array.dtype} values out of its range: {array.min()} to {array.max()}")
    return done


def to_npy(array: Array) -> bytes:
    """Return an array as an .npy file."""
    file = io.BytesIO()
    np.save(file, np.asarray(array, order="C"), allow_pickle=False)
    return file.getvalue()


def to_npz(outputs: Mapping[str, Array]) -> bytes:
    """Return arrays as an .npz file, uncompressed; equal arrays give equal bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in outputs.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _ZIP_EPOCH), to_npy(array))
    return file.getvalue()


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def _json_pair(name: str, array: Array) -> bytes:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise HandlerError(
            f"the output {name!r} holds NaN or Infinity, which JSON cannot carry; "
            "with Accept: application/x-npz the answer can"
        )
    try:
        return json.dumps(name).encode() + b":" + json_arrays.encode(array)
    except (TypeError, ValueError) as error:  # half of a surrogate pair
        raise HandlerError(f"the output {name!r} holds text that is not Unicode") from error


def _npy_header(view: memoryview, name: str) -> tuple[str, int]:
    """Return the header's text, and where the array's bytes begin."""
    head = bytes(view[: 12 + _MOST_HEADER_BYTES])
    if not head.startswith(NPY_MAGIC) or len(head) < 12 or head[6] not in (1, 2, 3):
        raise BadTensor(f"input {name!r} is not an .npy file")
    start, layout = (10, "<H") if head[6] == 1 else (12, "<I")
    (length,) = struct.unpack_from(layout, head, 8)
    if length > _MOST_HEADER_BYTES:
        raise BadTensor(
            f"input {name!r} has an .npy header of {length} bytes; the most is {_MOST_HEADER_BYTES}"
        )
    if start + length > len(view):
        raise BadTensor(f"input {name!r} is an .npy file that ends in its header")
    return head[start : start + length].decode("latin-1").strip(), start + length


def _npy_fields(header: str, name: str) -> tuple[np.dtype[Any], str, tuple[int, ...]]:
    """Return datatype, "True" for Fortran order, and shape."""
    shown = _shortened(header)
    found = {match["key"]: match["value"] for match in _NPY_FIELD.finditer(header.strip("{} "))}
    if "O" in found.get("descr", ""):
        raise BadTensor(f"input {name!r} is an .npy file of Python objects, which are never read: {shown}")
    try:
        descr, order, stated = found["descr"][1:-1], found["fortran_order"], found["shape"]
        dtype = np.dtype(descr) if _NPY_DTYPE.fullmatch(descr) else None
        shape = tuple(int(length) for length in stated.strip("()").split(",") if length.strip())
    except (KeyError, TypeError, ValueError):  # a key is missing, numpy has no such type, no number
        dtype, shape = None, ()
    known = dtype is not None and dtype.newbyteorder("=") in DTYPES.values()
    if dtype is None or not known or len(shape) > _MOST_AXES or math.prod(shape) > _MOST_ELEMENTS:
        raise BadTensor(f"input {name!r} is an .npy file with a header that cannot be used: {shown}")
    return dtype, order, shape


def _npz_entries(
    archive: zipfile.ZipFile, names: Sequence[str], size_bytes: int
) -> Iterator[tuple[str, bytes]]:
    entries = archive.infolist()
    found = [entry.filename.removesuffix(".npy") for entry in entries]
    wanted = ", ".join(f"{name}.npy" for name in names)
    for name, entry in zip(found, entries, strict=True):
        if name not in names or found.count(name) > 1:
            raise BadTensor(f"the .npz file should have one each of {wanted}; got: {entry.filename!r}")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise BadTensor(f"input {name!r} is compressed or encrypted in a way that is not read")
    total, most = sum(entry.file_size for entry in entries), max(_UNPACKED_BYTES, _MOST_TIMES * size_bytes)
    if total > most:
        raise BadTensor(
            f"the .npz file of {size_bytes} bytes unpacks to {total} bytes; the most is {most}: "
            "send it uncompressed"
        )
    for name, entry in zip(found, entries, strict=True):
        with archive.open(entry) as file:
            # Never without a number: it would unpack more than the entry says, and then cut it off.
            yield name, file.read(entry.file_size)
