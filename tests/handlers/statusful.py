"""Choose status, reason, headers and content type of each answer."""


def handle(data, context):
    if data is None:
        return None
    for index, item in enumerate(data):
        word = bytes(item["body"])
        context.set_response_header(index, "x-word", word.decode())
        if word == b"teapot":
            context.set_response_status(418, "I am a teapot", index)
        if word == b"unusual":
            context.set_response_status(799, "Unusual", index)
        if word == b"csv":
            context.set_response_content_type(index, "text/csv")
        if word == b"surrogate":
            context.set_response_header(index, "x-bad", "\ud800")
        if word == b"split":
            context.set_response_header(index, "x-bad", "a\r\nb")
    return [{"word": bytes(item["body"]).decode()} for item in data]
