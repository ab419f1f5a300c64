"""Messages in doubtful form: both ways in give the same answers and see the same requests, byte by byte."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_http import Stub, Wire

from mms_lite.frontends.head import read_head
from mms_lite.frontends.hot import HotConnections
from mms_lite.frontends.http import AnyConnections
from mms_lite.frontends.listener import HttpListener
from mms_lite.frontends.message import Limits

LIMITS = Limits(max_request_size=1000, linger_s=0)
HOST = b"Host: t\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: t\r\n\r\n"


@dataclass
class Seen:
    """What a way in answered, and what it took the messages for."""

    answers: list[bytes]
    statuses: list[int]
    requests: list[tuple[Any, ...]]
    closed: bool
    open: tuple[int, int]


async def seen(hot, *pieces):
    stub = Stub()
    listener = HttpListener(stub, LIMITS, access=lambda *_: None)
    every = AnyConnections(listener)
    wire = Wire((HotConnections(listener, every.take_over) if hot else every)())
    await wire.send(*pieces)
    answers = wire.answers()
    requests = [
        (each.method, each.raw_path, each.path, list(each.query), list(each.headers), bytes(each.body))
        for each in stub.asked
    ]
    counts = (listener.active, listener.held_bytes)
    found = Seen(answers, [int(answer[9:12]) for answer in answers], requests, wire.is_closing(), counts)
    wire.close()
    await wire.settle()
    return found


def post(*lines, body=b"", version=b"1.1"):
    head = b"".join(line + b"\r\n" for line in lines)
    return b"POST /a HTTP/" + version + b"\r\n" + HOST + head + b"\r\n" + body


TABLE = {
    "plain": (post(b"Content-Length: 5", body=b"12345"), [200]),
    "length and chunked": (
        post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        [400],
    ),
    "chunked and length": (
        post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n"),
        [400],
    ),
    "chunked, not last": (post(b"Transfer-Encoding: chunked, gzip", body=b"0\r\n\r\n"), [400]),
    "chunked twice": (
        post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        [400],
    ),
    "chunked in 1.0": (post(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n", version=b"1.0"), None),
    "chunk extension": (post(b"Transfer-Encoding: chunked", body=b"1;a=b\r\nx\r\n0\r\n\r\n"), [200]),
    "bare LF in a chunk": (post(b"Transfer-Encoding: chunked", body=b"1\nx\r\n0\r\n\r\n"), None),
    "two lengths": (post(b"Content-Length: 5", b"Content-Length: 6", body=b"123456"), [400]),
    "two equal lengths": (post(b"Content-Length: 5", b"Content-Length: 5", body=b"12345"), [400]),
    "two lengths in one": (post(b"Content-Length: 5, 5", body=b"12345"), [400]),
    "length with sign": (post(b"Content-Length: +5", body=b"12345"), [400]),
    "negative length": (post(b"Content-Length: -5", body=b"12345"), [400]),
    "length in hex": (post(b"Content-Length: 0x5", body=b"12345"), [400]),
    "length with underscore": (post(b"Content-Length: 1_0", body=b"1234567890"), [400]),
    "length with spaces": (post(b"Content-Length:  5 ", body=b"12345"), [200]),
    "length with leading zeros": (post(b"Content-Length: 005", body=b"12345"), [200]),
    "length without digits": (post(b"Content-Length: ", body=b""), [400]),
    "length beyond 64 bits": (post(b"Content-Length: 99999999999999999999", body=b"1"), [400]),
    "length beyond the limit": (post(b"Content-Length: 1001"), [413]),
    "space before colon": (post(b"Content-Length : 5", body=b"12345"), [400]),
    "tab before colon": (post(b"Content-Length\t: 5", body=b"12345"), [400]),
    "folded line": (post(b"X: a\r\n b"), [400]),
    "folded with tab": (post(b"X: a\r\n\tb"), [400]),
    "folded first line": (b"GET / HTTP/1.1\r\n Host: t\r\n\r\n", [400]),
    "bare LF": (b"GET / HTTP/1.1\nHost: t\n\n", [400]),
    "bare LF in the head": (post(b"X: a\nContent-Length: 5", body=b"12345"), [400]),
    "bare CR": (post(b"X: a\rContent-Length: 5", body=b"12345"), [400]),
    "NUL in a value": (post(b"X: a\0b"), [400]),
    "NUL in a name": (post(b"X\0: a"), [400]),
    "DEL in a value": (post(b"X: a\x7fb"), None),
    "bell in a value": (post(b"X: a\x07b"), [400]),
    "tab in a value": (post(b"X: a\tb"), [200]),
    "UTF-8 in a value": (post("X: é".encode()), [200]),
    "UTF-8 in a name": (post("é: x".encode()), [400]),
    "no name": (post(b": a"), [400]),
    "empty value": (post(b"X:", b"Y: b"), [200]),
    "no colon": (post(b"Xa"), [400]),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", [400]),
    "two hosts": (post(b"Host: u"), [400]),
    "two types": (post(b"Content-Type: a/b", b"Content-Type: c/d"), [400]),
    "old websocket": (post(b"Sec-WebSocket-Key1: x"), [400]),
    "upgrade": (post(b"Connection: Upgrade", b"Upgrade: websocket"), None),
    "HTTP/2 upgrade": (post(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"), None),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "HTTP/0.9": (b"GET /\r\n\r\n", None),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: t\r\n\r\n", [400]),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: t\r\n\r\n", None),
    "http in lower case": (b"GET / http/1.1\r\nHost: t\r\n\r\n", [400]),
    "method in lower case": (b"get / HTTP/1.1\r\nHost: t\r\n\r\n", [400]),
    "method unknown": (b"BREW / HTTP/1.1\r\nHost: t\r\n\r\n", [400]),
    "CONNECT": (b"CONNECT t:80 HTTP/1.1\r\nHost: t\r\n\r\n", None),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: t\r\n\r\n", [200]),
    "leading CR LF": (b"\r\n\r\nGET / HTTP/1.1\r\nHost: t\r\n\r\n", [200]),
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: t\r\n\r\n", None),
    "space in target": (b"GET /a b HTTP/1.1\r\nHost: t\r\n\r\n", [400]),
    "tab in target": (b"GET /a\tb HTTP/1.1\r\nHost: t\r\n\r\n", [400]),
    "target not ASCII": (b"GET /\xff HTTP/1.1\r\nHost: t\r\n\r\n", [400]),
    "absolute target": (b"GET http://u/b?c=d HTTP/1.1\r\nHost: t\r\n\r\n", [200]),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n", None),
    "two slashes": (b"GET //a/b HTTP/1.1\r\nHost: t\r\n\r\n", None),
    "fragment": (b"GET /a?b#c HTTP/1.1\r\nHost: t\r\n\r\n", None),
    "odd targets": (b'GET /a:b@[c]"<>\\^`{|}%zz? HTTP/1.1\r\nHost: t\r\n\r\n', None),
    "long target": (b"GET /" + b"a" * 4095 + b" HTTP/1.1\r\nHost: t\r\n\r\n", [200]),
    "longer target": (b"GET /" + b"a" * 4096 + b" HTTP/1.1\r\nHost: t\r\n\r\n", [400]),
    "long header": (post(b"X: " + b"a" * 8191), [200]),
    "longer header": (post(b"X: " + b"a" * 8193), [400]),
    "long name": (post(b"a" * 8193 + b": x"), [400]),
    "many headers": (post(*[b"X%d: y" % n for n in range(127)]), [200]),
    "more headers": (post(*[b"X%d: y" % n for n in range(128)]), [400]),
    "expectation": (post(b"Expect: 100-continue", b"Content-Length: 1", body=b"x"), None),
    "expectation in 1.0": (
        post(b"Expect: 100-continue", b"Content-Length: 1", body=b"x", version=b"1.0"),
        [200],
    ),
    "close": (post(b"Connection: close"), [200]),
    "close among others": (post(b"Connection: keep-alive, Close"), [200]),
    "1.0": (post(version=b"1.0"), [200]),
    "1.0 kept alive": (post(b"Connection: keep-alive", version=b"1.0"), [200, 200]),
    "1.0 without host": (b"GET / HTTP/1.0\r\n\r\n", [200]),
    "HEAD": (b"HEAD / HTTP/1.1\r\nHost: t\r\n\r\n", [200, 200]),
    "GET with a body": (b"GET / HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\n\r\nabc", [200, 200]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(30), [400]),
    "beginning of TLS": (b"\x16\x03\x01", [400]),
    "nonsense": (b"complete nonsense", [400]),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", [400]),
}


@pytest.mark.parametrize(("message", "statuses"), TABLE.values(), ids=TABLE)
async def test_both_ways_in_read_a_doubtful_message_alike(message, statuses):
    apart = await seen(False, message, NEXT)
    if statuses is not None:
        assert apart.statuses[: len(statuses)] == statuses
    assert apart.open == (0, 0)
    assert await seen(True, message, NEXT) == apart
    for cut in {1, len(message) // 3, len(message) - 3}:
        pieces = (message[:cut], message[cut:], NEXT)
        assert await seen(True, *pieces) == await seen(False, *pieces)


@pytest.mark.parametrize("message", [message for message, _ in TABLE.values()], ids=TABLE)
async def test_what_is_pipelined_around_a_doubtful_message_is_read_as_if_it_came_alone(message):
    """Where aiohttp reads a good message and a bad one at once, it loses the good one; only there it may."""
    alone = await seen(False, message, NEXT)
    followed = await seen(True, message + NEXT)
    assert followed in (alone, await seen(False, message + NEXT))
    behind = await seen(True, NEXT + NEXT + message + NEXT)
    assert behind.statuses[:2] == [200, 200]
    assert behind.requests[2:] == followed.requests
    assert behind.answers[2:] == followed.answers


LEFT_TO_THE_OTHER = [
    b"\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nX: a\rb\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nX: a\nb\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nX: a\r\n b\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nX: a \r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nX: a\tb\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nX: \xc3\xa9\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nX: a\r\nx: b\r\n\r\n",
    b"GET /a HTTP/1.1\r\nX: a\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nUpgrade: x\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nContent-Length: 9999999999999999\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: t\r\nContent-Length:\r\n\r\n",
    b"GET /a HTTP/2.0\r\nHost: t\r\n\r\n",
    b"GET /a\r\n\r\n",
    b"GET http://t/a HTTP/1.1\r\nHost: t\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n",
    b"TRACE /a HTTP/1.1\r\nHost: t\r\n\r\n",
]


@pytest.mark.parametrize("raw", LEFT_TO_THE_OTHER)
def test_a_head_that_is_not_plain_is_left_to_the_other_way_in(raw):
    assert read_head(raw, LIMITS) is None


def test_a_plain_head_is_read():
    raw = b"POST /a%20b?c=d HTTP/1.0\r\nconnection: Keep-Alive\r\nX-A:  thing\r\nContent-Length: 05\r\n\r\n"
    head = read_head(raw, LIMITS)
    assert (head.raw, head.method, head.version, head.target) == (raw, "POST", "HTTP/1.0", "/a%20b?c=d")
    assert (head.path, head.query, head.length, head.keep_alive) == ("/a b", [("c", "d")], 5, True)
    assert head.headers == (("connection", "Keep-Alive"), ("X-A", "thing"), ("Content-Length", "05"))


async def test_a_head_without_an_end_is_refused_at_the_limit():
    lines = [b"X%d: %s\r\n" % (n, b"a" * 1000) for n in range(200)]
    found = await seen(True, b"GET / HTTP/1.1\r\n", HOST, *lines)
    assert found.statuses == [400] and found.closed


LINES = [
    b"Content-Length: 5",
    b"Content-Length: 0",
    b"content-length:\t5",
    b"Content-Length: 5\t",
    b"Content-Length: 05",
    b"Content-Length: 5 5",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: identity",
    b"transfer-encoding:chunked ",
    b"Transfer-Encoding: \x0bchunked",
    b"Connection: close",
    b"Connection: keep-alive",
    b"Connection: close, keep-alive",
    b"Connection: upgrade",
    b"Proxy-Connection: close",
    b"Upgrade: websocket",
    b"Expect: 100-continue",
    b"Host: u",
    b"X-Empty:",
    b"X: a b  c",
    b"X: \xe9",
    b"X:y:z",
    b" X: folded",
    b"X : y",
    b"X\x00: y",
    b"Content_Length: 5",
]
messages = st.builds(
    lambda method, target, version, host, lines, ends, body: (
        b" ".join((method, target, version))
        + ends[0]
        + b"".join(line + ends[i % 4] for i, line in enumerate(host + lines))
        + ends[3]
        + body
    ),
    st.sampled_from(
        [b"GET", b"POST", b"HEAD", b"OPTIONS", b"DELETE", b"M-SEARCH", b"QUERY", b"post", b"PRI"]
    ),
    st.sampled_from([b"/", b"/a?b=c", b"//a", b"*", b"http://u/x", b"/%41%zz", b"/a#b", b"/\\", b"", b"a"]),
    st.sampled_from([b"HTTP/1.1"] * 4 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b""]),
    st.sampled_from([[HOST[:-2]]] * 4 + [[]]),
    st.lists(st.sampled_from(LINES), max_size=4),
    st.lists(st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b" \r\n"]), min_size=4, max_size=4),
    st.sampled_from([b"", b"12345", b"5\r\nabcde\r\n0\r\n\r\n", b"0\r\n\r\n", b"\r\n"]),
)


@st.composite
def mutated(draw):
    """A message, most often near a good one, and where its bytes are cut."""
    message = bytearray(draw(messages))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(message)))
        message[at : at + draw(st.integers(0, 1))] = draw(
            st.sampled_from(
                [b"", b" ", b"\t", b"\r", b"\n", b"\0", b":", b"\x80", b"\xff", b"A", b"0", b"\x7f"]
            )
        )
    return bytes(message), draw(st.integers(0, len(message)))


@settings(max_examples=300, deadline=None)
@given(mutated())
@example((b"POST /\n\r\nHost: t\r\n\r\n", 0))  # HTTP/0.9 ends without CR LF CR LF
async def test_both_ways_in_agree_on_any_message_and_on_where_the_next_begins(case):
    """Byte by byte exactly; in larger pieces aiohttp may lose a good message that a bad one follows."""
    message, cut = case
    pieces = [piece for piece in (message[:cut], message[cut:], NEXT) if piece]
    single = [bytes([byte]) for byte in message + NEXT]
    exact = await seen(False, *single)
    assert await seen(True, *single) == exact
    assert await seen(True, *pieces) in (exact, await seen(False, *pieces))
