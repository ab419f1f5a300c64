"""What was measured of a request, and how it is shown: as text, and as tables in docs/performance.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "side_by_side"))

from parts import PARTS, Stack, by_function, by_part
from results import machine
from tables import PAGE, between

__all__ = ["Measured", "Stack", "Used", "markdown", "text", "write"]

FUNCTIONS = 12  # of each process, in the text
ROLES = ("front", "worker")


@dataclass(frozen=True, slots=True)
class Used:
    """CPU time of a process: of all threads in user and in system mode, and of its main thread alone."""

    user: float = 0.0
    system: float = 0.0
    main: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.user + self.system

    @property
    def kernel(self) -> float:
        """The kernel's share. It is an estimate from the timer's ticks, as the kernel tells it."""
        return self.system / self.total if self.total else 0.0

    def __add__(self, other: Used) -> Used:
        return Used(self.user + other.user, self.system + other.system, self.main + other.main)

    def __sub__(self, other: Used) -> Used:
        return self + other * -1

    def __mul__(self, factor: float) -> Used:
        return Used(self.user * factor, self.system * factor, self.main * factor)


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell: microseconds of one request. `means_us` are those of the server's histograms, and "model"."""

    name: str
    used: Mapping[str, Used]
    kernel: Mapping[str, float]  # its share of each, from all loads: many ticks are needed
    stacks: Mapping[str, Mapping[Stack, int]]
    sampled_us: float  # CPU time of both processes while they were sampled
    client_us: float
    means_us: Mapping[str, float]
    requests_per_s: float

    @property
    def total_us(self) -> float:
        """CPU time of both processes."""
        return sum(used.total for used in self.used.values())

    def cpu(self) -> Iterator[tuple[str, float, float, float]]:
        """Yield each part with its CPU time in the server and in the worker, and its share of all."""
        found = {
            role: by_part(self.stacks[role], used.main, used.total - used.main)
            for role, used in self.used.items()
        }
        for name in PARTS:
            front, worker = (found[role].get(name, 0.0) for role in ROLES)
            if front or worker:
                yield name, front, worker, (front + worker) / self.total_us
        front, worker = (self.used[role].total for role in ROLES)
        yield "**all**", front, worker, 1.0
        front, worker = (self.used[role].total * self.kernel[role] for role in ROLES)
        yield "of it in the kernel", front, worker, (front + worker) / self.total_us

    def times(self) -> Iterator[tuple[str, float, float]]:
        """Yield each stretch of a request's way with its time and its share of all that the client sees."""
        mean = self.means_us
        at_worker = mean["request"] - mean["queue"]
        stretches = {
            "client, network, HTTP, waiting for the server's thread": self.client_us - mean["request"],
            "in the queue": mean["queue"],
            "sent ahead, waiting for the worker's turn": max(0.0, at_worker - mean["inference"]),
            "frames, two process switches, calling the handler": mean["inference"] - mean["model"],
            "in the model": mean["model"],
            "**all, as the client sees it**": self.client_us,
        }
        for title, us in stretches.items():
            yield title, us, us / self.client_us

    def samples(self) -> tuple[int, int]:
        """Return the numbers of samples, of the server and of the worker."""
        front, worker = (sum(self.stacks[role].values()) for role in ROLES)
        return front, worker


def text(cell: Measured) -> str:
    """Return a cell's figures and its dearest functions for a terminal."""
    lines = [f"{cell.name}: {cell.requests_per_s:,.0f} requests/s", ""]
    lines.append(f"{'CPU, µs per request':<58}{'server':>8}{'worker':>8}{'share':>8}")
    for name, front, worker, share in cell.cpu():
        lines.append(f"{name.strip('*'):<58}{_us(front):>8}{_us(worker):>8}{share:>8.0%}")
    lines += ["", f"{'time, µs per request':<58}{'':>16}{'share':>8}"]
    for name, us, share in cell.times():
        lines.append(f"{name.strip('*'):<58}{_us(us):>16}{share:>8.0%}")
    for role in ROLES:
        lines += ["", f"most CPU in the {'server' if role == 'front' else 'worker'}, µs per request"]
        functions = by_function(cell.stacks[role], cell.used[role].main)[:FUNCTIONS]
        lines += [f"{us:>8.1f}  {name}" for us, name in functions]
    front, worker = cell.samples()
    more = cell.sampled_us / cell.total_us - 1
    return "\n".join([*lines, "", f"{front} and {worker} samples; {more:+.1%} CPU while sampling", ""])


def markdown(cells: Sequence[Measured], day: date) -> str:
    """Return what stands between the marks of the page."""
    where = machine()
    samples = min(min(cell.samples()) for cell in cells)
    lines = [
        f"{where['cores']} cores of {where['cpu']}, shared with the load generator; "
        f"Python {where['python']}, kernel {where['kernel']}; {day.isoformat()}. "
        f"Microseconds of one request; {samples:,} samples or more of each process in each case.",
    ]
    for cell in cells:
        lines += ["", f"**{cell.name}**: {cell.requests_per_s:,.0f} requests/s", ""]
        lines += ["| CPU | server | worker | share |", "| --- | --: | --: | --: |"]
        for name, front, worker, share in cell.cpu():
            lines.append(f"| {name} | {_us(front)} | {_us(worker)} | {share:.0%} |")
        lines += ["", "| time | µs | share |", "| --- | --: | --: |"]
        lines += [f"| {name} | {_us(us)} | {share:.0%} |" for name, us, share in cell.times()]
    return "\n".join(lines)


def write(content: str) -> None:
    """Put a content between the marks of the page; nothing is written where it is empty.

    Raises:
        ValueError: the page has no marks.
    """
    page = between(PAGE.read_text(encoding="utf-8"), "profile", content)
    if content:
        PAGE.write_text(page, encoding="utf-8")


def _us(us: float) -> str:
    """Return microseconds with tenths; a dash for what does not occur, or not measurably."""
    if us < 0.05:
        return "-"
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"
