"""mms.metrics.dimension: a name and a value that qualify a metric."""

from mms_lite.worker.metrics_store import Dimension

__all__ = ["Dimension"]
