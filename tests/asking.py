"""What several tests do with a request: begin it, and read the body of its answer."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from mms_lite.types import InferResponse

T = TypeVar("T")


def begin(work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Run `work` beside the test; its failure is the test's to look at, or not."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def body(answer: InferResponse) -> bytes:
    return bytes(answer.outputs[0].data)
