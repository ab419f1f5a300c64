"""What batch size and delay do at a given load: a model of 5 ms for each batch and 1 ms for each row.

    python benchmarks/side_by_side/batching.py --seconds 3

The model sleeps, as one on an accelerator leaves the CPU alone. Without a batch it answers 167 requests/s at
most, in batches of 16 it could answer 762. Rows per batch are those of the worker's own clock.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ab
import models
from peers import FAILURES, PEERS, Job, Server, running

BATCH_SIZES = (4, 8, 16)
DELAYS_MS = (None, 0, 5, 100)  # None: not said
CONNECTIONS = (1, 8, 32, 100)
BODY_BYTES = 1_024
QUEUE_SIZE = 200  # room for every connection
SECONDS = 2.0
SETTLED_S = 0.5  # from the first request on


def settings() -> list[tuple[int, int | None]]:
    """Return each batch size with each delay; a batch of one row waits for nothing."""
    return [(1, None), *itertools.product(BATCH_SIZES, DELAYS_MS)]


def measure(servers: Sequence[str], repeat: int, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield a record for each repetition, setting, server and number of connections."""
    with tempfile.TemporaryDirectory(prefix="bodies-") as folder:
        body = Path(folder, "body")
        body.write_bytes(bytes(BODY_BYTES))
        for repetition, (rows, delay_ms), name in itertools.product(range(repeat), settings(), servers):
            place = {"workload": "batching", "server": name, "repetition": repetition}
            place |= {"batch_size": rows, "delay_ms": delay_ms}
            try:
                yield from (place | found for found in _cells(name, rows, delay_ms, body, seconds or SECONDS))
            except (ab.LoadError, *FAILURES) as error:
                yield place | {"error": f"{error}"[:500]}


def _cells(
    name: str, rows: int, delay_ms: int | None, body: Path, seconds: float
) -> Iterator[dict[str, Any]]:
    """Start a server with these settings; yield what is seen under each load."""
    peer = replace(PEERS[name], works=("accelerator",))
    with tempfile.TemporaryDirectory(prefix="clocks-") as clocks:
        job = Job(
            work="accelerator",
            batch_size=rows,
            max_batch_delay_ms=delay_ms,
            queue_size=QUEUE_SIZE,
            clock_dir=Path(clocks),
        )
        with running(peer, job) as server:
            for connections in CONNECTIONS:
                yield _loaded(server, body, Path(clocks), connections, seconds)


def _loaded(server: Server, body: Path, clocks: Path, connections: int, seconds: float) -> dict[str, Any]:
    begin = time.monotonic_ns()
    seen = ab.load(server, body, connections=connections, seconds=seconds)
    settled = begin + int(SETTLED_S * models.NS)
    found = models.at_work(models.read_clocks(clocks).values(), settled, time.monotonic_ns())
    kept = ("answered", "failed", "not_2xx", "requests_per_s", "p50_ms")
    return {
        "connections": connections,
        "rows_per_batch": found["rows_per_batch"],
        **{key: seen[key] for key in kept},
        "p99_ms": seen["p99_ms"] or seen["max_ms"],  # of 50 answers or fewer ab writes no percentile of 99
    }


def table(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table: a row for each setting, a column for each load; medians."""
    good = [record for record in records if "error" not in record]
    yield f"| batch size, delay | {' | '.join(f'{each} connections' for each in CONNECTIONS)} |"
    yield f"|{' --- |' * (1 + len(CONNECTIONS))}"
    for rows, delay_ms in settings():
        of_it = [each for each in good if (each["batch_size"], each["delay_ms"]) == (rows, delay_ms)]
        cells = [_text([each for each in of_it if each["connections"] == n]) for n in CONNECTIONS]
        delay = "" if rows == 1 else ", unset" if delay_ms is None else f", {delay_ms} ms"
        yield f"| {rows}{delay} | {' | '.join(cells)} |"


def _text(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "-"
    rows, rate, p50, p99 = (
        statistics.median(record[key] for record in records)
        for key in ("rows_per_batch", "requests_per_s", "p50_ms", "p99_ms")
    )
    return f"{rows:.1f} rows, {rate:.0f}/s, {p50:.0f} / {p99:.0f} ms"


def main() -> int:
    """Run the command line; return 0 if everything was measured, else 1."""
    parser = argparse.ArgumentParser(description="Measure batch size, delay and load.")
    parser.add_argument("--server", choices=list(PEERS), default="mms-lite")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load")
    options = parser.parse_args()
    records = []
    for record in measure([options.server], options.repeat, options.seconds):
        records.append(record)
        print(record, file=sys.stderr)
    print("\n".join(table(records)))
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
