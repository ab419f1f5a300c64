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
from mms_lite.errors import DeadlineExceeded, LoadError, OutOfMemory, ServingError
from mms_lite.transport import (
    BlockingConnection,
    Buffer,
    ConnectionClosed,
    ExitCode,
    Frame,
    FrameKind,
    ProtocolError,
    encode,
)
from mms_lite.types import InferRequest
from mms_lite.wire import Item, Outcome
from mms_lite.worker import handler, samples

_METRICS_EVERY_S = 0.25  # under load metric lines are gathered this long

Enter = Callable[[str, str], None]


def run(connection: BlockingConnection, enter: Enter | None = None) -> int:
    """Serve one model over `connection` and return the process's exit code.

    `enter(path, handler)` makes the model's folder current; on a thread of the server it is None.
    """
    try:
        return _Loop(connection).run(enter)
    except ConnectionClosed:
        return ExitCode.STOPPED
    except ProtocolError as error:
        print(f"worker: {error}", file=sys.stderr)
        return ExitCode.PROTOCOL


class _Loop:
    def __init__(self, connection: BlockingConnection) -> None:
        self._connection = connection
        self._waiting: deque[Frame] = deque()
        self._cancelled: set[int] = set()
        self._conversations = itertools.count(1)
        self._hostname = socket.gethostname()
        self._unsent: list[Buffer] = []  # answers that leave with the next frame, in one system call
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
        loaded = {"pid": os.getpid(), **wire.encode_signature(model.signature)}
        self._connection.send(encode(FrameKind.LOADED, frame.conversation, wire.encode_json(loaded)))
        while True:
            frame = self._next()
            if frame.kind is FrameKind.STOP:
                self._send_metrics()
                self._flush()
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
        meta, buffers = wire.join_batch([wire.encode_item(Item(0, None, request))])
        self._flush()
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
                enter(settings["path"], settings["handler"])
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
        while (frame := self._connection.poll()) is not None:
            self._keep(frame)
        while not self._waiting:
            self._send_metrics()
            self._flush()
            self._keep(self._connection.recv())
        return self._waiting.popleft()

    def _send_metrics(self) -> None:
        if self._lines:
            self._unsent += encode(FrameKind.METRICS, 0, wire.encode_json({"lines": self._lines}))
            self._lines = []
            self._lines_sent_at = time.monotonic()

    def _flush(self) -> None:
        if self._unsent:
            pieces, self._unsent = self._unsent, []
            self._connection.send(pieces)

    def _keep(self, frame: Frame) -> None:
        if frame.kind is FrameKind.CANCEL:
            self._cancelled.update(wire.decode_ids(frame))
        else:
            self._waiting.append(frame)

    def _run_batch(self, model: handler.MmsHandler, frame: Frame) -> None:
        number = frame.conversation
        items, skipped = [], []
        for item in wire.decode_batch(frame):
            if item.job_id in self._cancelled:
                skipped.append(Outcome(item.job_id, error=ServingError("cancelled before it began")))
            elif item.remaining_ms == 0:
                error = DeadlineExceeded("the request's deadline passed", by="client")
                skipped.append(Outcome(item.job_id, error=error))
            else:
                items.append(item)
        if not self._waiting:  # a CANCEL can only be for a batch that is here
            self._cancelled.clear()

        def started(job_ids: Iterable[int]) -> None:
            self._unsent += encode(FrameKind.STARTED, number, wire.encode_ids(job_ids))
            self._flush()

        unanswered = len(items) + len(skipped)

        def emit(outcomes: Sequence[Outcome]) -> None:
            nonlocal unanswered
            unanswered -= len(outcomes)
            for outcome in outcomes:
                self._unsent += encode(FrameKind.OUTCOME, number, *wire.encode_outcome(outcome))
            if unanswered:  # what runs next may end this process; only the last answers wait for company
                self._flush()

        if skipped:
            emit(skipped)
        if items:
            started(item.job_id for item in items)
            model.run(items, started, emit)
            self._lines += model.metric_lines(time.time(), self._hostname)
            if time.monotonic() - self._lines_sent_at > _METRICS_EVERY_S:
                self._send_metrics()
