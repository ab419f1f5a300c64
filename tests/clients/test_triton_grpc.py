"""What only gRPC has: typed contents, streams, deadlines, compression, health, and reflection."""

import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from client_server import Server

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (make clients)")

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from triton_client import TritonClient, sixteen
from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
    aio,
    service_pb2,
    service_pb2_grpc,
)
from tritonclient.utils import InferenceServerException

MORE_THAN_ANYONE_WAITS_S = 30.0


@pytest.fixture(params=["grpc", "grpc.aio"])
def client(triton: Server, request: pytest.FixtureRequest) -> Iterator[TritonClient]:
    with TritonClient(request.param, triton) as made:
        yield made


@pytest.fixture
def channel(triton: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(triton.grpc) as made:
        yield made


@pytest.fixture
def stub(channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


# Messages made by hand


def typed_pair(**changes: Any) -> service_pb2.ModelInferRequest:
    """Return a request to `simple` with its numbers in the field for 32-bit integers."""
    request = service_pb2.ModelInferRequest(model_name="simple", id="by hand")
    for name, start in (("INPUT0", 0), ("INPUT1", 100)):
        tensor = request.inputs.add(name=name, datatype="INT32", shape=[1, 16])
        tensor.contents.int_contents.extend(range(start, start + 16))
    for field, value in changes.items():
        getattr(request, field).extend(value)
    return request


def test_numbers_in_a_typed_field(stub: Any) -> None:
    answer = stub.ModelInfer(typed_pair())
    assert (answer.id, answer.model_name, answer.model_version) == ("by hand", "simple", "1")
    found = InferResult(answer)
    np.testing.assert_array_equal(found.as_numpy("OUTPUT0"), sixteen(0) + sixteen(100))
    np.testing.assert_array_equal(found.as_numpy("OUTPUT1"), sixteen(0) - sixteen(100))


def test_answers_are_raw_also_where_the_request_was_typed(stub: Any) -> None:
    answer = stub.ModelInfer(typed_pair())
    assert [len(each) for each in answer.raw_output_contents] == [64, 64]
    assert not any(each.HasField("contents") for each in answer.outputs)


def test_text_in_a_typed_field(stub: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name="words")
    tensor = request.inputs.add(name="words", datatype="BYTES", shape=[2])
    tensor.contents.bytes_contents.extend([b"one", b""])
    assert InferResult(stub.ModelInfer(request)).as_numpy("upper").tolist() == [b"ONE", b""]


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_typed_and_raw_in_one_request_are_refused(stub: Any) -> None:
    request = typed_pair(raw_input_contents=[sixteen(0).tobytes(), sixteen(1).tobytes()])
    error = refused(lambda: stub.ModelInfer(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "contents field must not be specified when using raw_input_contents" in error.details()


@pytest.mark.parametrize("size", [60, 68])
def test_raw_data_of_another_length_are_refused(stub: Any, size: int) -> None:
    request = typed_pair(raw_input_contents=[bytes(size), bytes(64)])
    for each in request.inputs:
        each.ClearField("contents")
    error = refused(lambda: stub.ModelInfer(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    expected = f"input byte size mismatch for input 'INPUT0' for model 'simple'. Expected 64, got {size}"
    assert expected in error.details()


def test_fewer_raw_data_than_inputs_are_refused(stub: Any) -> None:
    request = typed_pair(raw_input_contents=[bytes(64)])
    for each in request.inputs:
        each.ClearField("contents")
    assert refused(lambda: stub.ModelInfer(request)).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_half_precision_has_no_typed_field(stub: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name="identity_FP16")
    tensor = request.inputs.add(name="INPUT0", datatype="FP16", shape=[1, 1])
    tensor.contents.fp32_contents.append(1.0)
    assert refused(lambda: stub.ModelInfer(request)).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_version_that_is_no_number_is_refused(client: TritonClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.ask("simple", {"model_version": "newest"}, INPUT0=sixteen(0), INPUT1=sixteen(0))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_bytes_that_are_no_message(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    error = refused(lambda: call(b"\xff\xff\xff", timeout=MORE_THAN_ANYONE_WAITS_S))
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)


def test_a_method_that_there_is_not(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelGuess")
    error = refused(lambda: call(b"", timeout=MORE_THAN_ANYONE_WAITS_S))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


# Deadlines, compression


def seconds(value: float) -> np.ndarray[Any, Any]:
    return np.array([value], np.float32)


def test_a_deadline_ends_the_wait(client: TritonClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.ask("slow", {"client_timeout": 0.3}, SECONDS=seconds(2))
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert client.ask("slow", SECONDS=seconds(0)).as_numpy("SLEPT").tolist() == [0.0]


def test_a_deadline_that_is_met_is_of_no_consequence(client: TritonClient) -> None:
    result = client.ask("slow", {"client_timeout": MORE_THAN_ANYONE_WAITS_S}, SECONDS=seconds(0))
    assert result.as_numpy("SLEPT").tolist() == [0.0]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression(client: TritonClient, algorithm: str) -> None:
    array = np.zeros((100, 1000), np.float32)
    result = client.ask("identity_FP32", {"compression_algorithm": algorithm}, INPUT0=array)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), array)


def test_answers_by_a_callback(triton: Server) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with InferenceServerClient(triton.grpc) as client:
        for number in range(20):
            array = np.full((1, 4), number, np.int16)
            tensor = InferInput("INPUT0", [1, 4], "INT16").set_data_from_numpy(array)
            call = {"request_id": str(number)}
            client.async_infer(
                "identity_INT16", [tensor], lambda result, error: answers.put((result, error)), **call
            )
        got = [answers.get(timeout=MORE_THAN_ANYONE_WAITS_S) for _ in range(20)]
    assert [error for _, error in got if error is not None] == []
    assert sorted(int(result.get_response().id) for result, _ in got) == list(range(20))
    for result, _ in got:
        assert (result.as_numpy("OUTPUT0") == int(result.get_response().id)).all()


def test_a_call_that_is_cancelled(triton: Server) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with InferenceServerClient(triton.grpc) as client:
        tensor = InferInput("SECONDS", [1], "FP32").set_data_from_numpy(seconds(1))
        client.async_infer("slow", [tensor], lambda result, error: answers.put(error)).cancel()
        error = answers.get(timeout=MORE_THAN_ANYONE_WAITS_S)
        assert error.status() == "StatusCode.CANCELLED"
        tensor.set_data_from_numpy(seconds(0))
        assert client.infer("slow", [tensor]).as_numpy("SLEPT").tolist() == [0.0]


# Streams


def numbers(start: int) -> list[InferInput]:
    inputs = [InferInput(f"INPUT{index}", [1, 16], "INT32") for index in (0, 1)]
    inputs[0].set_data_from_numpy(sixteen(start))
    inputs[1].set_data_from_numpy(sixteen(0))
    return inputs


def test_a_stream_answers_each_of_its_requests(triton: Server) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with InferenceServerClient(triton.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(10):
            client.async_stream_infer("simple", numbers(number), request_id=str(number))
        got = [answers.get(timeout=MORE_THAN_ANYONE_WAITS_S) for _ in range(10)]
        client.stop_stream()
    assert {error for _, error in got} == {None}
    by_id = {int(result.get_response().id): result for result, _ in got}
    assert sorted(by_id) == list(range(10))
    for number, result in by_id.items():
        np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), np.full((1, 16), number))


def test_an_error_is_a_message_of_its_stream_which_goes_on(triton: Server) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with InferenceServerClient(triton.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("nobody", numbers(0))
        _, error = answers.get(timeout=MORE_THAN_ANYONE_WAITS_S)
        assert "Request for unknown model: 'nobody' is not found" in error.message()
        client.async_stream_infer("simple", numbers(1))
        result, error = answers.get(timeout=MORE_THAN_ANYONE_WAITS_S)
        client.stop_stream()
    assert error is None
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), np.ones((1, 16)))


def test_an_error_ends_the_stream_of_a_client_that_wants_that(triton: Server) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with InferenceServerClient(triton.grpc) as client:
        wish = {"triton_grpc_error": "true"}
        client.start_stream(lambda result, error: answers.put((result, error)), headers=wish)
        client.async_stream_infer("nobody", numbers(0))
        _, error = answers.get(timeout=MORE_THAN_ANYONE_WAITS_S)
        client.stop_stream(cancel_requests=True)
    assert error.status() == "StatusCode.NOT_FOUND"


def test_the_last_answer_says_so_to_a_client_that_wants_that(triton: Server) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with InferenceServerClient(triton.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("simple", numbers(2), enable_empty_final_response=True)
        result, error = answers.get(timeout=MORE_THAN_ANYONE_WAITS_S)
        client.stop_stream()
    assert error is None
    assert result.get_response().parameters["triton_final_response"].bool_param is True


async def test_a_stream_of_the_asynchronous_client(triton: Server) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(5):
            outputs = [InferRequestedOutput("OUTPUT1")]
            yield {
                "model_name": "simple",
                "inputs": numbers(number),
                "outputs": outputs,
                "request_id": str(number),
            }

    found = {}
    async with aio.InferenceServerClient(triton.grpc) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            found[int(result.get_response().id)] = result.as_numpy("OUTPUT1")[0, 0]
    assert found == {number: number for number in range(5)}


# Many at once


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_sixteen_threads_each_get_their_own_answers(triton: Server, face: str) -> None:
    failures: list[str] = []

    def ask(thread: int) -> None:
        with TritonClient(face, triton) as client:
            for round_ in range(10):
                start = 1000 * thread + round_
                found = client.ask("simple", INPUT0=sixteen(start), INPUT1=sixteen(0)).as_numpy("OUTPUT1")
                if not (found == start).all():
                    failures.append(f"{start}: {found}")

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(MORE_THAN_ANYONE_WAITS_S)
    assert not any(each.is_alive() for each in threads)
    assert failures == []


# Health (grpc.health.v1) and reflection (grpc.reflection), as their messages are, without their libraries

SERVING = b"\x08\x01"


def health(channel: grpc.Channel, service: bytes = b"") -> Any:
    name = bytes([0x0A, len(service)]) + service if service else b""
    return channel.unary_unary("/grpc.health.v1.Health/Check")(name, timeout=MORE_THAN_ANYONE_WAITS_S)


def test_the_server_is_serving(channel: grpc.Channel) -> None:
    assert health(channel) == SERVING
    assert health(channel, b"inference.GRPCInferenceService") == SERVING


def test_the_health_of_an_unknown_service(channel: grpc.Channel) -> None:
    assert refused(lambda: health(channel, b"no.such.Service")).code() is grpc.StatusCode.NOT_FOUND


def reflection_messages() -> tuple[Any, Any]:
    """Return ServerReflectionRequest and ServerReflectionResponse, as far as these tests need them."""
    fields = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="reflection.proto", package="r", syntax="proto3")

    def message(name: str, *members: tuple[str, int, str | None, bool, int]) -> None:
        made = file.message_type.add(name=name)
        for member, number, of, many, kind in members:
            label = fields.LABEL_REPEATED if many else fields.LABEL_OPTIONAL
            field = made.field.add(name=member, number=number, label=label, type=kind)
            if of:
                field.type_name = f".r.{of}"

    text, data = fields.TYPE_STRING, fields.TYPE_BYTES
    inner, number = fields.TYPE_MESSAGE, fields.TYPE_INT32
    message(
        "Request",
        ("symbol", 4, None, False, text),
        ("list", 7, None, False, text),
        ("file", 3, None, False, text),
    )
    message("Files", ("file", 1, None, True, data))
    message("Service", ("name", 1, None, False, text))
    message("Services", ("service", 1, "Service", True, inner))
    message("Error", ("code", 1, None, False, number), ("message", 2, None, False, text))
    message(
        "Response",
        ("files", 4, "Files", False, inner),
        ("services", 6, "Services", False, inner),
        ("error", 7, "Error", False, inner),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("r.Request", "r.Response")
    request, response = (message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names)
    return request, response


class Reflection:
    """A client of server reflection, as grpcurl is one."""

    def __init__(self, channel: grpc.Channel, package: str) -> None:
        self._request, self._response = reflection_messages()
        self._call = channel.stream_stream(f"/{package}.ServerReflection/ServerReflectionInfo")

    def ask(self, **field: str) -> Any:
        answers = self._call(
            iter([self._request(**field).SerializeToString()]), timeout=MORE_THAN_ANYONE_WAITS_S
        )
        return self._response.FromString(next(iter(answers)))

    def pool(self, symbol: str) -> descriptor_pool.DescriptorPool:
        """Return a pool with the file of a symbol and all that it imports."""
        files: dict[str, Any] = {}
        self._read(self.ask(symbol=symbol), files)
        pool = descriptor_pool.DescriptorPool()
        for each in files.values():
            pool.Add(each)
        return pool

    def _read(self, answer: Any, files: dict[str, Any]) -> None:
        assert not answer.HasField("error"), answer.error.message
        for each in answer.files.file:
            file = descriptor_pb2.FileDescriptorProto.FromString(each)
            for name in file.dependency:
                if name not in files:
                    self._read(self.ask(file=name), files)
            files[file.name] = file


@pytest.fixture(params=["grpc.reflection.v1", "grpc.reflection.v1alpha"])
def reflection(channel: grpc.Channel, request: pytest.FixtureRequest) -> Reflection:
    return Reflection(channel, request.param)


def test_reflection_lists_the_services(reflection: Reflection) -> None:
    listed = {each.name for each in reflection.ask(list="*").services.service}
    assert {
        "inference.GRPCInferenceService",
        "tensorflow.serving.PredictionService",
        "tensorflow.serving.ModelService",
        "grpc.health.v1.Health",
    } <= listed


def test_a_method_can_be_called_by_what_reflection_says_of_it(
    reflection: Reflection, channel: grpc.Channel
) -> None:
    pool = reflection.pool("inference.GRPCInferenceService")
    method = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ServerMetadata")
    asked, answered = (
        message_factory.GetMessageClass(each) for each in (method.input_type, method.output_type)
    )
    call = channel.unary_unary(
        "/inference.GRPCInferenceService/ServerMetadata",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answered.FromString,
    )
    assert call(asked(), timeout=MORE_THAN_ANYONE_WAITS_S).name == "triton"


@pytest.mark.parametrize(
    ("symbol", "service"),
    [
        ("tensorflow.serving.PredictionService", "tensorflow.serving.PredictionService"),
        ("tensorflow.serving.ModelService", "tensorflow.serving.ModelService"),
        ("grpc.health.v1.Health", "grpc.health.v1.Health"),
        ("inference.ModelInferRequest", "inference.GRPCInferenceService"),
    ],
)
def test_reflection_describes_a_symbol(reflection: Reflection, symbol: str, service: str) -> None:
    pool = reflection.pool(symbol)
    assert pool.FindServiceByName(service).methods
    if symbol != service:
        assert pool.FindMessageTypeByName(symbol).fields


def test_reflection_of_an_unknown_symbol(reflection: Reflection) -> None:
    answer = reflection.ask(symbol="no.such.Thing")
    assert answer.error.code == grpc.StatusCode.NOT_FOUND.value[0]
