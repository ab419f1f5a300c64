"""mms.context: what handlers import for annotations and unit tests."""

from mms_lite.worker.context import Context, RequestProcessor

__all__ = ["Context", "RequestProcessor"]
