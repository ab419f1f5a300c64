"""Tell back what came in: types and values of the data, the headers, and what the context says."""


def handle(data, context):
    """Answer each request with what the handler saw of it."""
    if data is None:
        return None
    return [_seen(index, item, len(data), context) for index, item in enumerate(data)]


def _seen(index, item, size, context):
    headers = context.get_all_request_header(index)
    return {
        "data": {name: _told(value) for name, value in sorted(item.items())},
        "headers": {name: headers[name] for name in sorted(headers)},
        "batch": size,
        "request_id": context.get_request_id(index),
    }


def _told(value):
    if isinstance(value, (bytes, bytearray)):
        return {"type": type(value).__name__, "value": value.decode("latin-1")}
    return {"type": type(value).__name__, "value": value}
