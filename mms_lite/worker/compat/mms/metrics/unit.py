"""mms.metrics.unit: short and long unit names."""

from mms_lite.worker.metrics_store import Units

__all__ = ["Units"]
