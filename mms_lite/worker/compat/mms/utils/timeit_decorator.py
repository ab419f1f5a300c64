"""mms.utils.timeit_decorator: prints how long a function took."""

import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def timeit(func: Callable[P, T]) -> Callable[P, T]:
    """Print the wall and CPU time of every call, in seconds."""

    @functools.wraps(func)
    def timed(*args: P.args, **kwargs: P.kwargs) -> T:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = func(*args, **kwargs)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        print(
            f"func: {func.__name__!r} took a total of {wall_s:.4f} sec to run and {cpu_s:.4f} sec of CPU time"
        )
        return result

    return timed
