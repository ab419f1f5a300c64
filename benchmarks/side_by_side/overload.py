"""W4, overload: five times more clients than a queue has places, and then none.

How long a refusal takes, whether what was accepted is answered as fast as its place in the queue allows, and
how soon a new client is served when all the others have hung up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import client
import turns
from peers import Job, Peer, running

COLUMNS = {
    "refusals": "refusals",
    "refusal_p50_ms": "refusal p50 ms",
    "refusal_p99_ms": "p99 ms",
    "refusal_max_ms": "max ms",
    "refusals_over_100_ms": "over 100 ms",
    "served_per_s": "served/s",
    "served_p50_ms": "served p50 ms",
    "served_limit_ms": "its limit",
    "first_after_ms": "first 200 after the load, ms",
    "broken": "neither served nor refused",
}
REFUSALS = (429, 503)
CONNECTIONS, PAUSE_MS = 500, 50.0
BODY = bytes(1024)
SECONDS = 8.0
PATIENCE_S = 30.0
WARM = client.Load(20, 1.0)
TOLERANCE = 1.1
JOB = Job(sleep_ms=20, queue_size=100)


def measure(servers: Sequence[str], repeat: int, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield a record for each repetition and server."""
    load = client.Load(
        CONNECTIONS, seconds or SECONDS, pause_ms=PAUSE_MS, patience_s=PATIENCE_S, first_after_s=PATIENCE_S
    )

    def run(peer: Peer) -> dict[str, Any]:
        with running(peer, JOB) as server:
            client.run(server, BODY, WARM)
            return summary(client.run(server, BODY, load), JOB)

    yield from turns.records(
        "W4", servers, repeat, {f"{CONNECTIONS} clients, queue of {JOB.queue_size}": run}
    )


def summary(result: client.Result, job: Job) -> dict[str, Any]:
    """Return the lines of one run.

    `first_after_ms`: the generator closes all its connections at once, opens a new one and asks, again after
    5 ms if it is refused; from the last close to its 200. The queue is full of requests of clients that left.
    """
    refusals, served = result.latencies_ms(*REFUSALS), result.latencies_ms(200)
    statuses = result.statuses()
    seconds = result.ended - result.began
    known = {"200", "cut", *map(str, REFUSALS)}
    first_after_s = result.first_after_s
    return {
        "refusals": len(refusals),
        "refusal_p50_ms": client.quantile(refusals, 0.5),
        "refusal_p99_ms": client.quantile(refusals, 0.99),
        "refusal_max_ms": max(refusals, default=None),
        "refusals_over_100_ms": sum(each > 100 for each in refusals),
        "served_per_s": len(served) / seconds,
        "served_p50_ms": client.quantile(served, 0.5),
        "served_limit_ms": (job.queue_size + job.workers) * job.sleep_ms * TOLERANCE,
        "first_after_ms": None if first_after_s is None else first_after_s * 1000,
        "statuses": statuses,
        "broken": sum(count for status, count in statuses.items() if status not in known),
        "generator_cores": result.cpu_s / seconds,
    }
