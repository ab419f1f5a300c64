"""The server from configuration to exit code, on the loop of the test."""

import asyncio
import gc
import json
import os
import signal
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from certificates import Pair, client_context

from mms_lite.address import Address
from mms_lite.config import OPTIONS, Config, LoadedConfig
from mms_lite.errors import ConfigError
from mms_lite.instance import Instance
from mms_lite.logs import access_line
from mms_lite.server import Server
from mms_lite.types import LoadOptions

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
        self.options = [option.name for option in OPTIONS]
        self.settings: dict[str, Any] = {
            "inference_address": FREE,
            "management_address": FREE,
            "metrics_address": None,
            "grpc_address": None,
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
        origins = {name: "command line" if name in settings else "default" for name in self.options}
        loaded = LoadedConfig(config, origins, ())
        self.server = Server(
            loaded,
            report=self.events.append,
            access=lambda *fields: self.accesses.append(access_line(*fields)),
        )
        assert self.instance.claim()
        self.task = asyncio.create_task(self.server.run(self.instance))
        return self.task

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.events]

    def event(self, kind: str) -> Mapping[str, Any]:
        return next(event for event in self.events if event["event"] == kind)

    async def status(self, api: str, target: str, *lines: str, method: str = "GET") -> int:
        return (await self.ask(api, target, *lines, method=method))[0]

    async def ask(
        self,
        api: str,
        target: str,
        *lines: str,
        method: str = "GET",
        host: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> tuple[int, str]:
        """Send a request on a connection of its own; return the answer's status and all of it."""
        address = Address.parse(self.event("listening")[f"{api}_address"])
        if address.scheme == "unix":
            reader, writer = await asyncio.open_unix_connection(address.path)
        else:
            name = "localhost" if tls else None
            reader, writer = await asyncio.open_connection(
                host or address.host, address.port, ssl=tls, server_hostname=name
            )
        head = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *lines]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        return int(answer.split()[1]), answer

    async def serve(self, wait_until: Wait, **settings: Any) -> None:
        """Start it, and wait until it listens and is ready."""
        task = self.start(**settings)
        await wait_until(lambda: task.done() or "ready" in self.kinds(), "the server to be ready")
        if task.done():
            task.result()


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


@pytest.mark.parametrize(
    ("mode", "strict", "code"), [("poll", False, None), ("explicit", False, None), ("poll", True, 3)]
)
async def test_where_models_may_come_later_a_server_without_any_starts_and_is_not_ready(
    running: Running, wait_until: Wait, mode: str, strict: bool, code: int | None
) -> None:
    pytest.importorskip("google.protobuf", reason="reads config.pbtxt")
    (running.folder / "models" / "typo").mkdir(parents=True)
    task = running.start(
        model_repository=running.folder / "models",
        model_store=None,
        load_models="*",
        model_control_mode=mode,
        strict=strict,
    )
    if code is not None:
        assert await task == code
        return
    await wait_until(lambda: "ready" in running.kinds(), "the server to be ready")
    assert "1 of 1 models failed to load." in [e["message"] for e in running.events if e["event"] == "note"]
    assert await running.status("inference", "/v2/health/ready") == 400
    _, page = await running.ask("inference", "/ping")
    assert "Unhealthy" in page
    status, page = await running.ask("management", "/models/typo")
    assert status == 200 and '"status": "FAILED"' in page and "it has no version folder" in page
    assert not task.done()


async def test_a_model_of_a_triton_repository_that_is_registered_has_the_workers_that_its_files_say(
    running: Running, wait_until: Wait
) -> None:
    pytest.importorskip("google.protobuf", reason="reads config.pbtxt")
    folder = running.folder / "models" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text("class TritonPythonModel:\n    execute = list\n")
    tensor = '[{ name: "x" data_type: TYPE_FP32 dims: [ 3 ] }]'
    config = f'backend: "python" instance_group {{ count: 2 }} input {tensor} output {tensor}'
    (folder / "config.pbtxt").write_text(config)
    await running.serve(
        wait_until, model_repository=folder.parent, model_store=None, model_control_mode="explicit"
    )
    for given, status, workers in (("", "Workers scaled", 2), ("&initial_workers=0", "registered", 0)):
        _, page = await running.ask("management", f"/models?url=m/1{given}", method="POST")
        assert status in page
        _, page = await running.ask("management", "/models/m")
        assert len(json.loads(page.partition("\r\n\r\n")[2])["workers"]) == workers
        assert await running.status("inference", "/v2/models/m/ready") == (200 if workers else 400)
        assert await running.status("management", "/models/m", method="DELETE") == 200


@pytest.mark.parametrize("missing", [None, "nowhere"])
async def test_all_models_of_no_store_are_none(
    running: Running, wait_until: Wait, missing: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = running.folder / missing if missing else None

    running.start(load_models="all", model_store=store)

    await wait_until(lambda: "ready" in running.kinds(), "the server to be ready")
    assert running.kinds() == ["listening", "note", "ready"]
    why = "Model store path is not found" if missing else "Model store is not configured"
    assert why in caplog.text
    assert why in running.event("note")["message"]


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


async def test_https_on_every_address(running: Running, wait_until: Wait, tmp_path: Path) -> None:
    pair = Pair()
    free = Address("https", "127.0.0.1", 0)
    await running.serve(
        wait_until,
        inference_address=free,
        management_address=free,
        metrics_address=free,
        **pair.write(tmp_path),
    )
    for api, target in [("inference", "/ping"), ("management", "/models"), ("metrics", "/metrics")]:
        assert running.event("ready")[f"{api}_address"].startswith("https://127.0.0.1:")
        assert (await running.ask(api, target, tls=client_context(pair)))[0] == 200


async def test_https_needs_files_that_can_be_used(running: Running, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read private_key_file"):
        await running.start(
            inference_address=Address("https", "127.0.0.1", 0),
            private_key_file=tmp_path / "none",
            certificate_file=tmp_path / "none",
        )
    assert running.events == []


async def test_http_alone_needs_no_files(running: Running, wait_until: Wait, tmp_path: Path) -> None:
    await running.serve(wait_until, private_key_file=tmp_path / "none", certificate_file=tmp_path / "none")


async def test_apis_on_unix_sockets(running: Running, wait_until: Wait, tmp_path: Path) -> None:
    inference, management = Address.parse(f"unix:{tmp_path}/i"), Address.parse(f"unix:{tmp_path}/m")
    await running.serve(wait_until, inference_address=inference, management_address=management)

    assert running.event("ready")["inference_address"] == str(inference)
    assert await running.status("inference", "/ping") == 200
    assert await running.status("management", "/models") == 200
    assert running.accesses[0].startswith('/0.0.0.0 "GET /ping HTTP/1.1" 200 ')
    assert running.server is not None
    assert running.task is not None
    running.server.stop()
    assert await running.task == 0
    assert not (tmp_path / "i").exists()
    assert not (tmp_path / "m").exists()


async def test_equal_unix_sockets_are_one(running: Running, wait_until: Wait, tmp_path: Path) -> None:
    address = Address.parse(f"unix:{tmp_path}/s")
    await running.serve(
        wait_until, inference_address=address, management_address=address, metrics_address=address
    )
    for target in ("/ping", "/models", "/metrics"):
        assert await running.status("metrics", target) == 200


async def test_the_socket_file_of_a_killed_server_is_replaced(
    running: Running, wait_until: Wait, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "s"))
        killed.listen()
    await running.serve(wait_until, inference_address=Address.parse(f"unix:{tmp_path}/s"))
    assert await running.status("inference", "/ping") == 200


@pytest.mark.parametrize("backlog", [0, 5], ids=["full", "free"])
async def test_the_socket_of_a_living_server_is_left_alone(
    running: Running, tmp_path: Path, backlog: int
) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as living, socket.socket(socket.AF_UNIX) as client:
        living.bind(path)
        living.listen(backlog)
        client.connect(path)
        with pytest.raises(ConfigError, match="another server does"):
            await running.start(inference_address=Address.parse(f"unix:{path}"))
        with closing(living.accept()[0]):
            assert stat.S_ISSOCK(os.lstat(path).st_mode)


@pytest.mark.parametrize("link", [False, True])
async def test_a_file_that_is_no_socket_is_left_alone(running: Running, tmp_path: Path, link: bool) -> None:
    file = tmp_path / "precious"
    file.write_text("data")
    path = tmp_path / "link" if link else file
    if link:
        path.symlink_to(file)
    with pytest.raises(ConfigError, match="a file that is no socket"):
        await running.start(inference_address=Address.parse(f"unix:{path}"))
    assert path.read_text() == "data"


@pytest.mark.parametrize("path", ["/none/s", "/" + "x" * 200])
async def test_a_socket_that_cannot_be_made_is_a_configuration_error(
    running: Running, tmp_path: Path, path: str
) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {tmp_path}"):
        await running.start(inference_address=Address.parse(f"unix:{tmp_path}{path}"))


async def test_metrics_have_an_address_of_their_own_or_share_one(running: Running, wait_until: Wait) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as reserved:
        shared = Address("http", "127.0.0.1", reserved.getsockname()[1])
    await running.serve(wait_until, inference_address=shared, metrics_address=shared)
    ready = running.event("ready")
    assert ready["metrics_address"] == ready["inference_address"] == str(shared)
    assert await running.status("metrics", "/metrics") == 200
    assert await running.status("metrics", "/ping") == 200
    assert await running.status("management", "/metrics") == 404


async def test_an_address_of_metrics_alone_has_nothing_else(running: Running, wait_until: Wait) -> None:
    await running.serve(wait_until, metrics_address=FREE)
    assert await running.status("metrics", "/metrics") == 200
    for target in ("/ping", "/models"):
        assert await running.status("metrics", target) == 404
    state = json.loads(running.instance.state_file.read_text())
    assert state["metrics_address"] == running.event("listening")["metrics_address"]


async def test_a_taken_port_of_metrics_is_an_error_only_where_it_was_asked_for(
    running: Running, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = Address("http", "127.0.0.1", taken.getsockname()[1])
        running.settings["metrics_address"] = address  # not among what is given: as the default
        await running.serve(wait_until)
        assert f"metrics are not served: cannot listen on 127.0.0.1:{address.port}: " in caplog.text
        assert "metrics_address" not in running.event("ready")
        assert await running.status("inference", "/ping") == 200


async def test_a_taken_port_of_metrics_that_was_asked_for_ends_the_start(running: Running) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: "):
            await running.start(metrics_address=Address("http", "127.0.0.1", port))


OPEN = Address("http", "0.0.0.0", 0)
PROXIED = "X-Forwarded-For: 192.0.2.7"  # as good as another machine


async def test_managing_from_elsewhere_needs_the_token(
    running: Running, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    await running.serve(wait_until, management_address=OPEN)

    file = running.folder / ".model_server.token"
    token = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    address = running.event("ready")["management_address"]
    told = f"Listening on {address}: other machines need the token in {file} to manage."
    assert [message for message in caplog.messages if "Listening" in message] == [told]
    assert token not in caplog.text

    assert await running.status("management", "/models") == 200
    for method, target in [
        ("GET", "/models"),
        ("POST", "/models?url=x"),
        ("GET", "/models/x"),
        ("PUT", "/models/x"),
        ("DELETE", "/models/x"),
    ]:
        status, answer = await running.ask("management", target, PROXIED, method=method)
        assert status == 401
        assert "WWW-Authenticate: Bearer\r\n" in answer
        assert '"type": "UnauthorizedException"' in answer
    authorised = (PROXIED, f"authorization: bearer {token}")
    assert await running.status("management", "/models", *authorised) == 200
    assert await running.status("management", "/models/x", *authorised) == 404


async def test_a_peer_that_is_not_on_the_loopback_needs_the_token(running: Running, wait_until: Wait) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only finds our own address
        except OSError:
            pytest.skip("this machine has no address but the loopback's")
        host = probe.getsockname()[0]
    file = running.folder / "secret"
    file.write_text("my token\n")
    file.chmod(0o600)
    await running.serve(wait_until, management_address=OPEN, management_token_file=file)

    assert (await running.ask("management", "/models", host=host))[0] == 401
    said = "Authorization: Bearer my token"
    assert (await running.ask("management", "/models", said, host=host))[0] == 200
    assert not (running.folder / ".model_server.token").exists()


async def test_predictions_stay_open_where_management_shares_their_address(
    running: Running, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    running.model("echo", ECHO)
    with closing(socket.create_server(("0.0.0.0", 0))) as reserved:
        address = Address("http", "0.0.0.0", reserved.getsockname()[1])
    await running.serve(wait_until, load_models="echo", inference_address=address, management_address=address)

    assert await running.status("inference", "/ping", PROXIED) == 200
    assert await running.status("inference", "/predictions/echo", PROXIED, method="POST") == 200
    assert await running.status("inference", "/models/echo/invoke", PROXIED, method="POST") == 200
    assert await running.status("inference", "/models/echo", PROXIED) == 401
    file = running.folder / ".model_server.token"
    assert [message for message in caplog.messages if "Listening" in message] == [
        f"Listening on {address}: whoever reaches it can use the models;"
        f" other machines need the token in {file} to manage."
    ]


async def test_management_can_be_open_to_all(
    running: Running, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    await running.serve(wait_until, management_address=OPEN, management_open=True)

    assert await running.status("management", "/models", PROXIED) == 200
    assert not (running.folder / ".model_server.token").exists()
    told = "whoever reaches it can load, scale and unload models (management_open=true)."
    assert [told in message for message in caplog.messages if "Listening" in message] == [True]


@pytest.mark.parametrize("address", ["http://127.0.0.1:0", "http://localhost:0", "unix:{}/s"])
async def test_a_local_address_is_open_without_a_token_or_a_warning(
    running: Running, wait_until: Wait, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    await running.serve(wait_until, management_address=Address.parse(address.format(running.folder)))

    assert await running.status("management", "/models", PROXIED) == 200
    assert not (running.folder / ".model_server.token").exists()
    assert "Listening" not in caplog.text


async def test_each_open_address_is_warned_of_once(
    running: Running, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    await running.serve(wait_until, inference_address=OPEN, metrics_address=OPEN)
    told = [message.partition(": ")[2] for message in caplog.messages if "Listening" in message]
    assert told == ["whoever reaches it can use the models.", "whoever reaches it can read the metrics."]


async def test_a_token_file_that_others_could_read_ends_the_start(running: Running) -> None:
    file = running.folder / ".model_server.token"
    file.write_text("token\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="remove it, or set management_token_file"):
        await running.start(management_address=OPEN)
    assert running.events == []


async def test_cors_headers_and_preflights_on_every_address(running: Running, wait_until: Wait) -> None:
    await running.serve(
        wait_until, management_address=OPEN, cors_allowed_origin="https://a.example", metrics_address=FREE
    )
    asked = ("Origin: https://a.example", "Access-Control-Request-Method: POST", PROXIED)
    for api, target in [("inference", "/predictions/x"), ("management", "/models"), ("metrics", "/metrics")]:
        status, answer = await running.ask(api, target, *asked, method="OPTIONS")
        assert status == 200
        assert "access-control-allow-origin: https://a.example\r\n" in answer
    status, answer = await running.ask("management", "/models", PROXIED)
    assert status == 401
    assert "access-control-allow-origin: https://a.example\r\n" in answer


@pytest.mark.parametrize(("settings", "workers"), [({}, 1), ({"default_workers_per_model": 2}, 2)])
async def test_debug_means_one_worker_and_no_time_limits(
    running: Running, wait_until: Wait, settings: dict[str, int], workers: int
) -> None:
    running.settings["default_workers_per_model"] = 0
    slow = ECHO.replace("    return", "    import time; time.sleep(0.3)\n    return")
    running.model("slow", slow)
    await running.serve(
        wait_until, load_models="slow", debug=True, response_timeout_s=0.1, load_timeout_s=0.1, **settings
    )
    assert await running.status("inference", "/predictions/slow", method="POST") == 200
    _, answer = await running.ask("management", "/models/slow")
    assert f'"minWorkers": {workers}' in answer


async def test_variables_on_the_blacklist_do_not_reach_workers(
    running: Running, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "hidden")
    monkeypatch.setenv("SOME_SECRETS", "seen")
    source = "import os\ndef handle(data, context):\n    return data and [dict(os.environ)] * len(data)\n"
    running.model("environ", source)
    await running.serve(wait_until, load_models="environ", blacklist_env_vars="SOME_SECRET|AWS_.*")

    _, answer = await running.ask("inference", "/predictions/environ", method="POST")
    assert '"SOME_SECRETS": "seen"' in answer
    assert '"SOME_SECRET"' not in answer


async def test_a_blacklist_that_is_no_regex_is_a_configuration_error(running: Running) -> None:
    with pytest.raises(ConfigError, match="blacklist_env_vars is not a regular expression"):
        await running.start(blacklist_env_vars="(")


@pytest.mark.parametrize(
    ("text", "cpus", "gpus", "workers"),
    [("", 8, 0, 8), ("", 8, 2, 2), ("default_workers_per_model=5", 8, 2, 5), ("debug=true", 8, 2, 1)],
)
async def test_a_model_gets_a_worker_for_each_gpu_else_for_each_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cpus: int, gpus: int, workers: int
) -> None:
    file = tmp_path / "config.properties"
    file.write_text(text)
    store = tmp_path / "store"
    (store / "m").mkdir(parents=True)
    monkeypatch.setattr("mms_lite.server.cpu_count", lambda: cpus)
    monkeypatch.setattr("mms_lite.server.gpu_count", lambda limit: gpus)
    loaded = Config.load(file, {"model_store": store}, {})
    models, _ = Server(loaded, report=lambda _: None, access=lambda *_: None)._build(tmp_path)
    spec = models.read(LoadOptions(url="m", name="m", handler="service:handle"))
    assert (spec.min_workers, len(spec.devices)) == (workers, gpus)


async def test_loading_through_a_proxy_needs_the_token_also_where_all_addresses_are_local(
    running: Running, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    await running.serve(wait_until, model_control_mode="explicit")

    load = "/v2/repository/models/nobody/load"
    token = (running.folder / ".model_server.token").read_text().strip()
    assert "Listening" not in caplog.text
    for target in (load, "/v2/repository/models/nobody/unload", "/v1/config/reload"):
        status, answer = await running.ask("inference", target, PROXIED, method="POST")
        assert status == 401
        assert "Authorization: Bearer" in answer
    here, _ = await running.ask("inference", load, method="POST")
    authorised, _ = await running.ask(
        "inference", load, PROXIED, f"authorization: bearer {token}", method="POST"
    )
    assert here == authorised
    assert here not in (200, 401, 403)


async def test_nobody_loads_through_the_inference_address_unless_control_is_explicit(
    running: Running, wait_until: Wait
) -> None:
    await running.serve(wait_until)

    for target in ("/v2/repository/models/nobody/load", "/v1/config/reload"):
        assert (await running.ask("inference", target, method="POST"))[0] == 403


async def test_who_can_load_models_is_said_where_nobody_needs_a_token(
    running: Running, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    await running.serve(
        wait_until, inference_address=OPEN, model_control_mode="explicit", management_open=True
    )

    (told,) = [message for message in caplog.messages if "Listening" in message]
    assert "whoever reaches it can use, load and unload the models (management_open=true)" in told
