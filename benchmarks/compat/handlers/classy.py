"""A handler in a class, as the template of MMS has it."""


class ClassyService:
    """Counts whether it was initialised."""

    def __init__(self):
        self.initialized = False

    def initialize(self, context):
        """Note that the server called."""
        self.initialized = context.system_properties["batch_size"]

    def handle(self, data, context):
        """Tell what was noted."""
        return [{"initialized": self.initialized} for _ in data]
