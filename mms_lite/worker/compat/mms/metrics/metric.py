"""mms.metrics.metric: one reported value."""

from mms_lite.worker.metrics_store import Metric, Units

__all__ = ["Metric", "MetricUnit"]

MetricUnit = Units()
