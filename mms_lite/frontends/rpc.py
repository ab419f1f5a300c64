"""gRPC: one listening address, its services, how it drains and stops. The only module that knows grpc.

Messages pass through as bytes; what they mean is the services' business.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import grpc

from mms_lite.errors import InvalidRequest, ModelNotReady, Overloaded, RequestTimeout, ServingError
from mms_lite.frontends.call import Call, RpcService, Stream, Unary
from mms_lite.frontends.message import CLIENT_LEFT, Limits, random_id
from mms_lite.frontends.rpc_services import about_the_server
from mms_lite.logs import log_access

if TYPE_CHECKING:
    from mms_lite.frontends.listener import Access

_CLOSE_S = 0.5  # for answers under way, and for streams that nobody ends
_LOOK_S = 0.25  # between two looks whether gRPC still listens
_LEFT_S = 30.0  # for the calls of a server that does not
_NO_LIMIT_S = 10 * 365 * 86400.0
_MOST_TEXT_BYTES = 2048  # of an error: percent-encoded, what clients read of metadata is 8 KiB
_FEWEST_MS_BETWEEN_PINGS = 1000
_MOST_STREAMS = 128  # calls of a connection at a time; the client keeps what is more to itself
_LEAST_BYTES_PER_S = 256 * 1024  # at which the largest message may come
# What the access log has of a code: the HTTP statuses of google/rpc/code.proto.
_STATUSES = {
    "CANCELLED": CLIENT_LEFT,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
}

_Answer = TypeVar("_Answer")

_STOPPING = "The server is stopping."

_log = logging.getLogger("mms_lite.grpc")


class GrpcListener:
    """One listening address with services, besides them health checking and reflection.

    `ready` says whether models can be asked: what health checking answers for the server and each service.
    """

    def __init__(
        self,
        services: Sequence[RpcService],
        limits: Limits,
        *,
        ready: Callable[[], bool],
        access: Access = log_access,
    ) -> None:
        self.access = access
        self.stopping = False
        self.active = 0  # calls of the given services
        self.held_bytes = 0  # of their messages
        self.reading: set[_Messages] = set()  # calls that wait for their clients
        # How long a message may take: only when it is whole can it be seen that anything comes.
        self.message_s = limits.idle_s + limits.max_tensor_request_size / _LEAST_BYTES_PER_S
        self._services = services
        self._limits = limits
        self._ready = ready
        self._server: Any = None
        self._former: dict[Any, asyncio.Future[None]] = {}  # that stopped by themselves, and their ends
        self._keeping: asyncio.Future[None] | None = None
        self._stopped: asyncio.Future[None] | None = None  # gRPC's own end, under way
        self._drained: asyncio.Future[None] | None = None

    async def start(self, host: str, port: int, *, tls: tuple[bytes, bytes] | None = None) -> int:
        """Listen on host and port (0: any free one) and return the bound port.

        `tls` are a private key and its certificate with the chain, in PEM. The address 0.0.0.0 is to gRPC
        every address of the machine, those of IPv6 too.

        Raises:
            OSError: the address cannot be bound.
        """
        await _check_free(host, port)
        name = f"[{host}]" if ":" in host else host
        bound = await self._start(f"{name}:{port}", tls)
        self._keeping = asyncio.ensure_future(self._keep(f"{name}:{bound}", tls))
        return bound

    async def start_unix(self, path: str) -> None:
        """Listen on a Unix socket; a file that is in the way is the caller's to remove, ours goes with us.

        Raises:
            OSError: the address cannot be bound.
        """
        _check_no_file(path)
        await self._start(f"unix:{path}", None)
        self._keeping = asyncio.ensure_future(self._keep(f"unix:{path}", None))

    async def _start(self, address: str, tls: tuple[bytes, bytes] | None) -> int:
        server = grpc.aio.server(options=_options(self._limits))
        server.add_generic_rpc_handlers(self._handlers())
        try:
            if tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, grpc.ssl_server_credentials([tls]))
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}") from error
        await server.start()
        self._server = server
        return int(port)

    async def _keep(self, address: str, tls: tuple[bytes, bytes] | None) -> None:
        """Listen again when gRPC has stopped by itself; calls that are open have time to come to their end.

        A call whose path is not UTF-8 ends its loop that takes calls (grpcio 1.85.1, aio/server.pyx.pxi:
        method().decode()), and closes the port for good: anybody could.
        """
        while not self.stopping:
            server = self._server
            try:
                await server.wait_for_termination(_LOOK_S)
            except Exception as error:
                _log.error("gRPC stopped listening on %s and is started again: %r", address, error)
                self._former[server] = asyncio.ensure_future(self._end_former(server))
                await self._restart(address, tls)

    async def _restart(self, address: str, tls: tuple[bytes, bytes] | None) -> None:
        while not self.stopping:
            try:
                await self._start(address, tls)
                break
            except OSError:  # the port is not free yet
                await asyncio.sleep(_LOOK_S)
        if self.stopping:  # since then
            await _end(self._server, 0)

    async def _end_former(self, server: Any) -> None:
        await _end(server, _LEFT_S)
        del self._former[server]

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        """Return what gRPC calls, for each service."""
        own = about_the_server(self._services, self._serves)
        # What only looks at the server does not hold up its end.
        return [self._handler(service, counted=True) for service in self._services] + [
            self._handler(service, counted=False) for service in own
        ]

    def _handler(self, service: RpcService, *, counted: bool) -> grpc.GenericRpcHandler:
        handlers = {}
        for name, unary in service.unary.items():
            handlers[name] = _unary_handler(_Method(self, service, name, counted=counted), unary)
        for name, stream in service.streams.items():
            handlers[name] = _stream_handler(_Method(self, service, name, counted=counted), stream)
        return grpc.method_handlers_generic_handler(service.name, handlers)

    def _serves(self) -> bool:
        return not self.stopping and self._ready()

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more, read nothing more of streams, wait up to `grace_s` for what is open."""
        if self._server is None:
            return
        if not self.stopping:
            self.stopping = True
            self._stopped = asyncio.ensure_future(_end(self._server, _NO_LIMIT_S))
            for messages in list(self.reading):
                messages.end(ModelNotReady, _STOPPING)
        if self.active:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._drained], timeout=grace_s)

    async def stop(self, grace_s: float) -> None:
        """Drain, then cancel what is left."""
        await self.drain(grace_s)
        if self._stopped is not None:
            await asyncio.gather(*(_end(each, _CLOSE_S) for each in (self._server, *self._former)))
            await asyncio.gather(self._stopped, *self._former.values())
        if self._keeping is not None:
            await self._keeping
            await _end(self._server, 0)  # if it was about to start one

    def hold(self, size: int) -> int:
        """Count a message of this size as held, and return the size.

        Raises:
            ServingError: all together would be too large, or the server is about to end.
        """
        if self.stopping:
            raise ModelNotReady(_STOPPING)
        if self.held_bytes + size > self._limits.max_bytes_in_flight:
            raise Overloaded("The server holds as many bytes of requests as it may. Try again later.")
        self.held_bytes += size
        return size

    def closed(self) -> None:
        """Count a call as open no longer."""
        self.active -= 1
        if self._drained is not None and not self.active and not self._drained.done():
            self._drained.set_result(None)


async def _end(server: Any, grace_s: float) -> None:
    """Stop a server of gRPC, whatever it fails with: then it is at its end already."""
    try:
        await server.stop(grace_s)
    except Exception as error:
        _log.debug("gRPC ended with %r", error)


class _Messages:
    """The messages that a client sends in a call; each is held until it is answered.

    They end where the client ends them, or with a `fault` of the server's making.
    """

    __slots__ = ("_context", "_held", "_listener", "_reader", "fault")

    def __init__(self, listener: GrpcListener, context: Any) -> None:
        self.fault: ServingError | None = None
        self._listener = listener
        self._context = context
        self._held: list[int] = []  # their sizes
        self._reader: asyncio.Task[Any] | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        received = await self._read()
        if received is None or self.fault is not None:
            raise StopAsyncIteration
        return received

    async def only(self) -> bytes:
        """Return the message of a call that has one; it has to be there within a time.

        Raises:
            ServingError: it is not, or is too much for the server.
        """
        late = RequestTimeout, "The client stopped sending."
        timer = asyncio.get_running_loop().call_later(self._listener.message_s, self.end, *late)
        try:
            received = await self._read()
        finally:
            timer.cancel()
        if self.fault is not None:
            raise self.fault
        if received is None:
            raise InvalidRequest("The call has no message.")
        return received

    def end(self, kind: type[ServingError], text: str) -> None:
        """Wait for the client no more."""
        self.fault = kind(text)
        if self._reader is not None:
            self._reader.cancel()

    def answered(self) -> None:
        """Hold the oldest message no more."""
        if self._held:
            self._listener.held_bytes -= self._held.pop(0)

    def release(self) -> None:
        """Hold nothing any more."""
        self._listener.held_bytes -= sum(self._held)
        self._held.clear()
        self.fault = None  # which has been told, and keeps the frames that it came through

    async def _read(self) -> bytes | None:
        """Return the next message, None where they end."""
        listener = self._listener
        if listener.stopping:
            self.fault = ModelNotReady(_STOPPING)
            return None
        self._reader = asyncio.current_task()
        listener.reading.add(self)
        try:
            received = await self._context.read()
            if received is grpc.aio.EOF:
                # A client that leaves looks the same; that it has left is known before one more read returns.
                await self._context.read()
                return None
        except asyncio.CancelledError:
            if self.fault is None:
                raise
            return None
        finally:
            self._reader = None
            listener.reading.discard(self)
        try:
            self._held.append(listener.hold(len(received)))
        except ServingError:
            del received  # which the error's traceback would keep
            raise
        return bytes(received)


class _Method:
    """A method as gRPC calls it: a call's accounts and its errors, whatever is done in it."""

    __slots__ = ("_counted", "_listener", "_name", "_path", "_service")

    def __init__(self, listener: GrpcListener, service: RpcService, name: str, *, counted: bool) -> None:
        self._listener = listener
        self._service = service
        self._name = name
        self._path = f"/{service.name}/{name}"
        self._counted = counted

    async def serve(
        self, context: Any, work: Callable[[Call, _Messages], Awaitable[_Answer]]
    ) -> _Answer | None:
        """Do the work of a call, and return what it returns; None if it was aborted."""
        listener = self._listener
        begin = time.monotonic()
        call, messages = _call(context, begin), _Messages(listener, context)
        status = CLIENT_LEFT
        listener.active += self._counted
        try:
            answer = await work(call, messages)
            status = 200
            return answer
        except Exception as error:
            code, text = self._spell(error, call)
            status = _STATUSES.get(code, 500)
        finally:
            messages.release()
            if self._counted:
                listener.closed()
            end = time.monotonic()
            if status == CLIENT_LEFT and call.deadline is not None and end >= call.deadline:
                status = _STATUSES["DEADLINE_EXCEEDED"]
            ms = int((end - begin) * 1000)
            listener.access(call.peer, "POST", self._path, "HTTP/2.0", status, ms)
        try:  # its id leads to what the log says
            await context.abort(grpc.StatusCode[code], _short(text), (("x-request-id", call.id),))
        except grpc.aio.AbortError as aborted:  # gRPC keeps it with the call: it is not to keep the call
            aborted.with_traceback(None)
        return None

    def _spell(self, error: Exception, call: Call) -> tuple[str, str]:
        if not isinstance(error, ServingError):
            _log.error("request %s: %s failed", call.id, self._path, exc_info=error)
            error = ServingError("Internal server error.")
        return self._service.spell(error, self._name)


def _unary_handler(method: _Method, function: Unary) -> Any:
    """Return a method with one request and one answer. Without serializers gRPC gives and takes bytes.

    To gRPC the request is one of any number, which on the wire is no special case: else it would itself
    wait for the request, and for ever.
    """

    async def work(call: Call, messages: _Messages) -> bytes:
        return await function(await messages.only(), call)

    async def answer(_messages: object, context: Any) -> bytes | None:
        return await method.serve(context, work)

    return grpc.stream_unary_rpc_method_handler(answer)


def _stream_handler(method: _Method, function: Stream) -> Any:
    """Return a method with any number of requests and answers: on the wire one is no special case."""

    async def converse(_messages: object, context: Any) -> None:
        async def work(call: Call, messages: _Messages) -> None:
            async with aclosing(function(messages, call)) as answers:  # it ends with its client
                async for answer in answers:
                    await context.write(answer)
                    messages.answered()
                    del answer  # it would be kept until the next, and that may be hours
            if messages.fault is not None:
                raise messages.fault

        await method.serve(context, work)

    return grpc.stream_stream_rpc_method_handler(converse)


def _call(context: Any, now: float) -> Call:
    remaining_s = context.time_remaining()
    return Call(
        random_id(),
        [pair for pair in context.invocation_metadata() if not pair[0].endswith("-bin")],
        None if remaining_s is None else now + remaining_s,
        _client_name(context.peer()),
    )


@lru_cache(maxsize=1024)
def _client_name(peer: str) -> str:
    """Return host:port of `ipv4:127.0.0.1:80` and `ipv6:%5B::1%5D:80`; empty for a Unix socket."""
    family, _, name = peer.partition(":")
    return unquote(name) if family in ("ipv4", "ipv6") else ""


def _short(text: str) -> str:
    return text.encode("utf-8", "replace")[:_MOST_TEXT_BYTES].decode("utf-8", "ignore")


def _options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else a second server on the same port would take half of the calls
        ("grpc.max_receive_message_length", limits.max_tensor_request_size),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_ping_interval_without_data_ms", _FEWEST_MS_BETWEEN_PINGS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),  # then a client is asked for a sign
        ("grpc.max_concurrent_streams", _MOST_STREAMS),
        # It refuses a call that takes the place of one that has just been answered.
        ("grpc.http.overload_protection", 0),
    ]


def _check_no_file(path: str) -> None:
    if os.path.lexists(path):  # gRPC would remove a socket, whoever listens
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)


async def _check_free(host: str, port: int) -> None:
    """Try to bind every address of the host: gRPC is content with one of them, and tells no reason.

    Raises:
        OSError: one cannot be bound.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
