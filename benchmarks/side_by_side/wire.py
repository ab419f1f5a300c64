"""One request over and over on non-blocking connections: sockets and epoll by hand, and where an answer ends.

By hand, because what a generator computes is taken from the server beside it; apart from the loops, which
decide when to send.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

# What stands in the place of an HTTP status where there is none; CUT: the load ended while it was on its way.
REFUSED, CLOSED, UNANSWERED, GARBLED, CUT = "refused", "closed", "unanswered", "garbled", "cut"
READ_BYTES = 1 << 18
REST_BYTES = 1 << 20
SEND_BUFFER_BYTES = 1 << 20  # a whole body in one call: else the generator waits in the kernel for the server
HEAD_END = b"\r\n\r\n"
_TOO_LONG = "more bytes than one answer has"
CHUNKED, TO_THE_END = -1, -2  # lengths of a body that its head does not give


class Outcome(NamedTuple):
    """What became of one request; seconds of the monotonic clock, which all processes of a machine share."""

    sent: float
    answered: float
    status: int | str


class AnswerReader:
    """Finds the end of one HTTP/1.x answer after the other, however its bytes are cut; keeps the last status.

    RFC 9112 sections 6.3 (the length of a body) and 9.3 (whether the connection stays).
    """

    __slots__ = ("_body_at", "_chunk_at", "_data", "_length", "body_bytes", "keep", "left", "status")

    def __init__(self) -> None:
        self.status = 0
        self.keep = True
        self.body_bytes = 0  # of the last answer; of one without a length or chunks, none are counted
        self.left = 0  # of a body whose length is known: bytes that are to come, and need only be counted
        self._data = b""
        self._body_at = 0  # 0: the head is not complete
        self._length = 0  # of the body; CHUNKED or TO_THE_END
        self._chunk_at = 0

    def feed(self, data: bytes) -> bool:
        """Take what was received; return whether the answer is complete.

        Raises:
            ValueError: these are not the bytes of one HTTP answer.
        """
        if self._body_at and self._length >= 0:
            return self.count(len(data))
        self._data = data = self._data + data if self._data else data
        while not self._body_at:
            if not self._read_head(data):
                return False
            data = self._data
        if self._length >= 0:
            self._data = b""
            return self.count(len(data) - self._body_at)
        return self._length == CHUNKED and self._read_chunks(data)

    def count(self, received: int) -> bool:
        """Take so many bytes of a body whose length is known; return whether the answer is complete.

        Raises:
            ValueError: they are more than the answer has.
        """
        self.left -= received
        if self.left < 0:
            raise ValueError(_TOO_LONG)
        return not self.left

    def end(self) -> bool:
        """Take the end of the connection; return whether that completes an answer."""
        return bool(self._body_at) and self._length == TO_THE_END

    def clear(self) -> None:
        """Make ready for the next answer on the same connection."""
        self._data = b""
        self._body_at = self._chunk_at = self.left = 0

    def _read_head(self, data: bytes) -> bool:
        end = data.find(HEAD_END)
        if end < 0:
            return False
        head = data[:end].lower() + b"\r\n"
        if not head.startswith(b"http/1."):
            raise ValueError("no HTTP answer")
        self.status = int(head[9:12])
        if self.status < 200:  # "continue" and its like: the answer follows
            self._data = data[end + len(HEAD_END) :]
            return True
        self._body_at = self._chunk_at = end + len(HEAD_END)
        connection = _field(head, b"\r\nconnection:")
        self.keep = b"close" not in connection and (head[7:8] == b"1" or b"keep-alive" in connection)
        if self.status in {204, 304}:
            self._length = 0
        elif b"chunked" in _field(head, b"\r\ntransfer-encoding:"):
            self._length = CHUNKED
        elif length := _field(head, b"\r\ncontent-length:"):
            self._length = int(length)
        else:
            self._length, self.keep = TO_THE_END, False
        self.left = self.body_bytes = max(0, self._length)
        return True

    def _read_chunks(self, data: bytes) -> bool:
        while (line_end := data.find(b"\r\n", self._chunk_at)) >= 0:
            size = int(data[self._chunk_at : line_end].partition(b";")[0], 16)
            if size == 0:
                # Trailers end with an empty line, and so does a list of none.
                end = data.find(HEAD_END, line_end)
                return end >= 0 and self._ended_at(end + len(HEAD_END))
            following = line_end + 2 + size + 2
            if following > len(data):
                return False
            self._chunk_at = following
            self.body_bytes += size
        return False

    def _ended_at(self, end: int) -> bool:
        if len(self._data) > end:
            raise ValueError(_TOO_LONG)
        return len(self._data) == end


def _field(head: bytes, name: bytes) -> bytes:
    at = head.find(name)
    return head[at + len(name) : head.find(b"\r\n", at + len(name))].strip() if at >= 0 else b""


class Connection:
    """One socket with at most one request on its way."""

    __slots__ = ("due", "reader", "sent", "socket", "unsent", "waits_to_write")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.reader = AnswerReader()
        self.unsent: memoryview | None = None
        self.waits_to_write = False
        self.sent = 0.0  # 0: no request on its way
        self.due = 0.0  # when an open loop had meant to send it


class Wire:
    """Sends requests on non-blocking connections and tells `settle` of each outcome, once.

    A connection that is closed is opened again with its next request; that takes part of the request's time.
    """

    def __init__(
        self, address: tuple[str, int], request: bytes, settle: Callable[[Connection, Outcome], None]
    ) -> None:
        self._address = address
        self._request = memoryview(request)
        self._settle = settle
        self._epoll = select.epoll()
        self._open: dict[int, Connection] = {}
        self._rest = bytearray(REST_BYTES)  # where bodies go that are only counted

    def connect(self, connection: Connection) -> None:
        """Begin to open the connection; what is sent meanwhile waits for it."""
        connection.socket = made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        made.connect_ex(self._address)  # an error comes as an event
        self._open[made.fileno()] = connection
        self._epoll.register(made.fileno(), select.EPOLLIN | select.EPOLLOUT)
        connection.waits_to_write = True

    def send(self, connection: Connection) -> None:
        """Send the request on a connection that has none on its way."""
        connection.sent = time.monotonic()
        connection.unsent = self._request
        if connection.socket is None:
            self.connect(connection)
        elif not connection.waits_to_write:
            self._write(connection)

    def wait(self, until: float, at_most: int = 64) -> None:
        """Settle what is there, `at_most` so many; else wait for something until that moment."""
        events = self._epoll.poll(0, at_most)
        # epoll waits whole milliseconds, select microseconds.
        if (
            not events
            and (left := until - time.monotonic()) > 0
            and select.select([self._epoll], [], [], left)[0]
        ):
            events = self._epoll.poll(0, at_most)
        for descriptor, event in events:
            connection = self._open.get(descriptor)
            if connection is not None:
                self._handle(connection, event)

    def give_up(self, connection: Connection, status: str) -> None:
        """Close the connection; its request, if there is one, ends with this status."""
        self._drop(connection)
        if connection.sent:
            self._finish(connection, status)

    def close(self) -> None:
        """Close every connection at once."""
        for connection in list(self._open.values()):
            self._drop(connection)
        self._epoll.close()

    def _drop(self, connection: Connection) -> None:
        if connection.socket is not None:
            self._open.pop(connection.socket.fileno(), None)
            connection.socket.close()
            connection.socket = None
        connection.reader.clear()
        connection.unsent = None
        connection.waits_to_write = False

    def _handle(self, connection: Connection, event: int) -> None:
        try:
            if event & select.EPOLLOUT and connection.waits_to_write:
                self._write(connection)
            if event & ~select.EPOLLOUT:
                self._read(connection)
        except BlockingIOError:
            return
        except ConnectionRefusedError:
            self.give_up(connection, REFUSED)
        except OSError:
            self.give_up(connection, CLOSED)
        except ValueError:
            self.give_up(connection, GARBLED)

    def _write(self, connection: Connection) -> None:
        assert connection.socket is not None
        try:
            if connection.unsent is not None:
                sent = connection.socket.send(connection.unsent)
                connection.unsent = connection.unsent[sent:] if sent < len(connection.unsent) else None
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            connection.unsent = None  # what the server said before it closed is still to be read
        writing = connection.unsent is not None
        if writing != connection.waits_to_write:
            connection.waits_to_write = writing
            self._epoll.modify(connection.socket, select.EPOLLIN | (select.EPOLLOUT if writing else 0))

    def _read(self, connection: Connection) -> None:
        assert connection.socket is not None
        reader = connection.reader
        if reader.left:
            received = connection.socket.recv_into(self._rest)
            ended = received and reader.count(received)
        else:
            data = connection.socket.recv(READ_BYTES)
            received = len(data)
            ended = reader.feed(data) if data else reader.end()
        if ended:
            reusable = received and reader.keep and connection.unsent is None and connection.sent
            if reusable:
                reader.clear()
            else:
                self._drop(connection)
            if connection.sent:
                self._finish(connection, reader.status)
        elif not received:
            self.give_up(connection, CLOSED)

    def _finish(self, connection: Connection, status: int | str) -> None:
        sent, connection.sent = connection.sent, 0.0
        self._settle(connection, Outcome(sent, time.monotonic(), status))
