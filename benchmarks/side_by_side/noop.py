"""W0, a model that costs nothing: what the servers themselves cost, by size of body, connections, workers.

All servers run, and one is loaded at a time, so that each cell's figures of all come from the same minute.
What they use while they wait is measured too.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ab
import processes
from peers import FAILURES, PEERS, Job, Server, running

BODIES = {"1k": 1_024, "110k": 112_640}  # bytes
CONNECTIONS = (1, 10, 100)
WORKERS = (1, 2)
QUEUE_SIZE = 200  # room for every connection: refusals are another benchmark's
SECONDS = 2.0
WARM_S = 4.0  # for each body; Java compiles what runs often
IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One load."""

    body: str
    connections: int
    workers: int

    @property
    def name(self) -> str:
        """Its name in results, tables and --cells."""
        return f"{self.body}-c{self.connections}-w{self.workers}"


CELLS = tuple(Cell(*each) for each in itertools.product(BODIES, CONNECTIONS, WORKERS))


def measure(
    servers: Sequence[str], repeat: int, seconds: float | None = None, *, cells: str = "*"
) -> Iterator[dict[str, Any]]:
    """Yield a record for each cell whose name fits the pattern, repetition and server.

    What cannot be installed, started or loaded gives a record with `error`.
    """
    chosen = [cell for cell in CELLS if fnmatchcase(cell.name, cells)]
    with tempfile.TemporaryDirectory(prefix="bodies-") as folder:
        for workers in sorted({cell.workers for cell in chosen}):
            with ExitStack() as stack:
                started: dict[str, Server] = {}
                for name in servers:
                    try:
                        job = Job(workers=workers, queue_size=QUEUE_SIZE)
                        started[name] = stack.enter_context(running(PEERS[name], job))
                    except FAILURES as error:
                        yield {"workload": "W0", "server": name, "error": f"{error}"[:500]}
                bodies = _bodies(started, Path(folder))
                for name, server in started.items():
                    yield from _warmed(server, bodies[name])
                yield from _idle(started, workers)
                of_these = [cell for cell in chosen if cell.workers == workers]
                yield from _cells(started, bodies, of_these, repeat, seconds or SECONDS)


def _bodies(servers: Mapping[str, Server], folder: Path) -> dict[str, dict[str, tuple[bytes, Path]]]:
    """Write what each server is sent; return it with the bytes that its model gets."""
    noise = random.Random(1)
    plain = {name: noise.randbytes(size) for name, size in BODIES.items()}
    found: dict[str, dict[str, tuple[bytes, Path]]] = defaultdict(dict)
    for (server, each), (name, body) in itertools.product(servers.items(), plain.items()):
        path = folder / f"{server}-{name}"
        path.write_bytes(each.encode(body))
        found[server][name] = (body, path)
    return found


def _warmed(server: Server, bodies: Mapping[str, tuple[bytes, Path]]) -> Iterator[dict[str, Any]]:
    """Load a server for a while; yield a record only if that fails."""
    try:
        for _, path in bodies.values():
            ab.load(server, path, connections=10, seconds=WARM_S)
    except ab.LoadError as error:
        yield {"workload": "W0", "server": server.peer.name, "error": str(error)}


def _idle(servers: Mapping[str, Server], workers: int) -> Iterator[dict[str, Any]]:
    """Yield which share of a core each server uses while nobody asks it."""
    before = {name: _used_s(server) for name, server in servers.items()}
    time.sleep(IDLE_S)
    for name, server in servers.items():
        after = _used_s(server)
        used = sum(after[role] - before[name].get(role, 0.0) for role in after)
        share = round(used / IDLE_S, 4)
        yield {"workload": "W0", "cell": f"idle-w{workers}", "server": name, "idle_cores": share}


def _cells(
    servers: Mapping[str, Server],
    bodies: Mapping[str, Mapping[str, tuple[bytes, Path]]],
    cells: Sequence[Cell],
    repeat: int,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Yield the records of servers that run; each repetition and each cell begins with another server."""
    names = list(servers)
    for repetition, (index, cell) in itertools.product(range(repeat), enumerate(cells)):
        first = (repetition + index) % max(1, len(names))
        for name in names[first:] + names[:first]:
            record = {"workload": "W0", "cell": cell.name, "server": name, "repetition": repetition}
            body, path = bodies[name][cell.body]
            try:
                yield record | _loaded(servers[name], body, path, cell.connections, seconds)
            except (ab.LoadError, *FAILURES) as error:
                yield record | {"error": f"{error}"[:500]}


def _loaded(server: Server, body: bytes, path: Path, connections: int, seconds: float) -> dict[str, Any]:
    _check(server, body)
    before, begin = _used_s(server), time.monotonic()
    found = ab.load(server, path, connections=connections, seconds=seconds)
    wall_s, after = time.monotonic() - begin, _used_s(server)
    _check(server, body)
    used = {role: after[role] - before.get(role, 0.0) for role in after}
    per_request = {f"{role}_us": round(s / found["answered"] * 1e6, 1) for role, s in used.items()}
    return found | per_request | {"cpu_cores": round(sum(used.values()) / wall_s, 3)}


def _check(server: Server, body: bytes) -> None:
    """See that the model got the whole body.

    Raises:
        ValueError: it did not.
    """
    status, text = server.ask(body)
    if status != 200 or not server.is_right(body, text):
        raise ValueError(f"{server.peer.name} answers {status} {text[:100]!r}")


def _used_s(server: Server) -> dict[str, float]:
    """Return the CPU seconds that a server has used, by the role of its processes."""
    each = server.processes()
    used = processes.cpu_s(process.pid for process in each)
    found: dict[str, float] = defaultdict(float)
    for process in each:
        found[process.role] += used.get(process.pid, 0.0)
    return found
