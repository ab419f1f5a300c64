"""The server from configuration to exit code, on the loop of the test."""

import asyncio
import gc
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mms_lite.address import Address
from mms_lite.config import Config
from mms_lite.errors import ConfigError
from mms_lite.instance import Instance
from mms_lite.server import Server

FREE = Address("http", "127.0.0.1", 0)
ECHO = "def handle(data, context):\n    return data and [bytes(item['body']) for item in data]\n"
Wait = Callable[..., Any]
BROKEN = "def handle(data, context):\n    raise ValueError('no weights')\n"


class Running:
    """A server on this test's loop, and what it reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.store.mkdir()
        self.work = folder / "work"
        self.work.mkdir()
        self.instance = Instance(str(folder))
        self.events: list[Mapping[str, Any]] = []
        self.accesses: list[str] = []
        self.settings: dict[str, Any] = {
            "inference_address": FREE,
            "management_address": FREE,
            "model_store": self.store,
            "temp_directory": self.work,
            "default_workers_per_model": 1,
            "default_service_handler": "service:handle",
            "drain_timeout_s": 5.0,
        }
        self.server: Server | None = None
        self.task: asyncio.Task[int] | None = None

    def model(self, name: str, source: str) -> None:
        (self.store / name).mkdir()
        (self.store / name / "service.py").write_text(source)

    def start(self, **settings: Any) -> asyncio.Task[int]:
        config = Config(**{**self.settings, **settings})
        self.server = Server(config, report=self.events.append, access=self.accesses.append)
        assert self.instance.claim()
        self.task = asyncio.create_task(self.server.run(self.instance))
        return self.task

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.events]

    def event(self, kind: str) -> Mapping[str, Any]:
        return next(event for event in self.events if event["event"] == kind)

    async def status(self, api: str, target: str) -> int:
        address = Address.parse(self.event("listening")[f"{api}_address"])
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return int(answer.split()[1])


@pytest.fixture
async def running(
    tmp_path: Path, children: Callable[[], list[Any]], wait_until: Wait
) -> AsyncIterator[Running]:
    running = Running(tmp_path)
    thresholds, policy = gc.get_threshold(), os.sched_getscheduler(0)
    yield running
    if running.task is not None and not running.task.done():
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
    running.instance.release()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)
    await wait_until(lambda: not children(), "the workers to end")
    # What a server asks of its own process is not for those that test it.
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    os.sched_setscheduler(0, policy, os.sched_param(0))


async def test_it_tells_its_addresses_its_models_and_when_it_is_ready(
    running: Running, wait_until: Wait
) -> None:
    running.model("echo", ECHO)
    task = running.start(load_models="ALL")
    await wait_until(lambda: "ready" in running.kinds(), "the server to be ready")

    assert running.kinds() == ["listening", "model", "ready"]
    told = running.event("model")
    assert (told["model"], told["error"]) == ("echo", None)
    assert await running.status("inference", "/ping") == 200
    assert '"GET /ping HTTP/1.1" 200' in running.accesses[0]
    assert await running.status("inference", "/models/echo") == 404
    assert await running.status("management", "/models/echo") == 200
    state = json.loads(running.instance.state_file.read_text())
    assert state == {
        "pid": os.getpid(),
        "drain_timeout_s": 5.0,
        "inference_address": running.event("ready")["inference_address"],
        "management_address": running.event("ready")["management_address"],
    }

    assert running.server is not None
    running.server.stop()
    assert await task == 0
    assert list(running.work.iterdir()) == []


async def test_one_address_serves_both_apis(running: Running, wait_until: Wait) -> None:
    running.model("echo", ECHO)
    with closing(socket.create_server(("127.0.0.1", 0))) as reserved:
        address = Address("http", "127.0.0.1", reserved.getsockname()[1])
    running.start(load_models="echo", inference_address=address, management_address=address)
    await wait_until(lambda: "ready" in running.kinds(), "the server to be ready")

    ready = running.event("ready")
    assert ready["inference_address"] == ready["management_address"] == str(address)
    assert await running.status("inference", "/ping") == 200
    assert await running.status("inference", "/models/echo") == 200


@pytest.mark.parametrize(
    ("models", "strict", "code"),
    [
        ({"echo": ECHO, "broken": BROKEN}, False, None),
        ({"echo": ECHO, "broken": BROKEN}, True, 3),
        ({"broken": BROKEN}, False, 3),
        ({}, True, None),
    ],
)
async def test_what_failed_models_mean(
    running: Running, wait_until: Wait, models: dict[str, str], strict: bool, code: int | None
) -> None:
    for name, source in models.items():
        running.model(name, source)

    task = running.start(load_models="ALL", strict=strict)

    if code is None:
        await wait_until(lambda: "ready" in running.kinds(), "the server to be ready")
        assert not task.done()
        return
    assert await task == code
    assert running.kinds()[-1] == "failed"
    assert running.event("failed")["message"] == f"1 of {len(models)} models failed to load."
    errors = {event["model"]: event["error"] for event in running.events if event["event"] == "model"}
    assert errors["broken"] == "ValueError: no weights"


@pytest.mark.parametrize("missing", [None, "nowhere"])
async def test_all_models_of_no_store_are_none(
    running: Running, wait_until: Wait, missing: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = running.folder / missing if missing else None

    running.start(load_models="all", model_store=store)

    await wait_until(lambda: "ready" in running.kinds(), "the server to be ready")
    assert running.kinds() == ["listening", "ready"]
    assert ("Model store path is not found" if missing else "Model store is not configured") in caplog.text


async def test_a_signal_while_models_load_ends_it_well(
    running: Running, children: Callable[[], list[Any]], wait_until: Wait
) -> None:
    running.model("slow", "import time\ndef handle(data, context):\n    time.sleep(600)\n")
    task = running.start(load_models="slow")
    await wait_until(children, "the worker to start")

    os.kill(os.getpid(), signal.SIGTERM)

    assert await task == 0
    assert "ready" not in running.kinds()
    assert list(running.work.iterdir()) == []


@pytest.mark.parametrize("api", ["inference_address", "management_address"])
async def test_a_taken_port_is_a_configuration_error(running: Running, api: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        task = running.start(**{api: Address("http", "127.0.0.1", port)})
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: "):
            await task

    assert running.events == []
    assert list(running.work.iterdir()) == []


@pytest.mark.parametrize("address", ["https://127.0.0.1:0", "unix:/tmp/x.sock"])
async def test_a_scheme_that_is_not_served_is_a_configuration_error(running: Running, address: str) -> None:
    with pytest.raises(ConfigError, match="are not served yet"):
        await running.start(inference_address=Address.parse(address))


async def test_a_host_that_others_reach_is_warned_of(
    running: Running, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    running.start(management_address=Address("http", "0.0.0.0", 0))

    await wait_until(lambda: "ready" in running.kinds(), "the server to be ready")

    assert "Listening on 0.0.0.0: whoever reaches it can use this API." in caplog.text
