"""A handler in a class whose initialize() fails."""


class BadService:
    """Never gets ready."""

    def initialize(self, context):
        """Fail."""
        raise ValueError("no weights")

    def handle(self, data, context):
        """Answer as if nothing had happened."""
        return ["served" for _ in data]
