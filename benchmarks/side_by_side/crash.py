"""W5, a crash: one worker is killed with SIGKILL under load.

How many requests fail or hang, and how long until the server answers again, and as fast as before.
"""

from __future__ import annotations

import bisect
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import client
import turns
from peers import Job, Peer, running
from wire import CUT, UNANSWERED

COLUMNS = {
    "rate_before": "requests/s before",
    "failed": "failed",
    "hanging": "hanging",
    "longest_gap_ms": "longest time between two 200s, ms",
    "next_ok_ms": "kill to next 200, ms",
    "next_ok_of_new_ms": "to that of a new request, ms",
    "recovered_s": "to 80 % of the rate, s",
}
WORKERS = (1, 2)
CONNECTIONS, PAUSE_MS = 50, 50.0
PATIENCE_S = 5.0  # a request without an answer for so long hangs
BODY = bytes(1024)
SECONDS = 8.0  # after the kill
KILL_AFTER_S = 3.0
WINDOW_S, STEP_S = 0.5, 0.05  # the rate after the kill is that of such windows
RECOVERED = 0.8
WARM = client.Load(20, 1.0)


def measure(servers: Sequence[str], repeat: int, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield a record for each repetition, number of workers and server."""

    def killing(workers: int) -> turns.Run:
        job = Job(sleep_ms=5, workers=workers, queue_size=1000)
        return lambda peer: _killed(peer, job, seconds or SECONDS)

    yield from turns.records("W5", servers, repeat, {f"w{workers}": killing(workers) for workers in WORKERS})


def _killed(peer: Peer, job: Job, seconds: float) -> dict[str, Any]:
    load = client.Load(
        CONNECTIONS, KILL_AFTER_S + seconds, pause_ms=PAUSE_MS, patience_s=PATIENCE_S, grace_s=PATIENCE_S
    )
    with running(peer, job) as server:
        client.run(server, BODY, WARM)
        generator = client.start(server, BODY, load)
        time.sleep(KILL_AFTER_S)
        worker = server.decode(server.ask(BODY)[1])["pid"]
        killed = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        return summary(client.finish(generator), killed, job.sleep_ms / 1000)


def summary(result: client.Result, killed: float, model_s: float) -> dict[str, Any]:
    """Return the lines of one run with a kill at that moment of the monotonic clock.

    An answer within `model_s` of the kill may have been on its way; the next 200 is one that comes later.
    """
    good = sorted(each.answered for each in result.outcomes if each.status == 200)
    failed = [each for each in result.outcomes if each.status not in (200, CUT)]
    of_new = [each.answered for each in result.outcomes if each.status == 200 and each.sent > killed]
    later = [moment for moment in good if moment > killed + model_s]
    failures = Counter(str(each.status) for each in failed)
    rate = _rate(good, killed - 2, killed)
    # The gap of a server that never answers again lasts until nobody waits for it any longer.
    seen = [*(moment for moment in good if moment > killed - WINDOW_S), *([] if later else [result.ended])]
    return {
        "rate_before": rate,
        "failed": len(failed),
        "failures": failures,
        "hanging": failures[UNANSWERED],
        "longest_gap_ms": max((b - a for a, b in itertools.pairwise(seen)), default=0.0) * 1000,
        "next_ok_ms": (later[0] - killed) * 1000 if later else None,
        "next_ok_of_new_ms": (min(of_new) - killed) * 1000 if of_new else None,
        "recovered_s": _recovered_s(good, killed, result.ended, RECOVERED * rate),
        "generator_cores": result.cpu_s / (result.ended - result.began),
    }


def _rate(moments: list[float], begin: float, end: float) -> float:
    return (bisect.bisect_left(moments, end) - bisect.bisect_left(moments, begin)) / (end - begin)


def _recovered_s(good: list[float], killed: float, end: float, wanted: float) -> float | None:
    """Return when after the kill the first window began in which the server was fast enough; None: never."""
    for number in range(int((end - killed - WINDOW_S) / STEP_S)):
        begin = killed + number * STEP_S
        if _rate(good, begin, begin + WINDOW_S) >= wanted:
            return number * STEP_S
    return None
