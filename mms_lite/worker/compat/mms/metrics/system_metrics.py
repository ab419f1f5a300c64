"""mms.metrics.system_metrics: the host's load as metrics. psutil is imported when a function is called."""

import logging

from mms_lite.worker.metrics_store import Dimension, Metric

_MIB = 1 << 20
_GIB = 1 << 30


def cpu_utilization() -> Metric:
    """Return CPUUtilization over a tenth of a second (psutil without an interval first says 0)."""
    import psutil

    return _host("CPUUtilization", psutil.cpu_percent(interval=0.1), "percent")


def memory_used() -> Metric:
    """Return MemoryUsed in megabytes."""
    import psutil

    return _host("MemoryUsed", psutil.virtual_memory().used / _MIB, "MB")


def memory_available() -> Metric:
    """Return MemoryAvailable in megabytes."""
    import psutil

    return _host("MemoryAvailable", psutil.virtual_memory().available / _MIB, "MB")


def memory_utilization() -> Metric:
    """Return MemoryUtilization in percent."""
    import psutil

    return _host("MemoryUtilization", psutil.virtual_memory().percent, "percent")


def disk_used() -> Metric:
    """Return DiskUsage of the root file system in gigabytes."""
    import psutil

    return _host("DiskUsage", psutil.disk_usage("/").used / _GIB, "GB")


def disk_utilization() -> Metric:
    """Return DiskUtilization of the root file system in percent."""
    import psutil

    return _host("DiskUtilization", psutil.disk_usage("/").percent, "percent")


def disk_available() -> Metric:
    """Return DiskAvailable of the root file system in gigabytes."""
    import psutil

    return _host("DiskAvailable", psutil.disk_usage("/").free / _GIB, "GB")


def collect_all(mod: object = None) -> list[Metric]:
    """Log and return all seven, in the alphabetical order of their functions. `mod` is MMS's and not used."""
    metrics = [
        cpu_utilization(),
        disk_available(),
        disk_used(),
        disk_utilization(),
        memory_available(),
        memory_used(),
        memory_utilization(),
    ]
    for metric in metrics:
        logging.info("%s", metric)
    return metrics


def _host(name: str, value: float, unit: str) -> Metric:
    return Metric(name, value, unit, [Dimension("Level", "Host")])
