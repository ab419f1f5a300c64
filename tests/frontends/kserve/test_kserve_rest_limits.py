"""What requests over HTTP may take together: memory for what is unpacked, threads that read JSON."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from raw_http import Answer

from mms_lite.frontends import json_bodies
from mms_lite.frontends.json_bodies import Readers
from mms_lite.frontends.kserve import codec, compression, rest
from mms_lite.frontends.message import HttpRequest, HttpResponse, Limits
from mms_lite.shared import Arena, SharedBytes

Call = Callable[..., Awaitable[Answer]]
Wait = Callable[..., Awaitable[Any]]

GZIP = ("Content-Encoding", "gzip")
INPUTS = [{"name": name, "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]} for name in ("x", "y")]
BODY = json.dumps({"inputs": INPUTS}).encode()
LONG = BODY + b" " * 200_000
LIMITS = Limits(max_tensor_request_size=32 << 20, max_bytes_in_flight=6 << 20)


class Gate:
    """Holds threads up until it is opened, and counts those that are inside."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._lock = threading.Lock()
        self.inside = self.most = self.entered = 0

    def hold(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any) -> Any:
            with self._lock:
                self.inside += 1
                self.entered += 1
                self.most = max(self.most, self.inside)
            try:
                assert self._open.wait(10)
                return function(*args)
            finally:
                with self._lock:
                    self.inside -= 1

        return held

    def open(self) -> None:
        self._open.set()


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def ask(service: Any) -> Callable[..., Awaitable[HttpResponse]]:
    """Ask a protocol with these limits: `await ask("/v2/...", body, header)`."""
    protocol = rest.protocol(service, LIMITS, Readers())

    async def ask(path: str, body: bytes | SharedBytes, *headers: tuple[str, str]) -> HttpResponse:
        whole = body if isinstance(body, SharedBytes) else bytearray(body)
        return await protocol.handle(HttpRequest("POST", path, "id", path, (), headers, whole))

    return ask


def said(response: HttpResponse) -> str:
    return str(json.loads(b"".join(response.body))["error"])


@pytest.mark.parametrize("leaves", [False, True])
async def test_all_unpacked_bodies_together_have_a_bound(
    ask: Any, inline: Any, tmp_path: Path, wait_until: Wait, leaves: bool
) -> None:
    await inline.load("gate")
    question = {"name": "body", "datatype": "BYTES", "shape": [1], "data": [str(tmp_path / "open")]}
    packed = gzip.compress(json.dumps({"inputs": [question]}).encode() + b" " * 4_000_000)
    first = asyncio.ensure_future(ask("/v2/models/gate/infer", packed, GZIP))
    await wait_until((tmp_path / "open.started").exists, "the first to reach the model")
    second = await ask("/v2/models/gate/infer", packed, GZIP)
    assert (second.status, dict(second.headers)["Retry-After"]) == (503, "1")
    assert said(second) == "The server holds as many bytes of requests as it may. Try again later."
    if leaves:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    await asyncio.to_thread((tmp_path / "open").touch)
    if not leaves:
        assert (await first).status == 200
    assert (await ask("/v2/models/gate/infer", packed, GZIP)).status == 200


@pytest.mark.usefixtures("double")
async def test_what_is_unpacked_for_who_has_left_is_counted_no_more(
    ask: Any, gate: Gate, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "_unpack", gate.hold(compression._unpack))
    packed = gzip.compress(BODY + b" " * 4_000_000)
    first = asyncio.ensure_future(ask("/v2/models/double/infer", packed, GZIP))
    await wait_until(lambda: gate.inside, "the thread")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gate.open()
    await wait_until(lambda: not gate.inside, "the thread's end")
    assert (await ask("/v2/models/double/infer", packed, GZIP)).status == 200


@pytest.mark.usefixtures("double")
async def test_gzip_may_have_several_members_and_not_too_many(ask: Any) -> None:
    members = gzip.compress(BODY[:9]) + gzip.compress(BODY[9:])
    assert (await ask("/v2/models/double/infer", members, GZIP)).status == 200
    response = await ask("/v2/models/double/infer", gzip.compress(b" ") * 1025, GZIP)
    assert (response.status, said(response)) == (
        400,
        "failed to decompress the request: it has too many parts",
    )


@pytest.mark.parametrize("headers", [(), (GZIP,)])
async def test_nothing_is_read_for_a_model_that_is_not_there(ask: Any, headers: Any) -> None:
    response = await ask("/v2/models/nobody/infer", b"neither gzip nor JSON", *headers)
    assert (response.status, said(response)) == (404, "Request for unknown model: 'nobody' is not found")


@pytest.mark.usefixtures("double")
async def test_json_has_a_limit_of_its_own(ask: Any) -> None:
    assert (await ask("/v2/models/double/infer", BODY + b" " * (16 << 20))).status == 200
    body = BODY + b"[]," * 2_000_000
    response = await ask("/v2/models/double/infer", body)
    assert response.status == 413
    assert said(response).startswith("The JSON of the request is more than the limit of 134217728 bytes, ")
    length = ("Inference-Header-Content-Length", str(len(BODY)))
    response = await ask("/v2/models/double/infer", body, length)  # what follows the JSON has not this limit
    assert (response.status, said(response)) == (400, "unexpected additional input data for model 'double'")


async def test_files_are_long_texts_and_lists_are_not(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_bodies, "MOST_COST", 1 << 20)
    file = b'{"parameters": {"config": "{}", "file:1/a": "?%s"}}' % (b"A" * (2 << 20))
    response = await ask("/v2/repository/models/m/load", file)
    assert said(response) == "parameter 'file:1/a' is not base64: Only base64 data is allowed"
    response = await ask("/v2/repository/models/m/load", b'{"parameters": %s}' % (b"[]," * 100_000))
    assert (response.status, said(response)[:27]) == (413, "The JSON of the request is ")


@pytest.mark.usefixtures("double")
async def test_two_long_texts_are_read_at_a_time(
    ask: Any, gate: Gate, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "read", gate.hold(codec.read))
    asking = [asyncio.ensure_future(ask("/v2/models/double/infer", LONG)) for _ in range(5)]
    await wait_until(lambda: gate.inside == 2, "two threads")
    asking[0].cancel()  # its thread goes on, and nobody has its place
    await asyncio.gather(asking[0], return_exceptions=True)
    gate.open()
    assert [(await each).status for each in asking[1:]] == [200] * 4
    assert (gate.most, gate.entered) == (2, 5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("double")
async def test_a_thread_keeps_the_body_in_shared_memory_that_it_reads(
    arena: Arena,
    placed: Callable[[bytes], SharedBytes],
    ask: Any,
    gate: Gate,
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
) -> None:
    monkeypatch.setattr(compression, "_unpack", gate.hold(compression._unpack))
    monkeypatch.setattr(rest, "_read_object", gate.hold(rest._read_object))
    headers = [GZIP] if packed else []
    body = placed(gzip.compress(LONG) if packed else LONG)
    asking = asyncio.ensure_future(ask("/v2/repository/models/m/load", body, *headers))
    del body
    await wait_until(lambda: gate.inside, "the thread")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    del asking
    gc.collect()
    assert arena.used_bytes
    gate.open()
    await wait_until(lambda: not arena.used_bytes, "the place to be free")
