"""Connections of the fast way in: whose bytes are whose, hand-overs, clients that are slow or leave."""

import asyncio
import gc
import itertools
import logging
import tracemalloc
from types import SimpleNamespace

import pytest
from raw_http import Stub, Wire, request

from mms_lite.frontends.head import read_head
from mms_lite.frontends.hot import HotConnections
from mms_lite.frontends.http import AnyConnections
from mms_lite.frontends.listener import HttpListener
from mms_lite.frontends.message import HttpResponse, Limits
from mms_lite.shared import LEAST_BYTES, Arena, SharedBytes

CHUNKED = b"POST /c HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"


def both_ways(test):
    return pytest.mark.parametrize("hot", [True, False], ids=["hot", "any"])(test)


def connections(stub, arena=None, **limits):
    listener = HttpListener(stub, Limits(linger_s=0, **limits), access=lambda *_: None, arena=arena)
    return HotConnections(listener, AnyConnections(listener).take_over)


@pytest.fixture
def clock(monkeypatch):
    """The time that connections see: `clock.now` in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("mms_lite.frontends.hot.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@both_ways
@pytest.mark.parametrize("size", [5, 300_000, 3_000_000])
async def test_a_body_is_its_own_and_can_be_resized(listen, connect, size):
    async def answer(asked):
        body = asked.own_body
        body.append(1)
        del body[:2]
        return HttpResponse(200, (), [b"%d" % len(body)])

    stub = Stub(answer)
    client = await connect(await listen(stub))
    for _ in range(2):
        assert (await client.ask("POST", "/a", bytes(size))).body == b"%d" % (size - 1)
    assert type(stub.asked[0].own_body) is bytearray and stub.asked[0].body is not stub.asked[1].body


@both_ways
async def test_plain_and_other_messages_take_turns_on_one_connection(listen, connect):
    client = await connect(await listen(Stub()))
    for _ in range(2):
        assert (await client.ask("POST", "/a", b"plain")).body == b"plain"
        await client.send(CHUNKED)
        assert (await client.response()).body == b"abc"
        await client.send(request("POST", "/b", bytes(500_000)) + CHUNKED + request("POST", "/c", b"last"))
        assert [len((await client.response()).body) for _ in range(3)] == [500_000, 3, 4]
    await client.send(b"nonsense\r\n\r\n")
    assert (await client.response()).status == 400
    assert await client.at_end()


async def test_ten_pipelined_requests_wherever_they_are_cut():
    bodies = [b"%d" % n * (n % 4) for n in range(10)]
    sent = b"".join(request("POST", f"/{n % 3}", body) for n, body in enumerate(bodies))
    for cut in range(len(sent)):
        stub = Stub()
        wire = Wire(connections(stub)())
        await wire.send(*filter(None, (sent[:cut], sent[cut:])))
        for _ in bodies:
            await wire.settle()
        assert [asked.raw_path for asked in stub.asked] == [f"/{n % 3}" for n in range(10)]
        assert [
            answer.partition(b"\r\n\r\n")[2].partition(b"\r\n\r\n")[2] for answer in wire.answers()
        ] == bodies
        wire.close()
        await wire.settle()


async def test_what_earlier_reads_left_behind_is_nobodys_message():
    stub = Stub()
    all_ = connections(stub)
    first, second = Wire(all_()), Wire(all_())
    sent = request("POST", "/a", b"body")
    for wire in (first, second, first):
        await wire.send(sent)
    for wire in (first, second):
        await wire.send(sent[:1])
        assert len(stub.asked) == 3
        await wire.send(sent[1:-1])
        assert len(stub.asked) == 3
    for wire in (first, second):
        await wire.send(sent[-1:])
        wire.close()
    await second.settle()
    assert [bytes(asked.body) for asked in stub.asked] == [b"body"] * 5


@both_ways
async def test_a_client_that_sends_byte_by_byte(listen, connect):
    client = await connect(await listen(Stub()))
    for _ in range(2):
        for byte in request("POST", "/slow", b"body", "X-Some: thing"):
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.response()).body == b"body"


@both_ways
async def test_every_answer_belongs_to_its_request(listen, connect):
    async def answer(asked):
        for _ in range(len(asked.body) % 3):
            await asyncio.sleep(0)
        return HttpResponse(200, [("x-asked", asked.raw_path)], [bytes(asked.body)])

    port = await listen(Stub(answer))

    async def ask(name, ahead):
        client = await connect(port)
        bodies = [f"{name}-{n}".encode() * (n % 7 * 1000 + 1) for n in range(24)]
        for batch in range(0, len(bodies), ahead):
            numbers = range(batch, batch + ahead)
            await client.send(b"".join(request("POST", f"/{name}/{n % 5}", bodies[n]) for n in numbers))
            for n in numbers:
                got = await client.response()
                assert (got.headers["x-asked"], got.body) == (f"/{name}/{n % 5}", bodies[n])
                yield got.headers["x-request-id"]

    async def collect(name, ahead):
        return [each async for each in ask(name, ahead)]

    runs = [collect(f"c{n}", ahead) for n, ahead in enumerate((1, 1, 2, 4, 8, 24))]
    ids = list(itertools.chain(*await asyncio.gather(*runs)))
    assert len(set(ids)) == len(ids) == 6 * 24


@both_ways
async def test_a_client_that_closes_its_half_gets_no_answer(listen, connect, wait_until):
    async def answer(_):
        await asyncio.Event().wait()

    stub = Stub(answer)
    client = await connect(await listen(stub))
    await client.send(request("POST", "/a", b"x"))
    await wait_until(lambda: stub.asked)
    client.writer.write_eof()
    assert await client.at_end()
    await wait_until(lambda: stub.cancelled == 1)


@both_ways
async def test_a_client_that_leaves_before_its_answer_is_sent(listen, connect, wait_until, caplog):
    async def answer(_):
        return HttpResponse(200, (), [bytes(50_000_000)])

    caplog.set_level(logging.INFO, "mms_lite.access")
    stub = Stub(answer)
    client = await connect(await listen(stub, idle_s=30))
    client.writer.transport.pause_reading()
    await client.send(request("GET", "/a"))
    await wait_until(lambda: stub.asked)
    client.leave()
    await wait_until(lambda: not listen.listener.active)
    assert [message.split()[-2] for message in caplog.messages] == ["499"]


@both_ways
@pytest.mark.parametrize("size", [1000, 100_000])
async def test_bodies_that_grow_past_the_bound_together_are_refused(listen, connect, wait_until, size):
    port = await listen(Stub(), max_bytes_in_flight=size * 3 // 2)
    first, second = await connect(port), await connect(port)
    for client in (first, second):
        await client.send(b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % size)
        await client.send(bytes(size // 10))
    await wait_until(lambda: listen.listener.held_bytes == size // 5)
    await first.send(bytes(size * 8 // 10))
    await wait_until(lambda: listen.listener.held_bytes == size)
    await second.send(bytes(size * 8 // 10))
    refused = await second.response()
    assert (refused.status, refused.headers["connection"]) == (503, "close")
    assert await second.at_end()
    await first.send(bytes(size // 10))
    assert (await first.response()).body == bytes(size)
    assert (listen.listener.active, listen.listener.held_bytes) == (0, 0)


async def test_announced_bodies_take_no_memory_before_they_come():
    all_ = connections(Stub())
    wires = [Wire(all_()) for _ in range(200)]
    tracemalloc.start()
    for wire in wires:
        await wire.send(b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 6000000\r\n\r\nx")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all_.listener.held_bytes == 200
    assert peak < 200 * 10_000
    for wire in wires:
        wire.close()
    await wires[-1].settle()
    assert (all_.listener.active, all_.listener.held_bytes) == (0, 0)


async def test_reading_stops_while_much_waits_behind_a_request():
    leave = asyncio.Event()

    async def answer(asked):
        await leave.wait()
        return HttpResponse(200, (), [asked.raw_path.encode()])

    wire = Wire(connections(Stub(answer))())
    one = request("POST", "/a", bytes(30_000))
    await wire.send(one, one, one)
    assert wire.reading
    await wire.send(one)
    assert not wire.reading
    leave.set()
    for _ in range(4):
        await wire.settle()
    assert wire.reading and len(wire.answers()) == 4
    wire.close()
    await wire.settle()


async def test_idle_connections_and_slow_heads_are_closed_and_bytes_gain_no_time(clock):
    all_ = connections(Stub(), keepalive_s=10)
    idle, slow, served = (Wire(all_()) for _ in range(3))
    for byte in b"GET /slow":
        clock.now += 1
        await slow.send(bytes([byte]))
    await served.send(request("GET", "/"))
    all_.look()
    assert not (idle.is_closing() or slow.is_closing())
    clock.now += 1
    all_.look()
    assert idle.is_closing() and slow.is_closing() and not served.is_closing()
    assert not slow.sent
    clock.now += 9
    all_.look()
    assert served.is_closing()
    await served.settle()


async def test_a_body_that_stops_is_refused_and_one_that_comes_slowly_is_not(clock):
    stub = Stub()
    all_ = connections(stub, idle_s=10)
    stops, slow = Wire(all_()), Wire(all_())
    for wire in (stops, slow):
        await wire.send(b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\n\r\n")
    for byte in b"slow":
        clock.now += 10
        await slow.send(bytes([byte]))
        all_.look()
        await slow.settle()
    assert [answer[9:12] for answer in stops.answers()] == [b"408"] and stops.is_closing()
    assert [answer[9:12] for answer in slow.answers()] == [b"200"] and not slow.is_closing()
    assert [bytes(asked.body) for asked in stub.asked] == [b"slow"]
    slow.close()
    await slow.settle()
    assert (all_.listener.active, all_.listener.held_bytes) == (0, 0)


async def test_a_request_in_work_has_all_the_time(clock):
    leave = asyncio.Event()

    async def answer(_):
        await leave.wait()
        return HttpResponse()

    all_ = connections(Stub(answer), idle_s=10, keepalive_s=10)
    wire = Wire(all_())
    await wire.send(request("GET", "/"))
    clock.now += 1_000_000
    all_.look()
    leave.set()
    await wire.settle()
    assert len(wire.answers()) == 1 and not wire.is_closing()
    wire.close()
    await wire.settle()


async def test_a_client_that_is_lost_before_its_next_request_has_begun_holds_nothing(monkeypatch):
    all_ = connections(Stub())
    wire = Wire(all_())
    written = wire.write

    def write_and_lose(data):
        written(data)
        asyncio.get_running_loop().call_soon(wire._protocol.connection_lost, ConnectionResetError())

    monkeypatch.setattr(wire, "write", write_and_lose)
    await wire.send(request("POST", "/a", b"one") + request("POST", "/b", bytes(30_000)))
    await wire.settle()
    wire.get_extra_info("socket").close()
    assert (all_.listener.active, all_.listener.held_bytes) == (0, 0)


async def test_an_answer_that_cannot_be_written_ends_its_connection(caplog):
    async def answer(asked):
        return HttpResponse(200, (), ["text, not bytes"])

    all_ = connections(Stub(answer))
    wire = Wire(all_())
    await wire.send(request("POST", "/a", b"one"))
    await wire.settle()
    assert wire.is_closing() and wire.sent == b"" and all_.listener.active == 0
    assert "its answer cannot be sent" in caplog.text


async def test_a_request_line_with_two_spaces_is_left_to_the_other_reader():
    assert read_head(b"GET  / HTTP/1.1\r\nHost: t\r\n\r\n", Limits()) is None
    assert read_head(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n", Limits()) is not None


@pytest.fixture
def arena():
    arena = Arena.create(4 << 20)
    if arena is None:
        pytest.skip("this system has no memory that processes share")
    return arena


def pattern(size, seed=0):
    return bytes((seed + n * 7 + n // 251) % 256 for n in range(size))


@pytest.mark.parametrize("cut", [1, 60, 1000, 32_768, 40_059, 40_060, 70_000])
async def test_a_large_body_lies_in_shared_memory_wherever_it_is_cut(arena, cut):
    first, last = pattern(40_000), pattern(LEAST_BYTES, 3)
    sent = request("POST", "/a", first) + request("POST", "/b", b"small") + request("POST", "/c", last)
    stub = Stub()
    wire = Wire(connections(stub, arena)())
    await wire.send(sent[:cut], sent[cut:])
    for _ in range(3):
        await wire.settle()
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in wire.answers()]
    assert [first in bodies[0], b"small" in bodies[1], last in bodies[2]] == [True] * 3
    assert [type(asked.body) for asked in stub.asked] == [SharedBytes, bytearray, SharedBytes]
    stub.asked.clear()
    assert arena.used_bytes == 0
    wire.close()


async def test_bodies_for_which_there_is_no_shared_memory_are_answered_all_the_same(arena):
    held = [arena.take(1 << 18) for _ in range(16)]
    stub = Stub()
    wire = Wire(connections(stub, arena)())
    await wire.send(request("POST", "/a", pattern(100_000)))
    assert wire.answers()[0].endswith(pattern(100_000))
    assert type(stub.asked[0].body) is bytearray
    del held
    await wire.send(request("POST", "/a", pattern(100_000, 9)))
    assert wire.answers()[1].endswith(pattern(100_000, 9))
    assert type(stub.asked[1].body) is SharedBytes
    wire.close()


async def test_a_client_that_leaves_while_it_is_served_leaves_its_memory(arena):
    async def answer(asked):
        await asyncio.Event().wait()

    class Forgetful(Stub):
        async def handle(self, request):
            return await answer(request)

    wire = Wire(connections(Forgetful(), arena)())
    gc.collect()
    gc.disable()
    try:
        await wire.send(request("POST", "/a", pattern(100_000)))
        assert arena.used_bytes >= 100_000
        wire.close()
        await wire.settle()
        assert arena.used_bytes == 0
    finally:
        gc.enable()


async def test_a_client_with_many_requests_at_once_leaves_others_their_turn():
    stub = Stub()
    all_ = connections(stub)
    greedy, modest = Wire(all_()), Wire(all_())
    sent = request("GET", "/greedy") * 500
    memoryview(greedy._protocol.get_buffer(-1))[: len(sent)] = sent
    greedy._protocol.buffer_updated(len(sent))
    await modest.send(request("GET", "/modest"))
    paths = [asked.raw_path for asked in stub.asked]
    assert "/modest" in paths[:5]
    for wire in (greedy, modest):
        wire.close()


async def test_a_client_that_leaves_in_the_middle_of_a_body_leaves_its_memory(arena):
    all_ = connections(Stub(), arena)
    wire = Wire(all_())
    await wire.send(request("POST", "/a", pattern(100_000))[:60_000])
    assert arena.used_bytes >= 100_000 and all_.listener.held_bytes > 59_000
    wire.close()
    await wire.settle()
    assert arena.used_bytes == 0
    assert (all_.listener.active, all_.listener.held_bytes) == (0, 0)


async def test_a_slow_client_of_a_large_body_is_told_and_its_memory_is_free(arena, clock):
    all_ = connections(Stub(), arena, idle_s=10)
    wire = Wire(all_())
    await wire.send(request("POST", "/a", pattern(100_000))[:60_000])
    clock.now += 11
    all_.look()
    await wire.settle()
    clock.now += 11
    all_.look()
    await wire.settle()
    assert wire.sent.startswith(b"HTTP/1.1 408 ")
    assert arena.used_bytes == 0


async def test_the_next_request_of_a_connection_waits_for_no_new_task(listen, connect):
    tasks = []

    async def answer(asked):
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        return HttpResponse(200)

    client = await connect(await listen(Stub(answer)))
    for _ in range(3):
        await client.ask("POST", "/a", b"body")
    assert len(set(tasks)) == 1 and not tasks[0].done()
    client.leave()
    await asyncio.wait(tasks[:1], timeout=10)
    assert tasks[0].cancelled()


async def test_what_another_client_sent_last_says_nothing_of_this_one(listen, connect):
    port = await listen(Stub())
    first, second, third = [await connect(port) for _ in range(3)]
    assert (await first.ask("POST", "/a", b"123", "x-who: first")).body == b"123"
    assert (await second.ask("POST", "/b", b"12345", "x-who: second")).body == b"12345"
    assert (await third.ask("POST", "/a", b"abc", "x-who: first")).body == b"abc"
    assert (await second.ask("POST", "/b", b"54321", "x-who: second")).body == b"54321"
