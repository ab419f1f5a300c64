"""Ask the real Multi Model Server and mms-lite the same, and fail on every difference that is not intended.

python benchmarks/compat/compare.py [--report docs/mms-side-by-side.md] [--only 'PATTERN']
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import difference
import report
import store
import table
from exchange import Address, Answer, Sent, exchange
from servers import PEER, CannotCompareError, NotStartedError, Server, free_ports, install_peer, java_version

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77  # the exit status where a machine lacks what the comparison needs

_LIMIT_S = 900
_STEP_S = 0.1
_LIMITS = {
    "default_workers_per_model": 1,
    "job_queue_size": 3,
    "max_request_size": 100_000,
    "max_response_size": 100_000,
    "default_response_timeout_seconds": 20,
    "metrics_address": "none",  # the rest is for mms-lite only; MMS ignores keys that it does not know
    "grpc_address": "none",
    "drain_timeout_s": 5,
}
_CORS = {
    "cors_allowed_origin": "https://example.com",
    "cors_allowed_methods": "GET, POST",
    "cors_allowed_headers": "X-Asked",
}


class Bench:
    """Both servers twice: with two addresses, and with one for both APIs; and what they read."""

    def __init__(self, places: dict[str, str], addresses: dict[str, dict[str, Address]]) -> None:
        self.places = places
        self._addresses = addresses  # by server, then by port's name

    def run(self, case: table.Case) -> tuple[list[Answer], list[Answer]]:
        """Send a case's requests to both servers at once; return the answers of MMS and ours."""
        with ThreadPoolExecutor(2) as pool:
            tasks = [pool.submit(self._ask, case, self._addresses[name]) for name in ("mms", "ours")]
            mms, ours = (task.result() for task in tasks)
        return mms, ours

    def _ask(self, case: table.Case, ports: dict[str, Address]) -> list[Answer]:
        sent = case.bytes(self.places)
        ask = partial(exchange, ports[case.port], sent, case.limit_s)
        if case.until:
            return [_repeated(ask, case)]
        with ThreadPoolExecutor(case.parallel) as pool:
            answers = []
            for _ in range(case.parallel):
                answers.append(pool.submit(ask))
                time.sleep(case.stagger_ms / 1000)
            found = [answer.result() for answer in answers]
        if any(b"Worker died." in answer.body for answer in found):
            _recover(ports)
        return found


def _repeated(ask: partial[Answer], case: table.Case) -> Answer:
    until = time.monotonic() + case.limit_s
    while case.until.encode() not in b"%d %s" % ((answer := ask()).status, answer.body):
        if time.monotonic() > until:
            break
        time.sleep(_STEP_S)
    return answer


def _recover(ports: dict[str, Address]) -> None:
    """Wait until a worker that died is back: a request to its model waits for it."""
    for name in store.STARTUP:
        get = f"GET /predictions/{name} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"
        request = Sent(get.encode(), head_only=True)
        until = time.monotonic() + 20.0
        while exchange(ports["inference"], request, 20.0).status == 500 and time.monotonic() < until:
            time.sleep(_STEP_S)


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """Start four servers and a host of archives in a folder; end them whatever happens.

    Raises:
        CannotCompareError: this machine lacks what that needs.
        NotStartedError: a server does not come up.
    """
    java_version()
    commands = {"mms": [str(install_peer() / PEER)], "ours": [sys.executable, "-m", "mms_lite"]}
    models = folder / "store"
    store.fill(models)
    closed, *ports = free_ports(1 + 3 * len(commands))
    with ExitStack() as stack:
        hosts = [f"http://127.0.0.1:{port}" for port in (stack.enter_context(_file_host(models)), closed)]
        settings = {**_LIMITS, "model_store": models, "allowed_urls": ",".join(f"{host}/" for host in hosts)}
        addresses, servers = {}, []
        for name, command in commands.items():
            own = {api: ports.pop() for api in ("inference", "management", "merged")}
            addresses[name] = {api: ("127.0.0.1", port) for api, port in own.items()}
            servers += _pair(Server(name, command, folder / name, own, settings))
        with ThreadPoolExecutor(len(servers)) as pool:
            for server, _ in servers:
                stack.callback(server.end)
            list(pool.map(lambda each: each[0].start(each[1]), servers))
        yield Bench(dict(zip(("<files>", "<closed>"), hosts, strict=True)), addresses)


def _pair(server: Server) -> list[tuple[Server, Sequence[str]]]:
    """Return a server with two addresses and one that serves both APIs on its third, and their models."""
    apart = {api: server.ports[api] for api in ("inference", "management")}
    one = dict.fromkeys(apart, server.ports["merged"])
    pair: list[tuple[Server, Sequence[str]]] = []
    for folder, ports, models, more in (
        (server.folder, apart, store.STARTUP, {}),
        (server.folder.with_name(f"{server.name}-merged"), one, store.STARTUP[:1], _CORS),
    ):
        settings = {**server.settings, **more, **_bound(ports), "load_models": _mars(models)}
        pair.append((Server(folder.name, server.command, folder, ports, settings), models))
    return pair


def _bound(ports: dict[str, int]) -> dict[str, str]:
    return {f"{api}_address": f"http://127.0.0.1:{port}" for api, port in ports.items()}


def _mars(names: Sequence[str]) -> str:
    return ",".join(f"{name}.mar" for name in names)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def _file_host(folder: Path) -> Iterator[int]:
    """Serve a folder over HTTP; the port is bound."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as host:
        thread = threading.Thread(target=host.serve_forever)
        thread.start()
        try:
            yield host.server_port
        finally:
            host.shutdown()
            thread.join()


def run(cases: Sequence[table.Case], folder: Path) -> list[report.Compared]:
    """Send all cases to both servers, in order.

    Raises:
        CannotCompareError: this machine lacks what that needs.
        NotStartedError: a server does not come up.
    """
    compared = []
    with bench(folder) as both:
        for case in cases:
            mms, ours = both.run(case)
            compared.append(report.Compared(case, mms, ours, difference.compare(case.id, mms, ours)))
    return compared


def _ended(number: int, _frame: object) -> None:
    """Leave through every `finally`, so that the servers end too."""
    raise SystemExit(f"compare.py: ended by {signal.Signals(number).name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status: 0 same, 1 differences, 77 cannot compare."""
    parser = argparse.ArgumentParser(description="Compare mms-lite with the real Multi Model Server.")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the result there, as Markdown")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="the cases with such ids only")
    options = parser.parse_args(arguments)
    cases = [case for case in table.read() if fnmatchcase(case.id, options.only)]
    signal.signal(signal.SIGTERM, _ended)
    signal.signal(signal.SIGALRM, _ended)
    signal.alarm(_LIMIT_S)
    try:
        with tempfile.TemporaryDirectory(prefix="compat-") as folder:
            compared = run(cases, Path(folder).resolve())
    except CannotCompareError as error:
        print(f"compare.py: SKIPPED, nothing was compared: {error}", file=sys.stderr)
        return SKIPPED
    except NotStartedError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    whitelist = difference.read()
    verdict = difference.judge((f for each in compared for f in each.findings), whitelist)
    if options.only != "*":
        verdict.unused.clear()  # an entry may be for a case that was left out
    print(report.summary(compared, verdict))
    if options.report:
        options.report.write_text(report.page(compared, verdict, whitelist, java_version()), encoding="utf-8")
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
