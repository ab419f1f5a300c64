"""The TensorFlow Serving API over gRPC: predictions, metadata, statuses, errors and their codes."""

import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mms_lite.errors import (
    BadTensor,
    Forbidden,
    HandlerError,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    QueueFull,
    RequestTooLarge,
    ServingError,
)
from mms_lite.frontends.call import Call
from mms_lite.frontends.message import Limits
from mms_lite.frontends.tfserving.grpc import services
from mms_lite.frontends.tfserving.service import check_names
from mms_lite.frontends.tfserving.tensor_proto import decode
from mms_lite.protos import message

PredictRequest = message("tensorflow.serving.PredictRequest")
PredictResponse = message("tensorflow.serving.PredictResponse")
MetadataRequest = message("tensorflow.serving.GetModelMetadataRequest")
StatusRequest = message("tensorflow.serving.GetModelStatusRequest")
FLOAT, STRING, INT64 = 1, 7, 9
VECTOR = [("x", "FP32", (-1, 2))]
Load = Callable[..., Awaitable[Any]]
Rpc = Callable[..., Awaitable[Any]]


def tensor(shape: tuple[int, ...], dtype: int = FLOAT, **fields: Any) -> Any:
    dims = [{"size": length} for length in shape]
    return message("tensorflow.TensorProto")(dtype=dtype, tensor_shape={"dim": dims}, **fields)


def floats(array: np.ndarray) -> Any:
    return tensor(array.shape, tensor_content=array.astype(np.float32).tobytes())


def request(name: str, *outputs: str, **inputs: Any) -> Any:
    return PredictRequest(model_spec={"name": name}, inputs=inputs, output_filter=outputs)


def content(proto: Any) -> list[Any]:
    array = np.frombuffer(proto.tensor_content, np.float32)
    return list(array.reshape([dim.size for dim in proto.tensor_shape.dim]).tolist())


@pytest.mark.parametrize("rows", [0, 1, 3, 20_000])
async def test_a_prediction(rows: int, arrays: Load, rpc: Rpc) -> None:
    await arrays("m", VECTOR, [("y", "FP32", (-1, 2))], "return {'y': arrays['x'] + 1}")
    x = np.arange(rows * 2).reshape(rows, 2)
    answer = await rpc("Predict", request("m", x=floats(x)))
    assert content(answer.outputs["y"]) == (x + 1).tolist()
    assert (answer.outputs["y"].dtype, answer.outputs["y"].tensor_shape.unknown_rank) == (FLOAT, False)
    spec = answer.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("m", 1, "serving_default")


async def test_several_inputs_and_the_outputs_that_are_wanted(arrays: Load, rpc: Rpc) -> None:
    outputs = [("sum", "FP32", (-1,)), ("diff", "FP32", (-1,))]
    code = "return {'sum': arrays['a'] + arrays['b'], 'diff': arrays['a'] - arrays['b']}"
    await arrays("m", [("a", "FP32", (-1,)), ("b", "FP32", (-1,))], outputs, code)
    inputs = {"a": tensor((2,), float_val=[3, 4]), "b": tensor((2,), float_val=[1])}
    answer = await rpc("Predict", request("m", **inputs))
    assert {name: content(proto) for name, proto in answer.outputs.items()} == {"sum": [4, 5], "diff": [2, 3]}
    assert list((await rpc("Predict", request("m", "diff", **inputs))).outputs) == ["diff"]
    text = r"output tensor alias not found in signature: no Outputs expected to be in the set \{sum,diff\}\."
    with pytest.raises(BadTensor, match=text):
        await rpc("Predict", request("m", "no", **inputs))


async def test_an_input_that_may_be_left_out(arrays: Load, inline: Any) -> None:
    await arrays("m", [("a", "FP32", (-1,)), ("b", "FP32", (-1,))])
    spec, signature = inline.engine.interface("m")
    lax = replace(spec, config={"input": [{"name": "a"}, {"name": "b", "optional": True}]})
    check_names(["a"], lax, signature)
    check_names(["a", "b"], lax, signature)
    with pytest.raises(BadTensor, match="Expected: 1; Actual: 0"):
        check_names([], lax, signature)


@pytest.mark.parametrize("spec", [{}, {"version": {"value": 0}}, {"version": {}}, {"version_label": "any"}])
async def test_the_default_version(spec: dict[str, Any], arrays: Load, rpc: Rpc) -> None:
    await arrays("m", VECTOR, version="7")
    await_this = PredictRequest(model_spec={"name": "m", **spec}, inputs={"x": floats(np.ones((1, 2)))})
    assert (await rpc("Predict", await_this)).model_spec.version.value == 7


@pytest.mark.parametrize(("version", "number"), [("1.0", 1), ("beta", 0), ("007", 0), ("9" * 20, 0)])
async def test_a_version_is_stated_by_its_number_if_it_has_one(
    version: str, number: int, arrays: Load, inline: Any, rpc: Rpc
) -> None:
    await arrays("m", VECTOR, version=version)
    answer = await rpc("Predict", request("m", x=floats(np.ones((1, 2)))))
    assert (answer.model_spec.HasField("version"), answer.model_spec.version.value) == (bool(number), number)
    described = await rpc(
        "GetModelMetadata", MetadataRequest(model_spec={"name": "m"}, metadata_field=["signature_def"])
    )
    assert described.model_spec.version.value == number
    ((_, metrics),) = inline.engine.statistics("m")
    assert metrics.requests == {("tfserving-grpc", "OK"): 1}


async def test_many_names_are_refused_before_they_are_looked_at(model: Load, rpc: Rpc) -> None:
    await model("parts", "def handle(data, context): return [str(len(each)) for each in data or []]")
    text = tensor((1,), STRING, string_val=[b"a"])
    with pytest.raises(BadTensor, match="the model takes at most 1024 inputs, got 1025"):
        await rpc("Predict", request("parts", **{f"n{number}": text for number in range(1025)}))
    with pytest.raises(BadTensor) as caught:
        await rpc(
            "Predict", request("parts", **{"n" * 1_000_000: tensor((2,), STRING, string_val=[b"a"] * 3)})
        )
    assert caught.value.message.endswith("input name: " + "n" * 80)


@pytest.mark.parametrize("method", ["GetModelMetadata", "GetModelStatus"])
async def test_a_question_without_tensors_is_short(method: str, rpc: Rpc) -> None:
    with pytest.raises(RequestTooLarge):
        await rpc(method, b"\x12\x00" * (4 << 20))


async def test_bodies(model: Load, rpc: Rpc) -> None:
    await model("loud", "def handle(data, context): return [each['body'].upper() for each in data or []]")
    answer = await rpc("Predict", request("loud", body=tensor((), STRING, string_val=[b"a\xff"])))
    assert list(answer.outputs["body"].string_val) == [b"A\xff"]
    answer = await rpc("Predict", request("loud", body=tensor((2,), STRING, string_val=[b"a", b"b"])))
    assert list(answer.outputs["body"].string_val) == [b"A", b"B"]
    assert [dim.size for dim in answer.outputs["body"].tensor_shape.dim] == [2]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (tensor((1, 2), INT64), "Invalid input precision - Expected: FP32; Actual: I64; input name: x"),
        (tensor((1, 2), 8), "Invalid input precision - Expected: FP32; Actual: INVALID; input name: x"),
        (
            tensor((1,), STRING, string_val=[b"jpeg"]),
            "Invalid input precision - Expected: FP32; Actual: STRING; input name: x "
            "(encoded images are not decoded here)",
        ),
        (
            tensor((2,), float_val=[1]),
            "Invalid number of shape dimensions - Expected: (-1,2); Actual: (2); input name: x",
        ),
        (
            tensor((1, 3), float_val=[1]),
            "Invalid input shape - Expected: (-1,2); Actual: (1,3); input name: x",
        ),
        (
            tensor((-1, 2), float_val=[1]),
            "Invalid input shape - Negative or zero dimension size is not acceptable: (-1,2); input name: x",
        ),
        (
            message("tensorflow.TensorProto")(dtype=FLOAT, tensor_shape={"unknown_rank": True}),
            "Invalid input shape - The rank must be known; input name: x",
        ),
        (
            tensor((1, 2), tensor_content=b"1234567"),
            "Invalid content size of tensor proto - Expected: 8 bytes; Actual: 7 bytes; input name: x",
        ),
        (
            tensor((1, 2)),
            "Invalid content size of tensor proto - Expected: 8 bytes; Actual: 0 bytes; input name: x",
        ),
        (
            tensor((1, 2), float_val=[1, 2, 3]),
            "Invalid number of values in tensor proto container - Expected: 2; Actual: 3; input name: x",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_inputs_that_are_refused(x: Any, text: str, arrays: Load, rpc: Rpc) -> None:
    await arrays("m", VECTOR)
    with pytest.raises(BadTensor) as caught:
        await rpc("Predict", request("m", x=x))
    assert caught.value.message == text


async def test_inputs_of_other_names_or_numbers(arrays: Load, rpc: Rpc) -> None:
    await arrays("m", VECTOR)
    x = floats(np.ones((1, 2)))
    for inputs, text in (
        ({}, "Invalid number of inputs - Expected: 1; Actual: 0"),
        ({"x": x, "y": x}, "Invalid number of inputs - Expected: 1; Actual: 2"),
        ({"y": x}, "Missing input with specific name - Required input: x"),
    ):
        with pytest.raises(BadTensor, match=text):
            await rpc("Predict", request("m", **inputs))


async def test_a_small_message_for_a_huge_tensor(arrays: Load, rpc: Rpc) -> None:
    await arrays("m", VECTOR)
    await arrays("texts", [("x", "BYTES", (-1,))])
    with pytest.raises(RequestTooLarge, match="takes 8796093022208 bytes; the limit is 10000"):
        await rpc("Predict", request("m", x=tensor((1 << 40, 2), float_val=[1])))
    with pytest.raises(RequestTooLarge, match="more than 10000 bytes"):
        await rpc("Predict", request("texts", x=tensor((1 << 40,), STRING, string_val=[b""])))


async def test_small_messages_for_large_tensors_are_bounded_together(arrays: Load, rpc: Rpc) -> None:
    await arrays("two", [("x", "FP32", (-1,)), ("y", "FP32", (-1,))])
    large = tensor((2000,), float_val=[1])
    with pytest.raises(RequestTooLarge, match="takes 8000 bytes; the limit is 2000"):
        await rpc("Predict", request("two", x=large, y=large))


@pytest.mark.parametrize("count", [1, 300_000])
async def test_a_small_message_for_a_large_tensor_is_read_in_a_thread(
    arrays: Load, inline: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    read_in = []

    def noting(*args: Any, **options: Any) -> Any:
        read_in.append(threading.current_thread())
        return decode(*args, **options)

    await arrays("m", [("x", "FP32", (-1,))])
    monkeypatch.setattr("mms_lite.frontends.tfserving.grpc.decode", noting)
    prediction, _ = services(inline.engine, lambda _: None, Limits())
    asked = request("m", x=tensor((count,), float_val=[0.5]))
    answer = await prediction.unary["Predict"](asked.SerializeToString(), Call("id-1"))
    assert content(PredictResponse.FromString(answer).outputs["x"]) == [0.5] * count
    assert (read_in[0] is threading.main_thread()) == (count == 1)


@pytest.mark.parametrize(
    ("received", "text"),
    [
        (b"\x12\x00" * 100_000, "the message has more than 4096 fields"),
        (b"\x1b\x1c" + b"\x12\x00" * 100_000, "the message has more than 4096 fields, or is none"),
        (b"\xff" * 200_000, "the message has more than 4096 fields, or is none"),
    ],
    ids=["empty inputs", "a group before them", "no message"],
)
async def test_a_message_of_many_fields_is_not_parsed(received: bytes, text: str, rpc: Rpc) -> None:
    with pytest.raises(InvalidRequest, match=text):
        await rpc("Predict", received)


async def test_single_values_are_bounded_and_large_texts_are_not(
    arrays: Load, rpc: Rpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mms_lite.frontends.fields.MOST_PARSED_BYTES", 1 << 20)
    await arrays("m", [("x", "FP32", (-1,))])
    await arrays("texts", [("x", "BYTES", (-1,))])
    with pytest.raises(RequestTooLarge, match=r"1048576 are the most\. Send arrays as tensor_content"):
        await rpc("Predict", request("m", x=tensor((300_000,), float_val=[0.5] * 300_000)))
    with pytest.raises(RequestTooLarge, match="1048576 are the most"):
        await rpc("Predict", request("texts", x=tensor((600_000,), STRING, string_val=[b""] * 600_000)))
    images = [bytes([number]) * 700_000 for number in range(3)]
    answer = await rpc("Predict", request("texts", x=tensor((3,), STRING, string_val=images)))
    assert list(answer.outputs["x"].string_val) == images


async def test_a_message_that_is_none(rpc: Rpc) -> None:
    for method in ("Predict", "GetModelMetadata", "GetModelStatus"):
        with pytest.raises(InvalidRequest, match="the message is no valid tensorflow"):
            await rpc(method, b"\xff\xff")


async def test_millions_of_single_values_are_read_in_a_thread(arrays: Load, rpc: Rpc) -> None:
    await arrays("m", [("x", "FP32", (-1,))])
    count = 300_000
    with pytest.raises(RequestTooLarge):
        await rpc("Predict", request("m", x=tensor((count,), float_val=[0.5] * count)))


async def test_metadata(arrays: Load, rpc: Rpc) -> None:
    await arrays("m", [("x", "FP32", (-1, 3))], [("y", "BYTES", None)])
    asked = MetadataRequest(model_spec={"name": "m"}, metadata_field=["signature_def"])
    answer = await rpc("GetModelMetadata", asked)
    assert (answer.model_spec.name, answer.model_spec.version.value) == ("m", 1)
    packed = answer.metadata["signature_def"]
    assert packed.type_url == "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    signatures = message("tensorflow.serving.SignatureDefMap").FromString(packed.value).signature_def
    assert list(signatures) == ["serving_default"]
    x, y = signatures["serving_default"].inputs["x"], signatures["serving_default"].outputs["y"]
    assert (x.name, x.dtype, [dim.size for dim in x.tensor_shape.dim]) == ("x", FLOAT, [-1, 3])
    assert (y.name, y.dtype, y.tensor_shape.unknown_rank) == ("y", STRING, True)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (MetadataRequest(metadata_field=["signature_def"]), "model_spec missing in request"),
        (MetadataRequest(model_spec={"name": "m"}), "Invalid signature name"),
        (MetadataRequest(model_spec={"name": "m"}, metadata_field=["graph"]), "Invalid signature name"),
        (
            MetadataRequest(model_spec={"name": "m"}, metadata_field=["signature_def"] * 2),
            "Invalid signature name",
        ),
    ],
)
async def test_metadata_that_there_is_not(asked: Any, text: str, rpc: Rpc) -> None:
    with pytest.raises(InvalidRequest, match=text):
        await rpc("GetModelMetadata", asked)


async def test_status(arrays: Load, inline: Any, rpc: Rpc) -> None:
    await arrays("m", VECTOR, version="10")
    for version in ("2", "next"):
        await inline.load("m", version=version)

    async def ask(**spec: Any) -> list[tuple[int, int, int, str]]:
        answer = await rpc("GetModelStatus", StatusRequest(model_spec={"name": "m", **spec}))
        return [
            (each.version, each.state, each.status.error_code, each.status.error_message)
            for each in answer.model_version_status
        ]

    available = [(version, 30, 0, "OK") for version in (2, 10)]
    assert await ask() == await ask(version={"value": 0}) == await ask(version_label="x") == available
    assert await ask(version={"value": 10}) == available[1:]
    with pytest.raises(ModelNotFound):
        await ask(version={"value": 3})
    with pytest.raises(ModelNotFound):
        await ask(name="n")


async def test_a_version_that_was_unloaded_has_ended(arrays: Load, inline: Any, rpc: Rpc) -> None:
    await arrays("m", VECTOR, version="1")
    await inline.load("m", version="2")
    await inline.engine.unload("m", "1")
    answer = await rpc("GetModelStatus", StatusRequest(model_spec={"name": "m"}))
    assert [(each.version, each.state) for each in answer.model_version_status] == [(1, 50), (2, 30)]
    await inline.load("m", version="1.0")  # which has the number now
    answer = await rpc("GetModelStatus", StatusRequest(model_spec={"name": "m", "version": {"value": 1}}))
    assert answer.model_version_status[0].state == 30


async def test_reload(inline: Any, rpc: Rpc, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    async def rescan() -> bool:
        called.append(True)
        return True

    monkeypatch.setattr(inline.engine, "rescan", rescan, raising=False)
    answer = await rpc("HandleReloadConfigRequest", b"")
    assert (answer.status.error_code, called) == (0, [True])
    with pytest.raises(Forbidden):
        await rpc("HandleReloadConfigRequest", b"", peer="203.0.113.7:1")
    assert called == [True]


async def test_a_deadline(model: Load, rpc: Rpc) -> None:
    await model("m", "def handle(data, context): return data")
    body = tensor((1,), STRING, string_val=[b""])
    with pytest.raises(ServingError) as caught:
        await rpc("Predict", request("m", body=body), deadline=time.monotonic() - 1)
    assert caught.value.grpc == "DEADLINE_EXCEEDED"


async def test_every_prediction_is_counted(arrays: Load, inline: Any, rpc: Rpc) -> None:
    await arrays("m", VECTOR)
    await rpc("Predict", request("m", x=floats(np.ones((1, 2)))))
    for name in ("m", "unknown"):
        with pytest.raises(ServingError):
            await rpc("Predict", request(name))
    ((_, metrics),) = inline.engine.statistics("m")
    codes = {("tfserving-grpc", "OK"): 1, ("tfserving-grpc", "INVALID_ARGUMENT"): 1}
    assert metrics.requests == codes
    assert inline.engine.metrics().unknown == {("tfserving-grpc", "NOT_FOUND"): 1}


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ModelNotFound("Model not found: m"), "NOT_FOUND", "Model with requested name is not found"),
        (
            ModelNotReady("model m is loading"),
            "UNAVAILABLE",
            "Model with requested version is not loaded yet - model m is loading",
        ),
        (BadTensor("as it is"), "INVALID_ARGUMENT", "as it is"),
        (QueueFull("full"), "RESOURCE_EXHAUSTED", "full"),
        (HandlerError("failed"), "INTERNAL", "failed"),
        (HandlerError("bad", status=422), "INVALID_ARGUMENT", "bad"),
        (HandlerError("gone", status=404), "NOT_FOUND", "gone"),
        (HandlerError("gone", status=400, grpc="CANCELLED"), "CANCELLED", "gone"),
        (HandlerError("odd", grpc="NO_SUCH_CODE"), "INTERNAL", "odd"),
        (HandlerError("odd", status=599, grpc=["INTERNAL"]), "INTERNAL", "odd"),
    ],
    ids=str,
)
def test_spelling(error: ServingError, code: str, text: str, inline: Any) -> None:
    for service in services(inline.engine, lambda _: None, Limits()):
        assert service.spell(error, "Predict") == (code, text)


def test_the_services(inline: Any) -> None:
    found = {each.name: set(each.unary) for each in services(inline.engine, lambda _: None, Limits())}
    assert found == {
        "tensorflow.serving.PredictionService": {"Predict", "GetModelMetadata"},
        "tensorflow.serving.ModelService": {"GetModelStatus", "HandleReloadConfigRequest"},
    }
