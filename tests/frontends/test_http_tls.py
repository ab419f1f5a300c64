"""The adapter over TLS: answers arrive whole, and no client holds up another or the end."""

import asyncio
import logging
import ssl

import pytest
from certificates import Pair, client_context
from raw_http import Stub, request

from mms_lite.config import Config
from mms_lite.frontends.message import HttpResponse
from mms_lite.tls import server_identity

PAIR = Pair()
LARGE = 30_000_000  # more than any socket buffer holds


@pytest.fixture
def tls(tmp_path):
    return server_identity(Config(**PAIR.write(tmp_path))).context


@pytest.fixture(params=["TLSv1_2", "TLSv1_3"])
def trust(request):
    context = client_context(PAIR)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[request.param]
    return context


async def test_requests_on_one_connection(listen, connect, tls, trust):
    stub = Stub()
    client = await connect(await listen(stub, tls=tls), trust)
    for body in (b"one", bytes(300_000), b""):
        answer = await client.ask("POST", "/a", body)
        assert (answer.status, answer.body, answer.headers["connection"]) == (200, body, "keep-alive")
    assert stub.asked[0].remote.startswith("127.0.0.1:")


async def test_a_large_answer_arrives_whole_before_the_close(listen, connect, tls, trust):
    async def answer(_):
        return HttpResponse(200, (), [bytes(LARGE), memoryview(bytearray(b"end"))])

    client = await connect(await listen(Stub(answer), tls=tls), trust)
    answer = await client.ask("GET", "/a", b"", "Connection: close")
    assert len(answer.body) == LARGE + 3 and answer.body.endswith(b"\0end")
    assert await client.at_end()


async def test_a_client_that_does_not_read_is_cut_off(listen, connect, tls, trust, wait_until, caplog):
    async def answer(_):
        return HttpResponse(200, (), [bytes(LARGE)])

    caplog.set_level(logging.INFO, "mms_lite.access")
    client = await connect(await listen(Stub(answer), tls=tls, idle_s=0.1), trust)
    client.writer.transport.pause_reading()
    await client.send(request("GET", "/a"))
    await wait_until(lambda: caplog.messages, "the answer to be given up")
    assert '"GET /a HTTP/1.1" 499 ' in caplog.messages[0]
    client.leave()


async def test_a_refused_body_leaves_the_answer_readable(listen, connect, tls, trust):
    client = await connect(await listen(Stub(), tls=tls, max_request_size=1000, linger_s=0.5), trust)
    await client.send(request("POST", "/a", bytes(LARGE)))
    answer = await client.response()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert answer.body.startswith(b"The request's body is larger than")
    assert await client.at_end()


async def test_what_is_not_http_gets_400(listen, connect, tls, trust):
    client = await connect(await listen(Stub(), tls=tls, linger_s=0.1), trust)
    await client.send(b"complete nonsense\r\n\r\n", bytes(100_000))
    answer = await client.response()
    assert (answer.status, answer.body) == (400, b"Invalid HTTP message.")
    assert await client.at_end()


async def test_a_client_that_never_stops_sending_is_cut_off(listen, connect, tls, trust):
    port = await listen(Stub(), tls=tls, max_request_size=1000, linger_bytes=1 << 20, linger_s=30)
    client = await connect(port, trust)
    client.writer.write(b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 900000000\r\n\r\n")
    with pytest.raises(OSError):
        for _ in range(900):
            await client.send(bytes(1_000_000))


async def test_clients_that_never_shake_hands_hold_up_nothing_and_are_cut_off(
    listen, connect, tls, trust, caplog
):
    port = await listen(Stub(), tls=tls, handshake_s=0.5)
    silent, halfway, plain = await connect(port), await connect(port), await connect(port)
    await halfway.send(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake
    await plain.send(request("GET", "/ping"))
    client = await connect(port, trust)
    assert (await client.ask("POST", "/a", b"x")).status == 200
    for each in (silent, halfway, plain):
        try:
            await each.reader.read()  # plain HTTP may get an alert
        except ConnectionError:
            continue
    assert not caplog.records


async def test_stop_waits_for_answers_but_not_for_handshakes(listen, connect, tls, trust, wait_until):
    leave = asyncio.Event()

    async def answer(asked):
        await leave.wait()
        return HttpResponse(200, (), [bytes(asked.body)])

    stub = Stub(answer)
    port = await listen(stub, tls=tls, handshake_s=5)
    idle, busy, _silent = await connect(port, trust), await connect(port, trust), await connect(port)
    await busy.send(request("POST", "/a", bytes(1_000_000)))
    await wait_until(lambda: stub.asked)
    stopping = asyncio.create_task(listen.listener.stop(10))
    assert await idle.at_end()
    with pytest.raises(ConnectionError):
        await connect(port)
    leave.set()
    answer = await busy.response()
    assert (len(answer.body), answer.headers["connection"]) == (1_000_000, "close")
    assert await busy.at_end()
    await asyncio.wait_for(stopping, 3)
