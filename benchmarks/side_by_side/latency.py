"""Latency well below capacity: each server at 30 and 50 % of what it can do, ours at another's rates, too.

Requests come at evenly spaced moments (open_loop.py). All servers run, and one is loaded at a time; a run in
which the generator itself was late is repeated.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import client
import open_loop
from peers import FAILURES, PEERS, Job, Server, running

COLUMNS = {
    "rate": "requests/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "p999_ms": "p99.9 ms",
    "max_ms": "max ms",
    "failed": "failed",
    "voided": "void runs",
}
WORKLOAD = "open"
BODY = bytes(110_969)  # as many as the tutorial's photo has
SHARES = (0.3, 0.5)
REFERENCE = "mosec"  # at whose rates ours is measured, too
OURS = "mms-lite"
CONNECTIONS = 100
SECONDS, WARM_S = 4.0, 2.0
CAPACITY_ROUNDS = 3
TRIES = 3
JOB = Job(queue_size=200)  # nothing is refused: at most CONNECTIONS are on their way


def measure(servers: Sequence[str], repeat: int, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield each server's capacity, then a record for each repetition, part of the capacity and server."""
    with ExitStack() as stack:
        started: dict[str, Server] = {}
        for name in servers:
            try:
                server = stack.enter_context(running(PEERS[name], JOB))
                client.run(server, BODY, client.Load(CONNECTIONS, WARM_S))
                started[name] = server
            except FAILURES as error:
                yield {"workload": WORKLOAD, "server": name, "error": str(error)[:500]}
        capacities = _capacities(started, (seconds or SECONDS) / 2)
        for name, rate in capacities.items():
            yield {"workload": WORKLOAD, "cell": "capacity", "server": name, "rate": rate}
        loads = _loads(capacities)
        for repetition in range(repeat):
            for (cell, name), rate in loads.items():
                schedule = open_loop.Schedule(rate, seconds or SECONDS, CONNECTIONS)
                place = {"workload": WORKLOAD, "cell": cell, "server": name, "repetition": repetition}
                try:
                    yield {**place, **_in_time(started[name], schedule)}
                except FAILURES as error:
                    yield {**place, "error": str(error)[:500]}


def _capacities(servers: Mapping[str, Server], seconds: float) -> dict[str, float]:
    """Return the 200s per second of a closed loop: the median of rounds in which the servers take turns."""
    found: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(CAPACITY_ROUNDS):
        for name, server in servers.items():
            result = client.run(server, BODY, client.Load(CONNECTIONS, seconds))
            found[name].append(len(result.latencies_ms(200)) / (result.ended - result.began))
    return {name: statistics.median(rates) for name, rates in found.items()}


def _loads(capacities: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """Return the rates at which servers are measured, by cell and server."""
    loads = {}
    for share in SHARES:
        for name, capacity in capacities.items():
            loads[f"{share:.0%} of its own", name] = share * capacity
        for name in (OURS, REFERENCE) if {OURS, REFERENCE} <= capacities.keys() else ():
            loads[f"{share:.0%} of {REFERENCE}'s", name] = share * capacities[REFERENCE]
    return loads


def _in_time(server: Server, schedule: open_loop.Schedule) -> dict[str, Any]:
    """Run until the generator was in time; the record says how often it was not, or that it never was."""
    voided = 0
    while True:
        found = open_loop.schedule(server, BODY, schedule)
        voided += found["void"]
        if not found["void"] or voided == TRIES:
            failed = sum(count for status, count in found["statuses"].items() if status != "200")
            return {**found, "failed": failed, "voided": voided}
