"""The command line: `mms-lite`, also installed as `multi-model-server` and `mxnet-model-server`.

`--start` runs the server in the background and returns when it is ready, or tells why it is not. Options that
are configuration come from the table in `config`; only what starts and stops a server is spelled here.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
import psutil

import mms_lite
from mms_lite.config import OPTIONS, SWITCH, Config, LoadedConfig, find_config_file
from mms_lite.errors import ConfigError
from mms_lite.instance import Instance

EXIT_CONFIGURATION = 1
EXIT_START_TIMEOUT = 4
_ALREADY = "Model server is already running, please use multi-model-server --stop to stop MMS."
_KILL_AFTER_S = 10.0  # beyond the drain time
_OUTPUT_FILE = "server_output.log"  # what the server prints outside its logs: crashes, mostly
# `python -m` would put the current folder before the standard library.
_BOOT = "import sys; sys.path[:] = [p for p in sys.path if p] + [{!r}]; from mms_lite.cli import main; main()"


class _Exit(Exception):
    """Ends the program with a message and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def spread_models(arguments: Sequence[str]) -> list[str]:
    """Repeat `--models` before each of its values, as users type several after one flag.

    Raises:
        click.UsageError: the flag has no value.
    """
    spread: list[str] = []
    in_models = empty = False
    for argument in [*arguments, "--"]:
        if argument.startswith("-"):
            if empty:
                raise click.UsageError("Option '--models' requires an argument.")
            empty = argument == "--models"
            in_models = empty or argument.startswith("--models=")
        elif in_models:
            spread.append("--models")
            empty = False
        if argument != "--models":
            spread.append(argument)
    return spread[:-1]


class _Command(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, spread_models(args))


def _config_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(OPTIONS):
        if not option.flag or option.flag == "--models":
            continue
        if option.kind is SWITCH and option.default is False:
            flag = click.option(option.flag, option.name, flag_value="true", default=None, help=option.doc)
        else:
            flag = click.option(option.flag, option.name, metavar=option.kind.word.upper(), help=option.doc)
        function = flag(function)
    return function


@click.command(cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--start", is_flag=True, help="Start in the background and wait until ready (the default).")
@click.option("--stop", is_flag=True, help="Drain and stop the running server.")
@click.option("--foreground", is_flag=True, help="Run in this terminal until Ctrl-C.")
@click.option("--mms-config", metavar="FILE", help="Properties file; ./config.properties is found by itself.")
@click.option("--models", multiple=True, metavar="[NAME=]MODEL ...", help="Models to load at start, or ALL.")
@click.option("--log-config", metavar="FILE", help="log4j configuration; its levels are taken over.")
@click.option("--report-fd", type=int, hidden=True)
@click.version_option(mms_lite.__version__, prog_name="mms-lite")
@_config_options
def command(**values: Any) -> None:
    """Serve machine-learning models over HTTP."""
    if values.pop("start") and values["stop"]:
        raise click.UsageError("--start and --stop exclude each other.")
    stop, foreground = values.pop("stop"), values.pop("foreground")
    report_fd = values.pop("report_fd")
    log_config = values.pop("log_config")
    instance = Instance()
    try:
        if stop:
            _stop(instance)
            return
        if report_fd is None and instance.running() is not None:
            raise _Exit(_ALREADY, EXIT_CONFIGURATION)
        loaded = _load_config(values.pop("mms_config"), log_config, values)
        if foreground:
            sys.exit(_serve(loaded, log_config, instance, report_fd))
        _start(loaded)
    except ConfigError as error:
        _fail(f"Invalid configuration: {error.message}", EXIT_CONFIGURATION)
    except _Exit as end:
        _fail(str(end), end.code)


def main() -> None:
    """Run the command line."""
    command.main(prog_name="mms-lite")


def _fail(message: str, code: int) -> NoReturn:
    click.echo(message)
    sys.exit(code)


def _load_config(flag: str | None, log_config: str | None, values: dict[str, Any]) -> LoadedConfig:
    if log_config and not Path(log_config).is_file():
        raise _Exit(f"--log-config file not found: {os.path.abspath(log_config)}", EXIT_CONFIGURATION)
    if flag and not Path(flag).is_file():
        raise _Exit(f"--mms-config file not found: {flag}", EXIT_CONFIGURATION)
    if values["model_store"] and not Path(values["model_store"]).is_dir():
        raise _Exit(f"--model-store directory not found: {values['model_store']}", EXIT_CONFIGURATION)
    models = values.pop("models")
    overrides = {**values, "load_models": ",".join(models) or None}
    loaded = Config.load(find_config_file(flag, os.environ), overrides, os.environ)
    if models and loaded.config.model_store is None and list(models) != ["ALL"]:
        raise _Exit("--model-store is required to load model locally.", EXIT_CONFIGURATION)
    return loaded


def _serve(loaded: LoadedConfig, log_config: str | None, instance: Instance, report_fd: int | None) -> int:
    """Be the server, in this process."""
    from mms_lite import logs, server

    if not instance.claim():
        raise _Exit(_ALREADY, EXIT_CONFIGURATION)
    report = _print_event if report_fd is None else _pipe_events(report_fd)
    try:
        level, note = logs.log_config_level(Path(log_config)) if log_config else (None, "")
        config = loaded.config
        router = logs.configure(
            config.log_location,
            config.metrics_location,
            console=report_fd is None,
            level=level or logging.INFO,
        )
        for text in filter(None, (*loaded.notes, note)):
            logging.getLogger("mms_lite").warning("%s", text)
        return server.serve(loaded.config, report=report, access=router.access, instance=instance)
    except ConfigError as error:
        report({"event": "failed", "message": f"Invalid configuration: {error.message}"})
        return EXIT_CONFIGURATION
    finally:
        instance.release()


def _start(loaded: LoadedConfig) -> None:
    """Start the server in the background; return when it is ready.

    Raises:
        _Exit: it is not, and why; the server has ended.
    """
    config = loaded.config
    for note in loaded.notes:
        click.echo(f"Note: {note}", err=True)
    output = _open_output(config.log_location)
    said_before = output.tell()
    receiving, sending = os.pipe()
    root = str(Path(mms_lite.__file__).resolve().parent.parent)
    arguments = [a for a in click.get_current_context().meta["arguments"] if a != "--start"]
    command = [
        sys.executable,
        "-c",
        _BOOT.format(root),
        "--foreground",
        "--report-fd",
        str(sending),
        *arguments,
    ]
    with output:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[sending],
            start_new_session=True,
        )
    os.close(sending)
    ready = False
    try:
        ready = _follow(receiving, server, config, said_before)
    finally:
        if not ready:
            _end(server.pid, config.drain_timeout_s)


def _open_output(folder: Path) -> BinaryIO:
    """Open the file for what the server prints outside its logs, at its end.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / _OUTPUT_FILE).open("ab")
    except OSError as error:
        raise ConfigError(f"log folder {folder} cannot be written: {error.strerror}") from error


def _follow(receiving: int, server: subprocess.Popen[bytes], config: Config, said_before: int) -> bool:
    """Print what the starting server reports until it is ready; its output before `said_before` is older."""
    until = time.monotonic() + config.start_timeout_s
    event: Mapping[str, Any] = {"event": ""}
    for event in _events(receiving, until):
        _print_event(event)
        if event["event"] == "ready":
            _say(f"Logs: {config.log_location.absolute()}")
            return True
        if event["event"] == "failed":
            until = time.monotonic() + config.drain_timeout_s
            break
    try:
        server.wait(max(0.0, until - time.monotonic()) + 1.0)
    except subprocess.TimeoutExpired:
        text = f"Model server was not ready within {config.start_timeout_s:g} s and was ended."
        raise _Exit(text, EXIT_START_TIMEOUT) from None
    if event["event"] == "failed":
        raise _Exit("Model server was not started.", server.returncode)
    said = (config.log_location / _OUTPUT_FILE).read_bytes()[said_before:]
    lines = said.decode("utf-8", "replace").splitlines()[-5:]
    text = "\n".join([f"Model server ended with exit code {server.returncode} while it started.", *lines])
    raise _Exit(text, server.returncode if server.returncode > 0 else EXIT_CONFIGURATION)


def _events(receiving: int, until: float) -> Iterator[dict[str, Any]]:
    """Yield the events that come down the pipe, until it is closed or the time is over."""
    rest = b""
    with os.fdopen(receiving, "rb", buffering=0) as pipe:
        while (left_s := until - time.monotonic()) > 0:
            if not select.select([pipe], [], [], left_s)[0]:
                return
            data = pipe.read(65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from map(json.loads, lines)


def _pipe_events(fd: int) -> Callable[[Mapping[str, Any]], None]:
    os.set_inheritable(fd, False)

    def report(event: Mapping[str, Any]) -> None:
        try:
            os.write(fd, json.dumps(dict(event)).encode() + b"\n")
        except OSError:
            return  # nobody waits for us any more

    return report


def _print_event(event: Mapping[str, Any]) -> None:
    kind = event["event"]
    if kind == "model" and event["error"] is None:
        _say(f"Model {event['model']}: ready after {event['seconds']:.1f} s")
    elif kind == "model":
        _say(f"Model {event['model']}: FAILED: {event['error']}")
    elif kind == "failed":
        _say(event["message"])
    elif kind == "ready":
        _say(f"Inference API:  {event['inference_address']}")
        _say(f"Management API: {event['management_address']}")
        _say("Model server started.")


def _say(text: str) -> None:
    """Print a line. Who reads no more, as `grep -q` once it has found its word, does not end the server."""
    try:
        click.echo(text)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _stop(instance: Instance) -> None:
    pid = instance.running()
    if pid is None:
        click.echo("Model server is not currently running.")
        return
    state = instance.state()
    _end(pid, float(state.get("drain_timeout_s", 30.0)), stopping=bool(state.get("stopping")))
    click.echo("Model server stopped.")


def _end(pid: int, drain_s: float, *, stopping: bool = False) -> None:
    """Let a server drain and end; kill it and what it started if it does not.

    One that is `stopping` is only waited for: a second signal would cut its drain short.
    """
    try:
        server = psutil.Process(pid)
        children = server.children(recursive=True)
        if not stopping:
            server.send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied as error:
        raise _Exit(f"process {pid} is another user's and cannot be stopped", EXIT_CONFIGURATION) from error
    if _wait_for_end(server, drain_s + _KILL_AFTER_S):
        return
    for process in [*children, server]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _wait_for_end(server, _KILL_AFTER_S)


def _wait_for_end(process: psutil.Process, timeout_s: float) -> bool:
    """Wait until a process has ended; a zombie has, though in many containers nobody ever reaps it."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
