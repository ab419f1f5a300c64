"""The import names of Multi Model Server, for handlers written for it. The code is in mms_lite.worker."""

from mms.version import __version__

__all__ = ["__version__"]
