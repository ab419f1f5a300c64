"""The host's load in mms_metrics.log: which lines, when, and what no failing or hanging reading can do."""

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import pytest

from mms_lite import host_metrics, logs
from mms_lite.host_metrics import HostMetrics

NAMES = [
    "CPUUtilization.Percent",
    "DiskAvailable.Gigabytes",
    "DiskUsage.Gigabytes",
    "DiskUtilization.Percent",
    "MemoryAvailable.Megabytes",
    "MemoryUsed.Megabytes",
    "MemoryUtilization.Percent",
]
FORM = re.compile(r"([A-Za-z.]+):(\d+\.\d+)\|#Level:Host\|#hostname:([^,|]+),timestamp:(\d+)")
HOUR_S = 3600.0

Wait = Callable[..., Any]
Start = Callable[..., HostMetrics]


@pytest.fixture
def start(caplog: pytest.LogCaptureFixture) -> Iterator[Start]:
    """Start a sampler that is closed at the end, its thread ended."""
    caplog.set_level(logging.INFO, logs.METRICS)
    started: list[HostMetrics] = []

    def begin(interval_s: float, **readings: Any) -> HostMetrics:
        sampler = HostMetrics(interval_s, **readings)
        sampler.start()
        started.append(sampler)
        return sampler

    yield begin
    for sampler in started:
        sampler.close()
    for thread in threading.enumerate():
        if thread.name == "host-metrics":
            thread.join(10)
            assert not thread.is_alive()


def values(messages: list[str]) -> dict[str, float]:
    matches = [FORM.fullmatch(message) for message in messages]
    assert all(matches), messages
    return {match[1]: float(match[2]) for match in matches if match}


async def test_the_first_sample_comes_at_once_in_alphabetical_order(
    start: Start, caplog: pytest.LogCaptureFixture, wait_until: Wait
) -> None:
    begun_s = int(time.time())
    start(HOUR_S)
    await wait_until(lambda: len(caplog.messages) >= len(NAMES), "seven lines")
    assert list(values(caplog.messages)) == NAMES
    assert {record.name for record in caplog.records} == {logs.METRICS}
    for message in caplog.messages:
        match = FORM.fullmatch(message)
        assert match is not None
        assert match[3] == socket.gethostname()
        assert begun_s <= int(match[4]) <= time.time()


async def test_the_numbers_are_those_of_the_machine(
    start: Start, caplog: pytest.LogCaptureFixture, wait_until: Wait
) -> None:
    start(HOUR_S)
    await wait_until(lambda: len(caplog.messages) >= len(NAMES), "seven lines")
    told = values(caplog.messages)
    disk, memory = psutil.disk_usage("/"), psutil.virtual_memory()
    assert told["DiskAvailable.Gigabytes"] == pytest.approx(disk.free / 2**30, rel=0.2)
    assert told["DiskUsage.Gigabytes"] == pytest.approx(disk.used / 2**30, rel=0.2)
    assert told["MemoryAvailable.Megabytes"] < memory.total / 2**20
    assert told["MemoryUsed.Megabytes"] < memory.total / 2**20
    for name, value in told.items():
        assert not name.endswith("Percent") or 0 <= value <= 100


async def test_the_first_cpu_load_is_of_a_real_moment(
    start: Start, caplog: pytest.LogCaptureFixture, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_s: list[float] = []

    def cpu_percent() -> float:
        asked_s.append(time.monotonic())
        return 12.5

    monkeypatch.setattr(psutil, "cpu_percent", cpu_percent)
    start(HOUR_S, readings=[host_metrics.cpu])
    await wait_until(lambda: caplog.messages, "a line")
    assert values(caplog.messages) == {"CPUUtilization.Percent": 12.5}
    first, second = asked_s
    assert second - first >= host_metrics._FIRST_S * 0.9


async def test_samples_go_on(start: Start, caplog: pytest.LogCaptureFixture, wait_until: Wait) -> None:
    start(0.01)
    await wait_until(lambda: len(caplog.messages) >= 3 * len(NAMES), "three samples")
    assert [message.partition(":")[0] for message in caplog.messages[: 3 * len(NAMES)]] == NAMES * 3


async def test_a_reading_that_fails_is_left_out_until_it_works(
    start: Start, caplog: pytest.LogCaptureFixture, wait_until: Wait
) -> None:
    works = threading.Event()

    def sometimes() -> Mapping[str, float]:
        if not works.is_set():
            raise psutil.AccessDenied
        return {"Mended.Count": 1.0}

    start(0.01, readings=[sometimes, host_metrics.memory])
    await wait_until(lambda: len(caplog.messages) >= 6, "two samples without it")
    assert not any("Mended" in message for message in caplog.messages)
    works.set()
    await wait_until(lambda: any("Mended" in message for message in caplog.messages), "its line")


async def test_a_reading_that_hangs_holds_up_neither_the_loop_nor_the_end(
    start: Start, caplog: pytest.LogCaptureFixture, wait_until: Wait
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hanging() -> Mapping[str, float]:
        asked.set()
        assert go_on.wait(20)
        return {"Late.Count": 1.0}

    sampler = start(0.01, readings=[hanging])
    await wait_until(asked.is_set, "the reading to begin")
    begun_s = time.monotonic()
    sampler.close()
    assert time.monotonic() - begun_s < 1
    go_on.set()


async def test_close_ends_it(start: Start, caplog: pytest.LogCaptureFixture, wait_until: Wait) -> None:
    sampler = start(0.01)
    await wait_until(lambda: caplog.messages, "a line")
    alive = [thread for thread in threading.enumerate() if thread.name == "host-metrics"]
    assert len(alive) == 1
    sampler.close()
    await wait_until(lambda: not any(thread.is_alive() for thread in alive), "the thread to end")
