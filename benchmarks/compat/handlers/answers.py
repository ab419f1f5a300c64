"""Answer as the body says: a JSON list of calls on the context, then the value to return.

The body is one JSON object with the keys status, phrase, headers, type and one of value, text, bytes.
"""

import json


def handle(data, context):
    """Do for each request what its body asks."""
    if data is None:
        return None
    return [_answer(index, item, context) for index, item in enumerate(data)]


def _answer(index, item, context):
    order = json.loads(bytes(item["body"]).decode("utf-8"))
    if "status" in order:
        context.set_response_status(order["status"], order.get("phrase", ""), index)
    if "type" in order:
        context.set_response_content_type(index, order["type"])
    for name, value in order.get("headers", {}).items():
        context.set_response_header(index, name, value)
    if "bytes" in order:
        return order["bytes"].encode("latin-1")
    if "size" in order:
        return b"x" * order["size"]
    return order["text"] if "text" in order else order.get("value")
