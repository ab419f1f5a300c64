"""Raise MMS's PredictionException with the status that the body names."""

from mms_lite.worker.context import PredictionException


def handle(data, context):
    if data is None:
        return None
    raise PredictionException("no such customer", int(data[0]["body"]))
