"""Which part of the server a stack belongs to: the innermost frame in mms_lite or in the model decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

HTTP = "reading and writing HTTP"
API = "the API"
ENGINE = "engine and queue"
FRAMES = "frames between the processes"
LOG = "access log and metrics"
CALL = "calling the handler"
MODEL = "the model, which does nothing"
LOOP = "event loop and its sockets"
OTHER = "elsewhere in mms_lite"
THREADS = "threads that write the logs"
PARTS = (HTTP, API, ENGINE, FRAMES, LOG, CALL, MODEL, LOOP, OTHER, THREADS)

_PACKAGE = "/mms_lite/"
# The first that a path within the package begins with counts.
_PLACES = {
    "frontends/mms/": API,
    "frontends/prometheus.py": LOG,
    "frontends/": HTTP,
    "engine/": ENGINE,
    "transport": FRAMES,
    "wire": FRAMES,
    "logs": LOG,
    "metrics.py": LOG,
    "host_metrics.py": LOG,
    "rotation.py": LOG,
    "worker/metrics_store.py": LOG,
    "worker/": CALL,
    # They call the event loop and what it calls has frames of its own.
    "server.py": LOOP,
    "cli.py": LOOP,
}
_CALLERS = ("types.py", "errors.py")  # plain values: their cost is that of whoever makes them
_MODEL = frozenset({"sampled_service.py", "service.py", "work.py"})

Frame = tuple[str, str]  # file, function
Stack = tuple[Frame, ...]  # the innermost first


def part(stack: Iterable[Frame]) -> tuple[str, str]:
    """Return the part that a stack belongs to and the function that decides, as `file:function`."""
    for path, function in stack:
        _, inside, module = path.rpartition(_PACKAGE)
        if inside and module not in _CALLERS:
            found = next((name for place, name in _PLACES.items() if module.startswith(place)), OTHER)
            return found, f"{module}:{function}"
        if not inside and path.rpartition("/")[2] in _MODEL:
            return MODEL, f"{path.rpartition('/')[2]}:{function}"
    return LOOP, "outside"


def by_part(stacks: Mapping[Stack, int], main_us: float, threads_us: float) -> dict[str, float]:
    """Divide the main thread's CPU time as its samples are; other threads are a part of their own."""
    samples: Counter[str] = Counter()
    for stack, count in stacks.items():
        samples[part(stack)[0]] += count
    whole = max(1, samples.total())
    found = {name: main_us * count / whole for name, count in samples.items()}
    return {name: us for name in PARTS if (us := {**found, THREADS: threads_us}.get(name, 0.0)) > 0}


def by_function(stacks: Mapping[Stack, int], main_us: float) -> list[tuple[float, str]]:
    """Return the main thread's CPU time by the function that decides, the dearest first."""
    samples: Counter[str] = Counter()
    for stack, count in stacks.items():
        samples[part(stack)[1]] += count
    whole = max(1, samples.total())
    return [(main_us * count / whole, name) for name, count in samples.most_common()]
