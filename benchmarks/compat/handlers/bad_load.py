"""A handler that fails when it is to load its model."""


def handle(data, context):
    """Fail at load."""
    if data is None:
        raise ValueError("no weights")
    return data
