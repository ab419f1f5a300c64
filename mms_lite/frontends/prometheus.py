"""The page that Prometheus scrapes: the engine's numbers in its text format, or as OpenMetrics.

The names and labels are here and in docs/metrics.md, and nowhere else.
"""

from __future__ import annotations

import asyncio
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.exposition import generate_latest as write_text
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as write_openmetrics
from prometheus_client.registry import Collector

import mms_lite
from mms_lite.engine.engine import Engine
from mms_lite.frontends.message import HttpRequest, HttpResponse
from mms_lite.metrics import Histogram, Snapshot, VersionMetrics
from mms_lite.types import ModelStatus, VersionState, WorkerState

_VERSION = ["model", "version"]
_STATES = (  # those of a worker that counts: one that is leaving is of the pool no more
    WorkerState.STARTING,
    WorkerState.READY,
    WorkerState.BUSY,
    WorkerState.BACKOFF,
    WorkerState.FAILED,
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[VersionMetrics], Histogram]], ...] = (
    (
        "mms_queue_seconds",
        "Time of a request in the queue, until a worker was given it.",
        lambda m: m.queue_s,
    ),
    ("mms_batch_wait_seconds", "Time that a batch waited to fill.", lambda m: m.batch_wait_s),
    ("mms_inference_seconds", "Time of a batch in the model.", lambda m: m.inference_s),
    ("mms_request_seconds", "Time of a request from the queue to its final answer.", lambda m: m.total_s),
    ("mms_batch_size", "Rows of a batch.", lambda m: m.batch_rows),
)


class Prometheus:
    """The route of the metrics, for a list of routes as `MmsProtocol` takes it.

    A page is made for one reader at a time, and given to all who ask within `reuse_s`: however many scrape,
    requests keep the processor.
    """

    def __init__(self, engine: Engine, *, reuse_s: float = 1.0) -> None:
        self._engine = engine
        self._reuse_s = reuse_s
        self._making = asyncio.Lock()
        self._pages: dict[bool, tuple[float, bytes]] = {}  # by whether it is OpenMetrics

    async def handle(self, request: HttpRequest, parts: list[str]) -> HttpResponse | None:
        """Answer a request whose path has these parts; None if it is not for the metrics."""
        if parts != ["metrics"]:
            return None
        if request.method not in ("GET", "HEAD"):
            headers = [("Allow", "GET, HEAD"), ("Content-Type", "text/plain; charset=utf-8")]
            return HttpResponse(405, headers, [b"The metrics can only be read.\n"])
        # Not prometheus_client's choose_encoder: it raises on a version that is no number.
        openmetrics = "application/openmetrics-text" in (request.header("accept") or "").lower()
        body = await self._page(openmetrics)
        content_type = CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE_PLAIN_0_0_4
        return HttpResponse(200, [("Content-Type", content_type)], [body])

    async def _page(self, openmetrics: bool) -> bytes:
        async with self._making:
            made_at, page = self._pages.get(openmetrics, (-math.inf, b""))
            if time.monotonic() - made_at >= self._reuse_s:
                collector = _Collector(self._engine.metrics())
                page = await asyncio.to_thread(write_openmetrics if openmetrics else write_text, collector)
                self._pages[openmetrics] = time.monotonic(), page
            return page


class _Collector(Collector):
    """What the writers of prometheus_client ask for metric families: one snapshot, and this process."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        build = {"version": mms_lite.__version__, "python": platform.python_version()}
        yield InfoMetricFamily("mms_build", "The server's version and its Python's.", build)
        yield from _counters(self._snapshot)
        yield from _gauges(self._snapshot)
        yield from _histograms(self._snapshot)
        yield from ProcessCollector(registry=None).collect()


def _counters(snapshot: Snapshot) -> Iterable[Metric]:
    requests = CounterMetricFamily(
        "mms_requests",
        "Answered requests, by the status that was sent.",
        labels=[*_VERSION, "protocol", "code"],
    )
    refusals = CounterMetricFamily(
        "mms_refusals", "Requests that no worker was given.", labels=[*_VERSION, "reason"]
    )
    cancelled = CounterMetricFamily(
        "mms_requests_cancelled", "Requests whose client left before the answer.", labels=_VERSION
    )
    restarts = CounterMetricFamily(
        "mms_worker_restarts", "Starts of a worker after its first.", labels=_VERSION
    )
    for (protocol, code), count in snapshot.unknown.items():
        requests.add_metric(["", "", protocol, code], count)
    for status, metrics in snapshot.versions:
        version = _labels(status)
        for (protocol, code), count in metrics.requests.items():
            requests.add_metric([*version, protocol, code], count)
        for reason, count in metrics.refusals.items():
            refusals.add_metric([*version, reason], count)
        cancelled.add_metric(version, metrics.cancelled)
        restarts.add_metric(version, metrics.restarts)
    return requests, refusals, cancelled, restarts


def _gauges(snapshot: Snapshot) -> Iterable[Metric]:
    depth = GaugeMetricFamily("mms_queue_depth", "Requests that wait for a worker.", labels=_VERSION)
    in_flight = GaugeMetricFamily("mms_requests_in_flight", "Requests that workers hold.", labels=_VERSION)
    ready = GaugeMetricFamily("mms_model_ready", "1 if the version takes requests, else 0.", labels=_VERSION)
    workers = GaugeMetricFamily("mms_workers", "Workers, by their state.", labels=[*_VERSION, "state"])
    memory = GaugeMetricFamily(
        "mms_worker_resident_memory_bytes", "Resident memory of a worker.", labels=[*_VERSION, "worker"]
    )
    for status, _ in snapshot.versions:
        version = _labels(status)
        depth.add_metric(version, status.queue_depth)
        in_flight.add_metric(version, status.in_flight)
        ready.add_metric(version, _takes_requests(status))
        for state in _STATES:
            count = sum(worker.state is state for worker in status.workers)
            workers.add_metric([*version, state.name.lower()], count)
        for worker in status.workers:
            if worker.memory_bytes:  # 0: not known, or no process just now
                memory.add_metric([*version, worker.id], worker.memory_bytes)
    return depth, in_flight, ready, workers, memory


def _histograms(snapshot: Snapshot) -> Iterator[Metric]:
    for name, text, of in _HISTOGRAMS:
        family = HistogramMetricFamily(name, text, labels=_VERSION)
        for status, metrics in snapshot.versions:
            histogram = of(metrics)
            bounds = [*map(str, histogram.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
            family.add_metric(_labels(status), buckets, histogram.sum)
        yield family


def _takes_requests(status: ModelStatus) -> bool:
    able = any(worker.state is not WorkerState.FAILED for worker in status.workers)
    return able and status.state is VersionState.READY


def _labels(status: ModelStatus) -> list[str]:
    return [status.spec.name, status.spec.version]
