"""Two classes and no function: nobody can tell which one is the handler."""


class FirstService:
    """One."""


class SecondService:
    """Another."""
