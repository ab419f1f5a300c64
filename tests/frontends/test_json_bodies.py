"""JSON of tensors: what a request may bring, and what is long enough for a thread."""

import asyncio
import math
import threading
from typing import Any

import numpy as np
import pytest

from mms_lite.errors import RequestTooLarge
from mms_lite.frontends.json_bodies import MOST_COST, Readers, is_long, loads
from mms_lite.tensors import to_tensor

MEGABYTE = 1 << 20


def listed(element: bytes, count: int) -> bytes:
    return b"[" + (element + b",") * (count - 1) + element + b"]"


def test_what_is_no_number() -> None:
    assert loads(b'{"a": [NaN, -Infinity], "b": "NaN"}')["a"][1] == -math.inf
    for text in (b"[NaN", b"[nan]", b"[Inf]", b"[NaN, \xff]", b"[" * 100_000 + b"NaN"):
        with pytest.raises(ValueError):
            loads(text)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_batch_of_images_is_read(kind: Any) -> None:
    digits = b"0.12345678901234567"
    images = listed(listed(listed(listed(digits, 3), 224), 224), 14)
    assert len(images) > 40_000_000
    assert loads(kind(images))[13][223][223][2] == float(digits)


@pytest.mark.parametrize("element", [b"[]", b"{}", b'""', b'{"a":1}', b"[[[]]]", b"1"])
def test_what_becomes_many_objects_is_not_read(element: bytes) -> None:
    with pytest.raises(RequestTooLarge) as caught:
        loads(listed(element, 32 * MEGABYTE // (len(element) + 1)))
    assert caught.value.message == (
        f"The JSON of the request is more than the limit of {MOST_COST} bytes, where besides these count"
        " 16 for each ',', 32 for each '\"', 64 for each '[', 64 for each '{': send large tensors in binary,"
        " over KServe v2 (REST or gRPC) or as tensor_content."
    )


def test_the_limit_is_exact() -> None:
    text = listed(b"[]", 40_000)
    cost = len(text) + 39_999 * 16 + 40_001 * 64
    assert len(loads(text, most_cost=cost)) == 40_000
    with pytest.raises(RequestTooLarge):
        loads(text, most_cost=cost - 1)


def test_what_python_alone_can_read_has_a_quarter_of_the_limit() -> None:
    text = listed(b"0.12345678901234567", 1_000_000)
    assert len(loads(text)) == 1_000_000
    with pytest.raises(RequestTooLarge, match=f"JSON with NaN or Infinity .* of {MOST_COST // 4} bytes"):
        loads(text[:-1] + b",NaN]")
    assert loads(listed(b"NaN", 100_000))[99_999] is not None


async def test_short_json_is_read_where_it_is_asked_for() -> None:
    readers, here = Readers(), threading.get_ident()
    assert await readers.read(128 << 10, threading.get_ident) == here
    assert await readers.read((128 << 10) + 1, threading.get_ident) != here


async def test_two_threads_read_at_a_time() -> None:
    readers, together, gate = Readers(), threading.Semaphore(2), threading.Barrier(2)

    def read(number: int) -> int:
        assert together.acquire(blocking=False)
        gate.wait(10)
        together.release()
        gate.wait(10)
        return number

    asking = [readers.read(MEGABYTE, read, number) for number in range(6)]
    assert await asyncio.gather(*asking) == list(range(6))


@pytest.mark.parametrize(
    ("array", "pieces", "long"),
    [
        (np.zeros(1 << 16, np.float32), 0, False),
        (np.zeros((1 << 16) + 1, np.float32), 0, True),
        (np.zeros(1 << 12, np.float16), 0, False),
        (np.zeros((1 << 12) + 1, np.float16), 0, True),
        (np.full(13_000, b"", np.object_), 0, False),
        (np.full(14_000, b"", np.object_), 0, True),
        (np.zeros(15_000, np.int8), 15_000, False),
        (np.zeros(15_000, np.int8), 17_000, True),
    ],
)
def test_how_long_an_answer_is(array: Any, pieces: int, long: bool) -> None:
    assert is_long([to_tensor("x", array)], pieces=pieces) is long
