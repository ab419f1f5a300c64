"""mms.version: the version of MMS whose behaviour handlers see."""

from mms_lite.worker.handler import MMS_VERSION as __version__

__all__ = ["__version__"]
