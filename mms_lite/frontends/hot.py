"""HTTP the fast way: messages of plain form, whatever their route, at a fraction of what aiohttp's cost.

Plain is a head that leaves no two readers of HTTP in doubt (head.py says which) and a body whose length
it states. Anything else is handed over, with the bytes so far, to http.py, which keeps the connection to its
end: chunked bodies, 100-continue, refusals and malformed messages have that one reader.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, cast

from mms_lite.errors import ServingError
from mms_lite.frontends.head import Head, may_begin_a_head, read_head
from mms_lite.frontends.message import (
    CLIENT_LEFT,
    Buffer,
    HttpRequest,
    client_name,
    encode_response,
    random_id,
)
from mms_lite.shared import LEAST_BYTES, SharedBytes

if TYPE_CHECKING:
    from mms_lite.frontends.listener import HttpListener

_SCRATCH_BYTES = 256 * 1024
_AHEAD_BYTES = 64 * 1024  # of requests behind the one in work, until nothing more is read
_LOOK_S = 1.0
_NEVER = math.inf
_END = b"\r\n\r\n"

_log = logging.getLogger("mms_lite.http")

TakeOver = Callable[[asyncio.Transport, bytes, bool], None]


class _State(Enum):
    """What a connection is about."""

    IDLE = "nothing, or a head of which a part is there"
    READING = "a body"
    HANDLING = "a request that has been read"
    SENDING = "an answer for which the client makes no room"
    CLOSING = "the rest of the last answer"


class HotConnections:
    """The connections of a listener that httptools reads, and the look at their clocks, once for all."""

    def __init__(self, listener: HttpListener, take_over: TakeOver) -> None:
        self.listener = listener
        self.take_over = take_over
        self.loop = asyncio.get_running_loop()
        # One for all: the loops fill it and call `buffer_updated` before they read anything else.
        self.scratch = bytearray(_SCRATCH_BYTES)
        self.head: Head | None = None  # the last one that was read, for new connections
        self._open: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self) -> asyncio.BaseProtocol:
        """Return a new connection."""
        return _Connection(self)

    def add(self, connection: _Connection) -> None:
        """Look after a connection from now on."""
        self._open.add(connection)
        if self._timer is None:
            self._set_timer()

    def remove(self, connection: _Connection) -> None:
        """Forget a connection."""
        self._open.discard(connection)

    def close_idle(self) -> None:
        """Close the connections without an open request."""
        for connection in list(self._open):
            connection.close_if_idle()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Cancel what is open and close all; wait for it up to `timeout` seconds."""
        tasks = [task for connection in list(self._open) if (task := connection.give_up())]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)

    def look(self) -> None:
        """Act on each connection whose client has let its time pass."""
        now = time.monotonic()
        for connection in [each for each in self._open if each.due <= now]:
            connection.overdue(now)

    def _set_timer(self) -> None:
        limits = self.listener.limits
        every_s = min(_LOOK_S, limits.idle_s, limits.keepalive_s)
        self._timer = self.loop.call_later(every_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        try:
            self.look()
        finally:
            if self._open:
                self._set_timer()


class _Connection(asyncio.BufferedProtocol):
    """One connection: a request at a time, what is behind it waits."""

    __slots__ = (
        "_all",
        "_begin",
        "_blocked",
        "_head",
        "_left",
        "_listener",
        "_missing",
        "_next",
        "_remote",
        "_request",
        "_rest",
        "_room",
        "_scratch",
        "_state",
        "_task",
        "_transport",
        "due",
    )

    def __init__(self, connections: HotConnections) -> None:
        self._all = connections
        self._listener = connections.listener
        self._scratch = connections.scratch
        self._transport: asyncio.Transport | None = None
        self._remote = ""
        self._state = _State.IDLE
        self._head: Head | None = None  # of the last request: most clients send the same again
        self._rest = bytearray()  # received, not looked at, or a head's beginning
        self._request: HttpRequest | None = None
        self._begin = 0.0
        self._missing = 0  # bytes of the body
        self._task: asyncio.Task[None] | None = None  # answers, from the first request on
        self._next: asyncio.Future[None] | None = None  # for which it waits between two
        self._blocked = False  # more is written than the transport takes
        self._room: asyncio.Future[None] | None = None
        self._left = 0  # to be read or written when the clock was last looked at
        self.due = _NEVER  # time.monotonic() at which the client is to have done something

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._remote = client_name(transport.get_extra_info("peername"))
        self.due = time.monotonic() + self._listener.limits.keepalive_s
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._all.remove(self)
        self._cancel_task()
        self._end(CLIENT_LEFT)  # a task that has not begun never comes to its own end

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        if self._state is _State.READING and self._request is not None:
            body = self._request.body
            if isinstance(body, SharedBytes):
                return body.view[-self._missing :]
        return self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._state is _State.READING:
            self._read_body(nbytes)
        elif self._state is _State.IDLE and not self._rest:
            used = self._read_request(self._scratch, nbytes)
            if used < nbytes:
                self._keep(memoryview(self._scratch)[used:nbytes])
        else:
            self._keep(memoryview(self._scratch)[:nbytes])
            if self._state is _State.IDLE:
                self._read_rest()

    def _keep(self, more: memoryview) -> None:
        """Keep what is behind the request in work; of a client that sends on and on no more is read."""
        self._rest += more
        busy = self._state is not _State.IDLE
        if busy and len(self._rest) > _AHEAD_BYTES and self._transport is not None:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def close_if_idle(self) -> None:
        """Close unless a request is open."""
        if self._state is _State.IDLE:
            self._close()

    def give_up(self) -> asyncio.Task[None] | None:
        """Cut the connection, and cancel and return what works for it."""
        if self._state is _State.IDLE:
            self._close()
        elif self._state is not _State.CLOSING and self._transport is not None:
            self._transport.abort()
        if self._task is not None:
            self._task.cancel()
        return self._task

    def overdue(self, now: float) -> None:
        """Act on a client that has done nothing for as long as it may."""
        transport = self._transport
        if transport is None:
            return
        if self._state is _State.IDLE:
            self._close()
            return
        reading = self._state is _State.READING
        left = self._missing if reading else transport.get_write_buffer_size()
        if left != self._left:
            self._wait(now, left)
        elif reading:
            self._hand_over_request(b"", late=True)
        else:
            transport.abort()

    def _wait(self, now: float, left: int) -> None:
        """Have the clock looked at in `idle_s`, whether there is still as much left."""
        self._left = left
        self.due = now + self._listener.limits.idle_s

    def _read_rest(self) -> None:
        used = self._read_request(self._rest, len(self._rest))
        del self._rest[:used]
        if self._transport is not None and len(self._rest) <= _AHEAD_BYTES:
            self._transport.resume_reading()

    def _read_request(self, data: bytearray, size: int) -> int:
        """Begin the request with which data[:size] begins; return how much of it is done with."""
        head = self._head or self._all.head
        if head is None or not data.startswith(head.raw, 0, size):
            end = data.find(_END, 0, size) + len(_END)
            limits = self._listener.limits
            if end < len(_END):  # not there yet
                part = bytes(data[:size])
                if size <= limits.max_header_size and may_begin_a_head(part):
                    return 0
                return self._hand_over(part)
            head = read_head(bytes(data[:end]), limits)
            if head is None:
                return self._hand_over(bytes(data[:size]))
            self._all.head = head
        self._head = head
        listener = self._listener
        try:
            listener.check_size(head.length, head.path)
        except ServingError:
            return self._hand_over(bytes(data[:size]))
        start = len(head.raw)
        end = min(start + head.length, size)
        body = self._begin_body(head.length, memoryview(data)[start:end])
        self._begin = time.monotonic()
        self._request = HttpRequest(
            head.method,
            head.path,
            random_id(),
            head.target,
            head.query,
            head.headers,
            body,
            self._remote,
            head.named,
        )
        listener.active += 1
        listener.held_bytes += end - start
        self._missing = head.length - (end - start)
        if self._missing:
            self._state = _State.READING
            self._wait(self._begin, self._missing)
        else:
            self._handle()
        return end

    def _begin_body(self, length: int, begun: memoryview) -> bytearray | SharedBytes:
        """Return a request's body with what is there of it."""
        arena = self._listener.arena
        if arena is not None and length >= LEAST_BYTES:
            place = arena.take(length)
            if place is not None:
                place.view[: len(begun)] = begun
                return place
        return bytearray(begun)

    def _read_body(self, nbytes: int) -> None:
        request, head, listener = self._request, self._head, self._listener
        assert request is not None and head is not None
        body, more = request.body, min(nbytes, self._missing)
        try:
            listener.check_size(head.length - self._missing, head.path, more=more)
            fits = True
        except ServingError:
            fits = False
        if isinstance(body, bytearray):  # else it is there already
            body += memoryview(self._scratch)[:more]
        listener.held_bytes += more
        self._missing -= more
        behind = memoryview(self._scratch)[more:nbytes]
        if not fits:
            self._hand_over_request(behind)
            return
        if not self._missing:
            self._handle()
        if behind:
            self._keep(behind)

    def _hand_over_request(self, behind: Buffer, *, late: bool = False) -> None:
        """Hand over the request that is being read: its other reader knows what to say of it."""
        request, head = self._request, self._head
        assert request is not None and head is not None
        self._request = None
        received = head.length - self._missing
        self._listener.release(received)
        body = request.body if isinstance(request.body, bytearray) else request.body.view[:received]
        self._hand_over(b"".join((head.raw, body, behind)), late=late)

    def _hand_over(self, received: bytes, *, late: bool = False) -> int:
        """Leave the connection to http.py from a message's beginning on; return how much that is."""
        transport = self._transport
        self._transport = None
        self._all.remove(self)
        if self._next is not None:  # else it is the task that hands over
            self._cancel_task()
        if transport is not None:
            self._all.take_over(transport, received, late)
        return len(received)

    def _handle(self) -> None:
        self._state = _State.HANDLING
        self.due = _NEVER
        if self._task is None:
            self._task = self._all.loop.create_task(self._work())
        elif self._next is not None:
            self._next.set_result(None)

    async def _work(self) -> None:
        """Answer the requests of this connection, one after the other: a task for each would cost more."""
        try:
            while self._request is not None and self._head is not None:
                await self._serve(self._request, self._head)
                if self._state is _State.HANDLING:  # what was behind it; others have their turn first
                    await asyncio.sleep(0)
                    continue
                if self._state is _State.CLOSING or self._transport is None:
                    return
                self._next = self._all.loop.create_future()
                await self._next
                self._next = None
        except Exception:
            _log.exception("the connection of %s is cut", self._remote)
            if self._transport is not None:
                self._transport.abort()

    def _cancel_task(self) -> None:
        """Cancel what works for this connection, and let go of it: a cancelled task keeps its frames."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _serve(self, request: HttpRequest, head: Head) -> None:
        """Answer a request, then go on with what follows it."""
        listener = self._listener
        status = CLIENT_LEFT
        keep_alive = False
        try:
            response = await listener.answer(request)
            keep_alive = head.keep_alive and not listener.stopping
            pieces = encode_response(
                request.method, response, request.id, keep_alive=keep_alive, cors=listener.cors
            )
            if self._transport is not None:
                for piece in pieces:
                    self._transport.write(piece)
                if self._blocked:
                    await self._wait_for_room(self._transport)
                status = response.status
        except Exception:
            _log.exception("request %s: its answer cannot be sent", request.id)
            keep_alive = False
            if self._transport is not None:
                self._transport.abort()
        finally:
            self._end(status)
        self._go_on(keep_alive)

    async def _wait_for_room(self, transport: asyncio.Transport) -> None:
        self._state = _State.SENDING
        self._wait(time.monotonic(), transport.get_write_buffer_size())
        self._room = self._all.loop.create_future()
        try:
            await self._room
        finally:
            self._room = None

    def _end(self, status: int) -> None:
        """Write off the request, if that has not been done."""
        request, head = self._request, self._head
        if request is None:
            return
        assert head is not None
        self._request = None
        self._listener.release(head.length - self._missing)
        self._listener.log_access(request, head.version, status, self._begin)

    def _go_on(self, keep_alive: bool) -> None:
        transport = self._transport
        if not keep_alive or self._listener.stopping or transport is None or transport.is_closing():
            self._close()
            return
        self._state = _State.IDLE
        self.due = time.monotonic() + self._listener.limits.keepalive_s
        if self._rest:
            self._read_rest()

    def _close(self) -> None:
        """Close once all is sent; a client that does not take it is cut off."""
        transport = self._transport
        if transport is None:
            return
        self._state = _State.CLOSING
        transport.close()
        self._wait(time.monotonic(), transport.get_write_buffer_size())
