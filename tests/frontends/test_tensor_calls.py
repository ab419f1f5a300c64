"""Any model as protocols of tensors see it: bodies as BYTES tensors, arrays as they are."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from forgetting import Received, forgotten

from mms_lite.errors import BadTensor, HandlerError, ModelNotFound
from mms_lite.frontends.tensor_calls import infer, interface
from mms_lite.tensors import pack, to_array
from mms_lite.types import BYTES, InferRequest, InferResponse, Tensor, TensorSpec

UPPER = """
    def handle(data, context):
        if data:
            context.set_response_content_type(0, "text/x-loud")
            return [each["body"].upper() + each.get("tail", b"") for each in data]
"""
PICKY = """
    def handle(data, context):
        if data:
            context.set_response_status(418, "teapot")
            return ["short and stout"]
"""
DOUBLE = """
    def handle(data, context):
        if data:
            return [{"twice": each["x"] * 2} for each in data]
"""


def bodies(name: str, *elements: bytes, content_type: str = "") -> Tensor:
    return Tensor(name, BYTES, (len(elements),), pack(elements), content_type)


def request(model: str, *inputs: Tensor) -> InferRequest:
    return InferRequest("id", model, inputs=inputs)


def elements(answer: InferResponse) -> list[bytes]:
    (output,) = answer.outputs
    return list(to_array(output))


async def test_a_handler_of_bodies_has_an_input_and_an_output_of_bytes(
    model: Callable[..., Any], inline: Any
) -> None:
    await model("upper", UPPER)
    _, signature = interface(inline.engine, "upper", None)
    assert signature.inputs == signature.outputs == (TensorSpec("body", BYTES, (-1,)),)
    answer = await infer(inline.engine, request("upper", bodies("body", b"a\0b\xff")))
    assert elements(answer) == [b"A\0B\xff"]
    assert (answer.outputs[0].name, answer.outputs[0].shape) == ("body", (1,))
    assert answer.outputs[0].content_type == "text/x-loud"


async def test_each_element_is_a_body_and_several_inputs_are_parts_of_one(
    model: Callable[..., Any], inline: Any
) -> None:
    await model("upper", UPPER)
    inputs = bodies("body", b"one", b"two", b""), bodies("tail", b"1", b"2", b"3")
    assert elements(await infer(inline.engine, request("upper", *inputs))) == [b"ONE1", b"TWO2", b"3"]


@pytest.mark.parametrize(
    "inputs",
    [(bodies("body", b"one"), bodies("tail", b"1", b"2")), (bodies("body"),), ()],
    ids=["unlike", "empty", "none"],
)
async def test_bodies_that_make_no_requests_are_refused(
    model: Callable[..., Any], inline: Any, inputs: tuple[Tensor, ...]
) -> None:
    await model("upper", UPPER)
    with pytest.raises(BadTensor, match="one body or more"):
        await infer(inline.engine, request("upper", *inputs))


async def test_a_body_without_a_frame_is_refused(model: Callable[..., Any], inline: Any) -> None:
    await model("upper", UPPER)
    with pytest.raises(BadTensor, match="at least one axis"):
        await infer(inline.engine, request("upper", Tensor("body", BYTES, (), b"raw")))


async def test_an_answer_with_a_status_of_an_error_is_one(model: Callable[..., Any], inline: Any) -> None:
    await model("picky", PICKY)
    with pytest.raises(HandlerError, match="short and stout") as caught:
        await infer(inline.engine, request("picky", bodies("body", b"tea")))
    assert caught.value.details["status"] == 418


async def test_a_handler_of_bodies_may_take_arrays(model: Callable[..., Any], inline: Any) -> None:
    await model("double", DOUBLE)
    answer = await infer(inline.engine, request("double", Tensor("x", "INT8", (1, 2), bytearray([3, 4]))))
    (output,) = answer.outputs
    assert (output.name, output.shape, bytes(output.data)) == ("twice", (1, 2), bytes([6, 8]))


async def test_one_bad_body_fails_the_request(model: Callable[..., Any], inline: Any) -> None:
    await model("upper", UPPER.replace('each["body"].upper()', 'bytes([each["body"][0]])'))
    with pytest.raises(HandlerError):
        await infer(inline.engine, request("upper", bodies("body", b"good", b"", b"good")))
    assert elements(await infer(inline.engine, request("upper", bodies("body", b"good")))) == [b"g"]


async def test_bodies_that_fail_leave_nothing_behind(
    model: Callable[..., Any], inline: Any, wait_until: Callable[..., Any]
) -> None:
    await model("upper", UPPER.replace('each["body"].upper()', "None"))

    async def ask(sent: Received) -> None:
        await infer(inline.engine, request("upper", Tensor("body", BYTES, (2,), sent)))

    code = await forgotten(lambda: Received(pack([b"one", b"two"])), ask, wait_until)
    assert code == "handler_error"


async def test_an_unknown_model(inline: Any) -> None:
    with pytest.raises(ModelNotFound):
        await infer(inline.engine, request("nobody", bodies("body", b"x")))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([Tensor("body", BYTES, (200_000,), bytes(800_000))], "at most 100 bodies in a request, got 200000"),
        ([bodies(f"part{at}", b"") for at in range(1025)], "at most 1024 inputs, got 1025"),
        ([bodies(f"part{at}", *[b""] * 100) for at in range(100)], "at most 8192 parts, got 10000"),
    ],
    ids=["bodies", "inputs", "parts"],
)
async def test_too_many_bodies_are_refused_before_one_is_made(
    model: Callable[..., Any], inline: Any, monkeypatch: pytest.MonkeyPatch, inputs: list[Tensor], said: str
) -> None:
    await model("upper", UPPER)
    asked: list[InferRequest] = []
    monkeypatch.setattr(inline.engine, "infer", asked.append)
    tracemalloc.start()
    try:
        with pytest.raises(BadTensor, match=said):
            await infer(inline.engine, request("upper", *inputs))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not asked
    assert peak < 100_000


async def test_all_bodies_of_a_request_go_to_one_version(
    model: Callable[..., Any], inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await model("upper", UPPER)
    ask, asked = inline.engine.infer, []

    def remember(one: InferRequest) -> Any:
        asked.append(one.version)
        return ask(one)

    monkeypatch.setattr(inline.engine, "infer", remember)
    assert elements(await infer(inline.engine, request("upper", bodies("body", b"a", b"b")))) == [b"A", b"B"]
    assert asked == ["1", "1"]
