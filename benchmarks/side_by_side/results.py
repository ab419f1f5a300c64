"""A run's results in one JSON file: the machine, the versions of the servers, every record as measured."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return what figures depend on beside the servers."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "java": _first_line(["java", "-version"]),
        "ab": _first_line(["ab", "-V"]),
        "h2load": _first_line(["h2load", "--version"]),
        "load_at_begin": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.machine()


def _first_line(command: Sequence[str]) -> str | None:
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return (run.stdout or run.stderr).splitlines()[0].strip()
    return None


def _rounded(value: Any) -> Any:
    """Return a record whose fractions have six digits that count."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Results:
    """The records of one run, which are written whatever ends it."""

    def __init__(self, path: Path, servers: Mapping[str, str]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._head = {
            "command": sys.argv[1:],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": _first_line(
                ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
            ),
            "machine": machine(),
            "servers": dict(servers),
        }

    def write(self) -> None:
        """Write the file: a record a line.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(_rounded(record)) for record in self.records)
        head = json.dumps(self._head, indent=1).removesuffix("\n}")
        self.path.write_text(f'{head},\n "records": [\n{lines}\n]}}\n', encoding="utf-8")
