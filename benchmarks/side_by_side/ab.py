"""ApacheBench, the closed-loop load generator: its command for a server, and what its report says."""

from __future__ import annotations

import csv
import math
import re
import subprocess
import tempfile
from pathlib import Path

from peers import Server

_REQUESTS_PER_S = 60_000  # more than any server here answers: the time ends a run, not the number
_ANSWER_S = 60  # that one answer may take
_COUNTS = {
    "answered": "Complete requests",
    "failed": "Failed requests",
    "not_2xx": "Non-2xx responses",
    "keep_alive": "Keep-Alive requests",
}


class LoadError(Exception):
    """ApacheBench gave no figures; the message has its last words."""


def load(server: Server, body: Path, *, connections: int, seconds: float) -> dict[str, float]:
    """Send the file again and again on all connections; return what `report` finds.

    Raises:
        LoadError: the program is missing, or the server stopped answering.
    """
    with tempfile.TemporaryDirectory(prefix="ab-") as folder:
        quantiles = Path(folder, "quantiles.csv")
        command = arguments(server, body, quantiles, connections=connections, seconds=seconds)
        limit_s = seconds + 2 * _ANSWER_S
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LoadError(f"ab: {error}") from error
        try:
            return report(run.stdout, quantiles.read_text())
        except (OSError, ValueError, KeyError) as error:
            said = (run.stderr.strip() or str(error)).splitlines()
            raise LoadError(f"ab: {said[-1]}") from error


def arguments(server: Server, body: Path, quantiles: Path, *, connections: int, seconds: float) -> list[str]:
    """Return the command; answers may differ in length, and connections are kept alive."""
    whole_s = math.ceil(seconds)
    headers = dict(server.headers)
    command = ["ab", "-q", "-k", "-l", "-s", str(_ANSWER_S), "-c", str(connections)]
    command += ["-t", str(whole_s), "-n", str(whole_s * _REQUESTS_PER_S)]  # -t alone ends at 50,000
    command += ["-e", str(quantiles), "-p", str(body), "-T", headers.pop("Content-Type")]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    return [*command, f"http://{server.host}:{server.port}{server.path}"]


def report(text: str, quantiles: str) -> dict[str, float]:
    """Return counts, requests per second, median, 99th percentile and maximum in ms of a report.

    `quantiles` is the file of -e: a line for each percent.

    Raises:
        ValueError, KeyError: this is no whole report.
    """
    found: dict[str, float] = {}
    for name, title in _COUNTS.items():
        match = re.search(rf"^{title}:\s+(\d+)", text, re.M)
        found[name] = int(match[1]) if match else 0  # ab leaves out what did not happen
    rate = re.search(r"^Requests per second:\s+([\d.]+)", text, re.M)
    longest = re.search(r"^\s*100%\s+(\d+)", text, re.M)
    if not found["answered"] or rate is None or longest is None:
        raise ValueError((text.strip() or "nothing was printed").splitlines()[-1])
    rows = {row[0]: float(row[1]) for row in list(csv.reader(quantiles.splitlines()))[1:]}
    return {
        **found,
        "requests_per_s": float(rate[1]),
        "p50_ms": rows["50"],
        "p99_ms": rows["99"],
        "max_ms": int(longest[1]),
    }
