"""JSON of tensors: how much of it a request may bring, and what is read or written in a thread.

Apart from the protocols because both have the same reason: a parser has the interpreter for itself until it
has done, so whatever one request asks of it, all others wait for.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import orjson

from mms_lite.errors import RequestTooLarge
from mms_lite.types import BYTES, Tensor

# What a text costs: its bytes, and more for what becomes an object: about half a second for all.
MOST_COST = 128 << 20
_MARKS = {b",": 16, b'"': 32, b"[": 64, b"{": 64}
_MOST_EACH = 1 + max(_MARKS.values())
_SLOWER = 4  # times, Python's own parser
_PIECE_BYTES = 1 << 18
_TOKENS = (b"NaN", b"Infinity")  # no JSON, but what Python's and TensorFlow's writers print
_MOST_READERS = 2  # at a time, which would but wait for each other
_LONG_BYTES = 128 << 10  # 40,000 texts without a letter: some milliseconds
_LONG_TENSORS = 1 << 18  # bytes, of which a megabyte of JSON becomes
_ELEMENT_BYTES = 16  # as many as take as long as what Python looks at alone
_HALF_TIMES = 32  # FP16, which nothing writes at once
_T = TypeVar("_T")


class Readers:
    """Threads in which long JSON is read: of their own, and no semaphore.

    A client that leaves does not end the thread that reads, and nobody else has its place.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MOST_READERS, "json")

    async def read(self, json_bytes: int, read: Callable[..., _T], *given: Any) -> _T:
        """Return what `read` makes of what is given: a body with so much JSON, not a view of its place."""
        if json_bytes <= _LONG_BYTES:
            return read(*given)
        return await asyncio.get_running_loop().run_in_executor(self._threads, read, *given)


def loads(text: bytes | bytearray | memoryview, *, most_cost: int = MOST_COST) -> Any:
    """Return the value of a JSON text, in which NaN, Infinity and -Infinity may stand for numbers.

    Raises:
        ValueError: it is no JSON; with `msg` and `pos` (characters) where that is known.
        RequestTooLarge: it costs more.
    """
    _check(text, most_cost, "The JSON of the request")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raw = bytes(text)
        if not any(token in raw for token in _TOKENS):
            raise
    _check(raw, most_cost // _SLOWER, "JSON with NaN or Infinity")
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _check(text: bytes | bytearray | memoryview, most_cost: int, what: str) -> None:
    """Check what a text costs.

    Raises:
        RequestTooLarge: more than that.
    """
    if len(text) * _MOST_EACH <= most_cost:
        return
    every = np.frombuffer(text, np.uint8)
    cost = len(every)
    for start in range(0, len(every), _PIECE_BYTES):  # numpy looks at a piece of them at once
        piece = every[start : start + _PIECE_BYTES]
        cost += sum(each * int(np.count_nonzero(piece == ord(mark))) for mark, each in _MARKS.items())
        if cost > most_cost:
            counted = ", ".join(f"{each} for each {mark.decode()!r}" for mark, each in _MARKS.items())
            raise RequestTooLarge(
                f"{what} is more than the limit of {most_cost} bytes, where besides these count {counted}:"
                " send large tensors in binary, over KServe v2 (REST or gRPC) or as tensor_content."
            )


def is_long(outputs: Sequence[Tensor], *, pieces: int = 0) -> bool:
    """Tell whether to write outputs, and so many pieces of them one by one, takes more than milliseconds."""
    return sum(map(_cost, outputs)) + pieces * _ELEMENT_BYTES > _LONG_TENSORS


def _cost(tensor: Tensor) -> int:
    size = tensor.nbytes
    if tensor.datatype == BYTES:
        return size + math.prod(tensor.shape) * _ELEMENT_BYTES
    return size * _HALF_TIMES if tensor.datatype == "FP16" else size
