"""The access log: its line, the count of answers beside it, and how those of many requests are written."""

import gzip
import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mms_lite import logs, rotation
from mms_lite.rotation import RotatingFile

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3}"
COUNT = r"Requests([245])XX\.Count:1\|#Level:Host\|#hostname:([^,|]+),timestamp:(\d+)"
REQUESTS = re.compile(f"({TIME}) - {COUNT}")
ODD = st.text(st.characters(), max_size=30)  # lone surrogates too
NOON_MS = int(time.mktime((2026, 11, 21, 12, 0, 0, 0, 0, -1))) * 1000
MIDNIGHT_MS = 12 * 3600 * 1000
MOMENTS = st.integers(0, 2000) | st.integers(MIDNIGHT_MS - 100, MIDNIGHT_MS + 100)  # after noon
ANSWERS = st.lists(st.tuples(MOMENTS, st.sampled_from([200, 302, 404, 500]), ODD), max_size=30)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file, after compression."""
    for thread in threading.enumerate():
        if thread.name == "log-compress":
            thread.join(20)
    return {
        file.name: gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for file in folder.iterdir()
    }


def test_the_access_line_is_that_of_mms() -> None:
    line = logs.access_line("127.0.0.1:55420", "GET", "/ping?a=%20", "HTTP/1.1", 200, 31)
    assert line == '/127.0.0.1:55420 "GET /ping?a=%20 HTTP/1.1" 200 31'
    assert logs.access_line("", "GET", "/", "HTTP/1.1", 200, 0).startswith("/0.0.0.0 ")


def test_a_quote_in_a_path_does_not_end_the_field() -> None:
    line = logs.access_line("h:1", "GET", '/a" 200 1', "HTTP/1.1", 404, 0)
    assert line == '/h:1 "GET /a%22 200 1 HTTP/1.1" 404 0'


@given(ODD, ODD)
def test_no_path_and_no_method_makes_a_second_line_or_field(method: str, path: str) -> None:
    line = logs.access_line("h:1", method.replace('"', ""), path, "HTTP/1.1", 200, 0)
    assert len(line.splitlines()) == 1
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", line)
    line.encode()
    assert line.count('"') == 2


def test_each_line_of_the_access_log_is_counted_once_by_its_status(tmp_path: Path) -> None:
    statuses = [200, 204, 301, 404, 413, 499, 500, 503, 101, 422, 200]
    router = logs.configure(tmp_path, tmp_path, console=False)
    for number, status in enumerate(statuses):
        router.log_access("127.0.0.1:5", "GET", f'/a" 200 1 {number}', "HTTP/1.1", status, number)
    logging.getLogger(logs.METRICS).info("CPUUtilization.Percent:1.0")
    router.close()
    access = (tmp_path / "access_log.log").read_text().splitlines()
    *counted, other = (tmp_path / "mms_metrics.log").read_text().splitlines()
    assert other.endswith(" - CPUUtilization.Percent:1.0")
    matches = [REQUESTS.fullmatch(line) for line in counted]
    assert [match[2] for match in matches if match] == list("22544455542")
    for line, match in zip(access, matches, strict=True):
        assert match is not None
        assert match[1] == line.partition(" - ")[0]
        assert match[3] == socket.gethostname()
        assert time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(int(match[4]))) == match[1][:19]


@pytest.mark.parametrize("kind", [logs._AccessFile, logs._MetricsFile])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=ANSWERS, max_bytes=st.sampled_from([300, 1000, rotation.MAX_BYTES]))
def test_lines_written_at_once_are_those_written_one_by_one_also_where_a_new_file_begins(
    kind: type[logs._LogFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[tuple[int, int, str]],
    max_bytes: int,
) -> None:
    monkeypatch.setattr(rotation, "OLD_FILES", 1000)
    lines = [
        (NOON_MS + ms, status, logs.access_line("h:1", "GET", path, "HTTP/1.1", status, 0))
        for ms, status, path in sorted(answers)
    ]
    written = []
    for size in (1, 4, 13):
        folder = tmp_path / str(size)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        file = kind(folder / "x.log", logs.ACCESS)
        file._file = RotatingFile(folder / "x.log", max_bytes=max_bytes)
        file.open()
        for begin in range(0, len(lines), size):
            file.write_access(lines[begin : begin + size])
            file.flush()
        file.close()
        written.append(contents(folder))
    assert written[0] == written[1] == written[2]
    every = b"".join(written[0].values()).decode().splitlines()
    assert len(every) == len(lines)
    assert all(re.match(f"{TIME} - ", line) for line in every)


def test_many_threads_lose_no_line_and_each_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_GATHER_S", 0.0)  # the writer falls asleep and wakes as often as it can
    router = logs.configure(tmp_path, tmp_path, console=False)

    def ask(client: int) -> None:
        for number in range(3000):
            router.log_access(f"{client}:1", "GET", f"/{number}", "HTTP/1.1", 200, 0)

    clients = [threading.Thread(target=ask, args=(client,)) for client in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    router.close()
    seen: dict[str, list[int]] = {}
    for line in (tmp_path / "access_log.log").read_text().splitlines():
        client, number = re.findall(r"/(\d+)", line.partition(" - ")[2])[:2]
        seen.setdefault(client, []).append(int(number))
    assert seen == {str(client): list(range(3000)) for client in range(4)}


def test_records_and_lines_of_requests_keep_their_order_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_TOGETHER", 4)
    router = logs.configure(tmp_path, tmp_path, console=False)
    kinds = list("rraaarararrrraaaaaar")
    for kind in kinds:
        if kind == "r":
            logging.getLogger(logs.METRICS).info("load")
        else:
            router.log_access("h:1", "GET", "/", "HTTP/1.1", 200, 0)
    router.close()
    lines = (tmp_path / "mms_metrics.log").read_text().splitlines()
    assert ["r" if line.endswith(" - load") else "a" for line in lines] == kinds


async def test_a_line_is_written_soon_after_a_long_silence(
    tmp_path: Path, wait_until: Callable[..., Awaitable[None]]
) -> None:
    router = logs.configure(tmp_path, tmp_path, console=False)
    try:
        (files,) = router._sinks
        for number in range(1, 4):
            await wait_until(lambda: files._asleep, "the writer sleeps")
            router.log_access("h:1", "GET", "/", "HTTP/1.1", 200, 0)
            log = tmp_path / "access_log.log"
            await wait_until(lambda: log.read_text().count("\n") == number, "the line is there")  # noqa: B023
    finally:
        router.close()
