"""The worker's conversation with the server: load, then batch after batch until told to stop.

Every job of a BATCH gets exactly one final OUTCOME, also one that was cancelled before it began.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mms_lite import wire
from mms_lite.errors import DeadlineExceeded, HandlerError, LoadError, OutOfMemory, ServingError
from mms_lite.transport import (
    BlockingConnection,
    Buffer,
    ConnectionClosed,
    ExitCode,
    Frame,
    FrameKind,
    Marks,
    ProtocolError,
    encode,
    frame_bytes,
)
from mms_lite.types import InferRequest
from mms_lite.wire import Item, Outcome
from mms_lite.worker import handler, samples

_METRICS_TOGETHER = 1000  # lines in one frame: it has a limit
_METRICS_EVERY_S = 0.25  # under load metric lines are gathered this long

Enter = Callable[[str, str, str | None], None]


def run(
    connection: BlockingConnection,
    marks: Marks,
    enter: Enter | None = None,
    shared: memoryview | None = None,
) -> int:
    """Serve one model over `connection` and return the process's exit code.

    `enter(path, handler, scratch)` makes the model's folder current, or that in which it may write; on a
    thread of the server it is None. `shared` is the memory in which large bodies are.
    """
    try:
        return _Loop(connection, marks, shared).run(enter)
    except ConnectionClosed:
        return ExitCode.STOPPED
    except ProtocolError as error:
        print(f"worker: {error}", file=sys.stderr)
        return ExitCode.PROTOCOL


class _Loop:
    def __init__(
        self, connection: BlockingConnection, marks: Marks, shared: memoryview | None = None
    ) -> None:
        self._connection = connection
        self._marks = marks
        self._shared = shared
        self._waiting: deque[Frame] = deque()
        self._cancelled: set[int] = set()
        self._cancels = 0  # CANCEL frames that were read
        self._conversations = itertools.count(1)
        self._hostname = socket.gethostname()
        self._batch = 0  # the conversation of the one that runs
        self._unanswered = 0  # of its jobs
        self._unsent: list[Buffer] = []  # its last answers, which leave in one system call
        self._lines: list[str] = []  # metrics
        self._lines_sent_at = 0.0

    def run(self, enter: Enter | None) -> int:
        frame = self._connection.recv()
        if frame.kind is not FrameKind.LOAD:
            raise ProtocolError(f"{frame.kind.name} before LOAD")
        settings = wire.decode_json(frame)
        try:
            model = self._load(settings, enter)
        except ServingError as error:
            self._connection.send(
                encode(FrameKind.LOADED, frame.conversation, wire.encode_json({"error": error.to_wire()}))
            )
            return ExitCode.OUT_OF_MEMORY if isinstance(error, OutOfMemory) else ExitCode.LOAD_FAILED
        said = wire.encode_signature(model.signature)
        loaded = wire.encode_json({"pid": os.getpid(), **said, "config": dict(model.completed_config)})
        self._connection.send(encode(FrameKind.LOADED, frame.conversation, loaded))
        while True:
            frame = self._next()
            if frame.kind is FrameKind.STOP:
                self._send_metrics()
                model.close()
                return ExitCode.STOPPED
            if frame.kind is not FrameKind.BATCH:
                raise ProtocolError(f"the server sent a {frame.kind.name} frame")
            self._run_batch(model, frame)

    def call(self, request: InferRequest) -> Outcome:
        """Ask another model of the server and wait for its answer; what else arrives meanwhile is kept.

        Raises:
            ConnectionClosed, ProtocolError: the server is gone or talks nonsense.
        """
        number = next(self._conversations)
        meta, buffers = wire.join_batch([wire.encode_item(0, None, request)])
        self._connection.send(encode(FrameKind.CALL, number, meta, buffers))
        while True:
            frame = self._connection.recv()
            if frame.kind is FrameKind.RESULT and frame.conversation == number:
                return wire.decode_outcome(frame)
            self._keep(frame)

    def _load(self, settings: dict[str, Any], enter: Enter | None) -> handler.MmsHandler:
        """Load the model.

        Raises:
            LoadError, OutOfMemory: with the last line of the traceback as message.
        """
        if enter is not None:
            logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
        try:
            if enter is not None:
                enter(settings["path"], settings["handler"], _scratch(settings))
            model = handler.load(settings)
            samples.run(model, settings["path"], settings["manifest"])
            return model
        except MemoryError as error:
            traceback.print_exc()
            raise OutOfMemory("the model ran out of memory while it loaded") from error
        except LoadError:
            raise
        except BaseException as error:
            lines = traceback.format_exception(error)
            sys.stderr.write("".join(lines))
            last = "".join(traceback.format_exception_only(error)).strip().splitlines()
            raise LoadError(last[-1] if last else type(error).__name__, traceback=lines) from error

    def _next(self) -> Frame:
        """Return the next frame to act on, having read every CANCEL that is already here."""
        while not self._waiting:
            self._keep(self._receive())
        while self._cancels < self._marks.cancels:
            frame = self._connection.poll()
            if frame is None:  # it is still on its way
                break
            self._keep(frame)
        return self._waiting.popleft()

    def _receive(self) -> Frame:
        """Wait for a frame; metrics do not wait much longer than they may."""
        if self._lines:
            frame = self._connection.recv_within(_METRICS_EVERY_S)
            if frame is not None:
                return frame
            self._send_metrics()
        return self._connection.recv()

    def _keep(self, frame: Frame) -> None:
        if frame.kind is FrameKind.CANCEL:
            self._cancels += 1
            self._cancelled.update(wire.decode_ids(frame))
        else:
            self._waiting.append(frame)

    def _run_batch(self, model: handler.MmsHandler, frame: Frame) -> None:
        self._batch = frame.conversation
        items = wire.decode_batch(frame, self._shared)
        self._unanswered = len(items)
        if self._cancelled or any(item.remaining_ms == 0 for item in items):
            items = self._wanted(items)
        if not self._waiting:  # a CANCEL can only be for a batch that is here
            self._cancelled.clear()
        if items:
            self._marks.begun = self._batch
            model.run(items, self._started, self._emit)
        self._flush()
        if items:  # what nobody waits for comes after the answers
            self._lines += model.metric_lines(time.time(), self._hostname)
            late = time.monotonic() - self._lines_sent_at > _METRICS_EVERY_S
            if late or len(self._lines) >= _METRICS_TOGETHER:
                self._send_metrics()

    def _wanted(self, items: list[Item]) -> list[Item]:
        """Return the items that somebody still waits for; the others have their answer."""
        wanted, skipped = [], []
        for item in items:
            if item.job_id in self._cancelled:
                skipped.append(Outcome(item.job_id, error=ServingError("cancelled before it began")))
            elif item.remaining_ms == 0:
                error = DeadlineExceeded("the request's deadline passed", by="client")
                skipped.append(Outcome(item.job_id, error=error))
            else:
                wanted.append(item)
        self._emit(skipped)
        return wanted

    def _started(self, job_ids: Iterable[int]) -> None:
        self._connection.send(encode(FrameKind.STARTED, self._batch, wire.encode_ids(job_ids)))

    def _emit(self, outcomes: Sequence[Outcome]) -> None:
        self._unanswered -= len(outcomes)
        limit = self._connection.max_frame_bytes
        for outcome in outcomes:
            try:
                meta, buffers = wire.encode_outcome_within(outcome, limit)
            except Exception:  # names that no frame can carry
                traceback.print_exc()
                error = HandlerError("Unsupported model output data type.")
                meta, buffers = wire.encode_outcome(Outcome(outcome.job_id, error=error))
            self._unsent += encode(FrameKind.OUTCOME, self._batch, meta, buffers)
        if self._unanswered:  # what runs next may end this process
            self._flush()

    def _send_metrics(self) -> None:
        if self._lines:
            meta = wire.encode_lines(self._lines)
            if frame_bytes(meta, ()) <= self._connection.max_frame_bytes:
                self._unsent += encode(FrameKind.METRICS, 0, meta)
            else:
                print(f"worker: {len(self._lines)} metrics of {len(meta)} bytes are dropped", file=sys.stderr)
            self._lines = []
        self._lines_sent_at = time.monotonic()
        self._flush()

    def _flush(self) -> None:
        if self._unsent:
            pieces, self._unsent = self._unsent, []
            self._connection.send(pieces)


def _scratch(settings: dict[str, Any]) -> str | None:
    """Return the folder in which this worker may write, for models that have one: each worker its own."""
    folder = settings.get("scratch")
    return os.path.join(folder, str(settings["instance"])) if folder else None
