import asyncio
import gzip
import logging
import re

import pytest
from raw_http import Stub, request

from mms_lite.frontends import mms
from mms_lite.frontends.listener import HttpListener
from mms_lite.frontends.message import Cors, HttpResponse, Limits, encode_response

CHUNKED = b"POST /x HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(params=[True, False], ids=["hot", "any"])
def hot(request):
    return request.param


async def test_keep_alive_and_common_headers(listen, connect):
    client = await connect(await listen(Stub()))
    first = await client.ask("POST", "/a", b"one")
    second = await client.ask("POST", "/a", b"two")
    assert (first.status, first.reason, first.body, second.body) == (200, "OK", b"one", b"two")
    assert first.headers["connection"] == "keep-alive"
    assert first.headers["pragma"] == "no-cache"
    assert first.headers["cache-control"] == "no-cache; no-store, must-revalidate, private"
    assert first.headers["expires"] == "Thu, 01 Jan 1970 00:00:00 UTC"
    assert not {"server", "date", "transfer-encoding"} & set(first.headers)
    ids = {first.headers["x-request-id"], second.headers["x-request-id"]}
    assert len(ids) == 2 and all(re.fullmatch(r"[0-9a-f-]{36}", each) for each in ids)


async def test_a_client_that_asks_for_close_gets_it(listen, connect):
    client = await connect(await listen(Stub()))
    answer = await client.ask("POST", "/a", b"x", "Connection: close")
    assert answer.headers["connection"] == "close"
    assert await client.at_end()


async def test_http_1_0_closes_unless_it_asks_for_keep_alive(listen, connect):
    port = await listen(Stub())
    client = await connect(port)
    await client.send(b"GET /a HTTP/1.0\r\n\r\n")
    assert (await client.response()).headers["connection"] == "close"
    assert await client.at_end()
    client = await connect(port)
    for _ in range(2):
        await client.send(b"POST /a HTTP/1.0\r\nConnection: Keep-Alive\r\nContent-Length: 2\r\n\r\nhi")
        answer = await client.response()
        assert answer.headers["connection"] == "keep-alive" and answer.body == b"hi"


async def test_the_request_as_the_protocol_sees_it(listen, connect):
    stub = Stub()
    client = await connect(await listen(stub))
    await client.ask("POST", "/a%20b/c%2Fd?x=1&x=%C3%A9&e=", b"body", "X-Mixed-Case: V", "x-mixed-case: w")
    seen = stub.asked[0]
    assert seen.method == "POST"
    assert seen.raw_path == "/a%20b/c%2Fd?x=1&x=%C3%A9&e="
    assert seen.path == "/a b/c/d"
    assert seen.query == [("x", "1"), ("x", "é"), ("e", "")]
    assert ("X-Mixed-Case", "V") in seen.headers and ("x-mixed-case", "w") in seen.headers
    assert seen.header("x-mixed-case") == "V" and seen.header("x-none") is None
    assert type(seen.body) is bytearray and seen.body == b"body"
    assert re.fullmatch(r"127\.0\.0\.1:\d+", seen.remote)


async def test_absolute_form_and_a_header_that_is_no_utf8(listen, connect):
    stub = Stub()
    client = await connect(await listen(stub))
    assert (await client.ask("GET", "http://other/ping?a=b")).status == 200
    await client.send(b"GET /%FF HTTP/1.1\r\nHost: t\r\nX: \xff\r\n\r\n")
    assert (await client.response()).status == 200
    assert (stub.asked[0].path, stub.asked[0].query) == ("/ping", [("a", "b")])
    assert stub.asked[1].path == "/\ufffd"
    assert stub.asked[1].header("x") == "\u00ff"


async def test_head_has_the_length_and_no_body(listen, connect):
    async def answer(_):
        return HttpResponse(200, (), [b"12345"])

    client = await connect(await listen(Stub(answer)))
    for _ in range(2):
        await client.send(request("HEAD", "/"))
        assert (await client.response(head_only=True)).headers["content-length"] == "5"


async def test_an_empty_body_and_a_chunked_one(listen, connect):
    client = await connect(await listen(Stub()))
    assert (await client.ask("POST", "/a")).body == b""
    await client.send(b"GET /a HTTP/1.1\r\nHost: t\r\n\r\n")
    assert (await client.response()).body == b""
    await client.send(CHUNKED, b"3\r\nabc\r\n", b"4\r\ndefg\r\n0\r\n\r\n")
    assert (await client.response()).body == b"abcdefg"


async def test_a_compressed_body_arrives_as_sent(listen, connect):
    client = await connect(await listen(Stub()))
    sent = gzip.compress(b"0" * 1000)
    assert (await client.ask("POST", "/a", sent, "Content-Encoding: gzip")).body == sent


async def test_a_body_over_the_limit_is_refused_and_the_answer_can_be_read(listen, connect):
    stub = Stub()
    client = await connect(await listen(stub, max_request_size=1000))
    await client.send(request("POST", "/a", bytes(30_000_000)))  # more than any socket buffer holds
    answer = await client.response()
    assert (answer.status, answer.headers["x-code"]) == (413, "request_too_large")
    assert answer.headers["connection"] == "close"
    assert await client.at_end()
    assert not stub.asked


async def test_a_chunked_body_is_refused_once_it_is_over_the_limit(listen, connect):
    client = await connect(await listen(Stub(), max_request_size=1000))
    await client.send(CHUNKED, b"3e8\r\n" + bytes(1000) + b"\r\n", b"1\r\nx\r\n")
    assert (await client.response()).status == 413
    assert await client.at_end()


async def test_a_refused_body_that_has_arrived_keeps_the_connection(listen, connect):
    client = await connect(await listen(Stub(), max_request_size=1000))
    assert (await client.ask("POST", "/a", bytes(1001))).headers["connection"] == "keep-alive"
    assert (await client.ask("POST", "/a", b"good")).body == b"good"


async def test_a_client_that_never_stops_sending_is_cut_off(listen, connect, wait_until):
    port = await listen(Stub(), max_request_size=1000, linger_bytes=1 << 20, linger_s=30)
    client = await connect(port)
    client.writer.write(b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 900000000\r\n\r\n")
    with pytest.raises(ConnectionError):
        for _ in range(900):
            await client.send(bytes(1_000_000))


async def test_expect_100_continue(listen, connect):
    client = await connect(await listen(Stub(), max_request_size=1000))
    await client.send(
        b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n",
    )
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.send(b"body")
    assert (await client.response()).body == b"body"


async def test_expect_with_too_large_a_body_gets_413_at_once(listen, connect):
    client = await connect(await listen(Stub(), max_request_size=1000))
    await client.send(
        b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 1001\r\nExpect: 100-continue\r\n\r\n",
    )
    assert (await client.response()).status == 413
    assert await client.at_end()


@pytest.mark.parametrize(
    "sent",
    [
        b"complete nonsense\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /" + b"a" * 4100 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: t\r\nX: " + b"a" * 8200 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : t\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: t\r\n\r\n",
    ],
    ids=["nonsense", "space", "long line", "long header", "length", "header", "not ASCII"],
)
async def test_what_is_not_http_gets_400(listen, connect, sent):
    client = await connect(await listen(Stub()))
    await client.send(sent)
    answer = await client.response()
    assert (answer.status, answer.body) == (400, b"Invalid HTTP message.")
    assert answer.headers["connection"] == "close"
    assert await client.at_end()


async def test_a_malformed_chunk_gets_400_without_waiting(listen, connect):
    client = await connect(await listen(Stub(), idle_s=30))
    await client.send(CHUNKED, b"3\r\nabc\r\n")
    await client.send(b"no number\r\n")
    assert (await client.response()).status == 400
    assert await client.at_end()


async def test_a_body_that_stops_arriving_gets_408(listen, connect):
    stub = Stub()
    client = await connect(await listen(stub, idle_s=0.05))
    await client.send(b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nabc")
    answer = await client.response()
    assert (answer.status, answer.headers["x-code"]) == (408, "request_timeout")
    assert await client.at_end()
    assert not stub.asked


async def test_a_head_that_does_not_arrive_closes_the_connection(listen, connect):
    client = await connect(await listen(Stub(), keepalive_s=0.05))
    await client.send(b"GET /a HTTP/1.1\r\n")
    assert await client.at_end()


async def test_a_client_that_does_not_read_is_cut_off(listen, connect, wait_until):
    async def answer(_):
        return HttpResponse(200, (), [bytes(50_000_000)])

    stub = Stub(answer)
    client = await connect(await listen(stub, idle_s=0.05))
    client.writer.transport.pause_reading()
    await client.send(request("GET", "/a"))
    await wait_until(lambda: stub.asked and not listen.listener.active, "the answer to be given up")


async def test_pipelined_requests_are_answered_in_order(listen, connect):
    async def answer(asked):
        await asyncio.sleep(0)
        return HttpResponse(200, (), [bytes(asked.body)])

    client = await connect(await listen(Stub(answer)))
    bodies = [str(n).encode() for n in range(60)]
    await client.send(b"".join(request("POST", "/a", body) for body in bodies))
    assert [(await client.response()).body for _ in bodies] == bodies


async def test_a_client_that_leaves_cancels_its_request(listen, connect, wait_until):
    async def answer(_):
        await asyncio.Event().wait()

    stub = Stub(answer)
    client = await connect(await listen(stub))
    await client.send(request("POST", "/a", b"x"))
    await wait_until(lambda: stub.asked)
    client.leave()
    await wait_until(lambda: stub.cancelled == 1)
    assert listen.listener.active == listen.listener.held_bytes == 0


async def test_a_client_that_leaves_while_it_sends_is_forgotten(listen, connect, wait_until, caplog):
    stub = Stub()
    client = await connect(await listen(stub))
    await client.send(b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nabc")
    await wait_until(lambda: listen.listener.held_bytes == 3)
    client.leave()
    await wait_until(lambda: listen.listener.active == 0)
    assert listen.listener.held_bytes == 0
    assert not stub.asked and not caplog.records


async def test_a_queued_job_of_a_client_that_leaves_leaves_the_queue(
    listen, connect, inline, wait_until, tmp_path
):
    await inline.load("gate")
    port = await listen(mms.protocol(inline.engine, Limits(), inference=True))
    gate = tmp_path / "open"
    running, queued = await connect(port), await connect(port)
    await running.send(request("POST", "/predictions/gate", str(gate).encode()))
    await wait_until(gate.with_suffix(".started").exists)
    await queued.send(request("POST", "/predictions/gate", b"second"))
    await wait_until(lambda: inline.engine.describe("gate").queue_depth == 1)
    queued.leave()
    await wait_until(lambda: inline.engine.describe("gate").queue_depth == 0)
    gate.touch()
    assert (await running.response()).status == 200


async def test_all_bodies_together_are_bounded(listen, connect, wait_until):
    leave = asyncio.Event()

    async def answer(asked):
        await leave.wait()
        return HttpResponse(200, (), [bytes(asked.body)])

    port = await listen(Stub(answer), max_bytes_in_flight=1500)
    first, second = await connect(port), await connect(port)
    await first.send(request("POST", "/a", bytes(1000)))
    await wait_until(lambda: listen.listener.held_bytes == 1000)
    refused = await second.ask("POST", "/a", bytes(501))
    assert (refused.status, refused.headers["x-code"]) == (503, "overloaded")
    leave.set()
    assert (await first.response()).status == 200
    assert (await second.ask("POST", "/a", bytes(501))).status == 200
    assert listen.listener.held_bytes == 0


async def test_a_defect_is_logged_once_and_answered_without_details(listen, connect, caplog):
    async def answer(_):
        raise KeyError("secret")

    client = await connect(await listen(Stub(answer)))
    for _ in range(2):
        answer = await client.ask("POST", "/a", b"x")
        assert (answer.status, answer.body) == (500, b"Internal server error.")
    assert [bool(record.exc_info) for record in caplog.records] == [True, True]


async def test_the_access_log(listen, connect, caplog):
    caplog.set_level(logging.INFO, "mms_lite.access")
    client = await connect(await listen(Stub()))
    await client.ask("POST", "/a?b=c", b"x")
    assert re.fullmatch(r'/127\.0\.0\.1:\d+ "POST /a\?b=c HTTP/1\.1" 200 \d+', caplog.messages[0])


async def test_stop_finishes_what_is_open_and_closes_what_is_idle(listen, connect, wait_until):
    leave = asyncio.Event()

    async def answer(asked):
        await leave.wait()
        return HttpResponse(200, (), [bytes(asked.body)])

    stub = Stub(answer)
    port = await listen(stub)
    idle, busy, sending = await connect(port), await connect(port), await connect(port)
    await busy.send(request("POST", "/a", b"busy"))
    await sending.send(b"POST /a HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\n\r\nse")
    await wait_until(lambda: listen.listener.active == 2)
    stopping = asyncio.create_task(listen.listener.stop(10))
    assert await idle.at_end()
    with pytest.raises(ConnectionError):
        await connect(port)
    await sending.send(b"nd")
    await wait_until(lambda: len(stub.asked) == 2)
    leave.set()
    for client, body in ((busy, b"busy"), (sending, b"send")):
        answer = await client.response()
        assert (answer.body, answer.headers["connection"]) == (body, "close")
        assert await client.at_end()
    await asyncio.wait_for(stopping, 2)


async def test_stop_gives_up_after_its_grace(listen, connect, wait_until):
    async def answer(_):
        await asyncio.Event().wait()

    stub = Stub(answer)
    client = await connect(await listen(stub))
    await client.send(request("POST", "/a", b"x"))
    await wait_until(lambda: stub.asked)
    await asyncio.wait_for(listen.listener.stop(0.05), 5)
    assert stub.cancelled == 1


async def test_a_unix_socket_whose_file_goes_with_the_server(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mms_lite.access")
    listener = HttpListener(Stub(), Limits())
    await listener.start_unix(str(tmp_path / "s"))
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    writer.write(request("POST", "/a", b"x", "Connection: close"))
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    await writer.wait_closed()
    assert re.fullmatch(r'/0\.0\.0\.0 "POST /a HTTP/1\.1" 200 \d+', caplog.messages[0])
    await listener.stop(1)
    assert not (tmp_path / "s").exists()


async def test_a_socket_file_that_another_server_has_put_there_stays(tmp_path):
    listener = HttpListener(Stub(), Limits())
    await listener.start_unix(str(tmp_path / "s"))
    (tmp_path / "s").unlink()
    (tmp_path / "s").touch()
    await listener.stop(1)
    assert (tmp_path / "s").exists()


ALLOWED = ("https://a.example", "GET, POST", "Content-Type")
LINES = {
    "access-control-allow-origin": "https://a.example",
    "access-control-allow-methods": "GET, POST",
    "access-control-allow-headers": "Content-Type",
}
PREFLIGHT = ("Origin: https://a.example", "Access-Control-Request-Method: POST")


async def test_cors_headers_are_on_every_answer(listen, connect):
    stub = Stub()
    client = await connect(await listen(stub, cors=Cors.of(*ALLOWED), max_request_size=10))
    for method, body, status in [("GET", b"", 200), ("OPTIONS", b"", 200), ("POST", bytes(11), 413)]:
        answer = await client.ask(method, "/a", body)
        assert answer.status == status
        assert LINES.items() <= answer.headers.items()
    await client.send(b"nonsense\r\n\r\n")
    refused = await client.response()
    assert refused.status == 400 and LINES.items() <= refused.headers.items()
    assert [asked.method for asked in stub.asked] == ["GET", "OPTIONS"]


async def test_a_handlers_own_cors_header_counts(listen, connect):
    async def answer(_):
        return HttpResponse(200, [("Access-Control-Allow-Origin", "https://b.example")])

    client = await connect(await listen(Stub(answer), cors=Cors.of(*ALLOWED)))
    await client.send(request("GET", "/"))
    head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
    assert head.lower().count("access-control-allow-origin:") == 1
    assert "Access-Control-Allow-Origin: https://b.example\r\n" in head
    assert "access-control-allow-methods: GET, POST\r\n" in head


async def test_a_preflight_is_answered_before_any_route(listen, connect):
    stub = Stub()
    client = await connect(await listen(stub, cors=Cors.of("*", None, None)))
    answer = await client.ask("OPTIONS", "/models/any/where", b"", *PREFLIGHT)
    assert (answer.status, answer.body, answer.headers["connection"]) == (200, b"", "keep-alive")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-methods" not in answer.headers
    assert not stub.asked


@pytest.mark.parametrize(
    ("cors", "method", "lines"),
    [
        (None, "OPTIONS", PREFLIGHT),
        (Cors.of(None, "POST", None), "OPTIONS", PREFLIGHT),
        (Cors.of("*", None, None), "OPTIONS", PREFLIGHT[:1]),
        (Cors.of("*", None, None), "OPTIONS", PREFLIGHT[1:]),
        (Cors.of("*", None, None), "POST", PREFLIGHT),
    ],
    ids=["cors off", "no origin allowed", "no method asked", "no origin", "no OPTIONS"],
)
async def test_what_is_no_preflight_reaches_the_protocol(listen, connect, cors, method, lines):
    stub = Stub()
    client = await connect(await listen(stub, cors=cors))
    assert (await client.ask(method, "/a", b"", *lines)).status == 200
    assert [asked.method for asked in stub.asked] == [method]


def test_cors_values_cannot_break_the_response():
    assert Cors.of(None, "", None) is None
    (sent,) = encode_response(
        "GET", HttpResponse(), "id-1", keep_alive=True, cors=Cors.of("*\r\nX: 1", None, None)
    )
    assert b"access-control-allow-origin: *  X: 1\r\n" in sent


async def test_refusals_are_spelt_by_the_protocol_and_connections_live_on(listen, connect, inline):
    await inline.load("echo")
    limits = Limits(max_request_size=1000)
    port = await listen(
        mms.protocol(inline.engine, limits, inference=True, management=lambda _: None), max_request_size=1000
    )
    client = await connect(port)
    kind = "Content-Type: multipart/form-data; boundary=XX"
    for target, body, status, name in [
        ("/predictions/echo", b"--XX\r\nbroken", 400, "BadRequestException"),
        ("/predictions/none", b"--XX--\r\n", 404, "ModelNotFoundException"),
        ("/predictions/echo", bytes(1001), 413, "RequestEntityTooLargeException"),
    ]:
        answer = await client.ask("POST", target, body, kind)
        assert (answer.status, answer.json["type"]) == (status, name)
        assert answer.headers["connection"] == "keep-alive"
    assert (await client.ask("POST", "/predictions/echo", b"hi")).body == b"hi"
    await client.send(b"nonsense\r\n\r\n")
    refused = {"code": 400, "type": "BadRequestException", "message": "Invalid HTTP message."}
    assert (await client.response()).json == refused


def test_a_handler_cannot_break_the_response():
    headers = [("a", "1\r\nInjected: 2"), ("b\r\nc", "3"), ("Content-Length", "7"), ("X-Request-Id", "mine")]
    response = HttpResponse(200, headers, [b"body"], "O\r\nK")
    (sent,) = encode_response("GET", response, "id-1", keep_alive=True)
    lines = sent.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 200 O  K"
    assert lines[1] == "a: 1  Injected: 2"
    assert lines[2] == "x-request-id: id-1"
    assert sum(line.lower().startswith("content-length") for line in lines) == 1


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_content_has_none(status):
    pieces = encode_response("GET", HttpResponse(status, (), [b"body"]), "id-1", keep_alive=True)
    assert b"Content-Length" not in pieces[0] and pieces[0].endswith(b"\r\n\r\n")
