"""An open loop: requests at evenly spaced moments, whether or not the server keeps up, and their latency.

A latency counts from the moment at which the request was due, so that a server that stalls is charged for all
who waited. The generator measures its own lateness too; a run in which it was late itself is void.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from client import Server, command_line, quantile, read_result, request_bytes, start_generator
from wire import UNANSWERED, Connection, Outcome, Wire

LATE_MS = 1.0  # a 99th percentile of the generator's own lateness over this makes a run void
# So much before a request is due the generator stops sleeping, but for a small part of the time between two:
# else it would take a core for itself, and the kernel grants a real-time process 95 % of one.
SPIN_S, SPIN_SHARE = 100e-6, 0.1
AT_A_TIME = 4  # answers taken before the clock is looked at again
PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class Schedule:
    """So many requests per second on so many connections; one that finds none free waits in the generator."""

    rate: float
    seconds: float
    connections: int = 100
    grace_s: float = 5.0


class OpenLoop:
    """Runs one `Schedule`."""

    def __init__(self, address: tuple[str, int], request: bytes, schedule: Schedule) -> None:
        self._schedule = schedule
        self._wire = Wire(address, request, self._settled)
        self._connections = [Connection() for _ in range(schedule.connections)]
        self._idle = list(self._connections)
        self._waiting: deque[float] = deque()  # when those were due that found no free connection
        self._late_s: list[float] = []
        self._latencies_s: list[float] = []
        self._statuses: Counter[str] = Counter()
        self._answered = 0.0
        self._spin_s = 0.0

    def run(self) -> dict[str, Any]:
        """Send everything, wait for the answers; return rates, latencies and the generator's own lateness."""
        self._connect()
        count, period = round(self._schedule.rate * self._schedule.seconds), 1 / self._schedule.rate
        self._spin_s = min(SPIN_S, SPIN_SHARE * period)
        begin = time.monotonic() + period
        for due in (begin + number * period for number in range(count)):
            self._wait(due)
            self._late_s.append(time.monotonic() - due)
            self._waiting.append(due)
            self._send_waiting()
        end = time.monotonic() + self._schedule.grace_s
        while len(self._idle) < len(self._connections) and (now := time.monotonic()) < end:
            self._wire.wait(min(end, now + 0.05))
        self._wire.close()
        unanswered = len(self._waiting) + len(self._connections) - len(self._idle)
        self._statuses.update({UNANSWERED: unanswered} if unanswered else {})
        return self._found(begin)

    def _connect(self) -> None:
        """Open every connection first: what a handshake costs is not the question here."""
        for connection in self._connections:
            self._wire.connect(connection)
        end = time.monotonic() + self._schedule.grace_s
        while any(each.waits_to_write for each in self._connections) and time.monotonic() < end:
            self._wire.wait(time.monotonic() + 0.01)

    def _wait(self, due: float) -> None:
        self._wire.wait(due - self._spin_s, AT_A_TIME)  # also when it is late: answers have their turn
        while time.monotonic() < due:
            self._wire.wait(due - self._spin_s, AT_A_TIME)

    def _send_waiting(self) -> None:
        while self._waiting and self._idle:
            connection = self._idle.pop()
            connection.due = self._waiting.popleft()
            self._wire.send(connection)

    def _settled(self, connection: Connection, outcome: Outcome) -> None:
        self._statuses[str(outcome.status)] += 1
        self._answered = outcome.answered
        if outcome.status == 200:
            self._latencies_s.append(outcome.answered - connection.due)
        self._idle.append(connection)
        self._send_waiting()

    def _found(self, begin: float) -> dict[str, Any]:
        late_ms = [late * 1000 for late in self._late_s]
        return {
            "rate": self._schedule.rate,
            "answered_per_s": round(self._statuses["200"] / (self._answered - begin), 1)
            if self._answered
            else 0.0,
            "statuses": dict(self._statuses),
            **spread([latency * 1000 for latency in self._latencies_s]),
            "late_p99_ms": quantile(late_ms, 0.99),
            "late_max_ms": max(late_ms, default=None),
            "void": (quantile(late_ms, 0.99) or 0.0) > LATE_MS,
            "cpu_s": time.process_time(),
        }


def spread(values: list[float]) -> dict[str, float | None]:
    """Return the median, the far quantiles and the largest of some milliseconds, each rounded."""
    named = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999, "max_ms": 1.0}
    found = {name: quantile(values, share) for name, share in named.items()}
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def raise_priority() -> str:
    """Put this process before all others where the system lets it; return what it got."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)  # ns: wake at the moment asked for, not 50 us later
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return f"nice {os.nice(0)}"
    return "SCHED_FIFO"


def schedule(server: Server, body: bytes, wanted: Schedule) -> dict[str, Any]:
    """Run a schedule from a process of its own; return what it found."""
    return read_result(start_generator(__file__, server, request_bytes(server, body), asdict(wanted)))


def main() -> None:
    """Run the command line; the whole request comes on standard input."""
    address, wanted = command_line(Schedule, "Send the request on standard input at evenly spaced moments.")
    loop = OpenLoop(address, sys.stdin.buffer.read(), wanted)
    gc.disable()  # nothing here makes cycles, and a collection is a pause
    priority = raise_priority()
    json.dump({**loop.run(), "priority": priority}, sys.stdout)


if __name__ == "__main__":
    main()
