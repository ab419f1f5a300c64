"""End the worker, process or thread, by an exception that no one catches."""


def handle(data, context):
    if data is None:
        return None
    if any(item["body"] == b"die" for item in data):
        raise SystemExit(0)
    return [item["body"] for item in data]
