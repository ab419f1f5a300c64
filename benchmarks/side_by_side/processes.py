"""The processes of a server, by a marker in their environment: nothing else is counted or ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARKER = "MMS_LITE_SIDE_BY_SIDE"

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STEP_S = 0.05
_KILLED_S = 5.0
_LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a server; `role` is "front" (it listens), "worker" (it runs the model) or "other"."""

    pid: int
    role: str
    command: str


def marked(marker: str) -> list[int]:
    """Return the pids of the live processes that carry this marker, oldest first."""
    entry = f"{MARKER}={marker}".encode()
    found = []
    for folder in _PROC.iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return sorted(found)


def described(pids: Iterable[int], port: int, workers: Collection[int]) -> list[Process]:
    """Return these processes with their roles; `workers` are those that said that they run the model."""
    listening = _listening(port)
    found = []
    for pid in pids:
        with suppress(OSError):
            command = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
            listens = pid not in workers and not listening.isdisjoint(_sockets(pid))
            role = "worker" if pid in workers else "front" if listens else "other"
            found.append(Process(pid, role, command.replace("\0", " ").strip()[:160]))
    return found


def _listening(port: int) -> set[str]:
    """Return the inodes of the sockets that listen on a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found


def _sockets(pid: int) -> set[str]:
    found = set()
    for descriptor in (_PROC / str(pid) / "fd").iterdir():
        with suppress(OSError):
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def cpu_s(pids: Iterable[int]) -> dict[int, float]:
    """Return the CPU time, user and system, that each live process has used so far."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            found[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return found


def pss_bytes(pids: Iterable[int]) -> dict[int, int]:
    """Return each live process's memory, shared pages divided among those that share them."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    found[pid] = int(line.split()[1]) * 1024
    return found


def end(marker: str, group: int, grace_s: float) -> list[int]:
    """Ask a server's process group to end, then kill whatever is left of it; return what would not go."""
    for pid in marked(marker):
        with suppress(OSError):
            if os.getpgid(pid) == group:  # others are for the server to end
                os.kill(pid, signal.SIGTERM)
    _gone(marker, grace_s)
    for pid in marked(marker):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _gone(marker, _KILLED_S)
    return marked(marker)


def _gone(marker: str, limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while marked(marker) and time.monotonic() < until:
        time.sleep(_STEP_S)
