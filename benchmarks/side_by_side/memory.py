"""W3, start and memory: the command to the first answer, one more model, memory before and after work.

Memory is what Linux calls the proportional set size: pages that processes share count once.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import client
import processes
import psutil
import turns
from peers import Job, Peer, Server, running

COLUMNS = {
    "first_answer_s": "start to first 200, s",
    "register_s": "one more model to its first 200, s",
    "pss_mib": "memory after the first request, MiB",
    "pss_after_20000_mib": "after 20,000, MiB",
    "pss_after_200000_mib": "after 200,000, MiB",
    "growth_mib": "growth between the two, MiB",
}
CAN_REGISTER = ("mms-lite", "mms", "torchserve")  # at run time
BODIES_BYTES = (1024, 110_969)
BLOCK = 2000  # requests with one body, then with the other
CONNECTIONS = 10
REQUESTS = (20_000, 200_000)
BLOCK_S = 600.0
SETTLE_S = 1.0
SECOND = "second"
JOB = Job()


def measure(
    servers: Sequence[str],
    repeat: int,
    seconds: float | None = None,
    *,
    requests: tuple[int, ...] = REQUESTS,
    working: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield a record for each start and server, then one for each of `working` long runs.

    `seconds` is every workload's; this one ends when it is done.
    """
    yield from turns.records("W3", servers, repeat, {"start": _started})
    yield from turns.records("W3", servers, working, {"work": lambda peer: _worked(peer, requests)})


def _started(peer: Peer) -> dict[str, Any]:
    with running(peer, JOB) as server:
        found = {"first_answer_s": server.first_answer_s, **_memory(server, "pss")}
        return {**found, "register_s": _register_s(server)} if peer.name in CAN_REGISTER else found


def _memory(server: Server, name: str) -> dict[str, Any]:
    """Return the sum in MiB and what each process has of it."""
    time.sleep(SETTLE_S)
    found = {each.pid: each for each in server.processes()}
    memory = processes.pss_bytes(found)
    parts = [
        {"role": found[pid].role, "mib": size / 2**20, "command": found[pid].command}
        for pid, size in memory.items()
    ]
    return {f"{name}_mib": sum(memory.values()) / 2**20, f"{name}_parts": parts}


def _worked(peer: Peer, requests: tuple[int, ...]) -> dict[str, Any]:
    """Serve so many requests in all, the bodies by turns; return the memory after each number of them."""
    done = failed = 0
    with running(peer, JOB) as server:
        found = _memory(server, "pss")
        for wanted in requests:
            while done < wanted:
                body = bytes(BODIES_BYTES[done // BLOCK % len(BODIES_BYTES)])
                load = client.Load(CONNECTIONS, BLOCK_S, requests=min(BLOCK, wanted - done), grace_s=BLOCK_S)
                result = client.run(server, body, load)
                done += load.requests
                failed += sum(each.status != 200 for each in result.outcomes)
            found |= _memory(server, f"pss_after_{wanted}")
    growth_mib = found[f"pss_after_{requests[-1]}_mib"] - found[f"pss_after_{requests[0]}_mib"]
    return {**found, "growth_mib": growth_mib, "failed": failed}


def _register_s(server: Server) -> float:
    """Register the model once more under another name; return the time to its first 200.

    Raises:
        RuntimeError: the server does not take it.
    """
    port = _management_port(server)
    query = {"url": "m.mar", "model_name": SECOND, "initial_workers": 1, "synchronous": "true"}
    begin = time.monotonic()
    status, text = _ask(port, "POST", f"/models?{urllib.parse.urlencode(query)}")
    if status == 200:
        status, text = _ask(server.port, "POST", f"/predictions/{SECOND}", b"are you there?")
    if status != 200:
        raise RuntimeError(f"a second model is answered with {status}: {text[:200]!r}")
    return time.monotonic() - begin


def _management_port(server: Server) -> int:
    """Return the port of the server's own that lists its models.

    Raises:
        RuntimeError: there is none.
    """
    for process in server.processes():
        for each in psutil.Process(process.pid).net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port != server.port:
                with suppress(OSError, ValueError, http.client.HTTPException):
                    status, text = _ask(each.laddr.port, "GET", "/models")
                    if status == 200 and "models" in json.loads(text):
                        return int(each.laddr.port)
    raise RuntimeError("the server has no management API")


def _ask(port: int, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, target, body, {"Content-Type": "application/octet-stream"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
