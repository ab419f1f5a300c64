"""Where a process's main thread is, looked at on every tick of the CPU time that the process uses.

SIGUSR1 begins, SIGUSR2 ends and writes what was found to FOLDER/PID.json. Runs within the server and its
workers, so it imports the standard library alone.
"""

from __future__ import annotations

import dis
import json
import os
import signal
from collections import Counter
from pathlib import Path
from types import FrameType

FOLDER = "PROFILE_FOLDER"  # the environment variable by which a server tells its workers
_EVERY_S = 0.001  # of CPU time; the kernel looks at its timers on its own ticks, often each 4 ms only
_RESUME = dis.opmap.get("RESUME", -1)

Stack = tuple[tuple[str, str], ...]  # file and function of each Python frame, the innermost first


class Sampler:
    """Counts stacks. `model_ns` and `batches` are for whoever calls the model."""

    def __init__(self, file: Path) -> None:
        self.model_ns = 0
        self.batches = 0
        self._file = file
        self._stacks: Counter[Stack] = Counter()

    def begin(self, _number: int, _frame: FrameType | None) -> None:
        """Forget what was found so far, and begin to sample."""
        self._clear()
        signal.setitimer(signal.ITIMER_PROF, _EVERY_S, _EVERY_S)

    def end(self, _number: int, _frame: FrameType | None) -> None:
        """Write what was found since the last call or `begin`, and forget it."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        stacks = [[count, stack] for stack, count in self._stacks.items()]
        scratch = self._file.with_suffix(".new")
        scratch.write_text(json.dumps({"stacks": stacks, "model_ns": self.model_ns, "batches": self.batches}))
        scratch.replace(self._file)  # whoever waits for the file finds it whole
        self._clear()

    def sample(self, _number: int, frame: FrameType | None) -> None:
        """Count where the main thread is."""
        self._stacks[stack(frame)] += 1

    def _clear(self) -> None:
        self._stacks.clear()
        self.model_ns = self.batches = 0


def stack(frame: FrameType | None) -> Stack:
    """Return the stack of a frame in which a signal was handled.

    Python handles signals between two instructions only: one that came in C code, an event loop's for
    instance, is handled at the first instruction of the next function. The time before that was its caller's.
    """
    if frame is not None and _entered_now(frame):
        frame = frame.f_back
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(found)


def _entered_now(frame: FrameType) -> bool:
    at = frame.f_lasti
    return at < 0 or frame.f_code.co_code[at] == _RESUME


def listen(folder: str) -> Sampler:
    """Have this process's sampler begin and end at signals; call it on the main thread."""
    sampler = Sampler(Path(folder, f"{os.getpid()}.json"))
    signal.signal(signal.SIGPROF, sampler.sample)
    signal.signal(signal.SIGUSR1, sampler.begin)
    signal.signal(signal.SIGUSR2, sampler.end)
    return sampler
