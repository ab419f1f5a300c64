"""mms.utils: small functions that MMS handlers import."""
