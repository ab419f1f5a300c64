"""Answer `bad` with an object that no response can carry, `circular` with a list that holds itself."""


def handle(data, context):
    if data is None:
        return None
    return [_answer(bytes(item["body"])) for item in data]


def _answer(body):
    if body == b"circular":
        circular = []
        circular.append(circular)
        return circular
    return object() if body == b"bad" else body
