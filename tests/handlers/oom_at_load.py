"""Run out of memory while loading."""


def handle(data, context):
    if data is None:
        raise MemoryError("no room for the weights")
    return data
