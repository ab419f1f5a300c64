"""Where the microseconds of a request go: CPU by part of the server, and time on the way.

    python benchmarks/profile/breakdown.py            # into docs/performance.md, between its marks
    python benchmarks/profile/breakdown.py --print    # on the terminal only

A model that does nothing, one worker, every other setting the default. Loads with and without the sampler
take turns on one server: the first give the shares, the second the CPU time that is divided.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "side_by_side"))

import ab
import figures
import recipes
from figures import Measured, Used
from noop import BODIES
from peers import PEERS, Job, Server, running
from recipes import Launch

from mms_lite.cli import PROCESS_NAME

INSIDE = Path(__file__).resolve().parent / "inside"
CONNECTIONS = (1, 100)
WARM_S = 2.0
PLAIN_S, SAMPLED_S = 2.0, 4.0
ROUNDS = 2
_REPORT_S = 10.0  # for a process to write its samples
_STEP_S = 0.01
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LIMIT_S = 600


@dataclass(frozen=True, slots=True)
class Place:
    """A server that runs with a sampler in its processes; `pids` are "front" and "worker"."""

    server: Server
    pids: Mapping[str, int]
    folder: Path  # where the samplers write
    metrics: str

    def signal(self, number: int) -> None:
        """Tell both samplers."""
        for pid in self.pids.values():
            os.kill(pid, number)

    def reports(self) -> dict[str, dict[str, Any]]:
        """End sampling and return what each process has found since the last time.

        Raises:
            RuntimeError: a process does not write it.
        """
        files = {role: self.folder / f"{pid}.json" for role, pid in self.pids.items()}
        for file in files.values():
            file.unlink(missing_ok=True)
        self.signal(signal.SIGUSR2)
        until = time.monotonic() + _REPORT_S
        while not all(file.exists() for file in files.values()):
            if time.monotonic() > until:
                raise RuntimeError(f"no samples from {self.server.peer.name}")
            time.sleep(_STEP_S)
        return {role: json.loads(file.read_text()) for role, file in files.items()}

    def used(self) -> dict[str, Used]:
        """Return the CPU time that both processes have used so far, in seconds."""
        return {role: _used(pid) for role, pid in self.pids.items()}

    def histograms(self) -> dict[str, tuple[float, float]]:
        """Return the sum and the count of each histogram of /metrics."""
        with urllib.request.urlopen(f"{self.metrics}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for name, kind, value in re.findall(r"^mms_(\w+)_seconds_(sum|count)\{.*\} (\S+)$", text, re.M):
            found[name][kind] = float(value)
        return {name: (values["sum"], values["count"]) for name, values in found.items()}


def _used(pid: int) -> Used:
    user, system = _ticks(Path("/proc", str(pid), "stat"))
    main = sum(_ticks(Path("/proc", str(pid), "task", str(pid), "stat")))
    return Used(user / _TICKS_PER_S, system / _TICKS_PER_S, main / _TICKS_PER_S)


def _ticks(stat: Path) -> tuple[int, int]:
    fields = stat.read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


def launch(out: Path, job: Job, folder: Path, programs: Path) -> Launch:
    """Start the server as the side-by-side benchmark does, with a sampler in it and in its worker."""
    plain = recipes.mms_lite(job, folder, programs)
    (out / "server").symlink_to(folder)
    pack = [str(programs / "model-archiver"), "--model-name", "m", "--model-path", str(INSIDE), "--force"]
    pack += ["--handler", "sampled_service:handle", "--export-path", str(folder / "store")]
    subprocess.run(pack, capture_output=True, timeout=60, check=True)
    program = [str(programs / "python"), str(INSIDE / "sampled_server.py"), str(out), PROCESS_NAME]
    return replace(plain, command=[*program, *plain.command[1:]])


@contextmanager
def sampled() -> Iterator[Place]:
    """Run a server with samplers; it ends with the context."""
    with tempfile.TemporaryDirectory(prefix="profile-") as name:
        out = Path(name).resolve()
        peer = replace(PEERS["mms-lite"], launch=partial(launch, out))
        with running(peer, Job()) as server:
            state = json.loads((out / "server" / "tmp" / ".model_server.json").read_text())
            pids = {each.role: each.pid for each in server.processes() if each.role in ("front", "worker")}
            yield Place(server, pids, out, state["metrics_address"])


@dataclass(frozen=True, slots=True)
class Load:
    """A cell's load."""

    body: Path
    connections: int

    def send(self, server: Server, seconds: float) -> tuple[int, float]:
        """Load the server; return the answered requests and the seconds that they took.

        Raises:
            ab.LoadError: one of them failed.
        """
        found = ab.load(server, self.body, connections=self.connections, seconds=seconds)
        if found["failed"] or found["not_2xx"]:
            raise ab.LoadError(f"{found['failed']:.0f} failed, {found['not_2xx']:.0f} were refused")
        return int(found["answered"]), found["answered"] / found["requests_per_s"]


@dataclass(slots=True)
class Tally:
    """What a cell's loads have added up to."""

    answered: int = 0
    wall_s: float = 0.0
    used: dict[str, Used] = field(default_factory=dict)
    histograms: dict[str, tuple[float, float]] = field(default_factory=dict)
    model_ns: int = 0
    batches: int = 0
    stacks: dict[str, Counter[figures.Stack]] = field(default_factory=lambda: defaultdict(Counter))
    sampled_answered: int = 0
    sampled_used: dict[str, Used] = field(default_factory=dict)

    def add_plain(self, place: Place, load: Load, seconds: float) -> None:
        """Load the server without sampling."""
        place.reports()  # which begins the model's clock anew
        used, histograms = place.used(), place.histograms()
        answered, wall_s = load.send(place.server, seconds)
        _add(self.used, used, place.used())
        for name, (total, count) in place.histograms().items():
            before, so_far = histograms[name], self.histograms.get(name, (0.0, 0.0))
            self.histograms[name] = so_far[0] + total - before[0], so_far[1] + count - before[1]
        model = place.reports()["worker"]
        self.model_ns += model["model_ns"]
        self.batches += model["batches"]
        self.answered += answered
        self.wall_s += wall_s

    def add_sampled(self, place: Place, load: Load, seconds: float) -> None:
        """Load the server while both of its processes are sampled."""
        before = place.used()
        place.signal(signal.SIGUSR1)
        answered, _ = load.send(place.server, seconds)
        for role, found in place.reports().items():
            for count, stack in found["stacks"]:
                self.stacks[role][tuple((file, function) for file, function in stack)] += count
        _add(self.sampled_used, before, place.used())
        self.sampled_answered += answered

    def measured(self, name: str, connections: int) -> Measured:
        """Return the figures of one request, in microseconds."""
        per_request = 1e6 / self.answered
        means = {name: 1e6 * total / max(1.0, count) for name, (total, count) in self.histograms.items()}
        return Measured(
            name,
            used={role: used * per_request for role, used in self.used.items()},
            kernel={role: (used + self.sampled_used[role]).kernel for role, used in self.used.items()},
            stacks=self.stacks,
            sampled_us=1e6 * sum(used.total for used in self.sampled_used.values()) / self.sampled_answered,
            client_us=1e6 * connections * self.wall_s / self.answered,
            means_us={**means, "model": self.model_ns / 1000 / max(1, self.batches)},
            requests_per_s=self.answered / self.wall_s,
        )


def _add(so_far: dict[str, Used], before: Mapping[str, Used], after: Mapping[str, Used]) -> None:
    for role, used in after.items():
        so_far[role] = so_far.get(role, Used()) + (used - before[role])


def measure(rounds: int) -> Iterator[Measured]:
    """Yield the figures of each cell."""
    with sampled() as place:
        noise = random.Random(1)
        bodies = {}
        for name, size in BODIES.items():
            bodies[name] = place.folder / name
            bodies[name].write_bytes(noise.randbytes(size))
            Load(bodies[name], 10).send(place.server, WARM_S)
        for name, connections in itertools.product(BODIES, CONNECTIONS):
            load, tally = Load(bodies[name], connections), Tally()
            for _ in range(rounds):
                tally.add_plain(place, load, PLAIN_S)
                tally.add_sampled(place, load, SAMPLED_S)
            yield tally.measured(f"{BODIES[name] // 1024} KB, {_counted(connections)}", connections)


def _counted(connections: int) -> str:
    return "1 connection" if connections == 1 else f"{connections} connections"


def _ended(number: int, _frame: object) -> None:
    """Leave through every `finally`, so that the server ends too."""
    raise SystemExit(f"breakdown.py: ended by {signal.Signals(number).name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Show where the microseconds of a request go.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each cell (default: {ROUNDS})")
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _ended)
    signal.alarm(_LIMIT_S)
    if not options.print:
        figures.write("")  # to hear now that the page has no marks, not after the measurement
    cells = []
    for each in measure(options.rounds):
        print(figures.text(each), flush=True)
        cells.append(each)
    if not options.print:
        figures.write(figures.markdown(cells, date.today()))


if __name__ == "__main__":
    main()
