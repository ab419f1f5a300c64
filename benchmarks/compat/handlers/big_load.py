"""A handler that runs out of memory when it is to load its model."""


def handle(data, context):
    """Run out of memory at load."""
    if data is None:
        raise MemoryError
    return data
