"""Run out of memory: as an exception, or as a process that the system ended."""

import os


def handle(data, context):
    if data is None:
        return None
    for item in data:
        if item["body"] == b"raise":
            raise MemoryError
        if item["body"] == b"137":
            os._exit(137)
    return [item["body"] for item in data]
