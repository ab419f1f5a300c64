"""Take as many milliseconds as the body says, then tell how large the batch was."""

import time


def handle(data, context):
    """Sleep for the longest time that a request of the batch asks for."""
    if data is None:
        return None
    time.sleep(max(int(bytes(item["body"]) or b"0") for item in data) / 1000)
    return [{"batch": len(data), "most": context.system_properties["batch_size"]} for _ in data]
