"""The command line: `mms-lite`, also installed as `multi-model-server` and `mxnet-model-server`.

`--start` runs the server in the background and returns when it is ready, or tells why it is not. Options that
are configuration come from the table in `config`; only what starts and stops a server is spelled here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
import psutil

import mms_lite
from mms_lite import config_report, machine
from mms_lite.arguments import Command
from mms_lite.config import OPTIONS, PRESETS, SWITCH, Config, LoadedConfig, find_config_file
from mms_lite.errors import ConfigError
from mms_lite.instance import Instance

EXIT_CONFIGURATION = 1
EXIT_START_TIMEOUT = 4
_ALREADY = "Model server is already running, please use multi-model-server --stop to stop MMS."
_KILL_AFTER_S = 10.0  # beyond the drain time
_OUTPUT_FILE = "server_output.log"  # what the server prints outside its logs: crashes, mostly
# The argument by which SageMaker's toolkit finds the server among all processes.
PROCESS_NAME = "com.amazonaws.ml.mms.ModelServer"
# `python -m` would put the current folder before the standard library.
_BOOT = (
    "import sys; del sys.argv[1]; sys.path[:] = [p for p in sys.path if p] + [{!r}];"
    " from mms_lite.cli import main; main()"
)
_PORTS = {"inference": "http", "grpc": "grpc", "metrics": "metrics"}  # what the flags call the APIs' ports
# MMS's own, looser reading of what its `--models` takes without a store; the repository reads them later.
_NEEDS_NO_STORE = re.compile(r"(.+=)?https?://.+|ALL", re.IGNORECASE)


class _Exit(Exception):
    """Ends the program with a message and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


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


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--start", is_flag=True, help="Start in the background and wait until ready (the default).")
@click.option("--stop", is_flag=True, help="Drain and stop the running server.")
@click.option("--foreground", is_flag=True, help="Run in this terminal until Ctrl-C.")
@click.option(
    "--mms-config",
    metavar="FILE",
    help="Properties file, or `sagemaker`; ./config.properties is found by itself.",
)
@click.option("--models", multiple=True, metavar="[NAME=]MODEL ...", help="Models to load at start, or ALL.")
@click.option("--log-config", metavar="FILE", help="log4j configuration; its levels are taken over.")
@click.option(
    "--print-config", is_flag=True, help="Show every setting and where it comes from; start nothing."
)
@click.option("--http-port", "--rest-port", type=int, help="Port of inference_address.")
@click.option("--grpc-port", "--port", type=int, help="Port of grpc_address.")
@click.option("--metrics-port", type=int, help="Port of metrics_address.")
@click.option("--report-fd", type=int, hidden=True)
@click.version_option(mms_lite.__version__, prog_name="mms-lite")
@_config_options
def command(**values: Any) -> None:
    """Serve machine-learning models over HTTP.

    `mms-lite check ARCHIVE` tries one model without serving it.
    """
    if values.pop("start") and values["stop"]:
        raise click.UsageError("--start and --stop exclude each other.")
    stop, foreground = values.pop("stop"), values.pop("foreground")
    print_config = values.pop("print_config")
    report_fd = values.pop("report_fd")
    if foreground and not (stop or print_config) and sys.executable and PROCESS_NAME not in sys.orig_argv:
        _become(_server_command())
    try:
        instance = Instance()
        if stop and not print_config:
            _stop(instance)
            return
        if report_fd is None and not print_config:
            _refuse_a_second(instance)
        log_config = values.pop("log_config")
        loaded = _load_config(values.pop("mms_config"), log_config, values)
        if print_config:
            _say(_report(loaded))
        elif foreground:
            sys.exit(_serve(loaded, log_config, instance, report_fd))
        else:
            _start(loaded)
    except ConfigError as error:
        _fail(f"Invalid configuration: {error.message}", EXIT_CONFIGURATION)
    except _Exit as end:
        _fail(str(end), end.code)


def _report(loaded: LoadedConfig) -> str:
    """Return what --print-config shows: every option, and how workers share this machine."""
    from mms_lite.engine.launcher import worker_environ

    config = loaded.config
    environ = worker_environ(os.environ, config.blacklist_env_vars)
    gpus = machine.gpu_count(config.number_of_gpu)
    shares = config_report.shares(config, environ, machine.cpus(), gpus=gpus)
    return f"{config_report.table(loaded)}\n\n{shares}"


def main() -> None:
    """Run the command line."""
    _open_closed_files()
    try:
        if sys.argv[1:2] == ["check"]:
            from mms_lite import check

            check.command.main(args=sys.argv[2:], prog_name="mms-lite check")
        command.main(prog_name="mms-lite")
    except SystemExit as end:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        # Python would wait for threads, and one may still read a large archive that nobody wants any more.
        os._exit(end.code if isinstance(end.code, int) else 1)


def main_by_old_name() -> None:
    """Run the command line as `mxnet-model-server`, with the warning that MMS gives."""
    click.echo("Warning: Calling MMS with mxnet-model-server. Please move to multi-model-server.")
    main()


def _open_closed_files() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed, else the next file opened takes its place."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(message)
    sys.exit(code)


def _refuse_a_second(instance: Instance) -> None:
    if instance.running() is not None:
        raise _Exit(_ALREADY, EXIT_CONFIGURATION)
    if instance.pid_file.exists():
        click.echo("Removing orphan pid file.")


def _load_config(flag: str | None, log_config: str | None, values: dict[str, Any]) -> LoadedConfig:
    """Read the configuration; the checks come in the order of MMS.

    Raises:
        _Exit, ConfigError: it cannot be used.
    """
    models, store, temp = values.pop("models"), values["model_store"], os.environ.get("TEMP")
    repository = values["model_repository"]
    ports = {f"{api}_address": values.pop(f"{key}_port") for api, key in _PORTS.items()}
    wrong = ""
    if log_config and not Path(log_config).is_file():
        wrong = f"--log-config file not found: {os.path.realpath(log_config)}"
    elif temp and not Path(temp).is_dir():
        wrong = f"Invalid temp directory: {temp}, please check TEMP environment variable."
    elif flag and flag not in PRESETS and not Path(flag).is_file():
        wrong = f"--mms-config file not found: {flag}"
    elif store and not Path(store).is_dir():
        wrong = f"--model-store directory not found: {store}"
    elif repository and not Path(repository).is_dir():
        wrong = f"--model-repository directory not found: {repository}"
    if wrong:
        raise _Exit(wrong, EXIT_CONFIGURATION)
    overrides = {**values, "load_models": ",".join(models) or None}
    loaded = Config.load(find_config_file(flag, os.environ), overrides, os.environ)
    sources = (loaded.config.model_store, loaded.config.model_repository)
    if sources == (None, None) and not all(map(_NEEDS_NO_STORE.fullmatch, models)):
        raise _Exit("--model-store is required to load model locally.", EXIT_CONFIGURATION)
    return loaded.with_ports(ports)


def _become(command: list[str]) -> None:
    """Turn this process into another one: its arguments cannot be changed in any other way."""
    os.execv(command[0], command)


def _server_command(*more: str) -> list[str]:
    """Return the command of the server that the command line asks for, in the foreground."""
    root = str(Path(mms_lite.__file__).resolve().parent.parent)
    typed = click.get_current_context().meta["arguments"]
    arguments = [each for each in typed if each not in ("--start", "--foreground")]
    return [sys.executable, "-c", _BOOT.format(root), PROCESS_NAME, "--foreground", *more, *arguments]


def _logs_to_stdout(config: Config, *, background: bool) -> bool:
    if config.console_log is not None:
        return config.console_log
    return not background or _is_log_of_container()


def _is_log_of_container() -> bool:
    """Tell whether stdout is that of process 1: then it stays open, and nobody waits for its end."""
    try:
        stdout, null = os.fstat(1), os.stat(os.devnull)
        return os.path.samestat(stdout, os.stat("/proc/1/fd/1")) and not os.path.samestat(stdout, null)
    except OSError:
        return False


def _serve(loaded: LoadedConfig, log_config: str | None, instance: Instance, report_fd: int | None) -> int:
    """Be the server, in this process."""
    from mms_lite import logs, server

    report = _print_event if report_fd is None else _pipe_events(report_fd)
    if report_fd is not None:  # no terminal is ours, so none that closes ends us
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        if not instance.claim():
            report({"event": "refused", "message": _ALREADY})
            return EXIT_CONFIGURATION
        level, note = logs.log_config_level(Path(log_config)) if log_config else (None, "")
        config = loaded.config
        router = logs.configure(
            config.log_location,
            config.metrics_location,
            console=_logs_to_stdout(config, background=report_fd is not None),
            level=level or logging.INFO,
        )
        for text in filter(None, (*loaded.notes, note)):
            logging.getLogger("mms_lite").warning("%s", text)
        return server.serve(loaded, report=report, access=router.log_access, instance=instance)
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
    output = None if _logs_to_stdout(config, background=True) else _open_output(config.log_location)
    said_before = output.tell() if output else 0
    receiving, sending = os.pipe()
    with output or nullcontext():
        # Never our stderr: who captures it would wait for the server's end.
        server = subprocess.Popen(
            _server_command("--report-fd", str(sending)),
            stdin=subprocess.DEVNULL,
            stdout=output or 1,
            stderr=output or 1,
            pass_fds=[sending],
            start_new_session=True,
        )
    os.close(sending)
    ready = False
    try:
        _follow(receiving, server, config, said_before if output else None)
        ready = True
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


def _follow(receiving: int, server: subprocess.Popen[bytes], config: Config, said_before: int | None) -> None:
    """Print what the starting server reports until it is ready.

    What it prints outside its logs begins at `said_before` of its output file; None: the user has seen it.

    Raises:
        _Exit: it is not ready.
    """
    logs = f"Logs: {config.log_location.absolute()}"
    until = time.monotonic() + config.start_timeout_s
    kind = ""
    for event in _events(receiving, until):
        kind = event["event"]
        if kind == "refused":
            raise _Exit(event["message"], EXIT_CONFIGURATION)
        _print_event(event)
        if kind == "ready":
            _say(logs)
            return
        if kind == "failed":
            until = time.monotonic() + config.drain_timeout_s + _KILL_AFTER_S
            break
    with suppress(subprocess.TimeoutExpired):
        server.wait(max(0.0, until - time.monotonic()) + 1.0)
    code = max(server.returncode or 0, 0) or EXIT_CONFIGURATION
    if kind == "failed":
        raise _Exit(f"Model server was not started.\n{logs}", code)
    if server.returncode is None:
        text = f"Model server was not ready within {config.start_timeout_s:g} s and was ended."
        hint = "A model that takes longer needs a higher --start-timeout."
        raise _Exit(f"{text}\n{hint}\n{logs}", EXIT_START_TIMEOUT)
    said = b"" if said_before is None else (config.log_location / _OUTPUT_FILE).read_bytes()[said_before:]
    last = said.decode("utf-8", "replace").splitlines()[-5:]
    text = f"Model server ended with exit code {server.returncode} while it started."
    raise _Exit("\n".join([text, *last, logs]), code)


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
    elif kind == "note":
        _say(f"Note: {event['message']}")
    elif kind in ("failed", "refused"):
        _say(event["message"])
    elif kind == "ready":
        _say(f"Inference API:  {event['inference_address']}")
        if "grpc_address" in event:
            _say(f"gRPC API:       {event['grpc_address']}")
        _say(f"Management API: {event['management_address']}")
        if "metrics_address" in event:
            _say(f"Metrics API:    {event['metrics_address']}")
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
        _say("Model server is not currently running.")
        return
    state = instance.state()
    _end(pid, float(state.get("drain_timeout_s", 30.0)), stopping=bool(state.get("stopping")))
    _say("Model server stopped.")


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
