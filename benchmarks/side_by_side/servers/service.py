"""The handler for mms-lite, Multi Model Server and TorchServe, which share one way to write it."""

import job

_work = None


def handle(data, context):
    """Answer each request of a batch."""
    global _work  # noqa: PLW0603 - the interface is a function, and the model is loaded once
    if _work is None:
        _work = job.load()
    if data is None:
        return None
    return _work([item.get("body") or item.get("data") or b"" for item in data])
