"""The benchmark's own figures: what is read from ab, how processes get their roles, what the tables say."""

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import ab
import noop
import peers
import processes
import pytest
import recipes
import tables

REPORT = """
Keep-Alive requests:    7340
Complete requests:      7340
Failed requests:        3
   (Connect: 0, Receive: 0, Length: 3, Exceptions: 0)
Non-2xx responses:      2
Requests per second:    3669.99 [#/sec] (mean)

Percentage of the requests served within a certain time (ms)
  50%     26
  99%     37
 100%     45 (longest request)
"""
QUANTILES = "Percentage served,Time in ms\n0,1.000\n50,26.117\n99,37.489\n"
LISTENS = """
import socket
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
input()
"""


def record(server: str, repetition: int, rate: float, **more: Any) -> dict[str, Any]:
    place = {"workload": "W0", "cell": "1k-c1-w1", "server": server, "repetition": repetition}
    return {**place, "requests_per_s": rate, "front_us": 300.0, "worker_us": 100.0, **more}


def test_a_report_of_ab_gives_counts_rate_and_quantiles() -> None:
    assert ab.report(REPORT, QUANTILES) == {
        "answered": 7340,
        "failed": 3,
        "not_2xx": 2,
        "keep_alive": 7340,
        "requests_per_s": 3669.99,
        "p50_ms": 26.117,
        "p99_ms": 37.489,
        "max_ms": 45,
    }


def test_a_report_without_errors_has_zeros_for_them() -> None:
    lines = [line for line in REPORT.splitlines() if "Non-2xx" not in line and "Failed" not in line]

    found = ab.report("\n".join(lines), QUANTILES)

    assert (found["failed"], found["not_2xx"]) == (0, 0)


@pytest.mark.parametrize(
    "text", ["", "Benchmarking 127.0.0.1 (be patient)...\n", "Complete requests:      0\n"]
)
def test_a_report_of_a_server_that_stopped_answering_has_no_figures(text: str) -> None:
    with pytest.raises(ValueError, match=r"nothing was printed|be patient|Complete requests"):
        ab.report(text, QUANTILES)


def test_processes_are_found_by_their_marker_and_told_apart_and_ended() -> None:
    marker = uuid.uuid4().hex
    environment = {**os.environ, processes.MARKER: marker}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", LISTENS], env=environment, start_new_session=True, **pipes
    ) as it:
        assert it.stdout is not None
        port = int(it.stdout.readline())
        try:
            found = processes.marked(marker)
            roles = [
                processes.described(found, number, workers)[0].role
                for number, workers in ((port, ()), (port, (it.pid,)), (0, ()))
            ]
            memory, used = processes.pss_bytes(found), processes.cpu_s(found)
        finally:
            left = processes.end(marker, it.pid, grace_s=10.0)

    assert found == [it.pid]
    assert roles == ["front", "worker", "other"]
    assert memory[it.pid] > 1_000_000
    assert used[it.pid] >= 0.0
    assert left == []


def test_a_server_that_does_not_start_is_told_of_and_keeps_nobody_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def launch(job: peers.Job, folder: Path, programs: Path) -> peers.Launch:
        ends = [sys.executable, "-c", "raise SystemExit('no such model')"]
        return recipes.Launch(ends, lambda: None, "/")

    broken = peers.Peer("broken", "", "1", launch)
    monkeypatch.setitem(peers.PEERS, "broken", broken)

    (found,) = noop.measure(["broken"], 1, cells="1k-c1-w1")

    assert (found["workload"], found["server"]) == ("W0", "broken")
    assert "no such model" in found["error"]


def test_a_server_is_not_measured_with_work_that_it_is_not_for() -> None:
    with pytest.raises(peers.CannotCompareError, match="mlserver is not measured with mxnet"):
        peers.PEERS["mlserver"].install("mxnet")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([3.0], "3"),
        ([5.0, 5.0, 5.0], "5"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "3 (2..4)"),
        ([0.511, 0.522], "0.52 (0.51..0.52)"),
        ([12_346.6, 123.4, 12.34], "123 (67.9..6,235)"),
    ],
)
def test_a_spread_is_the_median_and_the_quartiles(values: list[float], text: str) -> None:
    assert tables.spread(values) == text


def test_ratios_are_made_within_each_repetition() -> None:
    records = [record("mms-lite", each, rate) for each, rate in enumerate((100.0, 200.0, 400.0))]
    records += [record("mms", each, rate) for each, rate in enumerate((50.0, 50.0, 100.0))]

    found = tables.paired(records, tables.key("requests_per_s"), "mms")

    assert found == [2.0, 4.0, 4.0]


def test_a_table_shows_ratios_figures_and_what_was_not_measured() -> None:
    records = [record("mms-lite", 0, 2000.0, failed=0, not_2xx=1), record("mms", 0, 1000.0, keep_alive=0)]
    records.append({"workload": "W0", "server": "mosec", "error": "cannot be installed\nwith pip"})

    page = "\n".join(tables.lines(tables.TABLES["W0"], records))

    assert "| requests/s: mms-lite / | mms | mosec |\n| --- | --- | --- |\n| 1k-c1-w1 | 2 | - |" in page
    assert "| 1k-c1-w1 | mms-lite | 2,000 | - | - | - | 1 | 400 | 300 | 100 |" in page
    assert "- mms: closes the connection" in page
    assert "- mosec: not measured: cannot be installed" in page


def test_only_what_is_between_the_marks_of_a_page_is_replaced() -> None:
    page = "a\n<!-- W0 begin -->\nold\n<!-- W0 end -->\nb\n"

    assert tables.between(page, "W0", "new") == "a\n<!-- W0 begin -->\nnew\n<!-- W0 end -->\nb\n"
    with pytest.raises(ValueError, match="no marks <!-- W1 begin -->"):
        tables.between(page, "W1", "new")
