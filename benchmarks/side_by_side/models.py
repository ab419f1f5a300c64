"""Real models, W1 and W2: how much of the time the workers compute, by their own clocks, and what it costs.

Each server runs alone, between two slices of the same work without a server (bare.py), because a shared
machine changes from minute to minute; the order of the servers changes with each repetition.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ab
import bare
import processes
import work
from peers import FAILURES, PEERS, Job, Peer, Server, running

CONNECTIONS = 100
QUEUE_SIZE = 200  # room for every connection: refusals are another benchmark's
FILL_DELAY_MS = 20  # for batches of more than one row, the same for every server
WARM_S = 3.0  # of load before the measured time
NS = 1e9


@dataclass(frozen=True, slots=True)
class Workload:
    """A model under load; `least_s` is what it takes to see enough of its batches in five slices."""

    name: str
    work: str
    workers: int
    threads: int
    batch_size: int = 1
    least_s: float = 10.0

    @property
    def label(self) -> str:
        """Its name and numbers in the table."""
        return f"{self.name} {self.work}, {self.workers} x {self.threads} threads, batch {self.batch_size}"


WORKLOADS = (
    Workload("W1", "mxnet", workers=2, threads=1),
    Workload("W2", "onnx", workers=1, threads=2),
    Workload("W2", "onnx", workers=1, threads=2, batch_size=8, least_s=15.0),
    Workload("W2", "onnx", workers=2, threads=1),
    Workload("W2", "onnx", workers=2, threads=1, batch_size=8, least_s=15.0),
)


class Batch(NamedTuple):
    """A line of a worker's clock: begin and end in ns of the monotonic clock, rows."""

    begin: int
    end: int
    rows: int


def measure(
    servers: Sequence[str],
    repeat: int,
    seconds: float | None = None,
    *,
    workloads: Sequence[Workload] = WORKLOADS,
) -> Iterator[dict[str, Any]]:
    """Yield a record for each repetition, workload and server, as each is ready.

    `seconds` is the length of a slice, else the workload's own. What cannot be measured gives a record with
    `error`.
    """
    with tempfile.TemporaryDirectory(prefix="bodies-") as folder:
        for repetition, workload in itertools.product(range(repeat), workloads):
            length = workload.least_s if seconds is None else seconds
            body = write_body(workload.work, Path(folder))
            place = {**asdict(workload), "workload": workload.label, "repetition": repetition}
            for found in _round(_turned(servers, repetition), workload, body, length):
                yield place | found


def _turned(servers: Sequence[str], by: int) -> list[str]:
    start = by % max(1, len(servers))
    return [*servers[start:], *servers[:start]]


def _round(
    servers: Sequence[str], workload: Workload, body: Path, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield what is found of each server, compared with the bare loop before and after it."""
    size = {"workers": workload.workers, "threads": workload.threads, "rows": workload.batch_size}
    before = bare.rate(workload.work, body, seconds=seconds, **size)
    for name in servers:
        try:
            found = _slice(PEERS[name], workload, body, seconds)
        except (ab.LoadError, *FAILURES) as error:
            yield {"server": name, "error": f"{error}"[:500]}
            continue
        after = bare.rate(workload.work, body, seconds=seconds, **size)
        alone, before = (before + after) / 2, after
        yield {"server": name, "bare_rows_per_s": alone, "ratio": found["rows_per_s"] / alone, **found}


def write_body(kind: str, folder: Path) -> Path:
    """Write what is sent: a photo (JPEG, 112,525 bytes), or the tensor of one (602,112 bytes)."""
    path = folder / kind
    if kind == "mxnet":
        path.write_bytes((work.published("photos") / "rocket.jpg").read_bytes())
    else:
        noise = random.Random(1)
        values = (noise.uniform(-2, 2) for _ in range(work.TENSOR_BYTES // 4))
        path.write_bytes(array("f", values).tobytes())
    return path


def _slice(peer: Peer, workload: Workload, body: Path, seconds: float) -> dict[str, Any]:
    """Start a server, load it for some seconds, end it; return what was seen."""
    with tempfile.TemporaryDirectory(prefix="clocks-") as folder:
        job = Job(
            work=workload.work,
            workers=workload.workers,
            threads=workload.threads,
            batch_size=workload.batch_size,
            max_batch_delay_ms=FILL_DELAY_MS if workload.batch_size > 1 else None,
            queue_size=QUEUE_SIZE,
            clock_dir=Path(folder),
        )
        with running(peer, job) as server:
            return _loaded(server, body, Path(folder), seconds)


def _loaded(server: Server, body: Path, clocks: Path, seconds: float) -> dict[str, Any]:
    """Load a running server for some seconds; return what its clocks, its processes and the client say."""
    with tempfile.NamedTemporaryFile() as sent, ThreadPoolExecutor(1) as beside:
        Path(sent.name).write_bytes(server.encode(body.read_bytes()))
        load_s = WARM_S + seconds + 1  # it ends after what is measured
        client = beside.submit(ab.load, server, Path(sent.name), connections=CONNECTIONS, seconds=load_s)
        time.sleep(WARM_S)
        begin, cpu_begin = time.monotonic_ns(), _cpu_s(server)
        time.sleep(seconds)
        end, cpu_end = time.monotonic_ns(), _cpu_s(server)
        seen = client.result()
    by_worker = read_clocks(clocks)
    used = {pid: cpu_end[pid] - cpu_begin.get(pid, 0.0) for pid in cpu_end}
    rows = rows_between(by_worker.values(), begin, end)
    return {
        **at_work(by_worker.values(), begin, end),
        **cpu_shares(used, by_worker),
        "rows_per_s": rows / (end - begin) * NS,
        "rows_per_cpu_s": rows / sum(used.values()),  # other load on the machine moves it less
        "measured_s": (end - begin) / NS,
        **{name: seen[name] for name in ("answered", "failed", "p50_ms", "p99_ms")},
        "errors": seen["not_2xx"],
    }


def _cpu_s(server: Server) -> dict[int, float]:
    return processes.cpu_s(process.pid for process in server.processes())


def read_clocks(folder: Path) -> dict[int, list[Batch]]:
    """Return the batches of each worker, by its pid."""
    return {
        int(file.name): [Batch(*map(int, line.split())) for line in file.read_text().splitlines()]
        for file in folder.iterdir()
        if file.name.isdecimal()
    }


def at_work(workers: Iterable[Sequence[Batch]], begin: int, end: int) -> dict[str, Any]:
    """Return how much of their time workers were at work, from the first to the last batch in an interval.

    `busy_s` and `wall_s` are sums over the workers, `gap_ms` is the median time between two batches.
    """
    busy = wall = batches = rows = 0
    gaps: list[int] = []
    for all_batches in workers:
        inside = [batch for batch in all_batches if begin <= batch.begin and batch.end <= end]
        if inside:
            busy += sum(batch.end - batch.begin for batch in inside)
            wall += inside[-1].end - inside[0].begin
            batches += len(inside)
            rows += sum(batch.rows for batch in inside)
            gaps += [later.begin - earlier.end for earlier, later in itertools.pairwise(inside)]
    return {
        "busy_s": busy / NS,
        "wall_s": wall / NS,
        "batches": batches,
        "rows_per_batch": rows / batches if batches else None,
        "gap_ms": statistics.median(gaps) / 1e6 if gaps else None,
    }


def rows_between(workers: Iterable[Sequence[Batch]], begin: int, end: int) -> float:
    """Return how many rows were done in an interval; of a batch on its edge, the part of its time inside."""
    done = 0.0
    for batch in itertools.chain.from_iterable(workers):
        inside = min(batch.end, end) - max(batch.begin, begin)
        if inside > 0:
            done += batch.rows * inside / (batch.end - batch.begin)
    return done


def cpu_shares(used: Mapping[int, float], workers: Collection[int]) -> dict[str, float | None]:
    """Divide the CPU seconds by pid into those of the workers and of all other processes of the server."""
    of_workers = sum(seconds for pid, seconds in used.items() if pid in workers)
    others = sum(used.values()) - of_workers
    share = others / of_workers if of_workers else None
    return {"workers_cpu_s": of_workers, "others_cpu_s": others, "others_share": share}
