"""A batch that a worker holds: its open jobs, and how its time is told."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from mms_lite.engine.batcher import Job
from mms_lite.metrics import VersionMetrics

_GATHER_S = 0.25

_log = logging.getLogger("mms_lite.engine")


@dataclass(slots=True)
class Batch:
    """The unanswered jobs of a batch, by id. Times are monotonic seconds."""

    jobs: dict[int, Job]
    enqueued_at: float  # of its first job
    rows: int = 0
    turn_at: float = 0.0  # when no other batch was before it any more
    due: float = 0.0  # when it has taken too long, on the loop's clock; set when its turn comes

    def end(self, metrics: VersionMetrics) -> float:
        """Take note that a batch that was begun is over; return how long it took."""
        spent_s = time.monotonic() - self.turn_at
        metrics.inference_s.observe(spent_s)
        metrics.batch_rows.observe(self.rows)
        if _log.isEnabledFor(logging.DEBUG):
            waited_s = self.turn_at - self.enqueued_at
            _log.debug("Waiting time: %d, Backend time: %d", waited_s * 1000, spent_s * 1000)
        return spent_s


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
