"""Bodies of inference requests and answers, in JSON and with binary tensors."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mms_lite.errors import BadTensor, HandlerError, InvalidRequest, ServingError
from mms_lite.frontends.kserve.codec import Asked, Format, parameters, read, read_header_length, write
from mms_lite.frontends.kserve.expected import Expected
from mms_lite.frontends.kserve.service import RequestedOutput
from mms_lite.shared import Arena, SharedBytes
from mms_lite.tensors import DTYPES, pack, to_array, to_tensor
from mms_lite.types import BYTES, InferResponse, ModelSpec, Signature, Tensor, TensorSpec

NUMBERS = sorted(set(DTYPES) - {"BF16", BYTES})
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)


def body_of(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


ANY = Expected.of(ModelSpec("m", "1", "/nowhere"), Signature())  # of bodies, which takes what there is


def ask(body: bytes, behind: bytes = b"", expected: Expected = ANY) -> Asked:
    return read(bytearray(body + behind), len(body), expected)


def one(**described: Any) -> Tensor:
    """Return the only input of a request that describes it so."""
    (tensor,) = ask(body_of({"name": "x", **described})).inputs
    return tensor


def answered(*outputs: Tensor, binary: bool = False, **fields: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return the JSON of an answer, and the pieces behind it."""
    answer = InferResponse(fields.pop("id", ""), "m", "3", outputs, **fields)
    pieces, length = write(answer, Format((), binary=binary))
    assert length == (len(pieces[0]) if binary else None)
    return json.loads(pieces[0]), list(pieces[1:])


@st.composite
def tensors(draw: st.DrawFn, kinds: list[str]) -> tuple[str, np.ndarray[Any, Any]]:
    kind = draw(st.sampled_from(kinds))
    shape = draw(SHAPES)
    if kind == BYTES:
        shape = shape or (1,)  # without an axis it would be a body
        elements = draw(st.lists(st.binary(max_size=9), min_size=math.prod(shape), max_size=math.prod(shape)))
        array = np.empty(len(elements), np.object_)
        array[:] = elements
        return kind, array.reshape(shape)
    if kind == "BF16":
        return kind, draw(arrays.arrays(np.float32, shape)).view(np.float32).astype(DTYPES[kind])
    return kind, draw(arrays.arrays(DTYPES[kind], shape))


def same(found: np.ndarray[Any, Any], array: np.ndarray[Any, Any]) -> bool:
    """Tell whether two arrays are equal; one NaN is like another."""
    if array.dtype.kind == "f":
        return bool(np.array_equal(found, array, equal_nan=True)) and found.dtype == array.dtype
    return found.dtype == array.dtype and found.tolist() == array.tolist()


@settings(max_examples=200, deadline=None)
@given(tensors([*NUMBERS, BYTES]), st.booleans())
def test_json_brings_every_value_there_and_back(case: tuple[str, Any], nested: bool) -> None:
    kind, array = case
    written, _ = answered(to_tensor("x", array))
    (output,) = written["outputs"]
    assert output["shape"] == list(array.shape)
    if nested:
        output["data"] = np.array(output["data"], np.object_).reshape(array.shape).tolist()
    tensor = one(**{key: output[key] for key in output if key != "name"})
    assert (tensor.datatype, tensor.shape) == (kind, array.shape)
    assert same(to_array(tensor), array)


@settings(max_examples=100, deadline=None)
@given(st.lists(tensors(sorted(DTYPES)), min_size=1, max_size=4), st.booleans())
def test_binary_tensors_come_in_order_and_uncopied(cases: list[tuple[str, Any]], shared: bool) -> None:
    made = [to_tensor(f"x{index}", array) for index, (_, array) in enumerate(cases)]
    outputs, pieces = answered(*made, binary=True)
    head = body_of(*outputs["outputs"])
    body: bytearray | SharedBytes = bytearray(head + b"".join(pieces))
    if shared:
        arena = Arena.create(1 << 20)
        place = arena.take(len(body)) if arena else None
        if place is not None:
            place.view[:] = body
            body = place
    for tensor, (_, array) in zip(read(body, len(head), ANY).inputs, cases, strict=True):
        data = tensor.data.view if isinstance(tensor.data, SharedBytes) else tensor.data
        whole = body.view if isinstance(body, SharedBytes) else body
        assert not array.size or np.shares_memory(
            np.frombuffer(data, np.uint8), np.frombuffer(whole, np.uint8)
        )
        found = to_array(Tensor(tensor.name, tensor.datatype, tensor.shape, data))
        assert found.tobytes() == array.tobytes() or found.tolist() == array.tolist()


def test_numbers_are_printed_in_the_fewest_digits_that_are_exact() -> None:
    written, _ = answered(
        to_tensor("a", np.array([0.1, 1e-45], np.float32)),
        to_tensor("b", np.array([2**63 - 1, -(2**63)], np.int64)),
        to_tensor("c", np.array([2**64 - 1], np.uint64)),
        to_tensor("d", np.array([True, False])),
        to_tensor("e", np.array([0.5], np.float16)),
    )
    found = [output["data"] for output in written["outputs"]]
    assert found == [[0.1, 1e-45], [2**63 - 1, -(2**63)], [2**64 - 1], [True, False], [0.5]]


def test_what_is_not_finite_is_written_as_clients_of_triton_read_it() -> None:
    pieces, _ = write(
        InferResponse("", "m", "1", [to_tensor("x", np.array([1, np.nan, np.inf, -np.inf], np.float32))]),
        Format((), binary=False),
    )
    assert b'"data":[1.0,NaN,Infinity,-Infinity]' in pieces[0]
    tensor = one(datatype="FP32", shape=[3], data=[math.nan, math.inf, -math.inf])
    assert same(to_array(tensor), np.array([np.nan, np.inf, -np.inf], np.float32))


@pytest.mark.parametrize("parameter", [1 << 70, "\udc80"])
def test_what_a_model_says_that_is_no_json_is_its_fault(parameter: Any) -> None:
    with pytest.raises(HandlerError, match="no JSON"):
        answered(parameters={"odd": parameter})


@pytest.mark.parametrize(
    "wrong",
    [
        {"datatype": "INT8", "shape": [1], "data": [300]},
        {"datatype": "FP32", "shape": [2], "data": [1.0]},
        {"datatype": "BF16", "shape": [1], "data": [1.0]},
        {"datatype": "BYTES", "shape": [1], "data": ["?"], "parameters": {"content_type": "base64"}},
    ],
)
@pytest.mark.parametrize(("name", "shown"), [({"id": "7"}, "7"), ({}, "<id_unknown>")])
def test_values_that_do_not_fit_are_told_with_the_id_of_their_request(
    wrong: dict[str, Any], name: dict[str, Any], shown: str
) -> None:
    with pytest.raises(BadTensor) as caught:
        ask(body_of({"name": "x", **wrong}, **name))
    assert caught.value.message.startswith(f"[request id: {shown}] ")


def test_an_answer_names_model_version_and_parameters_and_the_id_that_was_given() -> None:
    assert answered()[0] == {"model_name": "m", "model_version": "3", "outputs": []}
    said, _ = answered(id="42", parameters={"took": 1.5})
    assert said == {
        "model_name": "m", "model_version": "3", "id": "42", "parameters": {"took": 1.5}, "outputs": []
    }  # fmt: skip


def test_an_output_says_for_itself_whether_it_is_binary() -> None:
    outputs = [to_tensor(name, np.zeros(2, np.int8)) for name in "abc"]
    how = Format([RequestedOutput("a", True), RequestedOutput("b", False), RequestedOutput("c")], binary=True)
    pieces, length = write(InferResponse("", "m", "1", outputs), how)
    described = json.loads(pieces[0])["outputs"]
    assert [("data" in each, each.get("parameters")) for each in described] == [
        (False, {"binary_data_size": 2}), (True, None), (False, {"binary_data_size": 2})
    ]  # fmt: skip
    assert (length, len(pieces)) == (len(pieces[0]), 3)


def test_bytes_that_are_no_text_become_base64_and_keep_their_media_type() -> None:
    photo = b"\x89PNG\r\n"
    (output,) = answered(Tensor("body", BYTES, (1,), pack([photo]), "image/png"))[0]["outputs"]
    assert output["data"] == [base64.b64encode(photo).decode()]
    assert output["parameters"] == {"content_type": "base64", "media_type": "image/png"}
    (output,) = answered(Tensor("body", BYTES, (1,), pack([b"hi"]), "text/plain"))[0]["outputs"]
    assert (output["data"], output["parameters"]) == (["hi"], {"content_type": "text/plain"})


@pytest.mark.parametrize(
    "described",
    [
        {"data": [base64.b64encode(b"\xff\x00").decode()], "parameters": {"content_type": "base64"}},
        {"data": [{"b64": base64.b64encode(b"\xff\x00").decode()}]},
    ],
)
def test_bytes_come_in_base64_by_tensor_or_by_element(described: dict[str, Any]) -> None:
    tensor = one(datatype=BYTES, shape=[1], **described)
    assert (to_array(tensor).tolist(), tensor.content_type) == ([b"\xff\x00"], "")


def test_a_content_type_is_that_of_the_bodies() -> None:
    tensor = one(datatype=BYTES, shape=[1], data=["{}"], parameters={"content_type": "application/json"})
    assert tensor.content_type == "application/json"


def test_inputs_without_a_size_are_cut_by_their_shape() -> None:
    body = body_of(
        {"name": "a", "datatype": "INT16", "shape": [2]}, {"name": "b", "datatype": "UINT8", "shape": [1]}
    )
    assert [bytes(each.data) for each in ask(body, b"\1\0\2\0\3").inputs] == [b"\1\0\2\0", b"\3"]


def test_one_input_of_bytes_without_a_size_is_all_that_is_left() -> None:
    body = body_of({"name": "a", "datatype": BYTES, "shape": [1]})
    assert bytes(ask(body, pack([b"abc"])).inputs[0].data) == pack([b"abc"])


def test_an_input_without_elements_needs_no_data() -> None:
    assert one(datatype="FP32", shape=[0, 3]).data == b""


def test_whole_floats_are_integers() -> None:
    assert to_array(one(datatype="INT32", shape=[2], data=[1.0, 2])).tolist() == [1, 2]


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "no_name": ({"name": None}, "Unable to parse 'name'"),
    "no_datatype": ({"datatype": None}, "invalid datatype for input x"),
    "odd_datatype": ({"datatype": "STRING"}, "invalid datatype for input x"),
    "no_shape": ({"shape": None}, "Unable to parse 'shape' of input 'x'"),
    "negative_shape": ({"shape": [-1]}, "Unable to parse 'shape' of input 'x'"),
    "fraction_in_shape": ({"shape": [2.0]}, "Unable to parse 'shape' of input 'x'"),
    "immense_shape": ({"shape": [2**63]}, "Unable to parse 'shape' of input 'x'"),
    "no_data": ({"data": ...}, "But no field is set for 'x'"),
    "two_sources": ({"parameters": {"binary_data_size": 8}}, "But 'x' set 'data' 'binary_data_size'"),
    "too_few": ({"data": [1]}, "Unable to parse 'data' of input 'x': its shape is [1], not [2]"),
    "too_many": ({"data": [1, 2, 3]}, "Unable to parse 'data' of input 'x': its shape is [3], not [2]"),
    "other_nesting": (
        {"shape": [2, 3], "data": [[1, 2], [3, 4], [5, 6]]},
        "Unable to parse 'data' of input 'x': its shape is [3,2], not [2,3]",
    ),
    "ragged": ({"shape": [2, 2], "data": [[1, 2], [3]]}, "input 'x' does not fit"),
    "text": ({"data": [1, "2"]}, 'text: "2" at [1]'),
    "null": ({"data": [1, None]}, "null at [1]"),
    "fraction": ({"data": [1, 2.5]}, "2.5 at [1]"),
    "too_large": ({"data": [1, 2**31]}, "2147483648 at [1]"),
    "beyond_64_bits": ({"datatype": "UINT64", "data": [1, 2**64]}, "input 'x' does not fit"),
    "boolean": ({"datatype": "INT64", "data": [True, 1]}, "a boolean: true at [0]"),
    "boolean_beside_a_float": ({"datatype": "INT64", "data": [True, 1.0]}, "a boolean: true at [0]"),
    "negative": ({"datatype": "UINT8", "data": [1, -1]}, "-1 at [1]"),
    "too_large_float": ({"datatype": "FP32", "data": [1, 1e39]}, "at [1]"),
    "neither_true_nor_false": ({"datatype": "BOOL", "data": [True, 2]}, "2 at [1]"),
    "no_text": ({"datatype": "BYTES", "data": ["a", 1]}, "input 'x' does not fit"),
    "no_base64": (
        {"datatype": "BYTES", "data": ["a", "%"], "parameters": {"content_type": "base64"}},
        "input 'x' has the content type base64, and an element that is not",
    ),
    "bfloat16": (
        {"datatype": "BF16"},
        "receiving BF16 data via JSON is not supported. Please use the binary data format for input x",
    ),
    "no_size": (
        {"data": ..., "parameters": {"binary_data_size": "8"}},
        "Unable to parse 'binary_data_size' of input 'x'",
    ),
    "negative_size": (
        {"data": ..., "parameters": {"binary_data_size": -8}},
        "Unable to parse 'binary_data_size' of input 'x'",
    ),
    "no_parameters": ({"parameters": 1}, "Unable to parse 'parameters'"),
    "shared_memory": (
        {"data": ..., "parameters": {"shared_memory_region": "r"}},
        "input 'x' is in shared memory, which this server does not read",
    ),
}


@pytest.mark.parametrize(("changed", "text"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_an_input_that_is_wrong_is_refused_by_name(changed: dict[str, Any], text: str) -> None:
    described = {"name": "x", "datatype": "INT32", "shape": [2], "data": [1, 2], **changed}
    body = body_of({key: value for key, value in described.items() if value is not ...})
    with pytest.raises(ServingError) as caught:
        ask(body)
    assert text in caught.value.message


X = {"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}
BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "no_json": (b"{", "failed to parse the request JSON buffer"),
    "empty": (b"", "failed to parse the request JSON buffer"),
    "no_text": (b'{"inputs": "\xff"}', "failed to parse the request JSON buffer"),
    "deep": (b'{"inputs": ' + b"[" * 100_000, "failed to parse the request JSON buffer"),
    "no_object": (b"[]", "it is not an object"),
    "no_inputs": (b"{}", "Unable to parse 'inputs'"),
    "odd_input": (b'{"inputs": [1]}', "Unable to parse 'inputs': an input is not an object"),
    "odd_id": (body_of(X, id=1), "Unable to parse 'id'"),
    "half_id": (body_of(X, id="\udc80", parameters={"p": math.nan}), "Unable to parse 'id'"),
    "odd_parameters": (body_of(X, parameters=[]), "Unable to parse 'parameters'"),
    "odd_binary": (body_of(X, parameters={"binary_data_output": 1}), "Unable to parse 'binary_data_output'"),
    "odd_outputs": (body_of(X, outputs={}), "Unable to parse 'outputs'"),
    "odd_output": (body_of(X, outputs=[1]), "Unable to parse 'outputs': an output is not an object"),
    "nameless_output": (body_of(X, outputs=[{}]), "Unable to parse 'name'"),
    "odd_binary_data": (
        body_of(X, outputs=[{"name": "y", "parameters": {"binary_data": 1}}]),
        "Unable to parse 'binary_data' of output 'y'",
    ),
    "odd_classification": (
        body_of(X, outputs=[{"name": "y", "parameters": {"classification": -1}}]),
        "Unable to set 'classification' of output 'y'",
    ),
    "output_in_shared_memory": (
        body_of(X, outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]),
        "output 'y' is wanted in shared memory",
    ),
}


@pytest.mark.parametrize(("body", "text"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_wrong_is_refused(body: bytes, text: str) -> None:
    with pytest.raises(ServingError) as caught:
        ask(body)
    assert text in caught.value.message


LONG = "n" * 1_000_000
LONG_NAMES = [
    body_of({**X, "name": LONG, "datatype": "STRING"}),
    body_of({**X, "name": LONG, "shape": [-1]}),
    body_of({**X, "name": LONG, "shape": [1] * 33}),
    body_of({**X, "name": LONG, "data": [1, 2]}),
    body_of({**X, "name": LONG, "data": ["a"]}),
    body_of({**X, "name": LONG, "parameters": {"binary_data_size": 1}}),
    body_of({**X, "name": LONG, "data": ["a"]}, id=LONG),
    body_of({"name": LONG, "datatype": "INT8", "shape": [8], "parameters": {"binary_data_size": 8}}),
    body_of(X, outputs=[{"name": LONG, "parameters": {"classification": -1}}]),
]


@pytest.mark.parametrize("body", LONG_NAMES, ids=range(len(LONG_NAMES)))
def test_of_long_names_an_error_tells_the_beginning(body: bytes) -> None:
    with pytest.raises(ServingError) as caught:
        ask(body)
    assert "n" * 80 in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("behind", [b"\0\0\0\0", b"\0\0\x80\x3f", b"NaN\0", b"NaN\xff"])
def test_bytes_behind_json_whose_length_nobody_tells(behind: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(body_of(X) + behind)
    assert caught.value.message.endswith(
        "; if tensors follow the JSON, the header Inference-Header-Content-Length must tell the JSON's length"
    )
    with pytest.raises(InvalidRequest) as caught:
        ask(b"{")
    assert "Inference-Header" not in caught.value.message


def test_null_is_as_if_it_were_not_there() -> None:
    body = body_of({**X, "parameters": None}, id=None, parameters=None, outputs=None)
    assert ask(body) == ask(body_of(X))
    assert parameters({"parameters": None}) == {}


def test_more_inputs_than_the_model_has_are_refused_before_they_are_read() -> None:
    x = TensorSpec("x", "INT8", (1,))
    one_input = Expected.of(ModelSpec("m", "1", "/nowhere"), Signature((x,), (x,), True))
    body = body_of(X, {"name": "y", "datatype": "none"}, id="7")
    with pytest.raises(BadTensor) as caught:
        ask(body, expected=one_input)
    assert caught.value.message.startswith("[request id: 7] expected 1 inputs but got 2 inputs for model 'm'")


def test_a_tensor_that_is_cut_off_is_refused() -> None:
    body = body_of({"name": "x", "datatype": "INT8", "shape": [8], "parameters": {"binary_data_size": 8}})
    with pytest.raises(InvalidRequest) as caught:
        ask(body, b"1234")
    assert caught.value.message == "unexpected size for input 'x', expecting 4 additional bytes for model 'm'"


def test_bytes_that_belong_to_no_tensor_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(body_of(X), b"1")
    assert caught.value.message == "unexpected additional input data for model 'm'"


@pytest.mark.parametrize(("text", "length"), [(None, 9), ("0", 0), (" 4 ", 4), ("9", 9)])
def test_the_header_says_how_much_is_json(text: str | None, length: int) -> None:
    assert read_header_length(text, 9) == length


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10", "inference header size should be in range (0, 9), got: 10"),
        ("-1", "inference header size should be in range (0, 9), got: -1"),
        ("9" * 30, f"inference header size should be in range (0, 9), got: {'9' * 30}"),
        ("x", "Unable to parse Inference-Header-Content-Length, got: x"),
        ("", "Unable to parse Inference-Header-Content-Length, got: "),
        ("²", "Unable to parse Inference-Header-Content-Length, got: ²"),
    ],
)
def test_a_header_that_says_no_length_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_header_length(text, 9)
    assert caught.value.message == said


def test_bfloat16_is_answered_in_binary_alone() -> None:
    tensor = to_tensor("x", np.ones(2, np.float32).astype(DTYPES["BF16"]))
    assert len(answered(tensor, binary=True)[1][0]) == 4
    with pytest.raises(InvalidRequest, match="Please use the binary data format for output x"):
        answered(tensor)
