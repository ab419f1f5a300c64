"""The load generator against servers that answer in every way that HTTP knows, and in others."""

import socket
import time

import client
import pytest
from answering import BUSY, OK, Address, Script, Target, always, server
from client import ClosedLoop, Load, first_ok, quantile
from wire import CLOSED, CUT, GARBLED, REFUSED, UNANSWERED, AnswerReader

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)


def statuses(address: Address, load: Load) -> dict[int | str, int]:
    loop = ClosedLoop(address, REQUEST, load)
    loop.run()
    found: dict[int | str, int] = {}
    for outcome in loop.outcomes:
        assert outcome.answered >= outcome.sent > 0
        found[outcome.status] = found.get(outcome.status, 0) + 1
    return found


ANSWERS = {
    "length": (OK, True),
    "no body": (b"HTTP/1.1 204 No Content\r\n\r\n", True),
    "chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n\r\n\r\n\r\n1;a=b\r\nx\r\n0\r\n\r\n",
        True,
    ),
    "trailers": (b"HTTP/1.1 200 OK\r\nTRANSFER-ENCODING: Chunked\r\n\r\n0\r\nA: b\r\n\r\n", True),
    "continue first": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, True),
    "close": (b"HTTP/1.1 500 No\r\nConnection: Close\r\nContent-Length: 3\r\n\r\n\r\n\r", False),
    "old": (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
    "old but staying": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", True),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_ends_where_its_head_says_however_its_bytes_are_cut(name: str) -> None:
    answer, keeps = ANSWERS[name]
    whole, pieces = AnswerReader(), AnswerReader()
    assert whole.feed(answer)
    for end in range(1, len(answer)):
        assert not pieces.feed(answer[end - 1 : end]), answer[:end]
    assert pieces.feed(answer[-1:])
    assert (pieces.status, pieces.keep) == (whole.status, whole.keep)
    assert whole.keep == keeps
    whole.clear()
    assert whole.feed(OK)
    assert (whole.status, whole.keep) == (200, True)


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    reader = AnswerReader()
    assert not reader.feed(b"HTTP/1.1 200 OK\r\n\r\nsome")
    assert not reader.feed(b" more")
    assert reader.end()
    cut = AnswerReader()
    assert not cut.feed(OK[:-1])
    assert not cut.end()


@pytest.mark.parametrize("data", [b"220 mail.example.org\r\n\r\n", OK + b"x", b"HTTP/1.1 abc\r\n\r\n"])
def test_what_is_no_answer_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(ValueError):
        AnswerReader().feed(data)


def test_every_request_is_counted_once_over_connections_that_stay() -> None:
    with server(always(OK)) as address:
        assert statuses(address, Load(4, 30.0, requests=40, grace_s=30)) == {200: 40}


def test_a_connection_that_the_server_closes_is_opened_again() -> None:
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    with server(always(closing, stays=False)) as address:
        assert statuses(address, Load(3, 30.0, requests=12, grace_s=30)) == {200: 12}


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (lambda connection, _: False, CLOSED),
        (always(OK[:-1], stays=False), CLOSED),
        (always(b"what?\r\n\r\n"), GARBLED),
        (always(BUSY), 503),
    ],
)
def test_what_went_wrong_with_a_request_is_its_status(script: Script, status: int | str) -> None:
    with server(script) as address:
        assert statuses(address, Load(2, 30.0, requests=6, grace_s=30)) == {status: 6}


def test_a_port_on_which_nobody_listens_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
    assert statuses(address, Load(2, 30.0, requests=4, grace_s=30)) == {REFUSED: 4}


def test_requests_on_their_way_at_the_end_are_cut_off_or_unanswered() -> None:
    with server(lambda connection, _: True) as address:
        assert statuses(address, Load(3, 0.05)) == {CUT: 3}
        assert statuses(address, Load(3, 0.05, grace_s=0.05)) == {UNANSWERED: 3}


def test_a_request_beyond_its_patience_is_given_up_and_another_is_sent() -> None:
    with server(lambda connection, _: True) as address:
        assert statuses(address, Load(1, 30.0, requests=2, patience_s=0.01, grace_s=30)) == {UNANSWERED: 2}


def test_a_pause_follows_every_answer_but_200() -> None:
    def script(connection: socket.socket, number: int) -> bool:
        connection.sendall(BUSY if number <= 2 else OK)
        return True

    with server(script) as address:
        loop = ClosedLoop(address, REQUEST, Load(1, 30.0, requests=4, pause_ms=40, grace_s=30))
        loop.run()
    pauses = [
        later.sent - each.answered for each, later in zip(loop.outcomes, loop.outcomes[1:], strict=False)
    ]
    assert [each.status for each in loop.outcomes] == [503, 503, 200, 200]
    assert pauses[0] >= 0.04
    assert pauses[1] >= 0.04


def test_after_the_load_one_client_asks_until_it_is_served() -> None:
    refused: list[float] = []

    def script(connection: socket.socket, number: int) -> bool:
        connection.sendall(OK if len(refused) == 3 else BUSY)
        refused.append(time.monotonic())
        return True

    begin = time.monotonic()
    with server(script) as address:
        took_s = first_ok(address, REQUEST, 30.0)
    assert took_s is not None
    assert refused[3] - refused[0] <= took_s <= time.monotonic() - begin


def test_the_generators_process_reports_what_it_did() -> None:
    with server(always(OK)) as address:
        load = Load(2, 30.0, requests=10, grace_s=30, first_after_s=30)
        result = client.run(Target(*address), b"a photo", load)
    assert result.statuses() == {"200": 10}
    assert len(result.latencies_ms(200)) == 10
    assert result.first_after_s is not None
    assert result.began < result.ended <= time.monotonic()


def test_quantiles_are_values_that_were_measured() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(range(1, 1001), 0.999) == 999
    assert quantile([5.0], 0.99) == 5.0
    assert quantile([], 0.5) is None
