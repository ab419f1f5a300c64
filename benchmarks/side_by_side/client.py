"""A closed loop: so many connections, each with its next request as soon as the last one is answered.

The load generator is the same for all servers: a process of its own on the standard library alone. Here are
its command line, and what starts it and reads its result. open_loop.py sends at fixed times instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent))

from wire import CUT, GARBLED, HEAD_END, UNANSWERED, Connection, Outcome, Wire

T = TypeVar("T")
LOOK_S = 0.05  # how often an end, or a request beyond its patience, is looked for
ASK_AGAIN_S = 0.005


class Server(Protocol):
    """What a generator needs to know of a running server."""

    @property
    def host(self) -> str: ...  # noqa: D102
    @property
    def port(self) -> int: ...  # noqa: D102
    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def headers(self) -> Mapping[str, str]: ...  # noqa: D102
    def encode(self, body: bytes) -> bytes: ...  # noqa: D102


def request_bytes(server: Server, body: bytes) -> bytes:
    """Return the whole POST request that carries the body as this server wants it."""
    content = server.encode(body)
    head = {"Host": f"{server.host}:{server.port}", **server.headers, "Content-Length": str(len(content))}
    lines = [f"POST {server.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    return "\r\n".join(lines).encode() + HEAD_END + content


def quantile(values: Iterable[float], share: float) -> float | None:
    """Return the smallest value that is not below this share of them (nearest rank); None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)] if ordered else None


@dataclass(frozen=True)
class Load:
    """A closed loop: so many connections, each with its next request when the last one is answered."""

    connections: int
    seconds: float
    requests: int = 0  # after so many it ends, too; 0: no limit
    pause_ms: float = 0.0  # after any answer but 200
    patience_s: float = 60.0  # then the connection is closed and the request counts as unanswered
    grace_s: float = 0.0  # at the end, for what is on its way; 0: it is cut off
    answer_bytes: int = 0  # that a right answer's body has; 0: any number
    first_after_s: float = 0.0  # then, with all connections closed, one asks until there is a 200


class ClosedLoop:
    """Runs one `Load`; `outcomes` in the order in which they came."""

    def __init__(self, address: tuple[str, int], request: bytes, load: Load) -> None:
        self.outcomes: list[Outcome] = []
        self._load = load
        self._wire = Wire(address, request, self._settled)
        self._connections = [Connection() for _ in range(load.connections)]
        self._paused: deque[tuple[float, Connection]] = deque()  # in the order of their moments
        self._left = load.requests or -1
        self._end = 0.0
        self._next_look = 0.0

    def run(self) -> tuple[float, float]:
        """Run it; return when it began and when every connection was closed."""
        began = time.monotonic()
        self._end = began + self._load.seconds
        for connection in self._connections:
            self._send(connection)
        while time.monotonic() < self._end:
            self._send_paused()
            self._wait(self._paused[0][0] if self._paused else self._end)
        last = self._end + self._load.grace_s
        while time.monotonic() < last and any(each.sent for each in self._connections):
            self._wait(last)
        self._wire.close()
        ended = time.monotonic()
        rest = UNANSWERED if self._load.grace_s else CUT
        self.outcomes += [Outcome(each.sent, ended, rest) for each in self._connections if each.sent]
        return began, ended

    def _send(self, connection: Connection) -> None:
        self._wire.send(connection)
        self._left -= 1
        if not self._left:
            self._end = time.monotonic()

    def _send_paused(self) -> None:
        now = time.monotonic()
        while self._paused and self._paused[0][0] <= now:
            self._send(self._paused.popleft()[1])

    def _wait(self, until: float) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._give_up_before(now - self._load.patience_s)
        self._wire.wait(min(until, self._next_look))

    def _give_up_before(self, moment: float) -> None:
        for connection in self._connections:
            if 0 < connection.sent < moment:
                self._wire.give_up(connection, UNANSWERED)

    def _settled(self, connection: Connection, outcome: Outcome) -> None:
        expected = self._load.answer_bytes
        if expected and outcome.status == 200 and connection.reader.body_bytes != expected:
            outcome = outcome._replace(status=GARBLED)
        self.outcomes.append(outcome)
        if outcome.answered >= self._end:
            return
        if outcome.status == 200 or not self._load.pause_ms:
            self._send(connection)
        else:
            self._paused.append((outcome.answered + self._load.pause_ms / 1000, connection))


@dataclass(frozen=True)
class Result:
    """What a generator's process found: its span on the monotonic clock, its CPU time, every outcome."""

    began: float
    ended: float
    cpu_s: float
    first_after_s: float | None
    outcomes: list[Outcome]

    def latencies_ms(self, *statuses: int | str) -> list[float]:
        """Return how long the requests that ended with one of these took."""
        return [(each.answered - each.sent) * 1000 for each in self.outcomes if each.status in statuses]

    def statuses(self) -> dict[str, int]:
        """Return how many requests ended with each status."""
        return dict(Counter(str(each.status) for each in self.outcomes))


def first_ok(address: tuple[str, int], request: bytes, limit_s: float) -> float | None:
    """Ask on one new connection until there is a 200; return how long that took."""
    outcomes: list[Outcome] = []
    connection, began = Connection(), time.monotonic()
    wire = Wire(address, request, lambda _, outcome: outcomes.append(outcome))
    end = began + limit_s
    while time.monotonic() < end:
        wire.send(connection)
        while connection.sent and time.monotonic() < end:
            wire.wait(end)
        if outcomes and outcomes[-1].status == 200:
            break
        time.sleep(ASK_AGAIN_S)
    wire.close()
    return outcomes[-1].answered - began if outcomes and outcomes[-1].status == 200 else None


def start(server: Server, body: bytes, load: Load) -> subprocess.Popen[bytes]:
    """Start a generator; its request is in its pipe already."""
    return start_generator(__file__, server, request_bytes(server, body), asdict(load))


def start_generator(
    script: str, server: Server, request: bytes, options: dict[str, float]
) -> subprocess.Popen[bytes]:
    """Start one of the generators in a Python without site-packages and send it the request."""
    named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-I", "-S", script, f"--host={server.host}", f"--port={server.port}", *named]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(request)
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: subprocess.Popen[bytes]) -> Result:
    """Wait for a generator and read what it found."""
    found = read_result(process)
    outcomes = [Outcome(*each) for each in found.pop("outcomes")]
    return Result(**found, outcomes=outcomes)


def read_result(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for a generator's process; return the JSON it wrote.

    Raises:
        CalledProcessError: it failed.
    """
    written, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    found: dict[str, Any] = json.loads(written)
    return found


def run(server: Server, body: bytes, load: Load) -> Result:
    """Load the server from a process of its own."""
    return finish(start(server, body, load))


def command_line(kind: type[T], description: str) -> tuple[tuple[str, int], T]:
    """Read an address and the fields of a dataclass of numbers from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    for field in fields(kind):
        number = int if field.type == "int" else float
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=number, required=field.default is MISSING, default=field.default)
    options = vars(parser.parse_args())
    return (options.pop("host"), options.pop("port")), kind(**options)


def main() -> None:
    """Run the command line; the whole request comes on standard input."""
    address, load = command_line(Load, "Send the request on standard input over and over.")
    request = sys.stdin.buffer.read()
    loop = ClosedLoop(address, request, load)
    gc.disable()  # nothing here makes cycles, and a collection is a pause
    began, ended = loop.run()
    first_after_s = first_ok(address, request, load.first_after_s) if load.first_after_s else None
    found = {"began": began, "ended": ended, "cpu_s": time.process_time(), "first_after_s": first_after_s}
    json.dump({**found, "outcomes": loop.outcomes}, sys.stdout)


if __name__ == "__main__":
    main()
