"""The host's load as lines of mms_metrics.log, in the form of MMS.

Read on a thread of its own: the root file system may hang, and neither serving nor stopping waits for it.
Handlers have the same numbers in mms.metrics.system_metrics, which the server may not import.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from threading import Event, Thread

import psutil

from mms_lite.logs import METRICS

_FIRST_S = 0.1  # what the first line's CPU load is of
_MIB = 1 << 20
_GIB = 1 << 30

_log = logging.getLogger(__name__)
_metrics_log = logging.getLogger(METRICS)

Reading = Callable[[], Mapping[str, float]]


def cpu() -> dict[str, float]:
    """Return the CPU load since this thread last asked."""
    return {"CPUUtilization.Percent": psutil.cpu_percent()}


def disk() -> dict[str, float]:
    """Return how full the root file system is."""
    usage = psutil.disk_usage("/")
    return {
        "DiskAvailable.Gigabytes": usage.free / _GIB,
        "DiskUsage.Gigabytes": usage.used / _GIB,
        "DiskUtilization.Percent": usage.percent,
    }


def memory() -> dict[str, float]:
    """Return how full the memory is, of the whole machine even in a container."""
    usage = psutil.virtual_memory()
    return {
        "MemoryAvailable.Megabytes": usage.available / _MIB,
        "MemoryUsed.Megabytes": usage.used / _MIB,
        "MemoryUtilization.Percent": usage.percent,
    }


class HostMetrics:
    """Writes the host's load to the metrics log: at once, and then every `interval_s`."""

    def __init__(self, interval_s: float, *, readings: Iterable[Reading] = (cpu, disk, memory)) -> None:
        self._interval_s = interval_s
        self._readings = tuple(readings)
        self._closing = Event()

    def start(self) -> None:
        """Begin to write."""
        Thread(target=self._run, name="host-metrics", daemon=True).start()

    def close(self) -> None:
        """Write no more; does not wait for a reading that hangs."""
        self._closing.set()

    def _run(self) -> None:
        self._read()  # tells psutil from when on the CPU load counts
        tail = f"|#Level:Host|#hostname:{socket.gethostname()},timestamp:"
        wait_s = _FIRST_S
        while not self._closing.wait(wait_s):
            values = self._read()
            now_s = int(time.time())
            for name, value in values.items():
                _metrics_log.info("%s:%s%s%d", name, round(value, 3), tail, now_s)
            wait_s = self._interval_s

    def _read(self) -> dict[str, float]:
        """Return what can be read: a machine that hides one number still tells the others."""
        values: dict[str, float] = {}
        for reading in self._readings:
            try:
                values |= reading()
            except Exception as error:  # whatever psutil meets in a container's /proc
                _log.debug("a reading of the host's load failed: %s", error)
        return values
