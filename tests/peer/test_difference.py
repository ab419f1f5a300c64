"""The comparison itself: what it finds, what it lets pass, and that its own tables are in order."""

import dataclasses
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import difference
import pytest
import report
import table
from difference import Finding, Intended
from exchange import Answer, Sent, exchange

DOCS = Path(__file__).resolve().parents[2] / "docs"
ID = "0f6f2c0e-6f0b-4b0a-9d37-5f0a1c2b3d4e"
OTHER_ID = "1a6f2c0e-6f0b-4b0a-9d37-5f0a1c2b3d4e"
ANSWER = Answer(
    404,
    "Not Found",
    "HTTP/1.1",
    (("content-type", "application/json"), ("x-request-id", ID), ("Pragma", "no-cache")),
    b'{\n  "code": 404,\n  "message": "no",\n  "seen": ["0"]\n}\n',
    "kept",
)


def changed(**fields: Any) -> Answer:
    return dataclasses.replace(ANSWER, **fields)


def found(other: Answer) -> dict[str, tuple[str, str]]:
    return {each.facet: (each.mms, each.ours) for each in difference.compare("a-case", [ANSWER], [other])}


def entry(**fields: Any) -> Intended:
    defaults: dict[str, Any] = {"reference": "section 1", "rows": "", "because": "it is better"}
    return Intended(**{"id": "an-entry", "cases": ("a-*",), **defaults, **fields})


def test_what_no_two_servers_say_alike_is_no_difference() -> None:
    headers = (("Content-Type", "application/json"), ("X-Request-Id", OTHER_ID), ("pragma", "no-cache"))

    assert found(changed(headers=headers)) == {}


@pytest.mark.parametrize(
    ("fields", "facets"),
    [
        ({"status": 400}, {"status": ("404", "400")}),
        ({"reason": ""}, {"reason": ("Not Found", "none")}),
        ({"version": "HTTP/1.0"}, {"version": ("HTTP/1.1", "HTTP/1.0")}),
        ({"ending": "reset"}, {"ending": ("kept", "reset")}),
        ({"interim": (100,)}, {"interim": ("none", "100")}),
        ({"headers": (*ANSWER.headers[:2], ("Pragma", "x"))}, {"header:pragma": ("no-cache", "x")}),
        ({"headers": (*ANSWER.headers, ("X-More", "1"))}, {"header:x-more": ("none", "1")}),
        ({"headers": (("content-type", "text/html"), *ANSWER.headers[1:])}, {"content-type": None}),
        (
            {"headers": (ANSWER.headers[0], ("x-request-id", "7"), ANSWER.headers[2])},
            {"header:x-request-id": None},
        ),
        ({"body": ANSWER.body.replace(b'"no"', b'"yes"')}, {"body": ("message=no", "message=yes")}),
        ({"body": ANSWER.body.replace(b'"0"', b"0")}, {"shape": ("seen[0]:str", "seen[0]:int")}),
        ({"body": ANSWER.body.replace(b"message", b"words")}, {"shape": ("message:str", "words:str")}),
        ({"body": ANSWER.body.replace(b"\n", b"")}, {"layout": None}),
        ({"body": b"no JSON"}, {"body": None}),
        ({"body": b""}, {"body": None}),
    ],
)
def test_a_planted_difference_is_found_and_nothing_else(
    fields: dict[str, Any], facets: dict[str, object]
) -> None:
    differences = found(changed(**fields))

    assert set(differences) == set(facets)
    for facet, values in facets.items():
        assert values is None or differences[facet] == values


def test_no_answer_at_all_is_a_difference() -> None:
    assert found(Answer(ending="no answer in time"))["status"] == ("404", "no answer in time")


def test_the_order_of_parallel_answers_means_nothing() -> None:
    other = changed(status=200)

    assert difference.compare("a-case", [ANSWER, other], [other, ANSWER]) == []
    assert difference.compare("a-case", [ANSWER, other], [other, other]) != []


def test_a_difference_that_is_not_listed_fails() -> None:
    finding = Finding("a-case", "status", "404", "400")
    listed = Finding("a-case", "status", "500", "400")

    verdict = difference.judge([finding, listed], [entry(facets={"status": ("500 -> 400",)})])

    assert verdict.unlisted == [finding]
    assert verdict.intended == {listed: "an-entry"}
    assert not verdict.holds


@pytest.mark.parametrize(
    "finding",
    [
        Finding("b-case", "status", "500", "400"),
        Finding("a-case", "body", "500", "400"),
        Finding("a-case", "status", "501", "400"),
        Finding("a-case", "status", "500", "401"),
    ],
)
def test_an_entry_allows_its_own_cases_facets_and_values_only(finding: Finding) -> None:
    assert difference.judge([finding], [entry(facets={"status": ("500 -> 400",)})]).unlisted == [finding]


@pytest.mark.parametrize(
    ("fields", "unused"),
    [
        ({"facets": {"status": ("500 -> 400",)}}, []),
        ({"facets": {"status": ("500 -> 400", "500 -> 401")}}, ["an-entry: status '500 -> 401'"]),
        ({"facets": {"status": ("500 -> 400",), "body": ("* -> *",)}}, ["an-entry: body '* -> *'"]),
        ({"cases": ("a-*", "b-*"), "facets": {"status": ("500 -> 400",)}}, ["an-entry: cases 'b-*'"]),
    ],
)
def test_a_part_of_the_whitelist_that_nothing_needs_fails(fields: dict[str, Any], unused: list[str]) -> None:
    verdict = difference.judge([Finding("a-case", "status", "500", "400")], [entry(**fields)])

    assert verdict.unused == unused
    assert verdict.holds == (not unused)


def test_what_the_peer_does_sometimes_may_be_unused() -> None:
    assert difference.judge([], [entry(facets={"status": ("500 -> 400",)}, sometimes=True)]).holds


def test_a_whitelist_that_is_too_long_is_refused(tmp_path: Path) -> None:
    row = '[[difference]]\nid = "%d"\ncases = []\nfacets = {}\nbecause = ""\nreference = ""\nrows = ""\n'
    path = tmp_path / "whitelist.toml"
    path.write_text("".join(row % number for number in range(difference.MAX_ENTRIES + 1)))

    with pytest.raises(ValueError, match="41 entries"):
        difference.read(path)


def test_every_intended_difference_says_why_and_where() -> None:
    page = (DOCS / "mms-compatibility.md").read_text(encoding="utf-8")
    for each in difference.read():
        assert each.because, each.id
        assert all(f"| {row} |" in page for row in each.rows.split(", ")), each.id


def test_the_cases_are_many_and_reach_all_ports() -> None:
    cases = table.read()

    assert sum(case.requests for case in cases) >= 150
    assert {case.port for case in cases} == {"inference", "management", "merged"}
    assert all(case.bytes({"<files>": "http://x", "<closed>": "http://y"}).head for case in cases)


def test_bodies_are_bytes_and_repeats_are_written_out() -> None:
    case = table.Case(id="a", group="g", send="POST /p<3>", headers=("X-A: <2>",), body="\u00ff\u0000")

    sent = case.bytes({})

    assert sent.head == b"POST /pxxx HTTP/1.1\r\nHost: test\r\nX-A: xx\r\nContent-Length: 2\r\n\r\n"
    assert sent.body == b"\xff\x00"


def test_the_report_names_what_differs() -> None:
    case = table.Case(id="a-case", group="g", send="GET /a|b")
    findings = [Finding("a-case", "status", "404", "500"), Finding("a-case", "body", "x", "y")]
    whitelist = [entry(facets={"body": ("x -> y",)})]
    compared = [report.Compared(case, [ANSWER], [changed(status=500)], findings)]
    verdict = difference.judge(findings, whitelist)

    page = report.page(compared, verdict, whitelist, "a Java")

    assert "| a-case | `GET /a\\|b` | 404 | 500 | intended: an-entry; **differs**: status |" in page
    assert "1 requests in 1 cases" in report.summary(compared, verdict)
    assert "    status: 404  ->  500" in report.summary(compared, verdict)


@contextmanager
def answering(talk: Callable[[socket.socket], object]) -> Iterator[tuple[str, int]]:
    """Serve one connection with `talk`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(5)
                connection.recv(1 << 16)
                talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()
        thread.join()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def keep(connection: socket.socket) -> None:
    connection.sendall(OK)
    connection.recv(1 << 16)
    connection.sendall(OK)


def reset(connection: socket.socket) -> None:
    connection.sendall(OK)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize(
    ("talk", "expected"),
    [
        (keep, Answer(200, "OK", "HTTP/1.1", (("Content-Length", "2"),), b"ok", "kept")),
        (reset, Answer(200, "OK", "HTTP/1.1", (("Content-Length", "2"),), b"ok", "reset")),
        (
            lambda each: each.sendall(OK),
            Answer(200, "OK", "HTTP/1.1", (("Content-Length", "2"),), b"ok", "closed"),
        ),
        (lambda each: None, Answer(ending="closed without an answer")),
        (lambda each: each.sendall(b"SSH-2.0\r\n\r\n"), Answer(ending="no HTTP answer")),
        (
            lambda each: each.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + OK),
            Answer(200, "OK", "HTTP/1.1", (("Content-Length", "2"),), b"ok", "closed", (100,)),
        ),
    ],
    ids=["kept", "reset", "closed", "nothing", "no http", "interim"],
)
def test_an_exchange_tells_how_the_connection_ends(
    talk: Callable[[socket.socket], object], expected: Answer
) -> None:
    with answering(talk) as address:
        assert exchange(address, Sent(b"GET / HTTP/1.1\r\n\r\n"), 5.0) == expected


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    with answering(lambda each: each.recv(1 << 16)) as address:
        assert exchange(address, Sent(b"GET / HTTP/1.1\r\n\r\n"), 0.05).ending == "no answer in time"
