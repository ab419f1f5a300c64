"""mms.metrics.metric: one reported value."""

from mms_lite.worker.metrics_store import Metric

__all__ = ["Metric"]
