"""gRPC over real sockets: calls, errors, limits, and how an address drains and stops."""

import asyncio
import errno
import gc
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the grpc extra")

import grpc
from certificates import Pair
from google.protobuf import descriptor_pool

from mms_lite.errors import ModelNotFound, ServingError
from mms_lite.frontends.call import Call, Stream, Unary
from mms_lite.frontends.message import Limits
from mms_lite.frontends.rpc import GrpcListener, _Messages
from mms_lite.protos import files, message

HEALTH, LOOK = "grpc.health.v1.Health", "ServerReflection/ServerReflectionInfo"
NAME = "inference.GRPCInferenceService"
ECHO, HANG, FAIL, CRASH = (f"/{NAME}/{method}" for method in ("Echo", "Hang", "Fail", "Crash"))
CHAT, GATHER = f"/{NAME}/Chat", f"/{NAME}/Gather"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
LIMIT_S = 20.0


class Service:
    """A protocol with methods that tests need; it says what it has seen."""

    name = NAME

    def __init__(self) -> None:
        self.unary: dict[str, Unary] = {
            "Echo": self._echo,
            "Hang": self._hang,
            "Fail": self._fail,
            "Crash": self._crash,
        }
        self.streams: dict[str, Stream] = {"Chat": self._chat, "Gather": self._gather}
        self.files: Sequence[bytes] = files(NAME)
        self.calls: list[Call] = []
        self.go_on = asyncio.Event()
        self.ended: list[str] = []

    def spell(self, error: ServingError, method: str) -> tuple[str, str]:
        return error.grpc, f"{method}: {error.message}"

    async def _echo(self, body: bytes, call: Call) -> bytes:
        self.calls.append(call)
        return body

    async def _hang(self, body: bytes, call: Call) -> bytes:
        self.calls.append(call)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("answered")
        return body

    async def _fail(self, body: bytes, call: Call) -> bytes:
        self.calls.append(call)
        raise ModelNotFound(body.decode())

    async def _crash(self, body: bytes, call: Call) -> bytes:
        raise ValueError("a secret of the server")

    async def _chat(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        self.calls.append(call)
        try:
            async for body in messages:
                if body == b"fail":
                    raise ModelNotFound("no such word")
                yield body.upper()
        finally:
            self.ended.append("stream")

    async def _gather(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        """Answer when all messages are there."""
        gathered = [body async for body in messages]
        await self.go_on.wait()
        for body in gathered:
            yield body


class Bench:
    """A listener with the service, what it wrote into the access log, and channels to it."""

    def __init__(self) -> None:
        self.service = Service()
        self.lines: list[tuple[str, str, str, str, int]] = []
        self.ready = True
        self.listeners: list[GrpcListener] = []
        self.channels: list[Any] = []

    def listener(self, **limits: Any) -> GrpcListener:
        self.listeners.append(
            GrpcListener(
                [self.service],
                Limits(**limits),
                ready=lambda: self.ready,
                access=lambda *line: self.lines.append(line[:5]),
            )
        )
        return self.listeners[-1]

    def channel(self, target: str, credentials: Any = None, *, options: Sequence[Any] = ()) -> Any:
        if credentials is None:
            self.channels.append(grpc.aio.insecure_channel(target, options=[*UNLIMITED, *options]))
        else:
            self.channels.append(grpc.aio.secure_channel(target, credentials, options=UNLIMITED))
        return self.channels[-1]

    async def serve(self, **limits: Any) -> Any:
        self.port = await self.listener(**limits).start("127.0.0.1", 0)
        return self.channel(f"127.0.0.1:{self.port}")

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()
        for listener in self.listeners:
            await listener.stop(0)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.close()


def ask(channel: Any, path: str, body: bytes = b"", **options: Any) -> Any:
    return channel.unary_unary(path)(body, timeout=options.pop("timeout", LIMIT_S), **options)


async def error_of(call: Awaitable[Any]) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def name_of(error: Any) -> str:
    return str(error.code().name)


async def test_a_call_brings_bytes_metadata_peer_and_deadline(bench: Bench) -> None:
    channel = await bench.serve()
    metadata = (("x-tenant", "blue"), ("trace-bin", b"\xff\x00"))
    assert (
        await ask(channel, ECHO, b"\x00\xff" * 100, metadata=metadata, timeout=LIMIT_S) == b"\x00\xff" * 100
    )
    await channel.unary_unary(ECHO)(b"")

    first, second = bench.service.calls
    assert ("x-tenant", "blue") in first.metadata
    assert all(isinstance(value, str) for _, value in first.metadata)
    assert first.peer.startswith("127.0.0.1:") and first.peer.rpartition(":")[2].isdigit()
    assert (
        first.deadline is not None and 0 < first.deadline - time.monotonic() < LIMIT_S + 1
    )  # what crosses the wire is rounded
    assert second.deadline is None
    assert first.id != second.id
    assert bench.lines[0] == (first.peer, "POST", ECHO, "HTTP/2.0", 200)


async def test_an_error_is_spelled_by_its_service(bench: Bench) -> None:
    channel = await bench.serve()
    error = await error_of(ask(channel, FAIL, "größer".encode()))

    assert (name_of(error), error.details()) == ("NOT_FOUND", "Fail: größer")
    assert ("x-request-id", bench.service.calls[0].id) in list(error.trailing_metadata())
    assert bench.lines[-1][4] == 404
    long = await error_of(ask(channel, FAIL, "ö".encode() * 100_000))
    assert long.details().startswith("Fail: öö") and name_of(long) == "NOT_FOUND"


async def test_a_crash_is_an_internal_error_and_told_in_the_log_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    error = await error_of(ask(await bench.serve(), CRASH))

    assert (name_of(error), error.details()) == ("INTERNAL", "Crash: Internal server error.")
    assert "a secret of the server" in caplog.text and CRASH in caplog.text
    assert bench.lines[-1][4] == 500


async def test_what_is_unknown_is_unimplemented(bench: Bench) -> None:
    channel = await bench.serve()
    for path in (f"/{NAME}/Nothing", "/other.Service/Echo"):
        assert name_of(await error_of(ask(channel, path))) == "UNIMPLEMENTED"


async def test_a_path_that_is_no_text_closes_the_port_for_a_moment_only(
    bench: Bench, caplog: pytest.LogCaptureFixture, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    port = await bench.listener().start("127.0.0.1", 0)
    hanging = asyncio.ensure_future(ask(bench.channel(f"127.0.0.1:{port}"), HANG, b"before"))
    await wait_until(lambda: bench.service.calls)

    await send_path(port, b"/x\xff")
    await wait_until(lambda: "started again" in caplog.text)

    other = bench.channel(f"127.0.0.1:{port}")
    assert await ask(other, ECHO, b"after", wait_for_ready=True) == b"after"
    bench.service.go_on.set()
    assert await hanging == b"before"


async def send_path(port: int, path: bytes) -> None:
    """Call a path as no gRPC library would."""
    pairs = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost")]
    pairs += [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
    block = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in pairs)
    settings, headers = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)), bytes((0, 0, len(block), 1, 5, 0, 0, 0, 1))
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + headers + block)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def test_a_deadline_ends_the_call_at_both_ends(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    error = await error_of(ask(await bench.serve(), HANG, timeout=0.1))

    assert name_of(error) == "DEADLINE_EXCEEDED"
    await wait_until(lambda: bench.lines)
    assert bench.service.ended == ["cancelled"]
    assert bench.lines[-1][4] == 504


async def test_a_client_that_leaves_cancels_its_call(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    call = ask(await bench.serve(), HANG)
    await wait_until(lambda: bench.service.calls)
    call.cancel()

    await wait_until(lambda: bench.lines)
    assert bench.service.ended == ["cancelled"]
    assert bench.lines[-1][4] == 499
    assert bench.listeners[0].active == bench.listeners[0].held_bytes == 0


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_a_message_over_the_limit_is_refused(bench: Bench, compression: Any) -> None:
    channel = await bench.serve(max_tensor_request_size=100_000)
    fits = b"a" * 99_000
    assert await ask(channel, ECHO, fits, compression=compression) == fits
    error = await error_of(ask(channel, ECHO, b"a" * 5_000_000, compression=compression))

    assert name_of(error) == "RESOURCE_EXHAUSTED"
    assert await ask(channel, ECHO, b"after") == b"after"


async def test_messages_that_together_are_too_large_are_refused(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    channel = await bench.serve(max_bytes_in_flight=1000)
    first = ask(channel, HANG, b"a" * 900)
    await wait_until(lambda: bench.service.calls)

    error = await error_of(ask(channel, ECHO, b"a" * 200))
    assert name_of(error) == "RESOURCE_EXHAUSTED" and "Try again later" in error.details()
    assert bench.lines[-1][4] == 429
    talk = channel.stream_stream(CHAT)(timeout=LIMIT_S)
    await talk.write(b"a" * 200)
    assert name_of(await error_of(talk.read())) == "RESOURCE_EXHAUSTED"
    bench.service.go_on.set()
    await first
    assert await ask(channel, ECHO, b"a" * 1000) == b"a" * 1000
    assert bench.listeners[0].held_bytes == 0


async def test_a_message_of_a_stream_is_held_until_it_is_answered(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    channel = await bench.serve(max_bytes_in_flight=1000)
    talk = channel.stream_stream(GATHER)(timeout=LIMIT_S)
    for size in (300, 400):
        await talk.write(bytes(size))
    listener = bench.listeners[0]
    await wait_until(lambda: listener.held_bytes == 700)
    assert name_of(await error_of(ask(channel, ECHO, bytes(301)))) == "RESOURCE_EXHAUSTED"

    await talk.done_writing()
    bench.service.go_on.set()
    assert [len(answer) async for answer in talk] == [300, 400]
    await wait_until(lambda: listener.held_bytes == 0)
    greedy = channel.stream_stream(GATHER)(timeout=LIMIT_S)
    for _ in range(4):
        await greedy.write(bytes(300))
    assert name_of(await error_of(greedy.read())) == "RESOURCE_EXHAUSTED"
    await wait_until(lambda: listener.held_bytes == 0)


async def test_a_message_that_does_not_come_is_not_waited_for(bench: Bench) -> None:
    channel = await bench.serve(idle_s=0.05, max_tensor_request_size=1000)
    error = await error_of(channel.stream_unary(ECHO)(timeout=LIMIT_S))  # on the wire the same as unary

    assert (name_of(error), error.details()) == ("DEADLINE_EXCEEDED", "Echo: The client stopped sending.")
    assert [line[4] for line in bench.lines] == [504]
    assert not bench.service.calls
    assert bench.listeners[0].active == 0
    talk = channel.stream_stream(CHAT)(timeout=LIMIT_S)  # which may be silent as long as it likes
    await error_of(channel.stream_unary(ECHO)(timeout=LIMIT_S))
    await talk.write(b"one")
    assert await talk.read() == b"ONE"
    talk.cancel()


async def test_a_call_that_fails_leaves_nothing_behind(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    def open_calls() -> int:
        return sum(type(each) is _Messages for each in gc.get_objects())

    channel = await bench.serve(idle_s=0.05, max_tensor_request_size=1000)
    gc.collect()
    gc.disable()  # what gRPC has of a call is the message too
    try:
        talk = channel.stream_stream(CHAT)(timeout=LIMIT_S)
        await talk.write(b"one")
        assert await talk.read() == b"ONE"
        await error_of(ask(channel, FAIL))
        await error_of(channel.stream_unary(ECHO)(timeout=LIMIT_S))  # it sends nothing
        await wait_until(lambda: open_calls() == 1, "failed calls to be forgotten", 3)
        await bench.listeners[0].drain(LIMIT_S)
        await error_of(talk.read())
        await wait_until(lambda: not open_calls(), "the stream to be forgotten", 3)
    finally:
        gc.enable()


async def test_a_call_without_a_message_is_an_error(bench: Bench) -> None:
    call = (await bench.serve()).stream_unary(ECHO)(timeout=LIMIT_S)
    await call.done_writing()
    error = await error_of(call)
    assert (name_of(error), error.details()) == ("INVALID_ARGUMENT", "Echo: The call has no message.")


async def test_a_connection_has_so_many_calls_at_a_time(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    channel = await bench.serve()
    calls = [asyncio.ensure_future(ask(channel, HANG, b"%d" % index)) for index in range(140)]
    await wait_until(lambda: bench.listeners[0].active == 128)
    other = bench.channel(f"127.0.0.1:{bench.port}", options=[("grpc.use_local_subchannel_pool", 1)])
    assert await ask(other, ECHO, b"another connection") == b"another connection"
    assert len(bench.service.calls) == 129

    bench.service.go_on.set()
    assert [int(answer) for answer in await asyncio.gather(*calls)] == list(range(140))


async def test_an_answer_may_have_any_size(bench: Bench) -> None:
    channel = await bench.serve(max_tensor_request_size=6_000_000)
    assert len(await ask(channel, ECHO, bytes(5_900_000))) == 5_900_000


async def test_a_stream_goes_both_ways_until_the_client_ends_it(bench: Bench) -> None:
    talk = (await bench.serve()).stream_stream(CHAT)(timeout=LIMIT_S)
    for word in (b"one", b"two"):
        await talk.write(word)
        assert await talk.read() == word.upper()
    await talk.done_writing()

    assert await talk.read() is grpc.aio.EOF
    assert (await talk.code()).name == "OK"
    assert bench.service.ended == ["stream"]
    assert bench.lines == [(bench.service.calls[0].peer, "POST", CHAT, "HTTP/2.0", 200)]


async def test_an_error_in_a_stream_ends_it(bench: Bench) -> None:
    talk = (await bench.serve()).stream_stream(CHAT)(timeout=LIMIT_S)
    await talk.write(b"one")
    await talk.write(b"fail")

    assert await talk.read() == b"ONE"
    error = await error_of(talk.read())
    assert (name_of(error), error.details()) == ("NOT_FOUND", "Chat: no such word")
    assert bench.lines[-1][4] == 404


async def test_a_client_that_leaves_a_stream_closes_it(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    channel = await bench.serve()
    for count in range(1, 51):  # gRPC may say first that it sends no more, and then that it has left
        talk = channel.stream_stream(CHAT)(timeout=LIMIT_S)
        await talk.write(b"one")
        assert await talk.read() == b"ONE"
        talk.cancel()
        await wait_until(lambda count=count: len(bench.lines) == count)  # type: ignore[misc]

    assert bench.service.ended == ["stream"] * 50
    assert {line[4] for line in bench.lines} == {499}
    assert bench.listeners[0].active == bench.listeners[0].held_bytes == 0


async def test_a_drain_waits_for_open_calls_and_takes_no_more(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    channel = await bench.serve()
    call = ask(channel, HANG, b"late")
    talk = channel.stream_stream(CHAT)(timeout=LIMIT_S)
    await talk.write(b"one")
    assert await talk.read() == b"ONE"
    silent = channel.stream_unary(ECHO)(timeout=LIMIT_S)
    listener = bench.listeners[0]
    await wait_until(lambda: len(bench.service.calls) == 2 and listener.active == 3)
    draining = asyncio.ensure_future(listener.drain(LIMIT_S))

    assert name_of(await error_of(silent)) == "UNAVAILABLE"
    assert name_of(await error_of(talk.read())) == "UNAVAILABLE"  # it only waited for its client
    assert name_of(await error_of(ask(channel, ECHO))) == "UNAVAILABLE"
    assert not draining.done()
    bench.service.go_on.set()
    assert await call == b"late"
    await draining
    await listener.stop(0)
    assert bench.service.ended == ["stream", "answered"]


async def test_a_stop_cancels_what_outlasts_its_grace(
    bench: Bench, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    call = ask(await bench.serve(), HANG)
    await wait_until(lambda: bench.service.calls)
    await bench.listeners[0].stop(0.05)

    assert name_of(await error_of(call)) in ("UNAVAILABLE", "CANCELLED")
    await wait_until(lambda: bench.service.ended)
    assert bench.service.ended == ["cancelled"]


async def test_an_address_that_is_taken_is_an_error(bench: Bench) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                await bench.listener().start("127.0.0.1", taken.getsockname()[1])
            assert caught.value.errno == errno.EADDRINUSE
    port = await bench.listener().start("127.0.0.1", 0)
    with pytest.raises(OSError):
        await bench.listener().start("127.0.0.1", port)
    with pytest.raises(OSError):
        await bench.listener().start("no.such.host.invalid", 0)


async def test_a_unix_socket_serves_and_goes_with_its_listener(bench: Bench, tmp_path: Path) -> None:
    path = str(tmp_path / "grpc.sock")
    await bench.listener().start_unix(path)
    with pytest.raises(OSError):
        await bench.listener().start_unix(path)
    assert await ask(bench.channel(f"unix:{path}"), ECHO, b"here") == b"here"
    assert bench.service.calls[0].peer == ""

    await bench.listeners[0].stop(0)
    await bench.listener().start_unix(path)


async def test_tls_with_a_key_and_a_chain(bench: Bench) -> None:
    root = Pair(name="root", ca=True)
    leaf = Pair(issuer=root)
    tls = (leaf.key_pem(), leaf.pem() + root.pem())
    port = await bench.listener().start("127.0.0.1", 0, tls=tls)
    channel = bench.channel(f"localhost:{port}", grpc.ssl_channel_credentials(root.pem()))

    assert await ask(channel, ECHO, b"secret") == b"secret"
    stranger = bench.channel(f"localhost:{port}", grpc.ssl_channel_credentials(Pair().pem()))
    assert name_of(await error_of(ask(stranger, ECHO))) == "UNAVAILABLE"


async def test_a_compressed_request_is_answered(bench: Bench) -> None:
    channel = await bench.serve()
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert await ask(channel, ECHO, b"a" * 10_000, compression=compression) == b"a" * 10_000


async def status_of(channel: Any, service: str) -> str:
    body = message("grpc.health.v1.HealthCheckRequest")(service=service).SerializeToString()
    answer = message("grpc.health.v1.HealthCheckResponse").FromString(
        await ask(channel, f"/{HEALTH}/Check", body)
    )
    return str(answer.ServingStatus.Name(answer.status))


async def test_health_is_that_of_the_models(bench: Bench) -> None:
    channel = await bench.serve()
    assert [await status_of(channel, name) for name in ("", NAME)] == ["SERVING", "SERVING"]
    assert name_of(await error_of(status_of(channel, "other"))) == "NOT_FOUND"
    bench.ready = False
    assert await status_of(channel, "") == "NOT_SERVING"

    listed = message("grpc.health.v1.HealthListResponse").FromString(await ask(channel, f"/{HEALTH}/List"))
    assert {name: status.status for name, status in listed.statuses.items()} == {"": 2, NAME: 2}


async def test_health_is_watched_and_holds_up_no_drain(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mms_lite.frontends.rpc_services._WATCH_S", 0.01)
    channel = await bench.serve()
    response = message("grpc.health.v1.HealthCheckResponse")
    watch = channel.unary_stream(f"/{HEALTH}/Watch")(b"", timeout=LIMIT_S)

    assert response.FromString(await watch.read()).status == response.SERVING
    bench.ready = False
    assert response.FromString(await watch.read()).status == response.NOT_SERVING
    bench.ready = True
    assert response.FromString(await watch.read()).status == response.SERVING
    await bench.listeners[0].drain(LIMIT_S)
    assert response.FromString(await watch.read()).status == response.NOT_SERVING


async def reflected(channel: Any, package: str, **question: str) -> Any:
    request = message(f"{package}.ServerReflectionRequest")(**question)
    talk = channel.stream_stream(f"/{package}.{LOOK}")(timeout=LIMIT_S)
    await talk.write(request.SerializeToString())
    answer = message(f"{package}.ServerReflectionResponse").FromString(await talk.read())
    await talk.done_writing()
    assert await talk.read() is grpc.aio.EOF
    assert answer.original_request == request
    return answer


@pytest.mark.parametrize("package", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
async def test_a_tool_finds_services_and_their_messages(bench: Bench, package: str) -> None:
    channel = await bench.serve()
    listed = await reflected(channel, package, list_services="*")
    names = [service.name for service in listed.list_services_response.service]
    assert {NAME, HEALTH, f"{package}.ServerReflection"} <= set(names)

    for name in names:
        found = await reflected(channel, package, file_containing_symbol=name)
        theirs = descriptor_pool.DescriptorPool()
        for file in found.file_descriptor_response.file_descriptor_proto:
            theirs.AddSerializedFile(file)
        assert theirs.FindServiceByName(name).methods
    named = await reflected(channel, package, file_by_filename="model_config.proto")
    assert len(named.file_descriptor_response.file_descriptor_proto) == 1
    for question in (
        {"file_containing_symbol": "other.Service"},
        {"file_by_filename": "other.proto"},
        {"all_extension_numbers_of_type": "inference.ModelConfig"},
    ):
        assert (await reflected(channel, package, **question)).error_response.error_code == 5


async def test_bytes_that_are_no_message_are_an_invalid_argument(bench: Bench) -> None:
    error = await error_of(ask(await bench.serve(), f"/{HEALTH}/Check", b"\xff"))
    assert name_of(error) == "INVALID_ARGUMENT"


async def test_what_tells_of_the_server_reads_no_long_message(bench: Bench) -> None:
    channel = await bench.serve()
    long = message("grpc.health.v1.HealthCheckRequest")(service="s" * (128 << 10)).SerializeToString()
    assert name_of(await error_of(ask(channel, f"/{HEALTH}/Check", long))) == "RESOURCE_EXHAUSTED"
    watch = channel.unary_stream(f"/{HEALTH}/Watch")(long, timeout=LIMIT_S)
    assert name_of(await error_of(watch.read())) == "RESOURCE_EXHAUSTED"
    with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
        await reflected(channel, "grpc.reflection.v1", file_by_filename="f" * (128 << 10))
