"""W6, the identity of 1 x 3 x 224 x 224 float32 in each open protocol: what a tensor's way in and out costs.

All servers run, and one is loaded at a time, so that each cell's figures of all come from the same minute.
Two of them are no model servers: an echo of the same bytes on the library alone.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import client
import h2load
import processes
from peers import FAILURES, PEERS, Job, Server, running
from protocols import PROTOCOLS, check

CONNECTIONS = (1, 32)
SECONDS = 2.0
WARM_REQUESTS, WARM_S = 8, 0.5  # at least; their rate says how many fill the seconds
PATIENCE_S = 60.0
STEADY = 0.9  # the part of the answers whose rate counts
WORKLOAD = "W6"
JOB = Job(work="identity")


@dataclass(frozen=True, slots=True)
class Cell:
    """One load."""

    protocol: str
    connections: int

    @property
    def name(self) -> str:
        """Its name in results, tables and --cells."""
        return f"{self.protocol}-c{self.connections}"


CELLS = tuple(Cell(*each) for each in itertools.product(PROTOCOLS, CONNECTIONS))


def measure(
    servers: Sequence[str], repeat: int, seconds: float | None = None, *, cells: str = "*"
) -> Iterator[dict[str, Any]]:
    """Yield a record for each cell whose name fits the pattern, repetition and server that has the protocol.

    What cannot be installed, started or loaded gives a record with `error`.
    """
    noise = random.Random(1)
    tensor = array("f", (noise.uniform(-2, 2) for _ in range(3 * 224 * 224))).tobytes()
    chosen = [cell for cell in CELLS if fnmatchcase(cell.name, cells)]
    with ExitStack() as stack:
        started: dict[str, Server] = {}
        for name in servers:
            try:
                started[name] = stack.enter_context(running(PEERS[name], JOB))
            except FAILURES as error:
                yield {"workload": WORKLOAD, "server": name, "error": f"{error}"[:500]}
        rates: dict[tuple[Cell, str], float] = {}
        for repetition, (index, cell) in itertools.product(range(repeat), enumerate(chosen)):
            for name in _turned([*started], repetition + index):
                if cell.protocol not in started[name].doors:
                    continue
                place = {"workload": WORKLOAD, "cell": cell.name, "server": name, "repetition": repetition}
                try:
                    found = _loaded(started[name], cell, tensor, seconds or SECONDS, rates.get((cell, name)))
                except (h2load.LoadError, *FAILURES) as error:
                    yield place | {"error": f"{error}"[:500]}
                    continue
                rates[cell, name] = found["requests_per_s"]
                yield place | found


def _turned(servers: Sequence[str], by: int) -> list[str]:
    start = by % max(1, len(servers))
    return [*servers[start:], *servers[:start]]


def _loaded(server: Server, cell: Cell, tensor: bytes, seconds: float, rate: float | None) -> dict[str, Any]:
    """Load a server for about so long, between two answers that are compared bit for bit.

    The number of requests, so many as fill the time at this rate, is fixed: each is waited for.
    """
    protocol, door = PROTOCOLS[cell.protocol], server.doors[cell.protocol]
    answer_bytes = len(check(protocol, door, tensor).body)
    load = _calls if protocol.is_grpc else _posts

    def run(requests: float) -> h2load.Report:
        each = max(1, round(requests / cell.connections))
        return load(server, cell, tensor, each * cell.connections, answer_bytes)

    rate = rate or _rate(run, cell.connections)
    before = _used_s(server)
    found = run(rate * seconds)
    used = {role: s - before.get(role, 0.0) for role, s in _used_s(server).items()}
    used["client"] = found.cpu_s
    check(protocol, door, tensor)
    answered = len(found.spans)
    per_request = {f"{role}_us": round(s / answered * 1e6, 1) for role, s in used.items()}
    return {"answered": answered, "failed": found.failed, **figures(found.spans), **per_request}


def _rate(run: Callable[[float], h2load.Report], connections: int) -> float:
    """Return the rate of the first run that is long enough to tell; it warms the server up, too."""
    requests = max(WARM_REQUESTS, connections)
    while True:
        rate = figures(run(requests).spans)["requests_per_s"]
        if requests >= rate * WARM_S:
            return rate
        requests *= 4


def _posts(server: Server, cell: Cell, tensor: bytes, requests: int, answer_bytes: int) -> h2load.Report:
    """Load a REST API with this project's own client."""
    protocol = PROTOCOLS[cell.protocol]
    server.port = server.doors[cell.protocol].port() or 0
    server.path, server.headers, server.encode = protocol.path, protocol.headers, protocol.request
    limits = {"requests": requests, "grace_s": PATIENCE_S, "answer_bytes": answer_bytes}
    result = client.run(server, tensor, client.Load(cell.connections, PATIENCE_S, **limits))
    good = [(each.sent, each.answered) for each in result.outcomes if each.status == 200]
    return h2load.Report(good, len(result.outcomes) - len(good), result.cpu_s)


def _calls(server: Server, cell: Cell, tensor: bytes, requests: int, answer_bytes: int) -> h2load.Report:
    """Load a gRPC API with h2load."""
    protocol, port = PROTOCOLS[cell.protocol], server.doors[cell.protocol].port() or 0
    sizes = {"requests": requests, "answer_bytes": answer_bytes}
    return h2load.load(port, protocol.path, protocol.request(tensor), connections=cell.connections, **sizes)


def figures(spans: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the rate, the median, the 99th percentile and the maximum in ms of answered requests.

    The rate is of the first answers: at the end, some connections have done theirs.

    Raises:
        ValueError: there is none.
    """
    if not spans:
        raise ValueError("no request was answered rightly")
    ended = sorted(end for _, end in spans)
    steady = max(1, int(len(ended) * STEADY))
    took = [(end - begin) * 1000 for begin, end in spans]
    return {
        "requests_per_s": steady / (ended[steady - 1] - min(begin for begin, _ in spans)),
        "p50_ms": client.quantile(took, 0.5) or 0.0,
        "p99_ms": client.quantile(took, 0.99) or 0.0,
        "max_ms": max(took),
    }


def _used_s(server: Server) -> Mapping[str, float]:
    """Return the CPU seconds that a server has used, by the role of its processes."""
    each = server.processes()
    used = processes.cpu_s(process.pid for process in each)
    found: dict[str, float] = defaultdict(float)
    for process in each:
        found[process.role] += used.get(process.pid, 0.0)
    return found
