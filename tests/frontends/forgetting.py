"""What a request leaves behind: whether anything still refers to it once it has been answered."""

import gc
import weakref
from collections.abc import Awaitable, Callable

from mms_lite.errors import ServingError


class Received(bytes):
    """A message whose end can be seen: `bytes` alone have no weak references."""

    mark: object


class _Mark:
    pass


async def forgotten(
    make: Callable[[], Received],
    ask: Callable[[Received], Awaitable[object]],
    wait_until: Callable[..., Awaitable[object]],
) -> str | None:
    """Ask with a message; wait until nobody has it, while no cycles are collected.

    Return the code of the error that it failed with.
    """
    code = None
    gc.collect()
    gc.disable()
    try:
        message = make()
        message.mark = _Mark()
        left = weakref.ref(message.mark)
        try:
            await ask(message)
        except ServingError as error:
            code = error.code
        del message
        await wait_until(lambda: left() is None, "the message to be forgotten", 3)
    finally:
        gc.enable()
    return code
