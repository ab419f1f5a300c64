"""One request over a socket, byte by byte, and everything that can be seen of the answer.

A client library would mend what is sent and hide how a connection ends.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass, field

_LOOK_S = 0.15  # how long a server gets to close a connection after its answer
_NEXT = b"GET /ping HTTP/1.1\r\nHost: test\r\n\r\n"

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; without a version there was none. `ending` says what became of the connection after it.

    `interim` are the statuses before it, as 100.
    """

    status: int = 0
    reason: str = ""
    version: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    ending: str = ""
    interim: tuple[int, ...] = ()

    def header(self, name: str) -> str | None:
        """Return the first header of that name in any letter case."""
        return next((value for key, value in self.headers if key.lower() == name), None)


@dataclass(frozen=True, slots=True)
class Sent:
    """What is sent: the head, and the body apart where the client waits for 100 Continue before it."""

    head: bytes
    body: bytes = b""
    waits: bool = False
    head_only: bool = False
    answers: int = 1


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    until: float
    left: bytearray = field(default_factory=bytearray)

    def more(self) -> bool:
        """Read once; False at the end of the stream.

        Raises:
            OSError: the connection broke, or the time is over.
        """
        self.socket.settimeout(max(0.001, self.until - time.monotonic()))
        piece = self.socket.recv(1 << 16)
        self.left += piece
        return bool(piece)

    def take(self, size: int) -> bytes:
        piece = bytes(self.left[:size])
        del self.left[:size]
        return piece


def exchange(address: Address, sent: Sent, limit_s: float) -> Answer:
    """Send a request on a connection of its own and return the last answer to it, within `limit_s`."""
    try:
        with contextlib.closing(socket.create_connection(address, timeout=limit_s)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _converse(_Connection(client, time.monotonic() + limit_s), sent)
    except OSError as error:
        return Answer(ending=f"no connection: {type(error).__name__}")


def _converse(connection: _Connection, sent: Sent) -> Answer:
    interim: tuple[int, ...] = ()
    _send(connection, sent.head if sent.waits else sent.head + sent.body)
    if sent.waits:
        answer = _answer(connection, sent.head_only)
        if answer.status != 100:
            return _with_ending(answer, connection)
        interim = (100,)
        _send(connection, sent.body)
    for _ in range(sent.answers):
        answer = _answer(connection, sent.head_only)
        while 100 <= answer.status < 200:
            interim += (answer.status,)
            answer = _answer(connection, sent.head_only)
        if not answer.version:
            break
    return _with_ending(answer, connection, interim)


def _send(connection: _Connection, data: bytes) -> None:
    """Send; a server that closes while we do may have answered all the same."""
    with contextlib.suppress(OSError):
        connection.socket.settimeout(max(0.001, connection.until - time.monotonic()))
        connection.socket.sendall(data)


def _answer(connection: _Connection, head_only: bool) -> Answer:
    try:
        while b"\r\n\r\n" not in connection.left:
            if not connection.more():
                return Answer(ending="closed without an answer")
        head = connection.take(connection.left.index(b"\r\n\r\n") + 4).decode("latin-1")
        line, *rest = head[:-4].split("\r\n")
        version, _, line = line.partition(" ")
        status, _, reason = line.partition(" ")
        pairs = (each.partition(":") for each in rest)
        headers = tuple((name, value.strip()) for name, _, value in pairs)
        answer = Answer(int(status), reason, version, headers)
    except ValueError:
        return Answer(ending="no HTTP answer")
    except TimeoutError:
        return Answer(ending="no answer in time")
    except OSError:
        return Answer(ending="reset without an answer")
    body = b"" if head_only or answer.status in (100, 204, 304) else _body(connection, answer)
    return Answer(answer.status, reason, version, headers, body)


def _body(connection: _Connection, answer: Answer) -> bytes:
    """Return the body by its length, or all there is until the end; what is lost is missing from it."""
    length = answer.header("content-length")
    with contextlib.suppress(OSError):
        while length is None or len(connection.left) < int(length):
            if not connection.more():
                break
    return connection.take(len(connection.left) if length is None else int(length))


def _with_ending(answer: Answer, connection: _Connection, interim: tuple[int, ...] = ()) -> Answer:
    return Answer(
        answer.status,
        answer.reason,
        answer.version,
        answer.headers,
        answer.body,
        answer.ending or _ending(connection),
        interim,
    )


def _ending(connection: _Connection) -> str:
    """Say whether the server closed, reset or kept the connection; a kept one answers another request."""
    connection.until = time.monotonic() + _LOOK_S
    try:
        if connection.left or connection.more():
            return "more than an answer"
        return "closed"
    except TimeoutError:
        pass
    except OSError:
        return "reset"
    connection.until = time.monotonic() + 1.0
    _send(connection, _NEXT)
    return {"": "kept", "closed without an answer": "closed"}.get(
        (next_answer := _answer(connection, head_only=True)).ending, next_answer.ending
    )
