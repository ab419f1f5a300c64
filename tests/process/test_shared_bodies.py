"""Large bodies that workers read from the server's memory: the right ones, and as long as they are wanted."""

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.frontends import mms
from mms_lite.frontends.listener import HttpListener
from mms_lite.frontends.message import Limits
from mms_lite.shared import Arena

DIGEST = """
import hashlib, time

def handle(data, context):
    if data is None:
        return None
    answers = []
    for item in data:
        body = item.get("body") or item["field"]
        answers.append(f"{type(body).__name__} {len(body)} {hashlib.sha256(body).hexdigest()}")
        body[:] = bytes(len(body))
        if context.get_request_header(0, "x-sleep"):
            time.sleep(float(context.get_request_header(0, "x-sleep")))
    return answers
"""

Send = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def body(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest() * (1100 + 64 * (number % 40))


def told(content: bytes) -> bytes:
    return f"bytearray {len(content)} {hashlib.sha256(content).hexdigest()}".encode()


@pytest.fixture
def arena(processes: Any) -> Arena:
    """Memory of 4 MiB, which the workers of `processes` can read."""
    arena = Arena.create(4 << 20)
    if arena is None:
        pytest.skip("this system has no memory that processes share")
    processes.launcher = ProcessLauncher(max_frame_bytes=1 << 20, arena=arena)
    processes.store.put("digest", {"service.py": DIGEST})
    return arena


@pytest.fixture
def listener(processes: Any, arena: Arena) -> HttpListener:
    limits = Limits()
    protocol = mms.protocol(processes.engine, limits, inference=True)
    return HttpListener(protocol, limits, arena=arena, access=lambda *_: None)


@pytest.fixture
async def send(listener: HttpListener) -> AsyncIterator[Send]:
    """Send a request to the model without waiting for its answer."""
    port = await listener.start("127.0.0.1", 0)
    writers: list[asyncio.StreamWriter] = []

    async def to(content: bytes, *lines: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        kind = "" if any(line.startswith("Content-Type") for line in lines) else "Content-Type: image/jpeg"
        head = ["POST /predictions/digest HTTP/1.1", "Host: t", *lines, f"Content-Length: {len(content)}"]
        writer.write("\r\n".join([*head, kind] if kind else head).encode() + b"\r\n\r\n" + content)
        await writer.drain()
        return reader, writer

    yield to
    for writer in writers:
        writer.close()
    await listener.stop(0.2)


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).decode().lower()
    return await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0]))


async def answers(readers: Sequence[asyncio.StreamReader]) -> list[bytes]:
    return await asyncio.gather(*map(answer, readers))


async def test_every_worker_gets_the_body_of_its_request_and_may_change_it(
    processes: Any, arena: Arena, send: Send, wait_until: Any
) -> None:
    # More than the memory has room for: some bodies cross the socket.
    await processes.engine.load(processes.options("digest", batch_size=4, workers=2))
    for start in (0, 80):
        contents = [body(number) for number in range(start, start + 80)]
        readers = [(await send(content))[0] for content in contents]
        assert await answers(readers) == [told(content) for content in contents]
    await wait_until(lambda: arena.used_bytes == 0, "every body's memory to be free")


async def test_a_form_is_read_where_it_lies(processes: Any, arena: Arena, send: Send) -> None:
    await processes.engine.load(processes.options("digest"))
    part = body(7)
    form = (
        b'--b\r\nContent-Disposition: form-data; name="field"; filename="f"\r\n\r\n' + part + b"\r\n--b--\r\n"
    )
    reader, _ = await send(form, "Content-Type: multipart/form-data; boundary=b")
    assert await answer(reader) == told(part)
    reader, _ = await send(
        part, "Content-Type: application/x-www-form-urlencoded"
    )  # what curl says of a photo
    assert await answer(reader) == told(part)
    text = b"x" * 50_000
    reader, _ = await send(b"field=" + text, "Content-Type: application/x-www-form-urlencoded")
    assert await answer(reader) == told(text)
    assert arena.used_bytes == 0


async def test_memory_that_a_worker_may_still_read_is_kept_after_its_client_left(
    processes: Any, arena: Arena, listener: HttpListener, send: Send, wait_until: Any
) -> None:
    await processes.engine.load(processes.options("digest"))
    for _ in range(3):  # so that batches are sent ahead
        assert await answer((await send(body(0)))[0]) == told(body(0))
    slow, _ = await send(body(1), "x-sleep: 1")
    await wait_until(lambda: processes.engine.describe("digest").in_flight == 1)
    _, leaver = await send(body(2))
    await wait_until(lambda: processes.engine.describe("digest").in_flight == 2)
    both = arena.used_bytes
    leaver.transport.abort()
    await wait_until(lambda: listener.active == 1, "the server to see that the client left")
    assert arena.used_bytes == both > len(body(1)) + len(body(2))
    others = [(await send(body(number)))[0] for number in range(3, 12)]
    assert await answers([slow, *others]) == [told(body(number)) for number in (1, *range(3, 12))]
    await wait_until(lambda: arena.used_bytes == 0, "the leaver's memory to be free")


async def test_bodies_that_a_killed_worker_had_not_begun_are_answered_by_the_next(
    processes: Any, arena: Arena, send: Send, wait_until: Any
) -> None:
    await processes.engine.load(processes.options("digest"))
    reader, _ = await send(body(0))
    assert await answer(reader) == told(body(0))
    begun, _ = await send(body(1), "x-sleep: 20")
    await wait_until(lambda: processes.engine.describe("digest").in_flight == 1)
    queued = [(await send(body(number)))[0] for number in range(2, 12)]
    await wait_until(lambda: arena.used_bytes > 11 * 32_768)
    (worker,) = processes.engine.describe("digest").workers
    os.kill(worker.pid, signal.SIGKILL)
    assert json.loads(await answer(begun))["message"] == "Worker died."
    assert await answers(queued) == [told(body(number)) for number in range(2, 12)]
    await wait_until(lambda: arena.used_bytes == 0)


async def test_workers_of_a_server_without_such_memory_get_their_bodies(processes: Any) -> None:
    processes.store.put("digest", {"service.py": DIGEST})
    await processes.engine.load(processes.options("digest"))
    limits = Limits()
    listener = HttpListener(mms.protocol(processes.engine, limits, inference=True), limits)
    port = await listener.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /predictions/digest HTTP/1.1\r\nHost: t\r\nContent-Type: image/jpeg\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body(3)) + body(3))
    assert await answer(reader) == told(body(3))
    writer.close()
    await listener.stop(0.2)
