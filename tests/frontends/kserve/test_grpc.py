"""KServe v2 over gRPC, from message to message and without sockets."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("google.protobuf", reason="needs the grpc extra")


from mms_lite.errors import Forbidden, HandlerError, InvalidRequest, RequestTooLarge, ServingError
from mms_lite.frontends.call import Call
from mms_lite.frontends.kserve import infer_messages
from mms_lite.frontends.kserve.grpc import InferenceService
from mms_lite.frontends.kserve.service import KServeService, RequestedOutput
from mms_lite.frontends.message import HttpRequest
from mms_lite.protos import message
from mms_lite.tensors import DTYPES, to_array, to_tensor
from mms_lite.types import InferRequest, InferResponse, Tensor

ARRAYS = """
    def handle(data, context):
        if data:
            return [dict(each) for each in data]
"""
BEARER = ("authorization", "Bearer secret")
Request = message("inference.ModelInferRequest")


class Recording(KServeService):
    """The service, with a note of what it is asked; `answers` are used up before the engine is."""

    def __init__(self, engine: Any, **fields: Any) -> None:
        super().__init__(engine, server_name="triton", server_version="1.0", **fields)
        self.asked: list[tuple[InferRequest, Sequence[RequestedOutput] | None]] = []
        self.managed: list[tuple[str, str, Mapping[str, Any]]] = []
        self.answers: list[Callable[[InferRequest], Awaitable[InferResponse]]] = []

    async def infer(
        self, request: InferRequest, wanted: Sequence[RequestedOutput] | None, *, call_id: str = ""
    ) -> InferResponse:
        self.asked.append((request, wanted))
        if self.answers:
            return await self.answers.pop(0)(request)
        return await super().infer(request, wanted, call_id=call_id)

    async def load(self, name: str, parameters: Mapping[str, Any], caller: HttpRequest) -> None:
        self._authorise(caller)
        self.managed.append(("load", name, parameters))

    async def unload(self, name: str, parameters: Mapping[str, Any], caller: HttpRequest) -> None:
        self._authorise(caller)
        self.managed.append(("unload", name, parameters))


def _authorise(caller: HttpRequest) -> None:
    if caller.header("authorization") != "Bearer secret":
        raise Forbidden("not for you")


class Client:
    """Calls methods of the service by name, with fields of their requests."""

    def __init__(self, engine: Any) -> None:
        self.service = Recording(engine, authorise=_authorise)
        self.rpc = InferenceService(self.service)

    async def __call__(self, method: str, *metadata: tuple[str, str], **fields: Any) -> Any:
        asked = message(f"inference.{method}Request")(**fields).SerializeToString()
        answer = await self.rpc.unary[method](asked, Call("call-1", metadata))
        assert type(answer) is bytes
        return message(f"inference.{method}Response").FromString(answer)

    async def refused(self, method: str, *metadata: tuple[str, str], **fields: Any) -> tuple[str, str]:
        """Return the status code and message of the error."""
        with pytest.raises(ServingError) as caught:
            await self(method, *metadata, **fields)
        return self.rpc.spell(caught.value, method)

    def stream(self, messages: AsyncIterator[bytes], *metadata: tuple[str, str]) -> Any:
        return aclosing(self.rpc.streams["ModelStreamInfer"](messages, Call("call-1", metadata)))


@pytest.fixture
def client(inline: Any) -> Client:
    return Client(inline.engine)


def question(model: str, *arrays: np.ndarray, **fields: Any) -> Any:
    """Make a request with raw inputs x0, x1, ..."""
    made = Request(model_name=model, **fields)
    for number, array in enumerate(arrays):
        tensor = to_tensor(f"x{number}", array)
        made.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        made.raw_input_contents.append(bytes(tensor.data))
    return made


def fields_of(asked: Any) -> dict[str, Any]:
    return {field.name: value for field, value in asked.ListFields()}


async def infer(client: Client, asked: Any) -> Any:
    return await client("ModelInfer", **fields_of(asked))


async def refused(client: Client, asked: Any) -> tuple[str, str]:
    return await client.refused("ModelInfer", **fields_of(asked))


@pytest.mark.parametrize("size", [16, 602_112 // 4])
async def test_raw_tensors_come_back_raw(model: Callable[..., Any], client: Client, size: int) -> None:
    await model("arrays", ARRAYS)
    first, second = np.arange(size, dtype=np.float32), np.arange(2 * size, dtype=np.int8).reshape(2, size)
    answer = await infer(client, question("arrays", first, second, id="mine"))
    assert (answer.model_name, answer.model_version, answer.id) == ("arrays", "1", "mine")
    assert [(each.name, each.datatype, tuple(each.shape)) for each in answer.outputs] == [
        ("x0", "FP32", (size,)),
        ("x1", "INT8", (2, size)),
    ]
    assert list(answer.raw_output_contents) == [first.tobytes(), second.tobytes()]


async def test_a_large_tensor_is_read_where_it_is_and_written_once() -> None:
    array = np.arange(200_000, dtype=np.float32)
    received = question("m", array).SerializeToString()
    asked = (await infer_messages.read(received, Call("call-1"))).request
    assert asked is not None
    (tensor,) = asked.inputs
    assert tensor.data.obj is received
    data = bytearray(array.tobytes())
    pieces = infer_messages.write(InferResponse("", "m", "1", [Tensor("y", "FP32", (200_000,), data)]))
    assert any(piece is data for piece in pieces)


VALUES = {
    "BOOL": ("bool_contents", [True, False, True]),
    "INT8": ("int_contents", [-128, 0, 127]),
    "INT16": ("int_contents", [-(1 << 15), 0, (1 << 15) - 1]),
    "INT32": ("int_contents", [-(1 << 31), 0, (1 << 31) - 1]),
    "INT64": ("int64_contents", [-(1 << 63), 0, (1 << 63) - 1]),
    "UINT8": ("uint_contents", [0, 1, 255]),
    "UINT16": ("uint_contents", [0, 1, (1 << 16) - 1]),
    "UINT32": ("uint_contents", [0, 1, (1 << 32) - 1]),
    "UINT64": ("uint64_contents", [0, 1, (1 << 64) - 1]),
    "FP32": ("fp32_contents", [-0.5, 0.0, 1e30]),
    "FP64": ("fp64_contents", [-0.5, 0.0, 1e300]),
    "BYTES": ("bytes_contents", [b"", b"\0", b"text"]),
}


@pytest.mark.parametrize("datatype", VALUES)
async def test_values_in_the_message_are_the_same_tensor(
    model: Callable[..., Any], client: Client, datatype: str
) -> None:
    await model("arrays", ARRAYS)
    field, values = VALUES[datatype]
    raw = question("arrays", np.array(values, DTYPES[datatype]))
    explicit = Request(model_name="arrays")
    explicit.inputs.add(name="x0", datatype=datatype, shape=[3], contents={field: values})
    expected, found = [
        (await infer_messages.read(each.SerializeToString(), Call("c"))).request for each in (raw, explicit)
    ]
    assert expected is not None
    assert found is not None
    assert bytes(found.inputs[0].data) == bytes(expected.inputs[0].data)
    if datatype != "BYTES":  # which this handler takes as a body
        answer = await infer(client, explicit)
        assert list(answer.raw_output_contents) == [bytes(expected.inputs[0].data)]


async def test_many_values_in_the_message(model: Callable[..., Any], client: Client) -> None:
    await model("arrays", ARRAYS)
    array = np.arange(400_000, dtype=np.float32)
    asked = Request(model_name="arrays")
    asked.inputs.add(name="x0", datatype="FP32", shape=[400_000], contents={"fp32_contents": array.tolist()})
    answer = await infer(client, asked)
    assert list(answer.raw_output_contents) == [array.tobytes()]


def _with(datatype: str = "FP32", **contents: Any) -> Any:
    asked = Request(model_name="m")
    asked.inputs.add(name="x", datatype=datatype, shape=[1], contents=contents)
    return asked


def _both() -> Any:
    asked = _with(fp32_contents=[1])
    asked.raw_input_contents.append(b"1234")
    return asked


def _more_raw() -> Any:
    asked = question("m", np.zeros(1, np.float32))
    asked.raw_input_contents.append(b"1234")
    return asked


def _no_data() -> Any:
    asked = question("m", np.zeros(1, np.float32), np.zeros(1, np.float32))
    del asked.raw_input_contents[1:]
    return asked


def _negative() -> Any:
    asked = question("m", np.zeros(1, np.float32))
    asked.inputs[0].shape[:] = [-1]
    return asked


def _input_parameter(**value: Any) -> Any:
    asked = question("m", np.zeros(1, np.float32))
    (name,) = value
    asked.inputs[0].parameters[name].CopyFrom(message("inference.InferParameter")(**value[name]))
    return asked


def _output_parameter(name: str, **value: Any) -> Any:
    asked = question("m", np.zeros(1, np.float32))
    asked.outputs.add(name="y").parameters[name].CopyFrom(message("inference.InferParameter")(**value))
    return asked


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (_both(), "contents field must not be specified when using raw_input_contents for 'x' for model 'm'"),
        (_no_data(), "unable to find data for input tensor 'x1' for model 'm' in request."),
        (_more_raw(), "got 2 raw_input_contents for the 1 inputs for model 'm'"),
        (
            _with("FP16", fp32_contents=[1]),
            "unexpected explicit tensor data for input tensor 'x' for model 'm' of type 'FP32',"
            " expected datatype 'FP16'",
        ),
        (
            _with("FP32", fp32_contents=[1], int_contents=[1]),
            "unexpected explicit tensor data for input tensor 'x' for model 'm',"
            " binary data was already supplied.",
        ),
        (_with("INT8", int_contents=[128]), "a value is out of the range of INT8 in input 'x' for model 'm'"),
        (
            _with("UINT8", uint_contents=[256]),
            "a value is out of the range of UINT8 in input 'x' for model 'm'",
        ),
        (_negative(), "input 'x0' has a negative length in its shape"),
        (
            Request(model_name="m", parameters={"empty": {}}),
            "invalid value type for 'empty' parameter, expected one of bool_param, int64_param, string_param,"
            " double_param, uint64_param.",
        ),
        (
            Request(model_name="m", parameters={"triton_enable_empty_final_response": {"int64_param": 1}}),
            "invalid value type for 'triton_enable_empty_final_response' parameter, expected bool_param.",
        ),
        (
            _input_parameter(content_type={"int64_param": 1}),
            "invalid value type for 'content_type' parameter, expected string_param.",
        ),
        (
            _output_parameter("classification", string_param="2"),
            "invalid value type for 'classification' parameter, expected int64_param.",
        ),
        (
            _output_parameter("classification", int64_param=0),
            "invalid value for 'classification' parameter, expected > 0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_wrong_with_a_request_is_said(client: Client, asked: Any, text: str) -> None:
    assert await refused(client, asked) == ("INVALID_ARGUMENT", text)
    assert not client.service.asked


@pytest.mark.parametrize(
    "asked",
    [
        _input_parameter(shared_memory_region={"string_param": "r"}),
        _output_parameter("shared_memory_region", string_param="r"),
    ],
    ids=["input", "output"],
)
async def test_tensors_in_shared_memory_are_refused(client: Client, asked: Any) -> None:
    code, text = await refused(client, asked)
    assert code == "UNIMPLEMENTED"
    assert "in shared memory" in text


@pytest.mark.parametrize("received", [b"\x0a\xff", b"\x3a\x05abc", b"\xff" * 11, b"\x0a\x01\xff"])
async def test_bytes_that_are_no_message_are_refused(client: Client, received: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"no valid inference\.ModelInferRequest"):
        await client.rpc.unary["ModelInfer"](received, Call("call-1"))


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("", "OK"),
        ("-1", "OK"),
        ("0", "OK"),
        ("1", "OK"),
        ("9", "NOT_FOUND: Request for unknown model: 'arrays' version 9 is not found"),
        ("one", "INVALID_ARGUMENT: failed to get model version from specified version string 'one'"),
    ],
)
async def test_versions(model: Callable[..., Any], client: Client, version: str, status: str) -> None:
    await model("arrays", ARRAYS)
    asked = question("arrays", np.zeros(1, np.float32), model_version=version)
    if status == "OK":
        assert (await infer(client, asked)).model_version == "1"
        assert (await client("ModelMetadata", name="arrays", version=version)).name == "arrays"
    else:
        assert status.startswith(": ".join(await refused(client, asked)))


async def test_an_unknown_model(client: Client) -> None:
    assert await refused(client, question("none", np.zeros(1, np.float32))) == (
        "NOT_FOUND",
        "Request for unknown model: 'none' is not found",
    )
    assert not (await client("ModelReady", name="none")).ready
    assert client.service.engine.metrics().unknown == {("kserve-grpc", "NOT_FOUND"): 1}


async def test_parameters_go_both_ways(client: Client) -> None:
    async def answer(request: InferRequest) -> InferResponse:
        given = {"flag": True, "count": -5, "share": 0.5, "word": "w", "huge": 1 << 63}
        return InferResponse(request.id, "m", "7", (), given)

    client.service.answers.append(answer)
    asked = question("m", np.zeros(1, np.float32))
    for name, value in {
        "b": {"bool_param": False},
        "i": {"int64_param": -1},
        "s": {"string_param": ""},
        "d": {"double_param": 2.5},
        "u": {"uint64_param": 1 << 63},
        "triton_enable_empty_final_response": {"bool_param": True},
    }.items():
        asked.parameters[name].CopyFrom(message("inference.InferParameter")(**value))
    asked.inputs[0].parameters["content_type"].string_param = "image/png"
    asked.outputs.add(name="y")
    asked.outputs.add(name="z").parameters["classification"].int64_param = 3
    said = await infer(client, asked)
    request, wanted = client.service.asked[0]
    assert request.parameters == {"b": False, "i": -1, "s": "", "d": 2.5, "u": 1 << 63}
    assert request.inputs[0].content_type == "image/png"
    assert wanted == [RequestedOutput("y"), RequestedOutput("z", None, 3)]
    assert {name: infer_messages.parameters({"": each})[""] for name, each in said.parameters.items()} == {
        "flag": True,
        "count": -5,
        "share": 0.5,
        "word": "w",
        "huge": str(1 << 63),
    }


async def test_the_deadline_and_the_metadata_of_the_call_are_those_of_the_request(client: Client) -> None:
    received = question("m", np.zeros(1, np.float32)).SerializeToString()
    asked = (await infer_messages.read(received, Call("c", (("x-tenant", "a"),), 12.5))).request
    assert asked is not None
    assert (asked.deadline, asked.headers) == (12.5, (("x-tenant", "a"),))


async def test_answers_are_counted_by_their_code(model: Callable[..., Any], client: Client) -> None:
    await model("arrays", ARRAYS)
    await infer(client, question("arrays", np.zeros(1, np.float32)))
    short = question("arrays", np.zeros(2, np.float32))
    short.raw_input_contents[0] = b"1234"
    assert (await refused(client, short))[0] == "INVALID_ARGUMENT"
    ((_, seen),) = client.service.engine.statistics("arrays")
    assert seen.requests == {("kserve-grpc", "OK"): 1, ("kserve-grpc", "INVALID_ARGUMENT"): 1}


NO_TEXT = "caf\udce9"  # as os.fsdecode returns it


@pytest.mark.parametrize(
    "answer",
    [
        InferResponse("", "arrays", "1", [Tensor(NO_TEXT, "UINT8", (1,), bytearray(1))]),
        InferResponse("", "arrays", "1", parameters={NO_TEXT: 1}),
        InferResponse("", "arrays", "1", parameters={"name": NO_TEXT}),
    ],
    ids=["output", "parameter", "value"],
)
async def test_an_answer_that_cannot_be_written_is_the_models_error(
    model: Callable[..., Any], client: Client, answer: InferResponse
) -> None:
    async def give(_: InferRequest) -> InferResponse:
        return answer

    await model("arrays", ARRAYS)
    client.service.answers += [give]
    code, text = await refused(client, question("arrays", np.zeros(1, np.uint8)))
    assert (code, text) == ("INTERNAL", "the model's answer has names or texts that are no valid Unicode")
    ((_, seen),) = client.service.engine.statistics("arrays")
    assert seen.requests == {("kserve-grpc", "INTERNAL"): 1}


async def test_a_text_that_is_none_does_not_end_a_stream(client: Client) -> None:
    async def fail(_: InferRequest) -> InferResponse:
        raise HandlerError(f"no {NO_TEXT}")

    async def give(_: InferRequest) -> InferResponse:
        return InferResponse("", "arrays", "1", parameters={"name": NO_TEXT})

    async def answer(_: InferRequest) -> InferResponse:
        return InferResponse("", "arrays", "1")

    client.service.answers += [fail, give, answer]
    asked = question("arrays", np.zeros(1, np.uint8))
    async with client.stream(_sent(asked, asked, asked)) as answers:
        said = [_read(each).error_message async for each in answers]
    assert said == ["no caf?", "the model's answer has names or texts that are no valid Unicode", ""]


async def test_what_is_told_of_server_and_models(model: Callable[..., Any], client: Client) -> None:
    await model("arrays", ARRAYS)
    await infer(client, question("arrays", np.zeros(1, np.float32)))
    assert (await client("ServerLive")).live
    assert (await client("ServerReady")).ready
    assert (await client("ModelReady", name="arrays")).ready
    server = await client("ServerMetadata")
    assert (server.name, server.version) == ("triton", "1.0")
    assert "model_repository" in server.extensions
    told = await client("ModelMetadata", name="arrays")
    assert (told.versions, told.inputs[0].datatype, told.inputs[0].shape) == (["1"], "BYTES", [-1])
    config = (await client("ModelConfig", name="arrays", version="1")).config
    assert (config.name, config.max_batch_size, len(config.input)) == ("arrays", 0, 1)
    (stats,) = (await client("ModelStatistics", name="arrays")).model_stats
    assert (stats.name, stats.inference_count, stats.inference_stats.success.count) == ("arrays", 1, 1)
    assert (await client.refused("ModelStatistics", name="none"))[0] == "INVALID_ARGUMENT"
    assert (await client.refused("ModelMetadata", name="none"))[0] == "NOT_FOUND"


async def test_models_are_loaded_and_unloaded_by_who_may(client: Client) -> None:
    parameters = {"config": {"string_param": "{}"}, "file:1/model.onnx": {"bytes_param": b"\0"}}
    assert await client.refused("RepositoryModelLoad", model_name="m") == ("PERMISSION_DENIED", "not for you")
    await client("RepositoryModelLoad", BEARER, model_name="m", parameters=parameters)
    await client(
        "RepositoryModelUnload",
        BEARER,
        model_name="m",
        parameters={"unload_dependents": {"bool_param": True}},
    )
    assert client.service.managed == [
        ("load", "m", {"config": "{}", "file:1/model.onnx": b"\0"}),
        ("unload", "m", {"unload_dependents": True}),
    ]


async def test_large_files_come_with_a_load_and_little_else(client: Client) -> None:
    weights, small = bytes(range(256)) * 4096, b""
    parameters: dict[str, Any] = {
        "config": {"string_param": "{}"},
        "file:1/model.onnx": {"bytes_param": weights},
        "file:1/labels.txt": {"bytes_param": small},
    }
    await client("RepositoryModelLoad", BEARER, model_name="m", parameters=parameters)
    expected = {"config": "{}", "file:1/model.onnx": weights, "file:1/labels.txt": small}
    assert client.service.managed == [("load", "m", expected)]
    assert all(type(given) in (str, bytes) for given in client.service.managed[0][2].values())
    parameters["config"] = {"string_param": " " * (1 << 20)}
    code, text = await client.refused("RepositoryModelLoad", BEARER, model_name="m", parameters=parameters)
    assert (code, text.startswith("the inference.RepositoryModelLoadRequest has 10")) == (
        "RESOURCE_EXHAUSTED",
        True,
    )


async def test_nothing_is_parsed_for_who_may_not_load(client: Client) -> None:
    with pytest.raises(Forbidden):
        await client.rpc.unary["RepositoryModelLoad"](b"\xff", Call("call-1"))


async def test_a_long_message_of_a_method_without_tensors_is_not_parsed(client: Client) -> None:
    long = b"\x0a\x00" * (1 << 16) + b"\xff"
    for method in sorted({*client.rpc.unary} - {"ModelInfer", "RepositoryModelLoad"}):
        with pytest.raises(RequestTooLarge, match=f"{method}Request has 131073 bytes; 131072 are the most"):
            await client.rpc.unary[method](long, Call("call-1"))


@pytest.mark.parametrize("method", ["RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"])
async def test_there_is_one_repository_without_a_name(client: Client, method: str) -> None:
    assert await client.refused(method, BEARER, repository_name="r") == (
        "UNIMPLEMENTED",
        "'repository_name' specification is not supported",
    )


async def test_a_folder_whose_name_is_no_text_is_in_the_index(client: Client, inline: Any) -> None:
    try:
        (inline.store.folder / os.fsdecode(b"caf\xe9")).mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    assert [each.name for each in (await client("RepositoryIndex")).models] == ["caf?"]


@pytest.mark.parametrize("kind", ["System", "Cuda"])
async def test_there_is_no_shared_memory_of_clients(client: Client, kind: str) -> None:
    assert not (await client(f"{kind}SharedMemoryStatus")).regions
    await client(f"{kind}SharedMemoryUnregister")
    assert (await client.refused(f"{kind}SharedMemoryStatus", name="r"))[0] == "NOT_FOUND"
    code, text = await client.refused(f"{kind}SharedMemoryRegister", name="r", byte_size=1)
    assert (code, text) == ("UNIMPLEMENTED", "this server does not support shared memory of clients")


async def test_settings_can_be_read_and_not_changed(client: Client) -> None:
    trace, log = await client("TraceSetting"), await client("LogSettings")
    assert trace.settings["trace_level"].value == ["OFF"]
    assert log.settings["log_info"].bool_param
    changed: dict[str, Any] = {
        "TraceSetting": {"trace_level": {"value": ["TIMESTAMPS"]}},
        "LogSettings": {"log_info": {"bool_param": False}},
    }
    for method, settings in changed.items():
        assert (await client.refused(method, settings=settings))[0] == "UNIMPLEMENTED"


async def test_every_method_of_the_service_is_there(client: Client) -> None:
    file = message("inference.ModelInferRequest").DESCRIPTOR.file
    methods = file.services_by_name["GRPCInferenceService"].methods
    assert {each.name for each in methods} == {*client.rpc.unary, *client.rpc.streams}
    assert client.rpc.name == methods[0].containing_service.full_name


async def _sent(*messages: Any) -> AsyncIterator[bytes]:
    for each in messages:
        yield each.SerializeToString()


def _read(received: bytes) -> Any:
    return message("inference.ModelStreamInferResponse").FromString(received)


async def test_a_stream_keeps_nothing_of_what_is_answered(
    model: Callable[..., Any], client: Client, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    await model("arrays", ARRAYS)
    message_bytes = question("arrays", np.zeros(200_000, np.uint8)).SerializeToString()
    done = asyncio.Event()

    async def sent() -> AsyncIterator[bytes]:
        for each in [message_bytes]:
            yield each
        del each
        await done.wait()

    before = sys.getrefcount(message_bytes)
    async with client.stream(sent()) as answers:
        assert not _read(await anext(answers)).error_message
        client.service.asked.clear()
        waiting = asyncio.ensure_future(anext(answers))
        try:
            await wait_until(lambda: sys.getrefcount(message_bytes) == before, "the message to be forgotten")
        finally:
            done.set()
            with pytest.raises(StopAsyncIteration):
                await waiting


@pytest.mark.parametrize(
    ("received", "text"),
    [
        (b"\x2a\x00" * 100_000, "the message has more than 4096 fields, or is none"),
        (b"\x2a\x00" * 2000, "a request has at most 1024 inputs"),
        (b"\x32\x00" * 60_000, "a request wants at most 1024 outputs, got 60000"),
    ],
)
async def test_a_message_of_empty_inputs_or_outputs_is_refused(
    client: Client, received: bytes, text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        await client.rpc.unary["ModelInfer"](received, Call("call-1"))


async def test_single_values_are_bounded_and_large_elements_are_not(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mms_lite.frontends.fields.MOST_PARSED_BYTES", 1 << 20)
    code, text = await refused(client, _with(fp32_contents=[0.5] * 300_000))
    assert (code, text.endswith("Send tensors in raw_input_contents.")) == ("RESOURCE_EXHAUSTED", True)
    elements = [bytes([number]) * 700_000 for number in range(3)]
    asked = _with("BYTES", bytes_contents=elements)
    asked.inputs[0].shape[:] = [3]
    read = (await infer_messages.read(asked.SerializeToString(), Call("c"))).request
    assert read is not None
    assert list(to_array(read.inputs[0])) == elements


async def test_a_stream_answers_in_order_and_goes_on_after_an_error(
    model: Callable[..., Any], client: Client
) -> None:
    await model("arrays", ARRAYS)
    good = [question("arrays", np.full(size, 1, np.uint8), id=str(size)) for size in (1, 200_000)]
    bad = question("none", np.zeros(1, np.uint8), id="bad")
    async with client.stream(_sent(good[0], bad, good[1])) as answers:
        first, failed, second = [_read(each) async for each in answers]
    assert [each.infer_response.id for each in (first, failed, second)] == ["1", "bad", "200000"]
    assert failed.error_message == "Request for unknown model: 'none' is not found"
    assert not first.error_message
    assert list(second.infer_response.raw_output_contents) == [b"\1" * 200_000]
    assert all(each.infer_response.parameters["triton_final_response"].bool_param for each in (first, failed))


async def test_a_later_request_of_a_stream_does_not_wait_for_an_earlier_one(
    inline: Any, client: Client, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    await inline.load("gate", workers=2)
    paths = [tmp_path / name for name in "ab"]
    asked = [question("gate", np.array([str(path).encode()], object)) for path in paths]
    for each in asked:
        each.inputs[0].name = "body"

    async def open_gates() -> None:
        await wait_until(lambda: all(path.with_suffix(".started").exists() for path in paths))
        for path in reversed(paths):
            path.touch()

    opening = asyncio.create_task(open_gates())
    async with client.stream(_sent(*asked)) as answers:
        found = [_read(each).infer_response.raw_output_contents[0] async for each in answers]
    await opening
    assert [each[4:].decode() for each in found] == list(map(str, paths))


async def test_a_client_may_have_an_error_end_the_stream(client: Client) -> None:
    asked = question("none", np.zeros(1, np.uint8))
    async with client.stream(_sent(asked, asked), ("triton_grpc_error", "true")) as answers:
        with pytest.raises(ServingError, match="Request for unknown model"):
            await anext(answers)


async def test_a_stream_has_a_bound_on_what_is_open_and_leaves_nothing_behind(
    client: Client, wait_until: Callable[..., Any]
) -> None:
    sent, cancelled = 0, 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield question("m", np.zeros(1, np.uint8)).SerializeToString()

    async def at_once(request: InferRequest) -> InferResponse:
        return InferResponse("", "m", "1")

    async def never(request: InferRequest) -> InferResponse:
        nonlocal cancelled
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled += 1
            raise
        raise AssertionError

    client.service.answers += [at_once] + [never] * 1000
    async with client.stream(endless()) as answers:
        await anext(answers)
        waiting = asyncio.ensure_future(anext(answers))
        await wait_until(lambda: len(client.service.asked) == 65, "the bound to be reached")
        waiting.cancel()
        await asyncio.wait([waiting])
    assert (sent, cancelled) == (65, 64)
    assert len(asyncio.all_tasks()) == 1


async def test_large_requests_of_a_stream_are_open_one_by_one(client: Client) -> None:
    running = most = 0

    async def answer(request: InferRequest) -> InferResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10):
            await asyncio.sleep(0)
        running -= 1
        return InferResponse("", "m", "1")

    large = question("m", np.zeros(40 << 20, np.uint8))
    client.service.answers += [answer] * 4
    async with client.stream(_sent(*[large] * 4)) as answers:
        assert len([each async for each in answers]) == 4
    assert most == 2


async def test_an_end_of_the_clients_side_for_a_reason_ends_the_stream_with_it(client: Client) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield question("none", np.zeros(1, np.uint8)).SerializeToString()
        raise ServingError("gone")

    async with client.stream(broken()) as answers:
        assert _read(await anext(answers)).error_message
        with pytest.raises(ServingError, match="gone"):
            await anext(answers)
