"""Give every array back, doubled."""


def handle(data, context):
    if data is None:
        return None
    return [{name: array * 2 for name, array in item.items()} for item in data]
