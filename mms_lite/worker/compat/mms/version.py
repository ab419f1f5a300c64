"""mms.version: the version of MMS whose behaviour handlers see."""

__version__ = "1.1.11"
