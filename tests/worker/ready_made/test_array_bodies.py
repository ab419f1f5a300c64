"""Arrays as bodies: what .npy and .npz may hold, what they may not, and what answers look like."""

import io
import json
import math
import struct
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mms_lite.errors import BadTensor, HandlerError
from mms_lite.handlers.array_bodies import cast, from_npy, from_npz, to_json, to_npy, to_npz
from mms_lite.tensors import DTYPES
from mms_lite.types import TensorSpec

NUMBERS = [name for name in DTYPES if name not in ("BYTES", "BF16")]  # numpy's files have no bfloat16


def spec(datatype: str) -> TensorSpec:
    return TensorSpec("x", datatype, (-1, -1))


def npy(array: Any, **options: Any) -> bytearray:
    file = io.BytesIO()
    np.save(file, array, **options)
    return bytearray(file.getvalue())


def npy_of(header: str, data: bytes = b"", version: int = 1) -> bytearray:
    text = header.encode("latin-1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return bytearray(b"\x93NUMPY" + bytes([version, 0]) + length + text + data)


def npz(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return bytearray(file.getvalue())


# --- JSON out


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0), fill=st.nothing()))
@settings(max_examples=50, deadline=None)
def test_floats_are_written_in_the_fewest_digits_that_read_back_the_same(array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        with pytest.raises(HandlerError, match="'y' holds NaN or Infinity"):
            to_json({"y": array})
        return
    back = np.array(json.loads(to_json({"y": array}))["y"], np.float32)
    np.testing.assert_array_equal(back.reshape(array.shape), array)


def test_json_answers_hold_every_output_by_name_in_short_digits() -> None:
    outputs = {
        "prob": np.array([[0.1, 1e-20, 3.0, 1e20]], np.float32),
        "half": np.array([0.1], np.float16),
        "wide": np.array(0.1),
        "class": np.array([[7]]),
        "text": np.array([b"gr\xc3\xbcn", b"\xff", "s"], np.object_),
        "none": np.empty((2, 0), np.float32),
        "yes": np.array([True]),
    }
    assert to_json(outputs) == (
        b'{"prob":[[0.1,1e-20,3.0,1e+20]],"half":[0.1],"wide":0.1,"class":[[7]],'
        b'"text":["gr\xc3\xbcn",{"b64":"/w=="},"s"],"none":[[],[]],"yes":[true]}'
    )
    with pytest.raises(HandlerError, match="the output 't' holds text that is not Unicode"):
        to_json({"t": np.array(["\ud800"], np.object_)})


# --- .npy


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_npy_files_of_every_byte_order_and_layout_are_read_as_numpy_reads_them(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([DTYPES[name] for name in NUMBERS]))
    dtype = dtype.newbyteorder(data.draw(st.sampled_from("<>")))
    array = data.draw(arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_side=4)))
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    found = from_npy(npy(array), "x")
    assert found.dtype.isnative
    assert found.flags.c_contiguous and found.flags.aligned and found.flags.writeable
    np.testing.assert_array_equal(found, array)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (npy_of(HEADER, bytes(7)), "which is 8 bytes, and 7 bytes follow"),
        (npy_of(HEADER, bytes(9)), "which is 8 bytes, and 9 bytes follow"),
        (npy_of(HEADER.replace("2,", "2000000000, 2000000"), bytes(8)), "bytes, and 8 bytes follow"),
        (npy_of(HEADER.replace("2,", "9" * 30), bytes(8)), "a header that cannot be used"),
        (npy_of(HEADER.replace("2,", "9" * 5000), bytes(8)), "a header that cannot be used"),
        (npy_of(HEADER.replace("2,", "1," * 33), bytes(4)), "a header that cannot be used"),
        (npy_of(HEADER.replace("2,", "-2,"), bytes(8)), "a header that cannot be used"),
        (npy_of(HEADER.replace("2,", "2, x"), bytes(8)), "a header that cannot be used"),
        (npy_of(HEADER.replace("2,", "0, 1000000000000000"), b""), "is empty"),
        (npy_of(HEADER.replace("<f4", "<f3"), bytes(8)), "a header that cannot be used"),
        (npy_of(HEADER.replace("<f4", "<c8"), bytes(16)), "a header that cannot be used"),
        (npy_of(HEADER.replace("<f4", "<U1"), bytes(8)), "a header that cannot be used"),
        (npy_of(HEADER.replace("'<f4'", "[('a', '<f4')]"), bytes(8)), "a header that cannot be used"),
        (npy_of("__import__('os').abort()"), "a header that cannot be used"),
        (npy_of("-" * 9_999), "a header that cannot be used"),
        (npy_of(" " * 10_001), "has an .npy header of 10001 bytes"),
        (npy_of("x", version=2)[:8] + b"\xff\xff\xff\xff" + bytes(20), "an .npy header of 4294967295 bytes"),
        (npy_of(HEADER, bytes(8))[:20], "ends in its header"),
        (npy_of(HEADER, bytes(8), version=4), "is not an .npy file"),
        (bytearray(b"\x93NUMPY"), "is not an .npy file"),
        (npy(np.array([{}]), allow_pickle=True), "Python objects, which are never read"),
    ],
)
def test_an_npy_file_that_is_not_what_it_says_is_refused(file: bytearray, message: str) -> None:
    with pytest.raises(BadTensor) as caught:
        from_npy(file, "x")
    assert caught.value.message.startswith("input 'x' ")
    assert message in caught.value.message
    assert len(caught.value.message) < 300


# --- .npz


def test_npz_files_of_numpy_are_read_compressed_or_not() -> None:
    x, y = np.arange(6.0).reshape(2, 3), np.array(5)
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, x=x, **{"in/y:0": y})
        found = from_npz(bytearray(file.getvalue()), ["x", "in/y:0"])
        np.testing.assert_array_equal(found["x"], x)
        np.testing.assert_array_equal(found["in/y:0"], y)
        assert all(each.flags.aligned and each.flags.writeable for each in found.values())


def with_false_size(file: bytearray, size: int) -> bytearray:
    """Have the zip's list say that its one entry unpacks to this size."""
    at = file.index(b"PK\x01\x02")
    file[at + 24 : at + 28] = struct.pack("<I", size)
    return file


X = bytes(npy(np.zeros(2)))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (npz([(f"{n}.npy", b"") for n in range(10_000)]), "more than 1000 entries"),
        (npz([("x.npy", npz([("x.npy", X)]))]), "input 'x' is not an .npy file"),
        (npz([("../../x.npy", X)]), "one each of x.npy; got: '../../x.npy'"),
        (npz([("x.npy", X), ("x", X)]), "one each of x.npy"),
        (npz([("x.npy", X)], zipfile.ZIP_LZMA), "in a way that is not read"),
        (npz([("x.npy", b"")]), "input 'x' is not an .npy file"),
        (with_false_size(npz([("x.npy", X)]), 10**9), "unpacks to 1000000000 bytes; the most is 16777216"),
        (with_false_size(npz([("x.npy", X)]), len(X) - 1), "cannot be read"),
        (npz([("x.npy", X)])[:-30], "cannot be read"),
        (bytearray(b"PK\x03\x04"), "cannot be read"),
    ],
)
def test_an_npz_file_that_is_hostile_or_damaged_is_refused(file: bytearray, message: str) -> None:
    with pytest.raises(BadTensor) as caught:
        from_npz(file, ["x"])
    assert message in caught.value.message


def test_an_npz_entry_that_unpacks_to_more_than_it_says_is_not_unpacked() -> None:
    file = with_false_size(npz([("x.npy", X + bytes(50_000_000))]), len(X))
    tracemalloc.start()
    try:
        with pytest.raises(BadTensor, match="cannot be read"):
            from_npz(file, ["x"])
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_an_npz_file_unpacks_to_what_a_small_body_or_eight_of_its_own_may_hold() -> None:
    zeros, noise = np.zeros(4 << 20, np.uint8), np.random.default_rng(0).bytes(3 << 20)
    for entries in ([zeros] * 3, [zeros] * 5 + [np.frombuffer(noise, np.uint8)]):
        file = npz([(f"{n}.npy", bytes(npy(array))) for n, array in enumerate(entries)])
        assert len(from_npz(file, [str(n) for n in range(len(entries))])) == len(entries)
    bomb = npz([(f"{n}.npy", bytes(npy(zeros))) for n in range(4)])
    with pytest.raises(BadTensor, match="unpacks to 16777728 bytes; the most is 16777216: send it uncompr"):
        from_npz(bomb, list("0123"))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_is_refused_or_read_and_never_breaks_the_reader(data: st.DataObject) -> None:
    compression = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    file = npz([("x.npy", X)], compression)
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        from_npz(file, ["x"])
    except BadTensor as error:
        assert error.message


def test_answers_as_files_are_read_by_numpy_and_are_the_same_each_time() -> None:
    outputs = {"y/0": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)), "n": np.array(3)}
    found = np.load(io.BytesIO(to_npz(outputs)))
    assert list(found) == ["y/0", "n"]
    np.testing.assert_array_equal(found["y/0"], outputs["y/0"])
    assert to_npz(outputs) == to_npz(outputs)
    np.testing.assert_array_equal(np.load(io.BytesIO(to_npy(outputs["y/0"]))), outputs["y/0"])


# --- casts


@pytest.mark.parametrize(
    ("array", "datatype"),
    [
        (np.array([0.1]), "FP32"),
        (np.array([255]), "UINT8"),
        (np.array([7], np.uint64), "INT32"),
        (np.array([7]), "FP32"),
        (np.array([math.nan, math.inf]), "FP32"),
        (np.array([0.5], np.float32), "BF16"),
    ],
)
def test_a_cast_keeps_values(array: np.ndarray, datatype: str) -> None:
    found = cast(array, spec(datatype))
    assert found.dtype == DTYPES[datatype]
    np.testing.assert_allclose(found.astype(array.dtype), array, rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "datatype"),
    [
        (np.array([1e39]), "FP32"),
        (np.array([1e39]), "BF16"),
        (np.array([256]), "UINT8"),
        (np.array([2**63], np.uint64), "INT64"),
    ],
)
def test_a_cast_that_would_change_values_is_refused(array: np.ndarray, datatype: str) -> None:
    with pytest.raises(BadTensor, match="values out of its range"):
        cast(array, spec(datatype))


def test_floats_and_booleans_are_never_cast_to_integers() -> None:
    for array in (np.array([1.0]), np.array([True])):
        assert cast(array, spec("INT32")) is array
