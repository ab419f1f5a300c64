"""What becomes of memory that is freed: the server and its workers take large bodies by the thousand."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 << 20
_OWN_MAPPING_BYTES = 32 << 20  # the most that glibc takes


def keep_freed() -> None:
    """Have malloc keep up to 64 MiB that were freed (glibc), instead of giving them back to the system.

    A request's body comes and goes, and each page that was given back is a fault when the next one comes:
    at 110 KB that is half of what a request costs.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
