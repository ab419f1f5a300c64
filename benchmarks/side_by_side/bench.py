"""Measure mms-lite and other model servers side by side on this machine.

    python benchmarks/side_by_side/bench.py W0 --servers mms-lite mms mosec --repeat 5 --out FILE.json

W0 a model that costs nothing, W1 and W2 ResNet-50, W3 memory and start, W4 overload, W5 a worker is killed,
W6 tensors in the open protocols, "open" latency below capacity. tables.py writes the
results into docs/performance.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import crash
import identity
import latency
import memory
import models
import noop
import overload
from peers import FAILURES, PEERS, Job, running
from results import Results

WORKLOADS: dict[str, ModuleType] = {
    "W0": noop,
    "W1": models,
    "W2": models,
    "W3": memory,
    "W4": overload,
    "W5": crash,
    "W6": identity,
    "open": latency,
}
_LIMIT_S = 6 * 3600

Record = dict[str, Any]


def measure(workload: str, servers: Sequence[str], options: argparse.Namespace) -> Iterator[Record]:
    """Yield a workload's records."""
    module = WORKLOADS[workload]
    more: dict[str, Any] = {}
    if module in (noop, identity):
        more = {"cells": options.cells}
    elif module is models:
        more = {"workloads": [each for each in models.WORKLOADS if each.name == workload]}
    yield from module.measure(servers, options.repeat, options.seconds, **more)


def startable(servers: Sequence[str], job: Job) -> Iterator[tuple[str, str]]:
    """Yield each server with an empty text, or with what keeps it from being installed and started here."""
    for name in servers:
        try:
            with running(PEERS[name], job):
                yield name, ""
        except FAILURES as error:
            yield name, f"{error}"[:500]


def _show(record: dict[str, Any]) -> None:
    """Print a record on one line."""
    named = [str(record[key]) for key in ("workload", "cell", "server", "repetition") if key in record]
    values = [f"{key}={value}" for key, value in record.items() if isinstance(value, float | int)]
    print(*named, record.get("error", "") or " ".join(values), flush=True)


def _ended(number: int, _frame: object) -> None:
    """Leave through every `finally`, so that the servers end too."""
    raise SystemExit(f"bench.py: ended by {signal.Signals(number).name}")


def _measured(options: argparse.Namespace, results: Results) -> None:
    """Measure what was asked for; a server that does not start here is told of in each workload."""
    jobs = {workload: identity.JOB if workload == "W6" else Job() for workload in options.workloads}
    found = {job: dict(startable(options.servers, job)) for job in set(jobs.values())}
    for workload, job in jobs.items():
        stopped = {name: why for name, why in found[job].items() if why}
        servers = [name for name in options.servers if name not in stopped]
        for name, why in stopped.items():
            results.records.append({"workload": workload, "server": name, "error": why})
        for record in measure(workload, servers, options) if servers else ():
            results.records.append(record)
            _show(record)
        for name, why in stopped.items():
            print(f"{workload}: {name} was not measured: {why}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if this project's own server could not be measured, else 0."""
    parser = argparse.ArgumentParser(description="Measure model servers side by side.")
    parser.add_argument("workloads", nargs="+", choices=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--servers", nargs="+", choices=list(PEERS), default=["mms-lite", "mms", "mosec"])
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of everything (default: 5)")
    parser.add_argument("--seconds", type=float, help="of each load (default: the workload's own)")
    parser.add_argument(
        "--cells", default="*", metavar="PATTERN", help="cells of W0, W6 with such names only"
    )
    parser.add_argument("--limit", type=int, default=_LIMIT_S, metavar="S", help="end after so long")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _ended)
    signal.alarm(options.limit)
    results = Results(options.out, {name: PEERS[name].version for name in options.servers})
    begin = time.monotonic()
    try:
        _measured(options, results)
    finally:
        results.write()
    print(f"{len(results.records)} records in {time.monotonic() - begin:.0f} s: {options.out}")
    return 1 if any("error" in each and each["server"] == "mms-lite" for each in results.records) else 0


if __name__ == "__main__":
    sys.exit(main())
