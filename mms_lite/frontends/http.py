"""HTTP over aiohttp: every message that is HTTP, chunked and unfinished and malformed ones too.

aiohttp's low-level server is used, for its parser and its connections: its router and its responses cost
more than they give here. hot.py hands over what it does not read itself, so unusual messages have one reader.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from aiohttp import HttpVersion11, abc, hdrs, web

from mms_lite.errors import InvalidRequest, RequestTimeout, ServingError
from mms_lite.frontends.message import (
    CLIENT_LEFT,
    JOIN_BYTES,
    Buffer,
    HttpRequest,
    client_name,
    encode_response,
    random_id,
    split_target,
)

if TYPE_CHECKING:
    from mms_lite.frontends.listener import HttpListener

_log = logging.getLogger("mms_lite.http")


class AnyConnections(web.Server):
    """The connections of a listener that aiohttp reads."""

    def __init__(self, listener: HttpListener) -> None:
        # Without handler_cancellation a client that leaves would keep its place in the queue.
        super().__init__(self.respond, handler_cancellation=True)
        self._listener = listener

    def __call__(self) -> web.RequestHandler:
        """Return a new connection."""
        return _Connection(self, self._listener)

    def take_over(self, transport: asyncio.Transport, received: bytes, late: bool) -> None:
        """Serve a connection from now on, of which `received` is to be read first.

        `late` says that what is missing of it has been waited for long enough.
        """
        connection = _Connection(self, self._listener)
        connection.late = late
        transport.pause_reading()  # uvloop looks at the kind of protocol only when reading starts
        transport.set_protocol(connection)
        transport.resume_reading()
        connection.connection_made(transport)
        connection.data_received(received)

    def close_idle(self) -> None:
        """Close the connections without an open request."""
        for connection in self.connections:
            if not cast(_Connection, connection).busy:
                connection.force_close()

    async def respond(self, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer one request of a connection."""
        listener = self._listener
        connection = cast(_Connection, raw.protocol)
        begin = time.monotonic()
        body = bytearray()
        request = _request(raw, connection.remote, body)
        connection.busy = True
        listener.active += 1
        status = CLIENT_LEFT
        try:
            error = await self._read_body(raw, body)
            if error is None:
                response = await listener.answer(request)
            else:
                response = listener.refusal(error, request.path)
            keep_alive = raw.keep_alive and raw.content.is_eof() and not listener.stopping
            pieces = encode_response(
                request.method, response, request.id, keep_alive=keep_alive, cors=listener.cors
            )
            await _send(raw, pieces, listener.limits.idle_s)
            status = response.status
        except ConnectionError:
            return _Sent(keep_alive=False)
        finally:
            connection.busy = False
            listener.release(len(body))
            self._log_access(raw, request, status, begin)
        return _Sent(keep_alive=keep_alive, unread=None if raw.content.is_eof() else connection)

    def refuse(self, connection: _Connection, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer what could not be read as HTTP, for `_Connection`."""
        begin = time.monotonic()
        request = HttpRequest("GET", "", random_id(), "/", remote=connection.remote)
        response = self._listener.refusal(InvalidRequest("Invalid HTTP message."), "")
        pieces = encode_response("GET", response, request.id, keep_alive=False, cors=self._listener.cors)
        if raw.transport is not None:
            raw.transport.write(b"".join(pieces))
        self._log_access(raw, request, response.status, begin)
        return _Sent(keep_alive=False, unread=connection)

    def _log_access(self, raw: web.BaseRequest, request: HttpRequest, status: int, begin: float) -> None:
        version = "HTTP/1.1" if raw.version == HttpVersion11 else f"HTTP/{raw.version[0]}.{raw.version[1]}"
        self._listener.log_access(request, version, status, begin)

    async def _read_body(self, raw: web.BaseRequest, body: bytearray) -> ServingError | None:
        """Append the request's body to `body`, and count what is appended as held.

        Returns what is to be answered if it is too large, came too slowly, or is broken.

        Raises:
            ConnectionError: the client left.
        """
        try:
            await self._append_body(raw, body)
        except ServingError as error:
            return error
        except web.RequestPayloadError:
            return InvalidRequest("Invalid HTTP message.")
        return None

    async def _append_body(self, raw: web.BaseRequest, body: bytearray) -> None:
        content = raw.content
        connection = cast(_Connection, raw.protocol)
        late, connection.late = connection.late, False
        if content.at_eof():
            return
        self._listener.check_size(raw.content_length or 0, raw.path)
        idle_s = self._listener.limits.idle_s
        if raw.version >= (1, 1) and raw.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await _send(raw, [b"HTTP/1.1 100 Continue\r\n\r\n"], idle_s)
        if content.is_eof() and content.exception() is None:  # all of it came with the head
            self._keep(raw.path, body, content.read_nowait())
            return
        if late:
            raise _too_slow()
        stall = _Stall(idle_s, lambda: content.total_bytes, lambda: content.set_exception(_too_slow()))
        connection.reading = content
        stall.start()
        try:
            while not content.at_eof():
                chunk, _ = await content.readchunk()
                self._keep(raw.path, body, chunk)
        finally:
            connection.reading = None
            stall.stop()

    def _keep(self, path: str, body: bytearray, chunk: bytes) -> None:
        self._listener.check_size(len(body), path, more=len(chunk))
        body += chunk
        self._listener.held_bytes += len(chunk)


def _too_slow() -> RequestTimeout:
    return RequestTimeout("The request's body did not arrive in time.")


class _Connection(web.RequestHandler):
    """aiohttp's connection, with our answer to what it cannot parse and a close that loses no answer."""

    __slots__ = (
        "_left_bytes",
        "_linger_s",
        "_lingering",
        "_server",
        "busy",
        "encrypted",
        "late",
        "reading",
        "remote",
    )

    def __init__(self, server: AnyConnections, listener: HttpListener) -> None:
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
        self._server = server
        self._lingering = False
        self._linger_s = limits.linger_s
        self._left_bytes = limits.linger_bytes
        self.busy = False
        self.late = False  # with what is missing of the first request
        self.reading: Any = None  # the body that a request waits for
        self.remote = ""
        self.encrypted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.remote = client_name(transport.get_extra_info("peername"))
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
        return self._server.refuse(self, request)

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
        await asyncio.sleep(self._linger_s)  # cancelled when the client closes
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


def _request(raw: web.BaseRequest, remote: str, body: bytearray) -> HttpRequest:
    target = raw.raw_path
    if not target.isascii():
        target = target.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    path, query = split_target(target)
    headers = [(k.decode("latin-1"), _header_text(v)) for k, v in raw.raw_headers]
    return HttpRequest(raw.method, path, random_id(), target, query, headers, body, remote)


def _header_text(value: bytes) -> str:
    """Return a header's value: UTF-8 as clients of today send it, else Latin-1, as HTTP had it."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


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
