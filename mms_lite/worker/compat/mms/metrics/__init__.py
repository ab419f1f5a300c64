"""mms.metrics: see mms_lite.worker.metrics_store."""

from mms.metrics import dimension, metric, metric_encoder, metrics_store, system_metrics, unit

__all__ = ["dimension", "metric", "metric_encoder", "metrics_store", "system_metrics", "unit"]
