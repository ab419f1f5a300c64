"""W6: what is read from h2load, the rate of a run that waits for its end, which answers are right."""

import socket
import threading
from array import array
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import client
import h2load
import identity
import protocols
import pytest
from protocols import PROTOCOLS, Answer, Door, WrongAnswerError

TENSOR = array("f", (number / 7 for number in range(3 * 224 * 224))).tobytes()
PRINTED = """
finished in 1.00s, 100.00 req/s, 1.00MB/s
requests: 100 total, 100 started, 100 done, {good} succeeded, 0 failed, 0 errored, 0 timeout
status codes: 100 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 1.00MB (1000000) total, 700B (700) headers (space savings 96.26%), 1.00MB ({received}) data
"""


def printed(good: int, received: int) -> str:
    return PRINTED.format(good=good, received=received)


class Reversed(BaseHTTPRequestHandler):
    """Answers with the body backwards; /chunked in chunks."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))[::-1]
        self.send_response(200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            half = len(body) // 2
            for part in (body[:half], body[half:], b""):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


class Target:
    """A server as the generator sees it."""

    headers: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, port: int, path: str) -> None:
        self.host, self.port, self.path = protocols.HOST, port, path

    def encode(self, body: bytes) -> bytes:
        return body


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer((protocols.HOST, 0), Reversed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_refusal_over_grpc_is_seen_by_the_bytes_that_are_missing() -> None:
    assert h2load.failed(printed(100, 100 * 605), 605) == 0
    assert h2load.failed(printed(100, 97 * 605), 605) == 3
    assert h2load.failed(printed(98, 97 * 605), 605) == 3
    assert h2load.failed(printed(100, 100 * 605 + 1), 605) == 1


def test_a_report_of_h2load_that_was_cut_is_no_report() -> None:
    with pytest.raises(ValueError, match="could not resolve"):
        h2load.failed("could not resolve host", 605)


def test_the_rate_does_not_count_the_end_when_connections_have_done_theirs() -> None:
    steady = [(each / 100, (each + 1) / 100) for each in range(90)]
    late = [(0.9, 0.9 + each) for each in range(1, 11)]

    found = identity.figures([*steady, *late])

    assert found["requests_per_s"] == pytest.approx(100)
    assert found["p50_ms"] == pytest.approx(10)
    assert found["max_ms"] == pytest.approx(10_000)


@pytest.mark.parametrize("path", ["/", "/chunked"])
def test_an_answer_of_another_length_than_the_right_one_is_no_good_answer(port: int, path: str) -> None:
    server = Target(port, path)

    right = client.run(server, TENSOR, client.Load(2, 30, requests=6, grace_s=30, answer_bytes=len(TENSOR)))
    wrong = client.run(server, TENSOR, client.Load(2, 30, requests=6, grace_s=30, answer_bytes=8))

    assert right.statuses() == {"200": 6}
    assert wrong.statuses() == {"garbled": 6}


@pytest.mark.parametrize("name", [name for name, protocol in PROTOCOLS.items() if not protocol.is_grpc])
def test_an_answer_that_is_another_tensor_is_wrong(port: int, name: str) -> None:
    with pytest.raises(WrongAnswerError):
        protocols.check(PROTOCOLS[name], Door(lambda: port), TENSOR)
    with pytest.raises(WrongAnswerError, match="echo"):
        protocols.check(PROTOCOLS[name], Door(lambda: port, echo=True), TENSOR)


def test_nobody_is_asked_who_does_not_listen() -> None:
    with socket.socket() as closed:
        closed.bind((protocols.HOST, 0))
        for protocol in PROTOCOLS.values():
            with pytest.raises(ConnectionRefusedError):
                protocols.check(protocol, Door(lambda: closed.getsockname()[1]), TENSOR)


def test_each_protocol_reads_the_tensor_of_its_own_answers() -> None:
    from mms_lite.protos import message

    v2 = message("inference.ModelInferResponse")(raw_output_contents=[TENSOR])
    v1 = message("tensorflow.serving.PredictResponse")()
    v1.outputs["OUT"].tensor_content = TENSOR
    head = b'{"outputs":[]}'
    length = {"inference-header-content-length": str(len(head))}
    numbers = PROTOCOLS["v2-rest-json"].request(TENSOR).replace(b"inputs", b"outputs")
    answers = {
        "v2-grpc": Answer(v2.SerializeToString()),
        "v1-grpc": Answer(v1.SerializeToString()),
        "v2-rest-binary": Answer(head + TENSOR, length),
        "v2-rest-json": Answer(numbers),
    }

    assert {
        name: PROTOCOLS[name].tensor(answer) == TENSOR for name, answer in answers.items()
    } == dict.fromkeys(PROTOCOLS, True)
