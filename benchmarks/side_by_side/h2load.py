"""h2load, the closed-loop load generator for gRPC: its command, and what its report says.

It does not read answers; their number and the sum of their bytes tell whether one was another than expected.
"""

from __future__ import annotations

import math
import re
import resource
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

_ANSWER_S = 60  # that one answer may take
_LIMIT_S = 300.0
_HEADERS = ("-H", "Content-Type: application/grpc", "-H", "TE: trailers")


class LoadError(Exception):
    """h2load gave no figures; the message has its last words."""


class Report(NamedTuple):
    """When each good call began and ended, in s; how many failed; the CPU seconds that h2load took."""

    spans: list[tuple[float, float]]
    failed: int
    cpu_s: float


def load(
    port: int, path: str, message: bytes, *, connections: int, requests: int, answer_bytes: int
) -> Report:
    """Call a method so often over all connections, one call at a time on each.

    Every right answer is a message of `answer_bytes`.

    Raises:
        LoadError: the program is missing, or the server stopped answering.
    """
    with tempfile.TemporaryDirectory(prefix="h2load-") as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes(framed(message))
        command = ["h2load", "-c", str(connections), "-n", str(requests), "-m", "1", "-d", str(body)]
        command += [*_HEADERS, "-N", str(_ANSWER_S), "--log-file", str(log), f"http://127.0.0.1:{port}{path}"]
        cpu_before = _cpu_s()
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LoadError(f"h2load: {error}") from error
        cpu_s = _cpu_s() - cpu_before
        try:
            spans = finished(log.read_text())
            return Report(spans, failed(run.stdout, answer_bytes + len(framed(b""))), cpu_s)
        except (OSError, ValueError) as error:
            said = (run.stderr or run.stdout or str(error)).strip().splitlines()
            raise LoadError(f"h2load: {said[-1]}") from error


def framed(message: bytes) -> bytes:
    """Return a gRPC message as it stands in a body: not compressed, its length, itself."""
    return struct.pack(">?I", False, len(message)) + message


def failed(text: str, answer_bytes: int) -> int:
    """Return how many calls failed, of what h2load prints; of wrong answers, the least that there were.

    A refusal over gRPC has the HTTP status 200, but no message: then bytes are missing.

    Raises:
        ValueError: this is no whole report.
    """
    counts = re.search(r"^requests: (\d+) total,.* (\d+) succeeded", text, re.M)
    traffic = re.search(r"^traffic:.*\((\d+)\) data$", text, re.M)
    if counts is None or traffic is None:
        raise ValueError((text.strip() or "nothing was printed").splitlines()[-1])
    asked, good, received = int(counts[1]), int(counts[2]), int(traffic[1])
    return asked - good + math.ceil(abs(good * answer_bytes - received) / answer_bytes)


def finished(log: str) -> list[tuple[float, float]]:
    """Return when each answered call began and ended, in s, of a file of --log-file.

    Its lines are the begin in µs, the HTTP status and the duration in µs.
    """
    rows = [[int(each) for each in line.split()] for line in log.splitlines()]
    return [(begin / 1e6, (begin + took) / 1e6) for begin, status, took in rows if status == 200]


def _cpu_s() -> float:
    """Return the CPU seconds of all processes that this one started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
