"""A client that writes and reads HTTP byte by byte, and a protocol that stands in for a real one."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mms_lite.frontends.message import HttpRequest, HttpResponse


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    reason: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
        await self.writer.drain()

    async def response(self, *, head_only: bool = False) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        line, *rest = head[:-4].split("\r\n")
        headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in rest)}
        _, status, reason = line.split(" ", 2)
        length = 0 if head_only else int(headers.get("content-length", 0))
        return Answer(int(status), headers, await self.reader.readexactly(length), reason)

    async def ask(self, method: str, target: str, body: bytes = b"", *lines: str) -> Answer:
        await self.send(request(method, target, body, *lines))
        return await self.response()

    async def at_end(self) -> bool:
        """Wait for the server to close; a reset raises."""
        return await self.reader.read() == b""

    def leave(self) -> None:
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):  # also what TLS says to a connection that was cut
            await self.writer.wait_closed()


def request(method: str, target: str, body: bytes = b"", *lines: str) -> bytes:
    """Return the bytes of an HTTP/1.1 request."""
    head = [f"{method} {target} HTTP/1.1", "Host: test", *lines, f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class Stub:
    """A protocol that answers with what `answer` returns, and remembers what it was asked."""

    def __init__(self, answer: Callable[[HttpRequest], Awaitable[HttpResponse]] | None = None) -> None:
        self.asked: list[HttpRequest] = []
        self.cancelled = 0
        self._answer = answer

    async def handle(self, request: HttpRequest) -> HttpResponse:
        self.asked.append(request)
        if self._answer is None:
            return HttpResponse(200, [("Content-Type", "text/plain")], [bytes(request.own_body)])
        try:
            return await self._answer(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def spell(self, error: Any, path: str) -> HttpResponse:
        headers: Sequence[tuple[str, str]] = [("Content-Type", "text/plain"), ("x-code", error.code)]
        return HttpResponse(error.http, headers, [error.message.encode()])

    def size_limit(self, path: str) -> str:
        return "max_request_size"


class Wire(asyncio.Transport):
    """A connection without a socket: what a server does with bytes depends on nothing but the bytes.

    A server's connection reads what `send` is given, in the pieces it is given; `sent` is what it answers.
    """

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"peername": ("127.0.0.1", 50000), "socket": socket.socket()})
        self._protocol: Any = protocol
        self._closing = False
        self.reading = True
        self.sent = b""
        protocol.connection_made(self)

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            if self._closing:
                break
            if isinstance(self._protocol, asyncio.BufferedProtocol):
                rest = piece
                while rest:
                    room = memoryview(self._protocol.get_buffer(-1))
                    size = min(len(room), len(rest))
                    room[:size] = rest[:size]
                    self._protocol.buffer_updated(size)
                    rest = rest[size:]
            else:
                self._protocol.data_received(piece)
            await self.settle()

    async def settle(self) -> None:
        """Let everything run that waits for nothing but its turn."""
        for _ in range(15):
            await asyncio.sleep(0)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.get_extra_info("socket").close()
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close

    def answers(self) -> list[bytes]:
        """Return what was answered, request by request, without what is random in it."""
        return re.split(rb"(?=HTTP/1\.1 )", re.sub(rb"x-request-id: [0-9a-f-]{36}", b"", self.sent))[1:]

    def write(self, data: Any) -> None:
        self.sent += data

    def write_eof(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
