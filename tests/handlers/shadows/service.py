"""A handler with modules beside it that are named like the standard library's."""

import json
import queue


def handle(data, context):
    if data is None:
        return None
    return [
        {"queue": queue.OURS, "json": json.dumps({"a": 1}), "body": item["body"].decode()} for item in data
    ]
