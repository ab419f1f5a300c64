"""The command line's promises about the server in the background: when it is ready, why not, and its end."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from mms_site import ROOT, Answer, Site

pytestmark = pytest.mark.time_limit(90)

ECHO = """
    def handle(data, context):
        return None if data is None else [bytes(item["body"]) for item in data]
"""
# Notes that it began, then answers once the file `go` of the site is there.
GATE = """
    import pathlib, time

    def handle(data, context):
        if data is None:
            return None
        site = pathlib.Path(context.system_properties["model_dir"]).parent.parent
        (site / "began").touch()
        while not (site / "go").exists():
            time.sleep(0.005)
        return ["done"] * len(data)
"""
GRANDCHILD = """
    import subprocess, sys

    def handle(data, context):
        if data is None:
            return None
        return [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid for _ in data]
"""
BROKEN = """
    def handle(data, context):
        raise ValueError("the weights are missing")
"""
HANGING = """
    import pathlib, time

    def handle(data, context):
        (pathlib.Path(context.system_properties["model_dir"]).parent.parent / "began").touch()
        while True:
            time.sleep(60)
"""

Wait = Callable[..., Any]


async def echoes(site: Site, model: str = "echo") -> None:
    answer = await site.ask("POST", f"/predictions/{model}", b"a good request")
    assert (answer.status, answer.body) == (200, b"a good request")


async def test_start_returns_when_ready_and_says_what_and_where(site: Site) -> None:
    site.handler("echo", ECHO)
    site.handler("other", ECHO)
    site.configure()

    lines = (await site.start()).splitlines()

    ping = await site.ask("GET", "/ping")
    assert (ping.status, ping.json) == (200, {"status": "Healthy"})
    assert sorted(line.split(" after")[0] for line in lines[:2]) == [
        "Model echo: ready",
        "Model other: ready",
    ]
    assert lines[2:] == [
        f"Inference API:  {site.state['inference_address']}",
        f"gRPC API:       {site.state['grpc_address']}",
        f"Management API: {site.state['management_address']}",
        f"Metrics API:    {site.state['metrics_address']}",
        "Model server started.",
        f"Logs: {site.logs}",
    ]
    await echoes(site)
    await site.stop()
    assert site.processes() == []
    assert not (site.folder / ".model_server.pid").exists()
    assert not list(site.folder.glob("mms-lite-*"))


@pytest.mark.parametrize("program", ["multi-model-server", "mxnet-model-server"])
async def test_the_names_of_mms_start_and_stop_it_too(site: Site, program: str) -> None:
    site.handler("echo", ECHO)
    site.configure()

    started = await site.mms("--start", program=program)
    assert "Model server started." in started.stdout.splitlines()
    stopped = await site.mms("--stop", program=program)

    assert (stopped.returncode, stopped.stdout.splitlines()[-1]) == (0, "Model server stopped.")
    assert site.processes() == []


@pytest.mark.parametrize("reader", ["head -1", "grep -q Inference", "true"])
async def test_a_reader_that_leaves_early_does_not_end_the_start(site: Site, reader: str) -> None:
    site.handler("echo", ECHO)
    site.handler("other", ECHO)
    site.configure()

    line = f"set -o pipefail; mms-lite --start | {reader}"
    result = await asyncio.to_thread(site.run, ["bash", "-c", line])

    assert result.returncode == 0
    assert "Error" not in result.stdout
    await echoes(site)


async def test_an_interrupted_start_leaves_no_process(site: Site, wait_until: Wait) -> None:
    site.handler("hanging", HANGING)
    site.configure()
    starting = asyncio.create_task(site.mms("--start"))
    await wait_until((site.folder / "began").exists, "the model to begin to load", 30)
    (front,) = [process for process in site.processes() if process.cmdline()[-1] == "--start"]

    front.send_signal(signal.SIGINT)

    assert (await starting).returncode == 1
    assert site.processes() == []


async def test_a_second_start_is_refused_and_the_first_server_goes_on(site: Site) -> None:
    site.handler("echo", ECHO)
    site.configure()
    await site.start()

    for verb in ("--start", "--foreground"):
        again = await site.mms(verb)
        assert again.returncode == 1
        assert again.stdout == (
            "Model server is already running, please use multi-model-server --stop to stop MMS.\n"
        )
    await echoes(site)


async def test_of_two_starts_at_once_one_succeeds(site: Site) -> None:
    site.handler("echo", ECHO)
    site.configure()

    results = await asyncio.gather(site.mms("--start"), site.mms("--start"))

    assert sorted(result.returncode for result in results) == [0, 1]
    loser = max(results, key=lambda result: result.returncode)
    assert [line for line in loser.stdout.splitlines() if "orphan" not in line] == [
        "Model server is already running, please use multi-model-server --stop to stop MMS."
    ]
    await echoes(site)


async def test_stop_lets_a_request_finish_and_leaves_no_process(site: Site, wait_until: Wait) -> None:
    site.handler("gate", GATE)
    site.handler("grandchild", GRANDCHILD)
    site.configure(default_workers_per_model=2)
    await site.start()
    grandchild = psutil.Process(int((await site.ask("POST", "/predictions/grandchild")).body))
    recorded = [site.server, *site.workers(), grandchild]
    assert len(recorded) == 6
    slow = asyncio.create_task(site.ask("POST", "/predictions/gate", b"x"))
    await wait_until((site.folder / "began").exists, "the handler to begin")

    stopping = asyncio.create_task(site.mms("--stop"))
    await wait_until(lambda: "Stopping" in site.log(), "the server to drain")
    assert not stopping.done()
    (site.folder / "go").touch()

    assert await slow == Answer(200, (await slow).headers, b"done")
    assert (await stopping).stdout == "Model server stopped.\n"
    await wait_until(lambda: not any(alive(process) for process in recorded), "every process to end")
    assert site.processes() == []


async def test_a_second_stop_does_not_cut_the_drain_of_the_first(site: Site, wait_until: Wait) -> None:
    site.handler("gate", GATE)
    site.configure()
    await site.start()
    slow = asyncio.create_task(site.ask("POST", "/predictions/gate", b"x"))
    await wait_until((site.folder / "began").exists, "the handler to begin")

    first = asyncio.create_task(site.mms("--stop"))
    await wait_until(lambda: site.state.get("stopping"), "the server to drain")
    second = asyncio.create_task(site.mms("--stop"))
    await wait_until(lambda: sum("--stop" in p.cmdline() for p in site.processes()) == 2, "both to wait")
    (site.folder / "go").touch()

    assert (await slow).status == 200
    assert (await first).stdout == "Model server stopped.\n"
    assert (await second).returncode == 0


async def test_a_request_whose_body_is_on_its_way_when_the_server_stops_is_answered(
    site: Site, wait_until: Wait
) -> None:
    site.handler("echo", ECHO)
    site.configure()
    await site.start()
    connection = await site.connect()
    await connection.send(b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
    await echoes(site)  # by now the server has read the first one's head

    stopping = asyncio.create_task(site.mms("--stop"))
    await wait_until(lambda: "Stopping" in site.log(), "the server to drain")
    await connection.send(b"cd")

    assert (await connection.answer()).status == 200
    await connection.close()
    assert (await stopping).stdout == "Model server stopped.\n"


async def test_stop_cuts_a_request_that_outlasts_the_drain_time(site: Site, wait_until: Wait) -> None:
    site.handler("gate", GATE)
    site.configure(drain_timeout_s=0.2)
    await site.start()
    slow = asyncio.create_task(site.ask("POST", "/predictions/gate", b"x"))
    await wait_until((site.folder / "began").exists, "the handler to begin")

    await site.stop()

    answer = (await asyncio.gather(slow, return_exceptions=True))[0]
    assert isinstance(answer, ConnectionError) or answer.status in (500, 503)
    assert site.processes() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_server_that_is_killed_leaves_no_process_and_the_next_one_starts(
    site: Site, wait_until: Wait, number: signal.Signals
) -> None:
    site.handler("echo", ECHO)
    site.handler("grandchild", GRANDCHILD)
    site.configure(default_workers_per_model=2)
    await site.start()
    grandchild = psutil.Process(int((await site.ask("POST", "/predictions/grandchild")).body))
    recorded = [*site.server.children(), grandchild]
    assert len(recorded) == 6  # four workers, the guard, what a model started

    os.kill(site.server.pid, number)

    await wait_until(lambda: not any(alive(process) for process in recorded), "every process to end")
    stop = await site.mms("--stop")
    assert (stop.returncode, stop.stdout) == (0, "Model server is not currently running.\n")
    await site.start()
    await echoes(site)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_foreground_ends_well_with_a_signal(
    site: Site, wait_until: Wait, number: signal.Signals
) -> None:
    site.handler("echo", ECHO)
    site.configure()
    server = site.foreground()
    await wait_until(lambda: "Model server started." in site.printed(), "the server to be ready", 30)
    await echoes(site)

    server.send_signal(number)

    assert await asyncio.to_thread(server.wait, 30) == 0
    assert "Model echo: ready" in site.printed()
    assert "Traceback" not in site.printed()
    assert site.processes() == []


async def test_stop_ends_a_server_in_the_foreground(site: Site, wait_until: Wait) -> None:
    site.handler("echo", ECHO)
    site.configure()
    server = site.foreground()
    await wait_until(lambda: "Model server started." in site.printed(), "the server to be ready", 30)

    await site.stop()  # nobody has reaped the process yet, as in a container without an init

    assert await asyncio.to_thread(server.wait, 30) == 0
    assert site.processes() == []


@pytest.mark.parametrize("verb", ["--start", "--foreground"])
async def test_one_process_alone_has_the_name_of_mms(site: Site, wait_until: Wait, verb: str) -> None:
    site.handler("grandchild", GRANDCHILD)
    site.configure(default_workers_per_model=2)
    if verb == "--start":
        await site.start()
    else:
        site.foreground()
        await wait_until(lambda: "Model server started." in site.printed(), "the server to be ready", 30)
    await site.ask("POST", "/predictions/grandchild")

    named = [each for each in site.processes() if "com.amazonaws.ml.mms.ModelServer" in each.cmdline()]

    assert [each.pid for each in named] == [site.server.pid]
    assert len(site.processes()) == 5  # two workers, the guard, what a model started


async def test_the_log_begins_with_what_the_server_is(site: Site) -> None:
    site.handler("echo", ECHO)
    site.configure()
    await site.start()
    await site.stop()  # lines are gathered for a moment before they are written

    lines = [line.partition(" - ")[2] for line in site.log().splitlines()]

    assert lines[0].startswith("Model server version: ")
    assert f"Config file: {site.folder / 'config.properties'}" in lines
    assert lines.index("Default workers per model: 1") < lines.index("Preload model: false")


async def test_the_log_goes_to_the_output_of_the_start_where_the_option_says_so(site: Site) -> None:
    site.handler("echo", ECHO)
    site.configure(console_log="true")
    result = await asyncio.to_thread(site.run, ["sh", "-c", "mms-lite --start > output.txt"])
    assert result.returncode == 0
    await echoes(site)
    await site.stop()

    printed = (site.folder / "output.txt").read_text()
    assert "Model server started." in printed.splitlines()
    assert " - Model server version: " in printed
    assert '"POST /predictions/echo HTTP/1.1" 200' in printed
    assert printed.endswith(" - Model server stopped.\n")


async def test_all_of_a_store_that_is_not_there_is_told(site: Site) -> None:
    site.configure(model_store="nowhere")

    assert "Note: Model store path is not found: nowhere" in (await site.start()).splitlines()


async def test_a_hangup_ends_a_server_in_the_foreground_only(site: Site, wait_until: Wait) -> None:
    site.handler("echo", ECHO)
    site.configure()
    await site.start()
    site.server.send_signal(signal.SIGHUP)
    await echoes(site)
    await site.stop()
    process = site.foreground()
    await wait_until(lambda: "Model server started." in site.printed(), "the server to be ready", 30)
    process.send_signal(signal.SIGHUP)
    assert await asyncio.to_thread(process.wait, 20) == 0
    assert site.processes() == []


async def test_a_second_signal_ends_at_once(site: Site, wait_until: Wait) -> None:
    site.handler("gate", GATE)
    site.configure()
    server = site.foreground()
    await wait_until(lambda: "Model server started." in site.printed(), "the server to be ready", 30)
    slow = asyncio.create_task(site.ask("POST", "/predictions/gate", b"x"))
    await wait_until((site.folder / "began").exists, "the handler to begin")

    server.send_signal(signal.SIGTERM)
    await wait_until(lambda: "Stopping" in site.log(), "the server to drain")
    server.send_signal(signal.SIGTERM)

    assert await asyncio.to_thread(server.wait, 5) == 1
    await asyncio.gather(slow, return_exceptions=True)
    await wait_until(lambda: not site.processes(), "the workers to end")


@pytest.mark.parametrize("api", ["inference", "management"])
async def test_a_port_that_is_taken_is_named(site: Site, api: str) -> None:
    site.handler("echo", ECHO)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        site.configure(**{f"{api}_address": f"http://127.0.0.1:{port}"})
        result = await site.mms("--start")

    assert result.returncode == 1
    first, *rest = result.stdout.splitlines()
    assert first.startswith(f"Invalid configuration: cannot listen on 127.0.0.1:{port}: ")
    assert "address already in use" in first.lower()
    assert rest == ["Model server was not started.", f"Logs: {site.logs}"]
    assert site.processes() == []


async def test_a_model_that_fails_to_load_is_named_and_the_other_serves(site: Site) -> None:
    site.handler("echo", ECHO)
    site.handler("broken", BROKEN)
    site.configure()

    printed = await site.start()

    assert "Model broken: FAILED: ValueError: the weights are missing" in printed.splitlines()
    await echoes(site)
    described = await site.ask("GET", "/models/broken", api="management")
    assert described.json["status"] == "FAILED"
    assert "the weights are missing" in described.json["detail"]
    assert (await site.ask("POST", "/predictions/broken", b"x")).status == 503


@pytest.mark.parametrize(("arguments", "models"), [(["--strict"], ["echo", "broken"]), ([], ["broken"])])
async def test_start_fails_when_all_models_do_or_any_if_strict(
    site: Site, arguments: list[str], models: list[str]
) -> None:
    for model in models:
        site.handler(model, BROKEN if model == "broken" else ECHO)
    site.configure()

    result = await site.mms("--start", *arguments)

    assert result.returncode == 3
    assert "Model broken: FAILED: ValueError: the weights are missing" in result.stdout.splitlines()
    assert f"1 of {len(models)} models failed to load." in result.stdout.splitlines()
    assert result.stdout.splitlines()[-2:] == ["Model server was not started.", f"Logs: {site.logs}"]
    assert site.processes() == []
    assert (await site.mms("--stop")).stdout == "Model server is not currently running.\n"


async def test_a_model_that_hangs_while_it_loads_ends_the_start(site: Site) -> None:
    site.handler("hanging", HANGING)
    site.configure()

    result = await site.mms("--start", "--start-timeout", "2")

    assert result.returncode == 4
    assert result.stdout.splitlines() == [
        "Model server was not ready within 2 s and was ended.",
        "A model that takes longer needs a higher --start-timeout.",
        f"Logs: {site.logs}",
    ]
    assert site.processes() == []


async def test_stop_ends_a_server_that_is_still_loading(site: Site, wait_until: Wait) -> None:
    site.handler("hanging", HANGING)
    site.configure()
    starting = asyncio.create_task(site.mms("--start"))
    await wait_until((site.folder / "began").exists, "the model to begin to load", 30)

    await site.stop()

    result = await starting
    assert result.returncode == 1
    assert "Model server ended with exit code 0 while it started." in result.stdout
    assert site.processes() == []


async def test_a_shadowing_current_directory_does_no_harm(site: Site) -> None:
    for name in ("json", "queue", "types", "asyncio", "click", "mms_lite", "service"):
        (site.folder / f"{name}.py").write_text(
            "raise SystemExit('a file of the working folder was imported')"
        )
    site.handler("echo", ECHO)
    site.configure()

    await site.start()

    await echoes(site)


async def test_a_model_folder_with_such_names_does_no_harm(site: Site) -> None:
    folder = site.handler("echo", ECHO)
    for name in ("json", "queue", "types", "asyncio"):
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the model was imported')")
    site.configure()

    await site.start()

    await echoes(site)


async def test_a_configuration_elsewhere_and_flags_over_it(site: Site) -> None:
    site.handler("echo", ECHO)
    site.archive("packed", ECHO)
    site.configure("other.properties", load_models="echo")
    (site.folder / "config.properties").write_text("inference_address=nonsense")

    printed = await site.start("--mms-config", "other.properties", "--models", "packed.mar", "renamed=echo")

    assert "Model packed: ready" in printed
    assert "Model renamed: ready" in printed
    assert "Model echo" not in printed
    await echoes(site, "packed")
    await echoes(site, "renamed")


async def test_a_broken_archive_does_not_keep_the_good_one_from_serving(site: Site) -> None:
    site.archive("good", ECHO)
    (site.store / "not_a_zip.mar").write_bytes(b"no archive")
    (site.store / "notes.txt").write_text("skipped")
    whole = site.archive("truncated", ECHO)
    whole.write_bytes(whole.read_bytes()[:-30])
    site.configure()

    lines = (await site.start()).splitlines()

    failed = sorted(line for line in lines if "FAILED" in line)
    assert [line.partition(": FAILED: ")[0] for line in failed] == [
        "Model not_a_zip.mar",
        "Model truncated.mar",
    ]
    await echoes(site, "good")


async def test_a_store_without_models_is_an_empty_server(site: Site) -> None:
    site.configure()

    await site.start()

    assert (await site.ask("GET", "/models", api="management")).json == {"models": []}
    answer = await site.ask("POST", "/predictions/nothing", b"x")
    assert (answer.status, answer.json["type"]) == (404, "ModelNotFoundException")


@pytest.mark.parametrize("verb", ["--start", "--foreground"])
@pytest.mark.parametrize("option", ["log_location", "metrics_location"])
async def test_a_log_folder_that_cannot_be_made_is_named(site: Site, verb: str, option: str) -> None:
    (site.folder / "taken").write_text("a file, not a folder")
    site.configure(**{option: "taken"})

    result = await site.mms(verb)

    assert result.returncode == 1
    assert result.stdout.splitlines()[0] == (
        "Invalid configuration: log folder taken cannot be written: File exists"
    )
    assert "Traceback" not in result.stdout
    assert site.processes() == []


@pytest.fixture
async def others_site() -> AsyncIterator[Site]:
    """A site of the user nobody."""
    if os.getuid() != 0:
        pytest.skip("only root can start a server as another user")
    user = pwd.getpwnam("nobody").pw_uid
    environ = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if "-packages" in path)])
    }
    # The Python that runs this may be in root's home.
    candidates = [sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"]
    python = next((each for each in candidates if can_run(each, user, environ)), None)
    if python is None:
        pytest.skip("the user nobody can run no Python that has what the server needs")
    parent = Path(tempfile.mkdtemp(prefix="mms-nobody-", dir="/tmp"))
    os.chmod(parent, 0o755)
    site = Site(parent / "site")
    site.user, site.python, site.environ = user, [python], environ
    yield site
    await asyncio.to_thread(site.end)
    shutil.rmtree(parent)


def can_run(python: str, user: int, environ: dict[str, str]) -> bool:
    command = [python, "-c", "import mms_lite.cli, mms_lite.server"]
    try:
        result = subprocess.run(
            command, user=user, group=user, env=environ, cwd="/", check=False, capture_output=True
        )
    except OSError:
        return False
    return result.returncode == 0


async def test_any_user_can_run_it(others_site: Site) -> None:
    others_site.archive("echo", ECHO)
    others_site.configure()
    give(others_site.folder, others_site.user)

    await others_site.start()

    assert {process.uids().real for process in others_site.processes()} == {others_site.user}
    assert len(others_site.processes()) == 3  # server, guard, worker
    await echoes(others_site)
    await others_site.stop()
    assert others_site.processes() == []


async def test_a_log_folder_without_permission_is_named(others_site: Site) -> None:
    others_site.configure()
    others_site.logs.mkdir(mode=0o755)  # root's

    result = await others_site.mms("--start")

    assert (result.returncode, result.stdout) == (
        1,
        "Invalid configuration: log folder logs cannot be written: Permission denied\n",
    )


async def test_a_user_cannot_stop_the_server_of_another(others_site: Site) -> None:
    site = others_site
    site.configure()
    site.folder.chmod(0o1777)  # like /tmp
    other, site.user = site.user, None
    await site.start()
    site.logs.chmod(0o777)
    site.user = other

    start, stop = await site.mms("--start"), await site.mms("--stop")

    assert (start.returncode, stop.returncode) == (1, 1), start.stdout + stop.stdout
    assert "already running" in start.stdout
    assert "another user" in stop.stdout
    assert (await site.ask("GET", "/ping")).status == 200


def give(folder: Path, user: int | None) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user or 0, user or 0)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
