"""What is counted while requests are served: plain numbers that one event loop writes, a microsecond each.

No format is known here: whoever shows the numbers takes a `Snapshot` and spells it (docs/metrics.md).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mms_lite.errors import ServingError
from mms_lite.types import ModelStatus

LATENCIES_S = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
ROWS = tuple(float(1 << power) for power in range(11))
_MOST_SIZES = 1024  # of batches that are told apart


class Histogram:
    """How often a value fell into each range.

    `counts[i]` is for values up to `bounds[i]` and above the bound before; the last, for those above all.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """Return a histogram of its own with the same counts."""
        twin = Histogram(self.bounds)
        twin.counts = self.counts.copy()
        twin.sum = self.sum
        return twin


def _latencies() -> Histogram:
    return Histogram(LATENCIES_S)


REASONS = ("queue_full", "model_not_ready", "no_workers", "deadline_exceeded")  # of refusals


@dataclass(slots=True)
class VersionMetrics:
    """What one version of a model has seen. `requests` is by protocol and the code that was sent.

    `batches` is by number of rows: how many were run of which something was answered, and in what time;
    `answered_rows` are the rows of all that was, and `answered_queue_s` is how long it had waited. `failed`
    counts jobs that ended in an error and `failed_s` how long they had taken; `last_batch_at` is wall-clock
    time.
    """

    requests: dict[tuple[str, str], int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    cancelled: int = 0
    restarts: int = 0
    failed: int = 0
    failed_s: float = 0.0
    last_batch_at: float = 0.0
    batches: dict[int, tuple[int, float]] = field(default_factory=dict)
    answered_rows: int = 0
    answered_queue_s: float = 0.0
    queue_s: Histogram = field(default_factory=_latencies)
    batch_wait_s: Histogram = field(default_factory=_latencies)
    inference_s: Histogram = field(default_factory=_latencies)
    total_s: Histogram = field(default_factory=_latencies)
    batch_rows: Histogram = field(default_factory=lambda: Histogram(ROWS))

    def count(self, protocol: str, code: str) -> None:
        """Count an answered request."""
        key = protocol, code
        self.requests[key] = self.requests.get(key, 0) + 1

    def end_batch(self, rows: int, spent_s: float, *, answered: int) -> None:
        """Take note of a batch that has run, and of how many of its rows were answered."""
        self.inference_s.observe(spent_s)
        self.batch_rows.observe(rows)
        self.last_batch_at = time.time()
        if not answered:
            return
        self.answered_rows += answered
        if rows not in self.batches and len(self.batches) >= _MOST_SIZES:
            rows = 1 << (rows - 1).bit_length()  # clients choose the sizes, and shall not fill the memory
        count, total_s = self.batches.get(rows, (0, 0.0))
        self.batches[rows] = count + 1, total_s + spent_s

    def end_job(self, spent_s: float, *, queued_s: float, failed: bool) -> None:
        """Take note of a job that is settled, `queued_s` of whose time it had waited for a worker."""
        self.total_s.observe(spent_s)
        if failed:
            self.failed += 1
            self.failed_s += spent_s
        else:
            self.answered_queue_s += queued_s

    def refuse(self, error: ServingError) -> None:
        """Count a request that no worker was given."""
        reason = "no_workers" if error.details.get("no_workers") else error.code
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def copy(self) -> VersionMetrics:
        """Return the numbers as they are now, for another thread."""
        return VersionMetrics(
            requests=self.requests.copy(),
            refusals=self.refusals.copy(),
            cancelled=self.cancelled,
            restarts=self.restarts,
            failed=self.failed,
            failed_s=self.failed_s,
            last_batch_at=self.last_batch_at,
            batches=self.batches.copy(),
            answered_rows=self.answered_rows,
            answered_queue_s=self.answered_queue_s,
            queue_s=self.queue_s.copy(),
            batch_wait_s=self.batch_wait_s.copy(),
            inference_s=self.inference_s.copy(),
            total_s=self.total_s.copy(),
            batch_rows=self.batch_rows.copy(),
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All numbers of one moment. `unknown` counts the requests that named no loaded version."""

    versions: Sequence[tuple[ModelStatus, VersionMetrics]]
    unknown: Mapping[tuple[str, str], int]
