"""A request that fails leaves nothing behind: its memory is free at once, though no cycles are collected."""

import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

pytest.importorskip("google.protobuf", reason="needs the grpc extra")

from forgetting import Received, forgotten
from raw_http import Answer

from mms_lite.errors import QueueFull
from mms_lite.frontends.call import Call
from mms_lite.frontends.kserve.grpc import InferenceService
from mms_lite.frontends.kserve.service import KServeService
from mms_lite.protos import message
from mms_lite.shared import Arena, SharedBytes
from mms_lite.types import TensorSpec

ROWS = 5000  # of 16 bytes: two inputs are more than a message from which nothing is lifted
X = TensorSpec("x", "FP32", (-1, 4))
CASES = {
    "answered": None,
    "unread": "invalid_request",
    "unknown": "model_not_found",
    "unfit": "bad_tensor",
    "full": "queue_full",
    "late": "deadline_exceeded",
    "unsendable": "invalid_request",
    "failing": "handler_error",
}


@pytest.fixture(params=CASES)
async def case(
    request: pytest.FixtureRequest,
    arena: Arena,
    double: None,
    tensor_model: Callable[..., Awaitable[Any]],
    inline: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Return what is wrong with a request, once there is an engine that fails like that."""
    case = str(request.param)
    if case == "failing":
        await tensor_model("failing", [X, TensorSpec("y", "FP32", (-1, 4))], [X], "raise ValueError")
    if case == "full":

        async def refuse(_: object) -> None:
            raise QueueFull("full")

        monkeypatch.setattr(inline.engine, "infer", refuse)
    return case


def model_of(case: str) -> str:
    return {"unknown": "none", "failing": "failing"}.get(case, "double")


def id_of(case: str) -> str:
    return "\0" if case == "unsendable" else ""


def question(case: str) -> Received:
    asked = message("inference.ModelInferRequest")(model_name=model_of(case), id=id_of(case))
    for name in "xy":
        asked.inputs.add(name=name, datatype="FP32", shape=[1 if case == "unfit" else ROWS, 4])
    asked.raw_input_contents.extend([bytes(16 * ROWS)] * (3 if case == "unread" else 2))
    if case == "late":
        asked.parameters["timeout"].int64_param = 1
    return Received(asked.SerializeToString())


async def test_of_a_call_nothing_is_left(
    case: str, service: KServeService, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    infer = InferenceService(service).unary["ModelInfer"]
    code = await forgotten(lambda: question(case), lambda sent: infer(sent, Call("c")), wait_until)
    assert code == CASES[case]


@pytest.mark.parametrize("ends_by_error", [False, True])
async def test_of_a_stream_nothing_is_left(
    case: str, service: KServeService, wait_until: Callable[..., Awaitable[Any]], ends_by_error: bool
) -> None:
    converse = InferenceService(service).streams["ModelStreamInfer"]
    call = Call("c", [("triton_grpc_error", "true")] if ends_by_error else ())

    async def each(sent: list[Received]) -> AsyncIterator[bytes]:
        while sent:
            yield sent.pop()

    async def ask(sent: Received) -> None:
        async with aclosing(converse(each([sent]), call)) as answers:
            del sent
            (answer,) = [answer async for answer in answers]
        said = message("inference.ModelStreamInferResponse").FromString(answer)
        assert bool(said.error_message) == (CASES[case] is not None)

    code = await forgotten(lambda: question(case), ask, wait_until)
    assert code == (CASES[case] if ends_by_error else None)


async def test_the_place_of_a_body_is_free(
    case: str,
    arena: Arena,
    placed: Callable[[bytes], SharedBytes],
    call: Callable[..., Awaitable[Answer]],
    wait_until: Callable[..., Awaitable[Any]],
) -> None:
    size = {"binary_data_size": 16 * ROWS + (case == "unread")}
    shape = [1 if case == "unfit" else ROWS, 4]
    inputs = [{"name": name, "datatype": "FP32", "shape": shape, "parameters": size} for name in "xy"]
    parameters = {"timeout": 1} if case == "late" else {}
    head = json.dumps({"id": id_of(case), "inputs": inputs, "parameters": parameters}).encode()
    gc.collect()
    gc.disable()
    try:
        length = ("Inference-Header-Content-Length", str(len(head)))
        body = placed(head + bytes(2 * 16 * ROWS))
        answer = await call("POST", f"/v2/models/{model_of(case)}/infer", body, length)
        del body
        await wait_until(lambda: not arena.used_bytes, "the place to be free", 3)
    finally:
        gc.enable()
    assert (answer.status == 200) == (CASES[case] is None)
