"""Arrays as JSON: exact both ways, and what is refused."""

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mms_lite import json_arrays
from mms_lite.errors import BadTensor
from mms_lite.frontends.json_bodies import loads
from mms_lite.json_arrays import encode, encode_rows, to_array
from mms_lite.tensors import DTYPES
from mms_lite.types import BYTES, TensorSpec

SHAPES = arrays.array_shapes(min_dims=0, min_side=1, max_dims=4, max_side=4)
NUMBERS = sorted(set(DTYPES) - {BYTES, "BF16"})


def spec(datatype: str, shape: tuple[int, ...] | None = None) -> TensorSpec:
    return TensorSpec("x", datatype, shape)


@pytest.mark.parametrize("datatype", NUMBERS)
@given(data=st.data())
def test_numbers_come_back_as_they_were(datatype: str, data: st.DataObject) -> None:
    array = data.draw(arrays.arrays(DTYPES[datatype], data.draw(SHAPES)))
    back = to_array(loads(encode(array)), spec(datatype))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert np.array_equal(back, array, equal_nan=array.dtype.kind == "f")
    if array.dtype.kind == "f":
        assert np.array_equal(np.signbit(back), np.signbit(array) & ~np.isnan(array))


@given(bits=arrays.arrays(np.uint16, 8))
def test_bfloat16(bits: np.ndarray) -> None:
    array = bits.view(ml_dtypes.bfloat16)
    wide = array.astype(np.float32)
    assert np.array_equal(to_array(loads(encode(array)), spec("BF16")).astype("f"), wide, equal_nan=True)


@given(elements=st.lists(st.binary(max_size=10) | st.text(max_size=10).map(str.encode), min_size=1))
def test_texts_and_bytes(elements: list[bytes]) -> None:
    array = np.array([*elements, None], np.object_)[:-1]
    assert to_array(loads(encode(array)), spec(BYTES)).tolist() == elements
    assert all(each.keys() == {"b64"} for each in loads(encode(array, as_base64=True)))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.object_])
def test_arrays_without_elements(shape: tuple[int, ...], dtype: Any) -> None:
    assert loads(encode(np.zeros(shape, dtype))) == np.zeros(shape).tolist()


def test_numbers_have_their_fewest_digits() -> None:
    assert encode(np.float32([0.1, 1 / 3, 1e-45, 3e38])) == b"[0.1,0.33333334,1e-45,3e+38]"
    assert encode(np.array(2.5, np.float32)) == b"2.5"


def test_what_is_no_number() -> None:
    array = np.array([[math.nan, 1], [math.inf, -math.inf]], np.float32)
    assert encode(array) == b"[[NaN,1.0],[Infinity,-Infinity]]"


def test_every_float16_has_its_fewest_digits() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    written = encode(every)
    digits = [json.loads(str(each).replace("nan", "NaN").replace("inf", "Infinity")) for each in every]
    np.testing.assert_array_equal(loads(written), digits)
    assert len(written) < 8 * len(every)
    few = every[:4000].reshape(2, 2000)
    assert loads(encode(few)) == [digits[:2000], digits[2000:4000]]


def test_float64_keeps_its_digits_where_bfloat16_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DTYPES, "BF16")  # as without ml_dtypes
    assert encode(np.array([0.1, 1 / 3, 123456789.123])) == b"[0.1,0.3333333333333333,123456789.123]"


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (0, 3), (3, 0), (2, 0, 2), (1, 1), (3, 2), (2, 3, 1, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.bool_, np.object_])
def test_rows_are_written_as_the_whole_is(shape: tuple[int, ...], dtype: Any) -> None:
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    if dtype is np.object_:
        array[...] = b'],["\xc3\xbc'
    rows = encode_rows(array)
    assert len(rows) == shape[0]
    assert b"[" + b",".join(rows) + b"]" == encode(array)


@pytest.mark.parametrize("without_orjson", [False, True])
def test_what_is_written_is_the_same_without_orjson(
    without_orjson: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_orjson:
        monkeypatch.setattr(json_arrays, "_orjson", lambda: None)
    for array, text in (
        (np.float32([[0.1, math.nan], [1 / 3, -math.inf]]), "[[0.1,NaN],[0.33333334,-Infinity]]"),
        (np.float16([0.1, 1 / 3]), "[0.1,0.3333]"),
        (np.float64(0.1), "0.1"),
        (np.array([[], []], np.float32), "[[],[]]"),
        (np.array([[1 << 63]], np.uint64), "[[9223372036854775808]]"),
        (np.array([True, False]), "[true,false]"),
        (np.array([["gr\u00fcn", b"\xff"]], np.object_), '[["gr\u00fcn",{"b64":"/w=="}]]'),
    ):
        assert encode(np.asarray(array)).decode() == text


@pytest.mark.parametrize(
    ("value", "datatype", "fault"),
    [
        ([[1], [2, 3]], "FP32", "a ragged list: lists beside each other, 1 deep, have 1 and 2 elements"),
        ([[1], 2], "FP32", "a ragged list: not all elements 1 deep are lists"),
        ([1, [2]], "FP32", "a ragged list: not all elements 1 deep are lists"),
        ([1.5, [2]], "INT8", "a ragged list: not all elements 1 deep are lists"),
        (["a"], "FP32", 'text: "a" at [0]'),
        ("a", "FP32", 'text: "a" at []'),
        ([[1, True]], "FP32", "a boolean: true at [0, 1]"),
        ([None], "FP64", "null: null at [0]"),
        ([{"b64": ""}], "INT8", 'an object: {"b64": ""} at [0]'),
        ([1e39], "FP32", "a number out of range: 1e+39 at [0]"),
        ([[1], [70000]], "FP16", "a number out of range: 70000 at [1, 0]"),
        ([1, 10**400], "FP64", "a number out of range: 1" + 79 * "0" + "... at [1]"),
        ([1.5], "INT32", "a number that is not whole: 1.5 at [0]"),
        ([1, math.inf], "INT32", "a number that is not whole: Infinity at [1]"),
        ([2.0**53], "INT64", "a number too large to be exact: 9007199254740992.0 at [0]"),
        ([-(2.0**63) - 1], "INT64", "a number too large to be exact: -9.223372036854776e+18 at [0]"),
        ([-1.0], "UINT8", "a number out of range (0 to 255): -1 at [0]"),
        ([1 << 63], "INT64", f"a number out of range (-{1 << 63} to {(1 << 63) - 1}): {1 << 63} at [0]"),
        ([[0, 128]], "INT8", "a number out of range (-128 to 127): 128 at [0, 1]"),
        ([-1], "UINT64", "a number out of range (0 to 18446744073709551615): -1 at [0]"),
        ([1 << 64], "UINT64", "a number out of range (0 to 18446744073709551615): 18446744073709551616"),
        ([2], "BOOL", "a number that is neither 0 nor 1: 2 at [0]"),
        ([0.5], "BOOL", "a number: 0.5 at [0]"),
        ([1], BYTES, "a number: 1 at [0]"),
        ([{"b64": "?"}], BYTES, 'neither a text nor {"b64": "..."}: {"b64": "?"} at [0]'),
        ([{"b64": 1}], BYTES, 'neither a text nor {"b64": "..."}: {"b64": 1} at [0]'),
        ([{"b64": "", "x": 1}], BYTES, 'neither a text nor {"b64": "..."}'),
        ([{"b65": ""}], BYTES, 'neither a text nor {"b64": "..."}'),
        (["\ud800"], BYTES, 'neither a text nor {"b64": "..."}'),
    ],
    ids=str,
)
def test_values_that_are_refused(value: Any, datatype: str, fault: str) -> None:
    with pytest.raises(BadTensor) as caught:
        to_array(value, spec(datatype))
    assert caught.value.message.startswith(
        f"input 'x' does not fit: the model expects {datatype} [...], got {fault}"
    )
    assert bool(caught.value.details.get("ragged")) == ("ragged" in fault)


class Unread(dict[str, Any]):
    """An object of which a message shows only the beginning."""

    def items(self) -> Any:
        yield "first", "a" * 100
        yield from ((f"n{number}", number) for number in range(100))
        raise AssertionError("who asked for more?")


def test_a_message_shows_the_beginning_of_what_may_be_long() -> None:
    shown = '{"first": "' + "a" * 69 + "..."
    for element, text in ((Unread(a=1), shown), ("b" * 1_000_000, '"' + "b" * 79 + "...")):
        with pytest.raises(BadTensor) as caught:
            to_array([element], spec("FP32"))
        assert f": {text} at [0]" in caught.value.message


def test_lists_that_are_nested_too_deep() -> None:
    value: Any = 1
    for _ in range(33):
        value = [value]
    with pytest.raises(BadTensor, match="nested more than 32 deep"):
        to_array(value, spec("FP32"))


def test_values_that_are_taken() -> None:
    assert to_array([1, 2.0, True and 3], spec("INT16")).tolist() == [1, 2, 3]
    assert to_array([0, 1, True], spec("BOOL")).tolist() == [False, True, True]
    assert to_array((1 << 64) - 1, spec("UINT64")) == (1 << 64) - 1
    assert to_array([], spec("INT8")).shape == (0,)
    assert to_array([[], []], spec("FP32")).shape == (2, 0)
    assert to_array(2.0**53 - 1, spec("INT64")) == (1 << 53) - 1
    assert to_array([math.nan], spec("FP16")).dtype == np.float16


def test_finite_numbers_alone_where_they_are_wanted() -> None:
    for number, shown in ((math.nan, "NaN"), (-math.inf, "-Infinity")):
        with pytest.raises(BadTensor, match=f"no finite number: {shown} at \\[1\\]"):
            to_array([1.0, number], spec("FP32"), finite=True)
