"""A client that writes and reads HTTP byte by byte, and a protocol that stands in for a real one."""

import asyncio
import contextlib
import json
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
            return HttpResponse(200, [("Content-Type", "text/plain")], [bytes(request.body)])
        try:
            return await self._answer(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def spell(self, error: Any, path: str) -> HttpResponse:
        headers: Sequence[tuple[str, str]] = [("Content-Type", "text/plain"), ("x-code", error.code)]
        return HttpResponse(error.http, headers, [error.message.encode()])
