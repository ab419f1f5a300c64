"""Which outputs a client asked for: only these, in its order.

Apart because every kind of model keeps to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from mms_lite.errors import BadTensor

_Value = TypeVar("_Value")
_SHOWN = 80  # characters of a name that a client made up


def check(wanted: Iterable[str] | None, allowed: Collection[str]) -> None:
    """Check the names of the outputs that a client wants; None or none at all means every output.

    Raises:
        BadTensor: there is no output of such a name (the words are Triton's).
    """
    for name in wanted or ():
        if name not in allowed:
            raise BadTensor(
                f"unexpected inference output {name[:_SHOWN]!r}, allowed outputs are: {', '.join(allowed)}"
            )


def pick(found: Mapping[str, _Value], wanted: Iterable[str] | None) -> Mapping[str, _Value]:
    """Return the outputs that a client wants, in its order; what the model did not give is left out."""
    return {name: found[name] for name in wanted if name in found} if wanted else found
