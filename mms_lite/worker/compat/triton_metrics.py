"""Metrics of a model's own, as the Triton Python backend offers them (README, "Custom Metrics").

They count, and the model can read them; the server's metrics do not have them yet, which the log says.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

COUNTER, GAUGE, HISTOGRAM = range(3)

_log = logging.getLogger("mms_lite.model")


class MetricFamily:
    """Metrics of one name and kind, which differ in their labels."""

    COUNTER, GAUGE, HISTOGRAM = COUNTER, GAUGE, HISTOGRAM

    def __init__(self, name: str, description: str, kind: int) -> None:
        if kind not in (COUNTER, GAUGE, HISTOGRAM):
            raise ValueError(f"the metric {name} is neither a counter, a gauge nor a histogram: {kind!r}")
        self.name = name
        self.description = description
        self.kind = kind
        _log.info("The metric %s is for the model alone: the server does not show it yet", name)

    def Metric(
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """Return the metric with these labels; `buckets` are the upper bounds of a histogram's, ascending."""
        if (buckets is not None) != (self.kind == HISTOGRAM):
            raise ValueError(f"buckets are for histograms, which need them: {self.name}")
        return Metric(self.kind, dict(labels or {}), list(buckets or ()))


class Metric:
    """A number that a model counts, sets or observes."""

    def __init__(self, kind: int, labels: dict[str, str], buckets: list[float]) -> None:
        self.labels = labels
        self._kind = kind
        self._value = 0.0
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)

    def increment(self, value: float) -> None:
        """Add to a counter, which only grows, or to a gauge.

        Raises:
            ValueError: the metric is a histogram, or a counter would become less.
        """
        if self._kind == HISTOGRAM or (self._kind == COUNTER and value < 0):
            raise ValueError(f"this metric cannot be incremented by {value}")
        self._value += value

    def set(self, value: float) -> None:
        """Set a gauge.

        Raises:
            ValueError: the metric is none.
        """
        if self._kind != GAUGE:
            raise ValueError("only a gauge can be set")
        self._value = value

    def observe(self, value: float) -> None:
        """Take a value into a histogram.

        Raises:
            ValueError: the metric is none.
        """
        if self._kind != HISTOGRAM:
            raise ValueError("only a histogram observes values")
        self._counts[bisect.bisect_left(self._buckets, value)] += 1
        self._value += value

    def value(self) -> Any:
        """Return a counter's or a gauge's number, or for a histogram how many values lie below each bound.

        A histogram's list ends with the number of all values.
        """
        return list(itertools.accumulate(self._counts)) if self._kind == HISTOGRAM else self._value
