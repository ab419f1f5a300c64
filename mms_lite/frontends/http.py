"""HTTP over aiohttp: reading bodies within limits, connections and their end, request ids, the access log.

aiohttp's low-level server is used, for its parser and its connections: its router and its responses cost
more than they give here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import ssl
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from aiohttp import HttpVersion11, abc, hdrs, web

from mms_lite.errors import InvalidRequest, Overloaded, RequestTimeout, RequestTooLarge, ServingError
from mms_lite.frontends.message import (
    JOIN_BYTES,
    Buffer,
    Cors,
    HttpProtocol,
    HttpRequest,
    HttpResponse,
    Limits,
    encode_response,
    split_target,
)
from mms_lite.logs import ACCESS, access_line

_CLIENT_LEFT = 499  # nginx's number, in the access log only
_BACKLOG = 1024
_CLOSE_S = 0.5  # for what is left of a connection once its grace is over

_log = logging.getLogger("mms_lite.http")
_access_log = logging.getLogger(ACCESS)


class HttpListener:
    """One listening address, all of whose requests go to one protocol."""

    def __init__(
        self,
        protocol: HttpProtocol,
        limits: Limits,
        *,
        access: Callable[[str], None] = _access_log.info,
        cors: Cors | None = None,
    ) -> None:
        self.limits = limits
        self._access = access
        self._cors = cors
        self._protocol = protocol
        self._server: _Server | None = None
        self._listening: asyncio.Server | None = None
        self._socket_file: tuple[str, os.stat_result] | None = None
        self._held_bytes = 0  # of request bodies
        self._active = 0  # requests
        self._stopping = False
        self._drained: asyncio.Future[None] | None = None

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> int:
        """Listen on host and port (0: any free one) and return the bound port.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self._server = _Server(self)
        self._listening = await loop.create_server(
            self._server,
            host,
            port,
            backlog=_BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else self.limits.handshake_s,
        )
        return int(self._listening.sockets[0].getsockname()[1])

    async def start_unix(self, path: str) -> None:
        """Listen on a Unix socket; a file that is in the way is the caller's to remove, ours goes with us.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self._server = _Server(self)
        self._listening = await loop.create_unix_server(self._server, path, backlog=_BACKLOG)
        self._socket_file = path, os.stat(path)

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more, close idle connections, and wait up to `grace_s` for open requests."""
        if self._server is None or self._listening is None:
            return
        self._stopping = True
        self._listening.close()
        self._remove_socket_file()
        for connection in self._server.connections:
            if not cast(_Connection, connection).busy:
                connection.force_close()
        if self._active:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._drained], timeout=grace_s)

    async def stop(self, grace_s: float) -> None:
        """Drain, then close what is left."""
        await self.drain(grace_s)
        if self._server is not None and self._listening is not None:
            await self._server.shutdown(_CLOSE_S)
            # From Python 3.12 on it waits for clients too, whose end of TLS may take as long as they like.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._listening.wait_closed(), _CLOSE_S)

    def _remove_socket_file(self) -> None:
        """Remove the file of our Unix socket, unless another server has put its own in the place."""
        if self._socket_file is None:
            return
        path, ours = self._socket_file
        self._socket_file = None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(path), ours):
                os.unlink(path)

    async def respond(self, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer one request of a connection, for `_Server`."""
        connection = cast(_Connection, raw.protocol)
        begin = time.monotonic()
        request = _request(raw, connection.remote)
        connection.busy = True
        self._active += 1
        status = _CLIENT_LEFT
        try:
            response = await self._answer(raw, request)
            keep_alive = raw.keep_alive and raw.content.is_eof() and not self._stopping
            pieces = encode_response(
                request.method, response, request.id, keep_alive=keep_alive, cors=self._cors
            )
            await _send(raw, pieces, self.limits.idle_s)
            status = response.status
        except ConnectionError:
            return _Sent(keep_alive=False)
        finally:
            self._held_bytes -= len(request.body)
            connection.busy = False
            self._active -= 1
            if self._drained is not None and not self._active and not self._drained.done():
                self._drained.set_result(None)
            self._log_access(raw, request, status, begin)
        return _Sent(keep_alive=keep_alive, unread=None if raw.content.is_eof() else connection)

    def refuse(self, connection: _Connection, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer what could not be read as HTTP, for `_Connection`."""
        begin = time.monotonic()
        request = HttpRequest("GET", "", _request_id(), "/", remote=connection.remote)
        response = self._protocol.spell(InvalidRequest("Invalid HTTP message."), "")
        pieces = encode_response("GET", response, request.id, keep_alive=False, cors=self._cors)
        if raw.transport is not None:
            raw.transport.write(b"".join(pieces))
        self._log_access(raw, request, response.status, begin)
        return _Sent(keep_alive=False, unread=connection)

    def _log_access(self, raw: web.BaseRequest, request: HttpRequest, status: int, begin: float) -> None:
        version = "HTTP/1.1" if raw.version == HttpVersion11 else f"HTTP/{raw.version[0]}.{raw.version[1]}"
        ms = int((time.monotonic() - begin) * 1000)
        self._access(access_line(request.remote, request.method, request.raw_path, version, status, ms))

    async def _answer(self, raw: web.BaseRequest, request: HttpRequest) -> HttpResponse:
        """Return the answer, whatever happens.

        Raises:
            ConnectionError: the client left while it sent.
        """
        if self._cors is not None and self._cors.is_preflight(request):
            return HttpResponse()
        try:
            await self._read_body(raw, request.body)
            return await self._protocol.handle(request)
        except ServingError as error:
            return self._protocol.spell(error, request.path)
        except Exception as error:
            if isinstance(error, ConnectionError) and raw.transport is None:
                raise
            _log.exception("request %s: %s %s failed", request.id, request.method, request.raw_path)
            return self._protocol.spell(ServingError("Internal server error."), request.path)

    async def _read_body(self, raw: web.BaseRequest, body: bytearray) -> None:
        """Append the request's body to `body`, and count what is appended as held.

        Raises:
            ServingError: it is too large, came too slowly, or is broken.
        """
        content = raw.content
        if content.at_eof():
            return
        self._check_size(raw.content_length or 0)
        if raw.version >= (1, 1) and raw.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await _send(raw, [b"HTTP/1.1 100 Continue\r\n\r\n"], self.limits.idle_s)
        if content.is_eof() and content.exception() is None:  # all of it came with the head
            self._keep(body, content.read_nowait())
            return
        connection = cast(_Connection, raw.protocol)
        stall = _Stall(
            self.limits.idle_s,
            lambda: content.total_bytes,
            lambda: content.set_exception(RequestTimeout("The request's body did not arrive in time.")),
        )
        connection.reading = content
        stall.start()
        try:
            while not content.at_eof():
                chunk, _ = await content.readchunk()
                self._keep(body, chunk)
        except web.RequestPayloadError as error:
            raise InvalidRequest("Invalid HTTP message.") from error
        finally:
            connection.reading = None
            stall.stop()

    def _keep(self, body: bytearray, chunk: bytes) -> None:
        self._check_size(len(body), more=len(chunk))
        body += chunk
        self._held_bytes += len(chunk)

    def _check_size(self, size: int, *, more: int = 0) -> None:
        limits = self.limits
        if size + more > limits.max_request_size:
            raise RequestTooLarge(
                f"The request's body is larger than max_request_size, {limits.max_request_size} bytes."
            )
        if self._held_bytes + (more or size) > limits.max_bytes_in_flight:
            raise Overloaded("The server holds as many bytes of requests as it may. Try again later.")


class _Server(web.Server):
    """Makes connections of our own kind."""

    def __init__(self, listener: HttpListener) -> None:
        # Without handler_cancellation a client that leaves would keep its place in the queue.
        super().__init__(listener.respond, handler_cancellation=True)
        self._listener = listener

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self._listener)


class _Connection(web.RequestHandler):
    """aiohttp's connection, with our answer to what it cannot parse and a close that loses no answer."""

    __slots__ = ("_left_bytes", "_lingering", "_listener", "busy", "encrypted", "reading", "remote")

    def __init__(self, server: _Server, listener: HttpListener) -> None:
        limits = listener.limits
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=limits.keepalive_s,
            access_log=cast(Any, None),  # ours is written by the listener
            max_line_size=limits.max_line_size,
            max_field_size=limits.max_header_size,
            lingering_time=0,  # it reads on without a limit in bytes; see `linger`
            auto_decompress=False,  # handlers get the bytes that were sent, and no bomb goes off
        )
        self._listener = listener
        self._lingering = False
        self._left_bytes = limits.linger_bytes
        self.busy = False
        self.reading: Any = None  # the body that a request waits for
        self.remote = ""
        self.encrypted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.remote = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        self.encrypted = transport.get_extra_info("sslcontext") is not None
        if self.encrypted:
            # Then what has no room in the socket's buffer holds up the next write: see `_send`.
            cast(asyncio.Transport, transport).set_write_buffer_limits(high=1, low=0)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._left_bytes -= len(data)
            if self._left_bytes < 0:
                self.force_close()
            return
        super().data_received(data)
        # After a malformed chunk aiohttp queues the error as the next request and the body never ends.
        if self.reading is not None and self._messages and not self.reading.is_eof():
            self.reading.set_exception(InvalidRequest("Invalid HTTP message."))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        _log.info("what %s sent is no HTTP request: %s", self.remote, " ".join(str(message).split()))
        return self._listener.refuse(self, request)

    async def linger(self) -> None:
        """Say that we are done, and discard what the client still sends until it closes, within limits.

        To close at once would reset the connection, and the client could lose the answer. TLS has no way
        to say that only we are done: there the client sees the answer's end by its length.
        """
        transport = self.transport
        if transport is None:
            return
        self._lingering = True
        transport.resume_reading()  # the body may have been held back
        if transport.can_write_eof():
            transport.write_eof()
        await asyncio.sleep(self._listener.limits.linger_s)  # cancelled when the client closes
        self.force_close()


class _Sent(web.StreamResponse):
    """Tells aiohttp that the answer is on its way, and what is to become of the connection."""

    def __init__(self, *, keep_alive: bool, unread: _Connection | None = None) -> None:
        self._keep_connection = keep_alive
        self._unread = unread

    @property
    def keep_alive(self) -> bool:
        return self._keep_connection

    async def prepare(self, request: web.BaseRequest) -> abc.AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        if self._unread is not None:
            await self._unread.linger()


class _Stall:
    """Calls `stalled` once `progress` has not changed from one look to the next, `every_s` apart."""

    __slots__ = ("_every_s", "_last", "_progress", "_stalled", "_timer")

    def __init__(self, every_s: float, progress: Callable[[], int], stalled: Callable[[], None]) -> None:
        self._every_s = every_s
        self._progress = progress
        self._stalled = stalled
        self._last = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._last = self._progress()
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        if self._progress() == self._last:
            self._stalled()
        else:
            self.start()


def _request(raw: web.BaseRequest, remote: str) -> HttpRequest:
    target = raw.raw_path
    if not target.isascii():
        target = target.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    path, query = split_target(target)
    headers = [(k.decode("latin-1"), _header_text(v)) for k, v in raw.raw_headers]
    return HttpRequest(raw.method, path, _request_id(), target, query, headers, bytearray(), remote)


def _header_text(value: bytes) -> str:
    """Return a header's value: UTF-8 as clients of today send it, else Latin-1, as HTTP had it."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _request_id() -> str:
    """Return a random UUID. It names a request and guards nothing: no system call for it."""
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


async def _send(raw: web.BaseRequest, pieces: Iterable[Buffer], idle_s: float) -> None:
    """Write, and wait for room. A client that does not read for `idle_s` is cut off.

    Over TLS one sees only how much waits before encryption: more is written once nothing does. Else a large
    answer would count as sent while all of it waits for the client, and its end would be lost at the close.

    Raises:
        ConnectionError: the client is gone.
    """
    transport = raw.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client left")
    encrypted = cast(_Connection, raw.protocol).encrypted
    for piece in _portions(pieces) if encrypted else pieces:
        transport.write(piece)
        if encrypted and transport.get_write_buffer_size():
            await _drain(raw, transport, idle_s)
    if transport.get_write_buffer_size() > JOIN_BYTES:
        await _drain(raw, transport, idle_s)


def _portions(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), JOIN_BYTES):
            yield view[start : start + JOIN_BYTES]


async def _drain(raw: web.BaseRequest, transport: asyncio.WriteTransport, idle_s: float) -> None:
    stall = _Stall(idle_s, transport.get_write_buffer_size, transport.abort)
    stall.start()
    try:
        await raw.writer.drain()
    finally:
        stall.stop()
    if transport.is_closing():
        raise ConnectionResetError("the client left")
