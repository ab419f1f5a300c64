"""The course of an attack: cases in bursts, after each of which the server must be unharmed.

A case depends on the seed, the kind of server and its number alone, so that any can be run again.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from soak_site import REPOSITORY, STORE, Defect, Site, attacked

PATIENCE_S = 30.0  # for the answer to a case
_AT_A_TIME = 48
_BURST_S = 3.0
_WARM = 0.3  # of the time, after which memory is looked at
_MOST_DEFECTS = 5
_MOST_SHOWN = 4000  # digits

Make = Callable[[Random, Site, int], Any]
Run = Callable[[Site, Any], Awaitable[tuple[str, str | None]]]
"""Runs a case: how it ended, and what was wrong with that."""


Last = Callable[[Site], Awaitable[None]]
"""What is done at the very end; good requests are answered again when it returns."""


def digits(data: bytes) -> str:
    """Return bytes as they are shown to who is to send them again."""
    return (
        data.hex() if len(data) * 2 <= _MOST_SHOWN else f"{data.hex()[:_MOST_SHOWN]}... ({len(data)} bytes)"
    )


@dataclass(slots=True)
class Attack:
    """An attack on one server; what went wrong is in `found`."""

    arguments: argparse.Namespace
    seconds: float
    make: Make
    run: Run
    last: Last | None
    codes: Counter[str]
    found: list[Defect]
    next: int = 0

    async def __call__(self, site: Site) -> list[Defect]:
        """Attack, and return what went wrong."""
        begin, last = time.monotonic(), self.arguments.first + self.arguments.count
        self.next, warm = self.arguments.first, False
        while time.monotonic() < begin + self.seconds and self.next < last and not self.found:
            first, until = self.next, min(time.monotonic() + _BURST_S, begin + self.seconds)
            await asyncio.gather(*(self._work(site, until, last) for _ in range(_AT_A_TIME)))
            harm = await site.check()
            burst = f"after --seed {self.arguments.seed} --first {first} --count {self.next - first}\n"
            self.found += [Defect(each.what, burst + each.how) for each in harm]
            if not warm and time.monotonic() > begin + self.seconds * _WARM:
                await site.remember()
                warm = True
        if not self.found:
            self.found += await site.check_end()
        if not self.found and self.last is not None:
            await self.last(site)
            self.found += await site.check()
        print(f"{site.kind}: {self.next - self.arguments.first} cases, {dict(self.codes.most_common())}")
        print(f"{site.kind}: {site.resources()}", flush=True)
        return self.found

    async def _work(self, site: Site, until: float, last: int) -> None:
        while time.monotonic() < until and self.next < last and len(self.found) < _MOST_DEFECTS:
            number = self.next
            self.next += 1
            case = self.make(Random(f"{self.arguments.seed}:{site.kind}:{number}"), site, number)
            code, wrong = await self.run(site, case)
            self.codes[code] += 1
            if wrong is not None:
                self.found.append(Defect(wrong, f"case {number}: {case}"))


def main(what: str, make: Make, run: Run, *, last: Last | None = None) -> int:
    """Attack a server over a Triton repository, then one over a model store; return the exit code."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1 << 60, help="of cases")
    parser.add_argument("--kinds", nargs="+", default=[REPOSITORY, STORE], choices=[REPOSITORY, STORE])
    arguments = parser.parse_args()
    found: list[Defect] = []
    for kind in arguments.kinds:
        attack = Attack(arguments, arguments.seconds / len(arguments.kinds), make, run, last, Counter(), [])
        found += asyncio.run(attacked(kind, attack))
    for defect in found:
        print(f"DEFECT: {defect.what}\n{defect.how}\n")
    return 1 if found else 0
