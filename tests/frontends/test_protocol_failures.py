"""What goes wrong behind a good request, over every protocol of tensors and real sockets.

What is wrong with requests themselves is in test_protocol_errors.py.
"""

from __future__ import annotations

import asyncio
import gzip
import struct
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the grpc extra")

import grpc
from asking import begin
from protocol_clients import (
    ALL,
    CHOOSE,
    DIE,
    GOOD,
    GRPC,
    KSERVE,
    LIMIT_S,
    NO_MEMORY,
    PREDICTION,
    RAISE,
    REST,
    TOKEN,
    V1,
    V1_GRPC,
    V1_REST,
    V2,
    V2_RAW,
    V2_REST,
    WAIT,
    Gate,
    GrpcClient,
    HttpClient,
    Input,
    Question,
    Served,
    serving,
)

from mms_lite.frontends.message import Limits
from mms_lite.protos import message
from mms_lite.types import LoadOptions, VersionState

LIMIT = 100_000
Wait = Callable[..., Awaitable[Any]]
Load = Callable[..., Awaitable[Any]]
each_protocol = pytest.mark.parametrize("protocol", ALL)


def wishing(wish: float, timeout_s: float | None = None) -> Question:
    return Question(inputs=(Input(values=(wish, 0)),), timeout_s=timeout_s)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.fixture
async def served(inline: Any, gate: Gate) -> AsyncIterator[Served]:
    inline.defaults["queue_size"] = 1
    async with serving(inline, gate, Limits(max_tensor_request_size=LIMIT)) as made:
        yield made


async def occupy(served: Served, gate: Gate, wait_until: Wait) -> asyncio.Task[Any]:
    """Have the model's one worker wait for the gate."""
    waiting = begin(served.client(V2_RAW).ask(wishing(WAIT)))
    await wait_until(gate.reached, "the worker to wait")
    return waiting


# what the model does: HTTP status, gRPC's in v2 and in v1, part of the text
FAILURES = {
    RAISE: ("500", "INTERNAL", "INTERNAL", "Prediction failed"),
    CHOOSE: ("404", "NOT_FOUND", "NOT_FOUND", "no such customer"),
    NO_MEMORY: ("507", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", "Out of resources"),
    DIE: ("500", "UNAVAILABLE", "UNAVAILABLE", "the worker ended with the request in flight"),
}


@each_protocol
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("wish", FAILURES, ids=["handler error", "status of its own", "memory", "death"])
async def test_a_model_that_fails(served: Served, protocol: str, wish: float) -> None:
    client = served.client(protocol)
    over_http, over_v2, over_v1, text = FAILURES[wish]
    reply = await client.ask(wishing(wish))
    code = over_http if protocol in REST else over_v1 if protocol == V1_GRPC else over_v2
    assert (reply.code, text in reply.text, "secret" in reply.text) == (code, True, False)
    assert "retry-after" not in reply.headers
    assert (await client.ask(GOOD)).values == [6, 8]
    assert served.counted() == Counter([(client.label, code), (client.label, client.good)])


@each_protocol
async def test_a_model_that_gives_no_answer_in_time(inline: Any, gate: Gate, protocol: str) -> None:
    async with serving(inline, gate, Limits(), response_timeout_s=0.1) as served:
        client = served.client(protocol)
        reply = await client.ask(wishing(WAIT))
        assert reply.code == ("504" if protocol in REST else "DEADLINE_EXCEEDED")
        assert "the model gave no answer within 0.1 s" in reply.text
        assert (await client.ask(Question("any"))).values == [6, 8]
        assert served.counted() == Counter([(client.label, reply.code), (client.label, client.good)])


@each_protocol
async def test_a_deadline_that_passes_in_the_queue(
    served: Served, gate: Gate, wait_until: Wait, protocol: str
) -> None:
    waiting = await occupy(served, gate, wait_until)
    client = served.client(protocol)
    reply = await client.ask(wishing(0, timeout_s=0.03))
    assert reply.code == ("504" if protocol in REST else "DEADLINE_EXCEEDED")
    await wait_until(lambda: not served.engine.describe("m").queue_depth, "the job to leave the queue")
    gate.open()
    assert (await waiting).values == [WAIT * 2, 0]
    assert (await client.ask(GOOD)).values == [6, 8]
    assert served.batches() == 2


@each_protocol
async def test_a_full_queue(served: Served, gate: Gate, wait_until: Wait, protocol: str) -> None:
    waiting = [await occupy(served, gate, wait_until), begin(served.client(V2_RAW).ask(GOOD))]
    await wait_until(lambda: served.engine.describe("m").queue_depth, "the queue to be full")
    client = served.client(protocol)
    reply = await client.ask(GOOD)
    assert reply.code == ("429" if protocol in REST else "RESOURCE_EXHAUSTED")
    assert "the queue is full: 1 of 1 places taken" in reply.text
    assert protocol not in REST or int(reply.headers["retry-after"]) >= 1
    assert served.counted() == Counter([(client.label, reply.code)])
    gate.open()
    await asyncio.gather(*waiting)
    assert (await client.ask(GOOD)).values == [6, 8]


@each_protocol
async def test_a_client_that_leaves_takes_its_request_out_of_the_queue(
    served: Served, gate: Gate, wait_until: Wait, protocol: str
) -> None:
    waiting = await occupy(served, gate, wait_until)
    client = served.client(protocol)
    asking = begin(client.ask(GOOD))
    await wait_until(lambda: served.engine.describe("m").queue_depth, "the request to wait")
    await client.leave()
    await wait_until(lambda: not served.engine.describe("m").queue_depth, "the job to leave the queue")
    gate.open()
    await waiting
    await asyncio.wait([asking])
    assert (await served.client(protocol).ask(GOOD)).values == [6, 8]
    assert served.batches() == 2
    assert served.http.active == served.grpc.active == 0


# how a model that cannot answer is made: its source, and what is said of it
LATE = """
    from pathlib import Path
    import time

    class Model:
        def initialize(self, context):
            while not Path({gate!r}).exists():
                time.sleep(0.002)

        def handle(self, data, context):
            return [each["body"] for each in data]
"""
BROKEN = """
    from mms_lite.errors import InvalidArchive

    raise InvalidArchive("no such file: /srv/secret")
"""


@each_protocol
@pytest.mark.parametrize(
    ("source", "state", "said"),
    [
        (LATE, VersionState.LOADING, "model odd is loading"),
        (BROKEN, VersionState.FAILED, "model odd failed to load"),
    ],
    ids=["loading", "failed"],
)
async def test_a_model_that_is_not_ready(
    served: Served,
    model: Load,
    gate: Gate,
    wait_until: Wait,
    protocol: str,
    source: str,
    state: VersionState,
    said: str,
) -> None:
    await model("odd", source.format(gate=str(gate.path)), wait=False)
    await wait_until(lambda: served.engine.describe("odd").state is state, state.name)
    client = served.client(protocol)
    reply = await client.ask(Question("odd"))
    check_not_ready(reply, protocol, said, "odd")
    assert (await client.ask(GOOD)).values == [6, 8]
    assert served.counted() == Counter([(client.label, reply.code), (client.label, client.good)])


@each_protocol
async def test_a_model_without_workers(served: Served, protocol: str) -> None:
    await served.engine.scale("m", 0, 0)
    client = served.client(protocol)
    check_not_ready(await client.ask(GOOD), protocol, "model m has no workers", "m")
    await served.engine.scale("m", 1, 1)
    assert (await client.ask(GOOD)).values == [6, 8]


def check_not_ready(reply: Any, protocol: str, said: str, name: str) -> None:
    assert reply.code == ("503" if protocol in REST else "UNAVAILABLE")
    before = (
        f"Request for unknown model: '{name}' is not at ready state: "
        if protocol in V2
        else "Model with requested version is not loaded yet - "
    )
    assert reply.text == before + said
    assert reply.headers.get("retry-after") == ("1" if protocol in REST else None)


@each_protocol
async def test_all_requests_together_are_too_large(inline: Any, gate: Gate, protocol: str) -> None:
    async with serving(inline, gate, Limits(max_bytes_in_flight=1000)) as served:
        client = served.client(protocol)
        reply = await client.ask(Question(body=bytes(1001)))
        assert reply.code == ("503" if protocol in REST else "RESOURCE_EXHAUSTED")
        assert reply.text == "The server holds as many bytes of requests as it may. Try again later."
        assert reply.headers.get("retry-after") == ("1" if protocol in REST else None)
        assert (await client.ask(GOOD)).values == [6, 8]
        assert served.http.held_bytes == served.grpc.held_bytes == 0


@each_protocol
async def test_a_server_that_drains(served: Served, gate: Gate, wait_until: Wait, protocol: str) -> None:
    client = served.client(protocol)
    waiting = begin(client.ask(wishing(WAIT)))
    await wait_until(gate.reached, "the worker to wait")
    draining = [begin(each.drain(LIMIT_S)) for each in (served.http, served.grpc)]
    await wait_until(lambda: served.http.stopping and served.grpc.stopping, "the drain")
    late = served.client(protocol)
    if isinstance(late, HttpClient):
        with pytest.raises(ConnectionRefusedError):
            await late.ask(GOOD)
    else:  # cancelled: by gRPC itself, before the server has seen the call
        assert (await late.ask(GOOD)).code in ("UNAVAILABLE", "CANCELLED")
    gate.open()
    reply = await waiting
    assert reply.values == [WAIT * 2, 0]
    assert protocol not in REST or reply.headers["connection"] == "close"
    await asyncio.gather(*draining)
    assert served.counted() == Counter([(client.label, client.good)])


@each_protocol
async def test_an_engine_that_drains(served: Served, gate: Gate, wait_until: Wait, protocol: str) -> None:
    waiting = await occupy(served, gate, wait_until)
    closing = begin(served.engine.close(drain_s=LIMIT_S))
    client = served.client(protocol)
    await wait_until(lambda: served.engine.describe("m").state is VersionState.UNLOADING, "the close")
    reply = await client.ask(GOOD)
    assert reply.code in ("503", "UNAVAILABLE")
    assert "being unloaded" in reply.text
    gate.open()
    assert (await waiting).values == [WAIT * 2, 0]
    await closing


# A small message for a large array, and a bomb: what they say costs nothing.
HUGE = Question(inputs=(Input(shape=(1 << 24, 2)),))
BOMB = Question(body=gzip.compress(bytes(200 * LIMIT)), lines=("Content-Encoding: gzip",))


def one_number(asked: Any) -> None:
    asked.inputs["x"].tensor_content = b""
    asked.inputs["x"].float_val.append(1)


@pytest.mark.parametrize(
    ("protocol", "question"),
    [(protocol, HUGE) for protocol in (*V2, V1_GRPC)]
    + [(protocol, BOMB) for protocol in (*V2_REST, *V1_REST)]
    + [(V1_GRPC, Question(inputs=HUGE.inputs, edit=one_number))],
)
async def test_what_a_request_claims_takes_no_memory(
    served: Served, protocol: str, question: Question
) -> None:
    client = served.client(protocol)
    await client.ask(GOOD)
    tracemalloc.start()
    try:
        reply = await client.ask(question)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reply.code in ("400", "413", "415", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
    assert peak < 10 * LIMIT
    assert (await client.ask(GOOD)).values == [6, 8]


@pytest.mark.parametrize("protocol", GRPC)
async def test_a_compressed_message_that_unpacks_to_too_much(served: Served, protocol: str) -> None:
    client = served.client(protocol)
    assert isinstance(client, GrpcClient)
    reply = await client.ask(Question(body=bytes(50 * LIMIT)), compression=grpc.Compression.Gzip)
    assert reply.code == "RESOURCE_EXHAUSTED"
    assert (await client.ask(GOOD)).values == [6, 8]


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2 (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    """Return a header as HPACK has it without a table (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(bytes([len(each)]) + each.encode() for each in (name, value))


@pytest.mark.parametrize("protocol", GRPC)
async def test_a_deadline_of_grpc_that_has_passed_on_arrival(
    served: Served, wait_until: Wait, protocol: str
) -> None:
    """grpc's own client would not send it."""
    client = served.client(protocol)
    assert isinstance(client, GrpcClient)
    asked = client.spell(GOOD)
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": client.path,
        ":authority": "test",
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-timeout": "1n",
    }
    reader, writer = await asyncio.open_connection("127.0.0.1", served.ports["grpc"])
    writer.write(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(4, 0, 0, b"")  # SETTINGS
        + frame(1, 4, 1, b"".join(literal(*each) for each in headers.items()))
        + frame(0, 1, 1, struct.pack(">BI", 0, len(asked)) + asked)
    )
    kind = None
    while kind not in (1, 3):  # HEADERS, or RST_STREAM: the call has ended
        head = await asyncio.wait_for(reader.readexactly(9), LIMIT_S)
        kind = head[3]
        await reader.readexactly(int.from_bytes(head[:3], "big"))
    writer.close()
    await wait_until(lambda: not served.grpc.active, "the call to end")
    assert (await client.ask(GOOD)).values == [6, 8]
    assert served.batches() == 1


@pytest.mark.parametrize("protocol", V1)
async def test_a_version_that_no_number_names(served: Served, protocol: str) -> None:
    """It answers as the default alone: v1 has no words for it."""
    await served.engine.load(LoadOptions(url="any", name="words", version="first", handler="service"))
    client = served.client(protocol)
    assert (await client.ask(Question("words"))).values == [6, 8]
    reply = await client.ask(Question("words", version="1"))
    assert reply.code == ("404" if protocol in REST else "NOT_FOUND")
    assert reply.text == "Model with requested version is not found"


def control(method: str) -> bytes:
    fields = {"model_name": "m"} if method.startswith("RepositoryModel") else {}
    name = {"HandleReloadConfigRequest": "tensorflow.serving.ReloadConfigRequest"}.get(
        method, f"inference.{method}Request"
    )
    return bytes(message(name)(**fields).SerializeToString())


# over which protocol models are loaded and unloaded: path
CONTROL = [
    (REST[0], "/v2/repository/models/m/load"),
    (REST[0], "/v2/repository/models/m/unload"),
    (REST[2], "/v1/config/reload"),
    (GRPC[0], f"/{KSERVE}/RepositoryModelLoad"),
    (GRPC[0], f"/{KSERVE}/RepositoryModelUnload"),
    (V1_GRPC, f"/{PREDICTION.replace('Prediction', 'Model')}/HandleReloadConfigRequest"),
]


@pytest.mark.parametrize(("protocol", "path"), CONTROL)
@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        (("x-forwarded-for", "203.0.113.7"), "401", "UNAUTHENTICATED"),
        (("origin", "https://elsewhere.example"), "403", "PERMISSION_DENIED"),
    ],
    ids=["from afar without the token", "a page of another site"],
)
async def test_who_may_not_manage(
    served: Served, protocol: str, path: str, header: tuple[str, str], status: str, code: str
) -> None:
    client = served.client(protocol)

    async def manage(*headers: tuple[str, str]) -> Any:
        if isinstance(client, HttpClient):
            return await client.post(path, b"", *(f"{name}: {value}" for name, value in headers))
        return (await client.post(path, control(path.rpartition("/")[2]), *headers))[0]

    reply = await manage(header)
    assert reply.code == (status if protocol in REST else code)
    assert ("manage this server" in reply.text, TOKEN.decode() in reply.text) == (True, False)
    assert ("www-authenticate" in reply.headers) == (reply.code == "401")
    assert (await client.ask(GOOD)).values == [6, 8]
    allowed = await manage(("x-forwarded-for", "203.0.113.7"), ("authorization", f"Bearer {TOKEN.decode()}"))
    assert allowed.code not in (status, code)
