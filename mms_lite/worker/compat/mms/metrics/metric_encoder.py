"""mms.metrics.metric_encoder: metrics as JSON."""

import json
from typing import Any

from mms_lite.worker.metrics_store import Dimension, Metric


class MetricEncoder(json.JSONEncoder):
    """A JSON encoder that knows Metric and Dimension: `json.dumps(metric, cls=MetricEncoder)`."""

    def default(self, obj: Any) -> Any:
        """Return a metric or dimension as plain data; leave the rest to JSONEncoder."""
        return obj.to_dict() if isinstance(obj, (Metric, Dimension)) else super().default(obj)
