"""Answer a batch that holds `short`, `long`, `tuple` or `none` with what the word says."""


def handle(data, context):
    if data is None:
        return None
    bodies = [bytes(item["body"]) for item in data]
    if b"short" in bodies:
        return bodies[:-1]
    if b"long" in bodies:
        return [*bodies, b"one more"]
    if b"tuple" in bodies:
        return tuple(bodies)
    if b"none" in bodies:
        return None
    return bodies
