"""The import names of Multi Model Server, for handlers written for it. The code is in mms_lite.worker."""

__version__ = "1.1.11"
