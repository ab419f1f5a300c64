"""What the machine gives this process: CPUs within its affinity and cgroups, and GPUs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cpus:
    """How many CPUs this process may run on (affinity, cpusets), and the time that its cgroups leave it."""

    affinity: int
    quota: float | None  # in CPUs; None without a limit

    @property
    def count(self) -> int:
        """How many there are to compute with: of a quota of one and a half, one; more would be throttled."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, int(self.quota)))


def cpus(root: Path = Path("/")) -> Cpus:
    """Return what this process's affinity and cgroups (v1 and v2) leave it; `root` holds proc and sys."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Cpus(affinity, min(_cpu_quotas(root), default=None))


def cpu_count(root: Path = Path("/")) -> int:
    """Return how many CPUs this process may use; see `Cpus`."""
    return cpus(root).count


def threads_per_worker(cpus: int, workers: int) -> int:
    """Return the share of the CPUs that each of a model's workers computes with, at least one."""
    return max(1, cpus // max(1, workers))


def _cpu_quotas(root: Path) -> Iterator[float]:
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's, of which only the top is mounted: try every level.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in (mount / "unified", mount / controllers, mount / "cpu"):
            for depth in range(len(parts) + 1):
                yield from _quota(top.joinpath(*parts[:depth]))


def _quota(folder: Path) -> Iterator[float]:
    v1 = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
    for pair in (_read(folder / "cpu.max"), v1):
        if match := re.match(r"([0-9]+)\s+([1-9][0-9]*)", pair):  # "max 100000" and "-1 100000": no limit
            yield int(match[1]) / int(match[2])


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def gpu_count(limit: int | None = None) -> int:
    """Return the number of GPUs that nvidia-smi lists, at most `limit`; 0 without it. Takes up to 5 s."""
    if limit == 0:
        return 0
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv"]
    try:
        answer = subprocess.run(command, capture_output=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return 0
    found = sum(line.strip().isdigit() for line in answer.stdout.splitlines())
    return found if limit is None else min(limit, found)
