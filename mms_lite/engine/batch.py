"""A batch that a worker holds: how it is packed, its open jobs, and how its time is told."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mms_lite import wire
from mms_lite.engine.batcher import Job
from mms_lite.errors import InvalidRequest, RequestTooLarge, ServingError
from mms_lite.metrics import VersionMetrics
from mms_lite.shared import Arena
from mms_lite.transport import Buffer, frame_bytes

_GATHER_S = 0.25
_AHEAD_BELOW_S = 0.1  # a batch is sent ahead to workers whose batches take less: it waits there no longer
_MOMENT_S = 0.002  # work of this length may wait at a worker, in several batches
_MAX_AHEAD = 15
_LONG_S = 0.02  # a batch that keeps others waiting
_REMEMBER = 1 - 1 / 2048  # from one batch to the next

_log = logging.getLogger("mms_lite.engine")


@dataclass(slots=True)
class Batch:
    """The unanswered jobs of a batch, by id. Times are monotonic seconds."""

    jobs: dict[int, Job]
    enqueued_at: float  # of its first job
    rows: int = 0
    answered: int = 0  # of its rows
    turn_at: float = 0.0  # when no other batch was before it any more
    due: float = 0.0  # when it has taken too long; set when its turn comes

    def end(self, metrics: VersionMetrics) -> float:
        """Take note that a batch that was begun is over; return how long it took."""
        spent_s = time.monotonic() - self.turn_at
        metrics.end_batch(self.rows, spent_s, answered=self.answered)
        if _log.isEnabledFor(logging.DEBUG):
            waited_s = self.turn_at - self.enqueued_at
            _log.debug("Waiting time: %d, Backend time: %d", waited_s * 1000, spent_s * 1000)
        return spent_s


def pack(
    jobs: list[Job], arena: Arena | None, most_bytes: int
) -> tuple[Batch, list[tuple[bytes, Sequence[Buffer]]], list[Job]]:
    """Encode jobs for one BATCH frame of at most `most_bytes`; a job that cannot cross fails, alone.

    Return the batch, its parts of the frame, and the jobs that found no room in it.
    """
    batch, room = Batch({}, jobs[0].enqueued_at), most_bytes
    parts: list[tuple[bytes, Sequence[Buffer]]] = []
    for index, job in enumerate(jobs):
        try:
            if arena is not None:
                job.request = wire.share(job.request, arena)
            part = wire.encode_item(job.id, job.remaining_ms, job.request)
        except InvalidRequest as error:
            job.fail(InvalidRequest(error.message))  # a new one: that one's traceback holds all jobs
            continue
        except Exception:
            _log.exception("request %s cannot be sent to a worker", job.request.id)
            job.fail(ServingError("internal error"))
            continue
        size = frame_bytes(*part)
        if size > most_bytes:
            text = f"The request takes {size} bytes on its way to the model; max_frame_bytes is {most_bytes}."
            job.fail(RequestTooLarge(text))
            continue
        if size > room:
            return batch, parts, jobs[index:]
        room -= size
        parts.append(part)
        batch.jobs[job.id] = job
        batch.rows += job.size
    return batch, parts, []


class Pace:
    """How many batches may be sent ahead to a worker, by how long its batches have taken of late.

    A batch sent ahead is bound to its worker and waits there. So none is where batches are long, and one
    where they are short. Where they are shorter than the way to the worker and back, each pause between two
    costs more than what runs between: then as many as take a moment together.
    """

    __slots__ = ("_longest_s", "_mean_s", "ahead")

    def __init__(self) -> None:
        self.ahead = 0
        self._mean_s = _AHEAD_BELOW_S
        self._longest_s = 0.0

    def observe(self, spent_s: float, *, alone: bool) -> None:
        """Take note of a batch's time; `alone` says that no other worker could run what waits behind it."""
        self._mean_s += (spent_s - self._mean_s) / 8
        self._longest_s = max(spent_s, self._longest_s * _REMEMBER)
        if self._mean_s >= _MOMENT_S:
            self.ahead = 1 if self._mean_s < _AHEAD_BELOW_S else 0
        elif self._longest_s >= _LONG_S and not alone:
            self.ahead = 1
        else:
            self.ahead = min(_MAX_AHEAD, int(_MOMENT_S / max(self._mean_s, 1e-6)))


class BackendLog:
    """MMS's line for each batch of a worker, which people grep for.

    Gathered for a moment: a log record for every batch is a tenth of what a small request costs.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._lines: list[str] = []

    def add(self, spent_s: float) -> None:
        """Log how long a batch took, soon."""
        if not self._lines:
            if not _log.isEnabledFor(logging.INFO):
                return
            asyncio.get_running_loop().call_later(_GATHER_S, self._flush)
        self._lines.append(f"Backend response time: {int(spent_s * 1000)}")

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        _log.info(
            "%d batches of %s", len(lines), self._worker, extra={"lines": lines, "thread_name": self._worker}
        )
