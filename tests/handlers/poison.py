"""Fail every batch that holds a `poison` item; echo the others and say how large the batch was."""


def handle(data, context):
    if data is None:
        return None
    if any(item["body"] == b"poison" for item in data):
        raise ValueError("poison")
    return [{"body": item["body"].decode(), "size": len(data)} for item in data]
