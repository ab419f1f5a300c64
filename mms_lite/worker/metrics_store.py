"""The metrics that a handler reports for one batch, and the text lines they become.

Hides the rules of MMS's metric log (units, dimensions, request ids). Apart from context.py because load,
batch and system metrics share it. Whatever a handler reports, a line is one line and its value a number.
"""

from __future__ import annotations

import logging
import math
import operator
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

MAX_METRICS = 10_000
_MAX_TEXT = 256
_UNIT_NAMES: dict[str | None, str] = {
    "ms": "Milliseconds",
    "s": "Seconds",
    "percent": "Percent",
    "count": "Count",
    "MB": "Megabytes",
    "GB": "Gigabytes",
    "kB": "Kilobytes",
    "B": "Bytes",
    None: "unit",
}
# Control characters, line separators, lone surrogates and the bar that ends a field.
_UNSAFE = "\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff|"
_UNSAFE_IN_VALUE = re.compile(f"[{_UNSAFE}]")
_UNSAFE_IN_NAME = re.compile(f"[{_UNSAFE}#,:]")

log = logging.getLogger(__name__)


def _text(value: object) -> str:
    try:
        return str(value)[:_MAX_TEXT]
    except ValueError:  # an int of thousands of digits
        return type(value).__name__


def _name_text(value: object) -> str:
    text = _text(value)
    return text if text.isalnum() else _UNSAFE_IN_NAME.sub("_", text)


def _value_text(value: object) -> str:
    """Return a number without an exponent (parsers of this log know none), anything else as one safe line."""
    number = None if isinstance(value, str) else _finite(value)
    if number is None:
        return _UNSAFE_IN_VALUE.sub("_", _text(value))
    text = repr(number)
    if "e" in text:
        from decimal import Decimal

        return format(Decimal(text), "f")
    return text


def _finite(value: object) -> int | float | None:
    """Return value as a finite int or float, or None. Takes numpy scalars and numeric text too."""
    if type(value) is float:  # nearly always
        return value if math.isfinite(value) else None
    try:
        whole = int(operator.index(value))  # type: ignore[arg-type]
        if abs(whole) < 1 << 63:
            return whole
    except (TypeError, ValueError, RuntimeError):
        pass
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of many elements
        return None
    return number if math.isfinite(number) else None


class Units:
    """The short unit names that handlers write, and the long ones that the log shows."""

    def __init__(self) -> None:
        self.units = dict(_UNIT_NAMES)


class Dimension:
    """A name and a value that qualify a metric."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value

    def __str__(self) -> str:
        return f"{_name_text(self.name)}:{_name_text(self.value)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the dimension as plain data."""
        return {"Name": self.name, "Value": self.value}


class Metric:
    """One reported value. `metric_method` "counter" adds on update, anything else replaces."""

    def __init__(
        self,
        name: str,
        value: Any,
        unit: str | None,
        dimensions: Sequence[Dimension],
        request_id: str | None = None,
        metric_method: str | None = None,
    ) -> None:
        self.name = name
        self.value = value
        self.unit = _UNIT_NAMES.get(unit, unit)
        self.dimensions = dimensions
        self.request_id = request_id
        self.metric_method = metric_method

    def update(self, value: Any) -> None:
        """Add value to a counter; replace the value of any other metric."""
        self.value = self.value + value if self.metric_method == "counter" else value

    def to_dict(self) -> dict[str, Any]:
        """Return the metric as plain data, stamped with the time (seconds since 1970) and the host."""
        return {
            "MetricName": self.name,
            "Value": self.value,
            "Unit": self.unit,
            "Dimensions": self.dimensions,
            "Timestamp": int(time.time()),
            "HostName": socket.gethostname(),
            "RequestId": self.request_id,
        }

    def line(self, now_s: float, hostname: str) -> str:
        """Return the line of the metrics file (MMS reference, section 10)."""
        ids = f",requestID:{self.request_id}" if self.request_id else ""
        return f"{self._head()}|#hostname:{hostname}{ids},timestamp:{int(now_s)}"

    def __str__(self) -> str:
        # The form that MMS's workers print after [METRICS]: a bare time stamp, request ids last.
        ids = f",{self.request_id}" if self.request_id else ""
        return f"{self._head()}|#hostname:{socket.gethostname()},{int(time.time())}{ids}"

    def _head(self) -> str:
        dimensions = ",".join([_UNSAFE_IN_VALUE.sub("_", str(each)) for each in self.dimensions])
        return f"{_name_text(self.name)}.{_name_text(self.unit)}:{_value_text(self.value)}|#{dimensions}"


class MetricsStore:
    """What `context.metrics` is: the metrics of one batch, in the order of their first report.

    Holds MAX_METRICS at most. A value that is not a finite number is left out; only `add_error` takes text.
    """

    def __init__(self, request_ids: Mapping[int, str] | str | None, model_name: str) -> None:
        self.store: list[Metric] = []
        self.cache: dict[tuple[str, ...], Metric] = {}
        self.request_ids = request_ids
        self.model_name = model_name
        self._unusable = 0
        self._over_limit = 0
        self._prediction_ms: float | None = None

    def add_prediction_time(self, ms: float) -> None:
        """Report how long the handler took; for the worker, after the call."""
        self._prediction_ms = ms

    def add_counter(
        self, name: str, value: Any, idx: int | None = None, dimensions: Sequence[Dimension] | None = None
    ) -> None:
        """Add value to the counter of this name, request and dimensions."""
        self._add(name, _finite(value), "count", self._ids(idx), dimensions, "counter")

    def add_time(
        self,
        name: str,
        value: Any,
        idx: int | None = None,
        unit: str = "ms",
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:
        """Report a duration in "ms" or "s".

        Raises: ValueError for another unit.
        """
        if unit not in ("ms", "s"):
            raise ValueError("the unit for a timed metric should be one of ['ms', 's']")
        self._add(name, _finite(value), unit, self._ids(idx), dimensions)

    def add_size(
        self,
        name: str,
        value: Any,
        idx: int | None = None,
        unit: str = "MB",
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:
        """Report a size in "MB", "kB", "GB" or "B".

        Raises: ValueError for another unit.
        """
        if unit not in ("MB", "kB", "GB", "B"):
            raise ValueError("The unit for size based metric is one of ['MB','kB', 'GB', 'B']")
        self._add(name, _finite(value), unit, self._ids(idx), dimensions)

    def add_percent(
        self, name: str, value: Any, idx: int | None = None, dimensions: Sequence[Dimension] | None = None
    ) -> None:
        """Report a percentage."""
        self._add(name, _finite(value), "percent", self._ids(idx), dimensions)

    def add_metric(
        self,
        name: str,
        value: Any,
        idx: int | None = None,
        unit: str | None = None,
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:
        """Report a value in any unit, or in none."""
        self._add(name, _finite(value), unit, self._ids(idx), dimensions)

    def add_error(self, name: str, value: Any, dimensions: Sequence[Dimension] | None = None) -> None:
        """Report an error as text. It belongs to the model, not to a request."""
        self._add(name, _value_text(value), "Error", None, dimensions, level="Error")

    def lines(self, now_s: float, hostname: str) -> list[str]:
        """Return one line per metric for the metrics file; `now_s` is wall-clock seconds.

        Warns, once, of what had to be left out.
        """
        if self._prediction_ms is not None:
            if not self.store and not self._unusable:  # the only one, nearly always: a third of the cost
                ids = self._ids(None)
                told = f",requestID:{ids}" if ids else ""
                head = f"PredictionTime.Milliseconds:{_value_text(self._prediction_ms)}"
                where = f"#ModelName:{_name_text(self.model_name)},Level:Model"
                return [f"{head}|{where}|#hostname:{hostname}{told},timestamp:{int(now_s)}"]
            self.add_time("PredictionTime", self._prediction_ms)
        metrics = [
            each for each in self.store if isinstance(each.value, str) or _finite(each.value) is not None
        ]
        unusable = self._unusable + len(self.store) - len(metrics)
        if unusable:
            log.warning("model %s: %d metric values were not finite numbers", self.model_name, unusable)
        if self._over_limit:
            log.warning(
                "model %s: %d metrics over the limit of %d in one batch were dropped",
                self.model_name,
                self._over_limit,
                MAX_METRICS,
            )
        self._unusable = self._over_limit = 0
        return [each.line(now_s, hostname) for each in metrics]

    def _ids(self, idx: int | None) -> str | None:
        """Return the id of one request, or all of the batch where idx names none of it."""
        ids = self.request_ids
        if isinstance(ids, Mapping):
            one = None if idx is None else ids.get(idx)
            return ",".join(ids.values()) if one is None else one
        return None if ids is None else str(ids)

    def _add(
        self,
        name: str,
        value: int | float | str | None,
        unit: str | None,
        request_id: str | None,
        dimensions: Sequence[Dimension] | None,
        method: str | None = None,
        level: str = "Model",
    ) -> None:
        if dimensions is not None and not isinstance(dimensions, (list, tuple)):
            raise ValueError("Please provide a list of dimensions")
        if value is None:
            self._unusable += 1
            return
        # A new list: the caller may hand us the same one for every metric.
        every = [*(dimensions or ()), Dimension("ModelName", self.model_name), Dimension("Level", level)]
        key = (str(name), str(unit), str(request_id), *map(str, every))
        known = self.cache.get(key)
        if known is not None:
            known.update(value)
        elif len(self.store) < MAX_METRICS:
            self.cache[key] = metric = Metric(name, value, unit, every, request_id, method)
            self.store.append(metric)
        else:
            self._over_limit += 1
