"""What the parameters of an answer may be: what frames and every protocol can carry.

Apart because handlers and Triton's Python models set them, each in its own way.
"""

from __future__ import annotations

import math
from typing import Any

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1
_SHOWN = 80  # characters of a value in a message


def fault(name: Any, value: Any) -> str | None:
    """Return why an answer cannot have this parameter; None if it can."""
    if not isinstance(name, str) or not _is_unicode(name):
        return "the name of a parameter of the answer is not Unicode text"
    said = f"the answer's parameter {name[:_SHOWN]!r}"
    if not isinstance(value, str | int | float):
        return f"{said} is neither text, number, true nor false: {repr(value)[:_SHOWN]}"
    if isinstance(value, str):
        return None if _is_unicode(value) else f"{said} is text that is not Unicode"
    if isinstance(value, int):
        return None if _LEAST <= value <= _MOST else f"{said} is a number of more than 64 bits"
    return None if math.isfinite(value) else f"{said} is not finite: {value}"


def _is_unicode(text: str) -> bool:
    """Tell whether UTF-8 can hold it: half of a surrogate pair it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
