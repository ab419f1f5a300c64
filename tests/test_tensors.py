"""Arrays and tensors: each datatype there and back, the layout of BYTES, and tensors that are not as said."""

import struct
from collections.abc import Sequence

import numpy as np
import pytest

from mms_lite.errors import BadTensor
from mms_lite.tensors import DTYPES, datatype, describe, texts, to_array, to_tensor
from mms_lite.types import BYTES, Tensor

NUMBERS = [name for name in DTYPES if name != BYTES]


def packed(*elements: bytes) -> bytearray:
    """Return elements in KServe's layout: each after its length, four bytes, little endian."""
    return bytearray(b"".join(struct.pack("<I", len(each)) + each for each in elements))


def text_tensor(data: bytes | bytearray, shape: Sequence[int]) -> Tensor:
    return Tensor("x", BYTES, tuple(shape), data)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("shape", [(2, 3), (4,), (), (0, 3)])
def test_each_datatype_goes_there_and_back(name: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2).astype(DTYPES[name])
    tensor = to_tensor("x", array)
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", name, shape)
    assert bytes(tensor.data) == array.tobytes()
    back = to_array(tensor)
    assert (back.dtype, back.shape, back.tolist()) == (array.dtype, shape, array.tolist())


def test_numbers_cross_without_a_copy_both_ways() -> None:
    array = np.ones((2, 3), np.float32)
    assert np.shares_memory(to_array(to_tensor("x", array)), array)


def test_arrays_of_another_layout_or_byte_order_are_sent_in_c_order_and_little_endian() -> None:
    turned = np.arange(6, dtype=np.int16).reshape(2, 3).T
    assert bytes(to_tensor("x", turned).data) == struct.pack("<6h", 0, 3, 1, 4, 2, 5)
    big = np.array([1, 2], ">i4")
    assert to_tensor("x", big).datatype == "INT32"
    assert bytes(to_tensor("x", big).data) == struct.pack("<2i", 1, 2)


@pytest.mark.parametrize(
    "array",
    [
        np.array([[b"\xff\0", b""], ["é".encode(), b"x" * 300]], np.object_),
        np.array([["a", ""], ["é", "x"]]),
        np.array([[b"a", b""], [b"b", b"x"]]),
        np.array([["a", 7], [b"b", 1.5]], np.object_),
        np.array([[bytearray(b"a\xff"), memoryview(b"b")], [b"", ""]], np.object_),
    ],
)
def test_text_and_bytes_are_elements_after_their_lengths(array: np.ndarray) -> None:
    raw = (bytes, bytearray, memoryview)
    elements = [bytes(e) if isinstance(e, raw) else str(e).encode() for e in array.reshape(-1)]
    tensor = to_tensor("x", array)
    assert (tensor.datatype, tensor.shape, tensor.data) == (BYTES, (2, 2), packed(*elements))
    assert to_array(tensor).tolist() == [elements[:2], elements[2:]]


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (packed(b"a"), [2]),  # one too few
        (packed(b"a", b"b"), [1]),  # one too many
        (packed(b"abc")[:-1], [1]),  # cut within an element
        (packed(b"abc")[:3], [1]),  # cut within a length
        (packed(b"a") + b"\0", [1]),  # more behind it
        (struct.pack("<I", 2**32 - 1), [1]),  # a length past all
        (b"", [1 << 60]),  # a shape past all memory
        (packed(b"a"), [0]),
    ],
)
def test_bytes_that_do_not_hold_their_elements_are_refused(data: bytes, shape: list[int]) -> None:
    with pytest.raises(
        BadTensor, match=r"input 'x' is declared with \d+ elements, which its bytes do not hold"
    ):
        to_array(text_tensor(data, shape))


@pytest.mark.parametrize("word", [np.array("é"), np.array(b"\xc3\xa9", np.object_)])
def test_a_text_without_an_axis_gets_one_as_without_it_would_be_a_body(word: np.ndarray) -> None:
    tensor = to_tensor("x", word)
    assert (tensor.shape, to_array(tensor).tolist()) == ((1,), ["é".encode()])


def test_no_elements_and_empty_elements_are_something_else() -> None:
    assert to_array(text_tensor(b"", [0, 4])).shape == (0, 4)
    assert to_array(text_tensor(packed(b"", b""), [2])).tolist() == [b"", b""]
    assert to_array(text_tensor(packed(b"one"), [])).item() == b"one"


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (
            Tensor("x", "FP32", (2, 3), bytes(20)),
            r"'x' is declared as FP32 \[2,3\], which is 24 bytes, and has 20",
        ),
        (Tensor("x", "FP32", (), bytes(8)), r"FP32 \[\], which is 4 bytes, and has 8"),
        (Tensor("x", "FP32", (1 << 40, 1 << 40), b""), r"and has 0"),
        (Tensor("x", "FP8", (1,), bytes(1)), "'x' has the unknown datatype FP8"),
        (Tensor("x", "fp32", (1,), bytes(4)), "'x' has the unknown datatype fp32"),
        (Tensor("x", "FP32", (-1, -3), bytes(12)), "'x' has a negative length in its shape"),
        (Tensor("x", BYTES, (-1,), b""), "'x' has a negative length in its shape"),
    ],
)
def test_a_tensor_that_is_not_what_it_says_is_refused(tensor: Tensor, says: str) -> None:
    with pytest.raises(BadTensor, match=says):
        to_array(tensor)


@pytest.mark.parametrize("kind", [np.complex64, "datetime64[s]", np.longdouble])
def test_arrays_that_have_no_datatype_cannot_be_sent(kind: str | type) -> None:
    array = np.zeros(2, kind)
    with pytest.raises(BadTensor, match=f"arrays of type {array.dtype} cannot be sent".replace("[", r"\[")):
        to_tensor("x", array)
    assert describe(array) == f"{array.dtype} [2]"


def test_arrays_are_described_as_messages_show_them() -> None:
    assert describe(np.zeros((1, 3, 224, 224), np.float32)) == "FP32 [1,3,224,224]"
    assert describe(np.array("a")) == "BYTES []"
    assert datatype(np.zeros(1, ">f8")) == "FP64"


def test_frameworks_get_bytes_as_text_and_the_client_is_told_what_is_none() -> None:
    array = np.array([["é".encode(), "ü"], [b"", 7]], np.object_)
    assert texts("x", array).tolist() == [["é", "ü"], ["", "7"]]
    with pytest.raises(BadTensor, match="input 'x' has text that is not UTF-8"):
        texts("x", np.array([b"ok", b"\xff"], np.object_))
