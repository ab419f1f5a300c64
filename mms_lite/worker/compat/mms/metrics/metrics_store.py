"""mms.metrics.metrics_store: what context.metrics is."""

from mms_lite.worker.metrics_store import MetricsStore

__all__ = ["MetricsStore"]
