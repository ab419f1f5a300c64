"""mms.utils: small functions that MMS handlers import."""

from mms.utils import timeit_decorator

__all__ = ["timeit_decorator"]
