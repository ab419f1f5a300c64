"""mms.metrics: see mms_lite.worker.metrics_store."""
