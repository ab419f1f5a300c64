"""The worker's side of the conversation, spoken to frame by frame over a socket pair."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mms_lite import wire
from mms_lite.errors import DeadlineExceeded, HandlerError, LoadError, OutOfMemory
from mms_lite.transport import (
    BlockingConnection,
    ConnectionClosed,
    ExitCode,
    Frame,
    FrameKind,
    Marks,
    encode,
)
from mms_lite.types import InferRequest, Tensor
from mms_lite.wire import Outcome
from mms_lite.worker import loop


class Server:
    """The server's end, with the worker's loop on a thread at the other."""

    def __init__(self) -> None:
        self.max_frame_bytes = 1 << 30
        ours, theirs = socket.socketpair()
        ours.settimeout(10)
        self._ours, self._theirs = ours, theirs
        self.connection = BlockingConnection(ours)
        self.marks = Marks(bytearray(Marks.SIZE))
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        self.code = loop.run(BlockingConnection(self._theirs, self.max_frame_bytes), self.marks)
        self._theirs.close()

    def load(self, path: Path, **settings: Any) -> dict[str, Any]:
        base = {
            "name": "m",
            "path": str(path),
            "handler": "service:handle",
            "batch_size": 4,
            "device": None,
            "manifest": None,
            "decode_input_request": True,
            "isolate_failures": True,
        }
        self.send(FrameKind.LOAD, 1, wire.encode_json({**base, **settings}))
        return wire.decode_json(self.hear(FrameKind.LOADED))

    def send(self, kind: FrameKind, number: int, meta: bytes = b"", buffers: Any = ()) -> None:
        self.connection.send(encode(kind, number, meta, list(buffers)))

    def cancel(self, *job_ids: int) -> None:
        self.send(FrameKind.CANCEL, 0, wire.encode_ids(job_ids))
        self.marks.count_cancel()

    def hear(self, kind: FrameKind) -> Frame:
        while (frame := self.connection.recv()).kind is FrameKind.METRICS:
            pass
        assert frame.kind is kind, f"heard {frame.kind.name}, not {kind.name}"
        return frame

    def hear_outcome(self) -> Outcome:
        return wire.decode_outcome(self.hear(FrameKind.OUTCOME))

    def hear_started(self) -> list[int]:
        return wire.decode_ids(self.hear(FrameKind.STARTED))

    def hear_lines(self) -> list[str]:
        frame = self.connection.recv()
        assert frame.kind is FrameKind.METRICS
        return wire.decode_lines(frame)

    def exit_code(self) -> int | None:
        self._thread.join(10)
        return self.code

    def close(self) -> None:
        self._ours.close()
        if self._thread.ident is not None:
            self._thread.join(10)
        self._theirs.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.close()


def batch(*bodies: bytes, first: int = 1, remaining_ms: int | None = None) -> tuple[bytes, Any]:
    """Return a BATCH frame's meta block and buffers; its jobs are numbered from `first`."""
    parts = []
    for number, body in enumerate(bodies, start=first):
        request = InferRequest(id=f"r{number}", model="m", inputs=[Tensor("body", "BYTES", (), body)])
        parts.append(wire.encode_item(number, remaining_ms, request))
    return wire.join_batch(parts)


def until(condition: Callable[[], bool]) -> None:
    """Wait until the worker's thread has come so far."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def text(outcome: Outcome) -> bytes:
    assert outcome.error is None
    return bytes(outcome.outputs[0].data)


def test_a_batch_is_answered_item_by_item(server: Server, store: Any) -> None:
    assert "error" not in server.load(store.add("echo"))
    server.send(FrameKind.BATCH, 5, *batch(b"a", b"b"))
    answers = [server.hear(FrameKind.OUTCOME) for _ in range(2)]
    assert [answer.conversation for answer in answers] == [5, 5]
    outcomes = [wire.decode_outcome(answer) for answer in answers]
    assert [(each.job_id, text(each), each.final) for each in outcomes] == [(1, b"a", True), (2, b"b", True)]


def test_a_worker_told_to_stop_leaves_with_code_zero(server: Server, store: Any) -> None:
    server.load(store.add("echo"))
    server.send(FrameKind.STOP, 0)
    assert server.exit_code() == ExitCode.STOPPED


def test_a_stop_behind_a_batch_comes_after_its_answers(server: Server, store: Any) -> None:
    server.load(store.add("echo"))
    server.send(FrameKind.BATCH, 5, *batch(b"a"))
    server.send(FrameKind.STOP, 0)
    assert text(server.hear_outcome()) == b"a"
    assert server.exit_code() == ExitCode.STOPPED


def test_a_server_that_is_gone_ends_the_worker(server: Server, store: Any) -> None:
    server.load(store.add("echo"))
    server.close()
    assert server.code == ExitCode.STOPPED


@pytest.mark.parametrize(
    ("handler", "kind", "code"),
    [("bad_init", LoadError, ExitCode.LOAD_FAILED), ("oom_at_load", OutOfMemory, ExitCode.OUT_OF_MEMORY)],
)
def test_a_failed_load_is_reported_before_the_worker_ends(
    server: Server, store: Any, handler: str, kind: type, code: int
) -> None:
    report = server.load(store.add(handler))
    assert report["error"]["code"] == kind.code
    assert server.exit_code() == code
    with pytest.raises(ConnectionClosed):
        server.connection.recv()


@pytest.mark.parametrize("first", [FrameKind.BATCH, FrameKind.STOP, FrameKind.RESULT])
def test_anything_before_load_is_a_protocol_error(server: Server, first: FrameKind) -> None:
    server.send(first, 0)
    assert server.exit_code() == ExitCode.PROTOCOL


@pytest.mark.parametrize(
    ("kind", "meta"),
    [(FrameKind.LOADED, b""), (FrameKind.BATCH, b"noise"), (FrameKind.CANCEL, b"noise")],
)
def test_nonsense_after_load_is_a_protocol_error(
    server: Server, store: Any, kind: FrameKind, meta: bytes
) -> None:
    server.load(store.add("echo"))
    server.send(kind, 0, meta)
    assert server.exit_code() == ExitCode.PROTOCOL


def test_a_batch_is_marked_as_begun_when_the_model_gets_it_and_not_before(
    server: Server, store: Any, tmp_path: Path
) -> None:
    server.load(store.add("gate"))
    gates = [tmp_path / "one", tmp_path / "two"]
    for number, gate in enumerate(gates, start=7):
        server.send(FrameKind.BATCH, number, *batch(str(gate).encode()))
    for number, gate in enumerate(gates, start=7):
        until(gate.with_suffix(".started").exists)
        assert server.marks.begun == number
        gate.touch()
        server.hear_outcome()


def test_the_answers_of_a_batch_have_left_before_the_next_one_begins(
    server: Server, store: Any, tmp_path: Path
) -> None:
    # What the next one does to this process must not take them along.
    server.load(store.add("gate"))
    gate = tmp_path / "gate"
    server.send(FrameKind.BATCH, 1, *batch(b"first"))  # its metrics leave at once, the next ones later
    server.hear_outcome()
    server.send(FrameKind.BATCH, 2, *batch(b"a", b"b"))
    server.send(FrameKind.BATCH, 3, *batch(str(gate).encode(), first=3))
    until(gate.with_suffix(".started").exists)
    assert [text(server.hear_outcome()) for _ in range(2)] == [b"a", b"b"]
    assert not gate.exists()
    gate.touch()
    assert server.hear_outcome().job_id == 3


def test_a_cancelled_job_of_a_batch_sent_ahead_never_runs_and_still_gets_its_outcome(
    server: Server, store: Any, tmp_path: Path
) -> None:
    server.load(store.add("gate"))
    gate, never = tmp_path / "gate", tmp_path / "never"
    server.send(FrameKind.BATCH, 1, *batch(str(gate).encode()))
    until(gate.with_suffix(".started").exists)
    server.send(FrameKind.BATCH, 2, *batch(str(never).encode(), b"stays", first=11))
    server.cancel(11)
    gate.touch()
    server.hear_outcome()
    cancelled = server.hear_outcome()
    assert (cancelled.job_id, cancelled.final) == (11, True) and cancelled.error is not None
    assert text(server.hear_outcome()) == b"stays"
    assert not never.with_suffix(".started").exists()


def test_each_of_several_cancels_is_seen_in_time(server: Server, store: Any, tmp_path: Path) -> None:
    server.load(store.add("gate"))
    gate = tmp_path / "gate"
    server.cancel(98)  # for a batch that was answered meanwhile
    server.send(FrameKind.BATCH, 1, *batch(str(gate).encode()))
    until(gate.with_suffix(".started").exists)
    server.send(FrameKind.BATCH, 2, *batch(b"a", b"b", b"c", b"d", first=11))
    for job_id in (11, 99, 13, 14):
        server.cancel(job_id)
    gate.touch()
    server.hear_outcome()
    ran = {each.job_id: each.error is None for each in [server.hear_outcome() for _ in range(4)]}
    assert ran == {11: False, 12: True, 13: False, 14: False}


def test_a_cancel_that_is_still_on_its_way_holds_nothing_up(server: Server, store: Any) -> None:
    server.load(store.add("echo"))
    server.marks.count_cancel()
    server.send(FrameKind.BATCH, 5, *batch(b"a"))
    assert text(server.hear_outcome()) == b"a"
    server.send(FrameKind.CANCEL, 0, wire.encode_ids([1]))
    server.send(FrameKind.BATCH, 6, *batch(b"b", first=2))
    assert text(server.hear_outcome()) == b"b"


def test_a_batch_whose_jobs_are_all_cancelled_or_late_is_not_begun(
    server: Server, store: Any, tmp_path: Path
) -> None:
    server.load(store.add("counts"))
    server.send(FrameKind.BATCH, 2, *batch(b"late", b"too", remaining_ms=0))
    assert [type(server.hear_outcome().error) for _ in range(2)] == [DeadlineExceeded] * 2
    assert server.marks.begun == 0
    server.send(FrameKind.BATCH, 3, *batch(b""))
    assert b'"batch": 1' in text(server.hear_outcome())
    assert server.marks.begun == 3


def test_any_number_of_cancels_to_an_idle_worker_does_no_harm(server: Server, store: Any) -> None:
    server.load(store.add("echo"))
    for _ in range(3000):
        server.cancel(99)
    server.send(FrameKind.BATCH, 5, *batch(b"a"))
    assert text(server.hear_outcome()) == b"a"


def test_in_a_failed_batch_each_item_runs_alone_with_a_start_of_its_own(server: Server, store: Any) -> None:
    server.load(store.add("poison"))
    server.send(FrameKind.BATCH, 5, *batch(b"a", b"poison", b"b"))
    for number in (1, 2, 3):
        assert server.hear_started() == [number]
        outcome = server.hear_outcome()
        assert outcome.job_id == number
        assert isinstance(outcome.error, HandlerError) is (number == 2)


def test_without_isolation_a_failed_batch_fails_whole(server: Server, store: Any) -> None:
    server.load(store.add("poison"), isolate_failures=False)
    server.send(FrameKind.BATCH, 5, *batch(b"a", b"poison"))
    assert [type(server.hear_outcome().error) for _ in range(2)] == [HandlerError, HandlerError]


def test_metrics_follow_the_answers(server: Server, store: Any) -> None:
    server.load(store.add("echo"))
    server.send(FrameKind.BATCH, 5, *batch(b"a"))
    server.hear_outcome()
    (line,) = server.hear_lines()
    assert line.startswith("PredictionTime.Milliseconds:")


def test_metrics_of_batches_that_follow_closely_come_by_themselves(server: Server, store: Any) -> None:
    server.load(store.add("echo"))
    for number in (1, 2, 3):
        server.send(FrameKind.BATCH, number, *batch(b"a"))
    lines: list[str] = []
    answers = 0
    while len(lines) < 3:  # and nothing more is sent
        frame = server.connection.recv()
        if frame.kind is FrameKind.METRICS:
            lines += wire.decode_lines(frame)
        else:
            answers += 1
    assert (len(lines), answers) == (3, 3)


def test_a_worker_told_to_stop_sends_the_metrics_it_has(server: Server, store: Any) -> None:
    server.load(store.add("echo"))
    for number in (1, 2, 3):
        server.send(FrameKind.BATCH, number, *batch(b"a"))
    server.send(FrameKind.STOP, 0)
    assert server.exit_code() == ExitCode.STOPPED
    lines: list[str] = []
    with pytest.raises(ConnectionClosed):
        while True:
            frame = server.connection.recv()
            lines += wire.decode_lines(frame) if frame.kind is FrameKind.METRICS else []
    assert len(lines) == 3


def test_a_call_to_another_model_waits_for_its_own_result_and_keeps_what_else_comes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server, marks = BlockingConnection(ours), Marks(bytearray(Marks.SIZE))
        worker = loop._Loop(BlockingConnection(theirs), marks)
        answers: list[Outcome] = []
        question = InferRequest(id="q", model="other", inputs=[], headers=[])
        thread = threading.Thread(target=lambda: answers.append(worker.call(question)))
        thread.start()
        call = server.recv()
        assert (call.kind, wire.decode_batch(call)[0].request) == (FrameKind.CALL, question)
        server.send(encode(FrameKind.STOP, 0))
        meta, buffers = wire.encode_outcome(Outcome(0, status=201))
        server.send(encode(FrameKind.RESULT, call.conversation, meta, buffers))
        thread.join(10)
        assert answers[0].status == 201
        assert worker._next().kind is FrameKind.STOP


@pytest.mark.parametrize("name", ["nul", "number"])
def test_an_output_whose_name_cannot_travel_fails_alone(server: Server, store: Any, name: str) -> None:
    server.load(store.add("odd_names"))
    parts = []
    for number, tensor in enumerate(("good", name, "good"), start=1):
        inputs = [Tensor(tensor, "UINT8", (1,), b"x")]
        parts.append(wire.encode_item(number, None, InferRequest(id=f"r{number}", model="m", inputs=inputs)))
    server.send(FrameKind.BATCH, 5, *wire.join_batch(parts))
    outcomes = [server.hear_outcome() for _ in parts]
    assert [(each.job_id, each.error is None) for each in outcomes] == [(1, True), (2, False), (3, True)]


@pytest.fixture
def narrow() -> Iterator[Server]:
    """A server whose worker may send frames of a thousand bytes."""
    server = Server()
    server.max_frame_bytes = 1000
    server.start()
    yield server
    server.close()


def handler(store: Any, source: str) -> Path:
    folder: Path = store.add("echo", "m")
    (folder / "service.py").write_text(source)
    return folder


def test_an_answer_over_the_limit_of_a_frame_is_an_error_of_its_own(narrow: Server, store: Any) -> None:
    source = "def handle(data, context):\n    return data and [bytes(int(d['body'])) for d in data]\n"
    narrow.load(handler(store, source))
    narrow.send(FrameKind.BATCH, 5, *batch(b"1", b"2000", b"850"))
    outcomes = [narrow.hear_outcome() for _ in range(3)]
    assert [each.job_id for each in outcomes] == [1, 2, 3]
    assert [len(outcomes[place].outputs[0].data) for place in (0, 2)] == [1, 850]
    error = outcomes[1].error
    assert isinstance(error, HandlerError)
    assert re.fullmatch(r"The answer takes 2103 bytes .*; max_frame_bytes is 1000\.", error.message)


def test_metrics_over_the_limit_of_a_frame_are_dropped(narrow: Server, store: Any) -> None:
    source = """
def handle(data, context):
    for number in range(int(data[0]["body"]) if data else 0):
        context.metrics.add_counter(f"m{number}", 1)
    return data and [b"fine"]
"""
    narrow.load(handler(store, source))
    narrow.send(FrameKind.BATCH, 1, *batch(b"50"))
    assert narrow.hear_outcome().error is None
    narrow.send(FrameKind.STOP, 0)
    assert narrow.exit_code() == ExitCode.STOPPED
    with pytest.raises(ConnectionClosed):  # and no METRICS frame before the end
        narrow.connection.recv()
