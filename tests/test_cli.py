"""The command line without a server: how arguments are read, what is refused and in which words."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mms_lite
from mms_lite import cli
from mms_lite.cli import PROCESS_NAME, command
from mms_lite.config import OPTIONS, SWITCH, Config, LoadedConfig

Invoke = Any
SAGEMAKER = {
    "SAGEMAKER_MODEL_STORE": "/",
    "SAGEMAKER_BIND_TO_PORT": "8080",
    "SAGEMAKER_RESPONSE_TIMEOUT": "2",
    "SAGEMAKER_NUM_MODEL_WORKERS": "3",
    "SAGEMAKER_HANDLER": "a.b:c",
    "SAGEMAKER_MAX_RESPONSE_SIZE": "4",
    "SAGEMAKER_MAX_REQUEST_SIZE": "5",
}


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command line in an empty folder that is also the temporary one; no server is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("MMS_CONFIG_FILE", "LOG_LOCATION", "METRICS_LOCATION", "TEMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "_become", pytest.fail)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(command, arguments, prog_name="mms-lite")
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    return run


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[LoadedConfig]:
    """With which configurations a server would have been started."""
    found: list[LoadedConfig] = []
    monkeypatch.setattr(cli, "_start", found.append)
    return found


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--models"], "Option '--models' requires an argument."),
        (["--mod", "x"], "ambiguous option: --mod could match --model-store, --models"),
        (["--st"], "ambiguous option: --st could match --start, --stop"),
        (["--model-store"], "Option '--model-store' requires an argument."),
        (["--sta", "--sto"], "--start and --stop exclude each other."),
        (["--start=yes"], "Option '--start' does not take a value."),
    ],
)
def test_a_usage_error(invoke: Invoke, typed: Sequence[str], message: str) -> None:
    result = invoke(*typed)

    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    "typed",
    [
        ["--model-s", "{folder}", "--mms-c", "x.properties", "--log", "log.xml", "--models", "a", "b"],
        ["--model-store={folder}", "--mms-config=x.properties", "--log-config=log.xml", "--models=a", "b"],
    ],
)
def test_flags_may_be_abbreviated_and_joined_to_their_values(
    invoke: Invoke, started: list[LoadedConfig], tmp_path: Path, typed: Sequence[str]
) -> None:
    (tmp_path / "x.properties").write_text("job_queue_size=7")
    (tmp_path / "log.xml").touch()

    result = invoke(*(each.format(folder=tmp_path) for each in typed))

    assert result.exit_code == 0, result.output
    config = started[0].config
    assert (config.model_store, config.job_queue_size, config.load_models) == (tmp_path, 7, "a,b")


@pytest.mark.parametrize(
    ("typed", "models"),
    [
        (["--models", "a.mar", "n=b.mar"], "a.mar,n=b.mar"),
        (["--models", "a.mar", "n=b.mar", "--start"], "a.mar,n=b.mar"),
        (["--models=a", "--models", "b"], "a,b"),
        (["--start", "--models", "ALL"], "ALL"),
        ([], ""),
    ],
)
def test_the_models_reach_the_configuration(
    invoke: Invoke, started: list[LoadedConfig], tmp_path: Path, typed: Sequence[str], models: str
) -> None:
    result = invoke("--model-store", str(tmp_path), *typed)

    assert result.exit_code == 0, result.output
    (loaded,) = started
    assert loaded.config.load_models == models
    assert loaded.config.model_store == tmp_path


def test_every_flag_reaches_its_option(invoke: Invoke, started: list[LoadedConfig], tmp_path: Path) -> None:
    values = {
        "inference_address": "http://127.0.0.1:1",
        "management_address": "http://127.0.0.1:2",
        "metrics_address": "none",
        "model_store": str(tmp_path),
        "load_models": "ALL",
        "number_of_gpu": "1",
        "max_frame_bytes": "100000000",
        "grpc_address": "none",
        "model_control_mode": "poll",
        "decode_input_request": "false",
        "default_service_handler": "a:b",
        "log_location": "l",
        "metrics_location": "m",
        "temp_directory": "t",
    }
    flags = [option for option in OPTIONS if option.flag and option.name != "model_repository"]
    typed: list[str] = []
    for option in flags:
        assert option.flag
        is_switch = option.kind is SWITCH and option.default is False
        typed += [option.flag] if is_switch else [option.flag, values.get(option.name, "7")]

    result = invoke(*typed)

    assert result.exit_code == 0, result.output
    origins = started[0].origins
    assert {option.name: origins[option.name] for option in flags} == dict.fromkeys(
        (option.name for option in flags), "command line"
    )
    assert started[0].config.strict is True
    assert started[0].config.start_timeout_s == 7


def test_the_flag_beats_the_file_and_the_file_is_found(
    invoke: Invoke, started: list[LoadedConfig], tmp_path: Path
) -> None:
    (tmp_path / "config.properties").write_text("job_queue_size=1\nmax_request_size=2\nmodel_store=.\n")

    assert invoke("--job-queue-size", "3", "--models", "a.mar").exit_code == 0

    config = started[0].config
    assert (config.job_queue_size, config.max_request_size, config.load_models) == (3, 2, "a.mar")


@pytest.mark.parametrize("typed", [["--bogus"], ["--ports", "80"], ["--stop", "--bogus"], ["left over"]])
def test_what_is_unknown_is_a_usage_error(invoke: Invoke, typed: Sequence[str]) -> None:
    result = invoke(*typed)

    assert result.exit_code == 2
    assert result.output.startswith("Usage: mms-lite [OPTIONS]")


def test_a_mistyped_flag_names_the_nearest(invoke: Invoke) -> None:
    assert "--start" in invoke("--strat").output


def test_version(invoke: Invoke) -> None:
    result = invoke("--version")

    assert (result.exit_code, result.output) == (0, f"mms-lite, version {mms_lite.__version__}\n")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_every_flag(invoke: Invoke, flag: str) -> None:
    result = invoke(flag)

    assert result.exit_code == 0
    flags = ("--start", "--stop", "--foreground", "--mms-config", "--log-config", "--print-config")
    for each in (*flags, *(option.flag for option in OPTIONS if option.flag)):
        assert f"  {each}" in result.output
    assert "report-fd" not in result.output


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--mms-config", "no.properties"], "--mms-config file not found: no.properties"),
        (["--mms-config", "."], "--mms-config file not found: ."),
        (["--model-store", "no"], "--model-store directory not found: no"),
        (["--model-store", "config.txt"], "--model-store directory not found: config.txt"),
        (["--log-config", "no.xml"], "--log-config file not found: {folder}/no.xml"),
        (["--models", "a.mar"], "--model-store is required to load model locally."),
        (["--models", "a.mar", "ALL"], "--model-store is required to load model locally."),
        (["--models", "http://h/a", "n=b"], "--model-store is required to load model locally."),
    ],
)
def test_mistakes_in_the_words_of_mms(
    invoke: Invoke, tmp_path: Path, typed: Sequence[str], message: str
) -> None:
    (tmp_path / "config.txt").touch()

    result = invoke("--start", *typed)

    assert (result.exit_code, result.output) == (1, message.format(folder=tmp_path) + "\n")


def test_mistakes_are_looked_for_in_the_order_of_mms(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMP", "no")
    typed = ["--models", "a", "--model-store", "no", "--mms-config", "no", "--log-config", "no"]
    steps = [
        "--log-config file not found: ",
        "Invalid temp directory: no, please check TEMP environment variable.\n",
        "--mms-config file not found: no\n",
        "--model-store directory not found: no\n",
        "--model-store is required to load model locally.\n",
    ]

    for step in steps:
        result = invoke(*typed)
        assert result.exit_code == 1
        assert result.output.startswith(step)
        if step.startswith("Invalid temp"):
            monkeypatch.delenv("TEMP")
        else:
            del typed[-2:]


def test_temp_is_the_folder_for_archives_unless_another_is_named(
    invoke: Invoke, started: list[LoadedConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMP", str(tmp_path))

    assert invoke().exit_code == invoke("--temp-directory", "other").exit_code == 0

    assert [loaded.config.temp_directory for loaded in started] == [tmp_path, Path("other")]
    assert started[0].origins["temp_directory"] == "environment TEMP"


@pytest.mark.parametrize("models", [["ALL"], ["http://h/a.mar"], ["n=HTTPS://h/a.mar", "http://h/b"]])
def test_models_that_need_no_store(invoke: Invoke, started: list[LoadedConfig], models: list[str]) -> None:
    assert invoke("--models", *models).exit_code == 0
    assert started[0].config.load_models == ",".join(models)


def test_the_sagemaker_preset_wins_over_a_file_of_that_name(
    invoke: Invoke, started: list[LoadedConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sagemaker").write_text("job_queue_size=1")
    for name, value in SAGEMAKER.items():
        monkeypatch.setenv(name, value)

    assert invoke("--mms-config", "sagemaker").exit_code == 0

    config = started[0].config
    assert config.inference_address == config.management_address
    assert (str(config.inference_address), config.metrics_address) == ("http://0.0.0.0:8080", None)
    assert (config.model_store, config.default_service_handler) == (Path("/"), "a.b:c")
    assert (config.response_timeout_s, config.unregister_model_timeout_s) == (120, 2)
    assert (config.default_workers_per_model, config.max_request_size, config.max_response_size) == (3, 5, 4)
    assert (config.decode_input_request, config.management_open, config.console_log) == (False, True, True)
    assert config.job_queue_size == 100
    assert "2 is 120 s (preset sagemaker)" in started[0].notes[0]


@pytest.mark.parametrize("missing", SAGEMAKER)
def test_the_sagemaker_preset_needs_all_its_variables(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name, value in SAGEMAKER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)

    result = invoke("--mms-config", "sagemaker")

    assert result.exit_code == 1
    assert result.output == f"Invalid configuration: Invalid Environment Variable {missing}\n"


def test_print_config_shows_and_starts_nothing(
    invoke: Invoke, started: list[LoadedConfig], tmp_path: Path
) -> None:
    (tmp_path / "config.properties").write_text("job_queue_size=7\nvmargs=x")
    (tmp_path / ".model_server.pid").symlink_to("nowhere")  # would be refused

    for verb in ("--start", "--stop", "--foreground"):
        result = invoke("--print-config", "--max-request-size", "8", verb)

        assert result.exit_code == 0, result.output
        rows = [line.split(maxsplit=2) for line in result.output.splitlines()]
        assert ["job_queue_size", "7", "file config.properties"] in rows
        assert ["max_request_size", "8", "command line"] in rows
        assert ["strict", "false", "default"] in rows
        assert "Note: vmargs concerns Java only, ignored (file config.properties)" in result.output
    assert started == []


def test_print_config_of_what_is_invalid(invoke: Invoke) -> None:
    result = invoke("--print-config", "--job-queue-size", "x")

    assert result.exit_code == 1
    assert result.output.startswith('Invalid configuration: For input string: "x"')


@pytest.mark.parametrize(("console_log", "background"), [("true", True), ("true", False), ("false", False)])
def test_console_log_decides_where_it_is_set(console_log: str, background: bool) -> None:
    config = Config.load(None, {"console_log": console_log}, {}).config
    assert cli._logs_to_stdout(config, background=background) is (console_log == "true")


def test_the_log_goes_to_stdout_in_the_foreground_only_unless_said_otherwise() -> None:
    assert cli._logs_to_stdout(Config(), background=False)
    assert not cli._logs_to_stdout(Config(), background=True)


def test_the_server_in_the_foreground_becomes_a_process_with_the_name_of_mms(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(cli, "_become", commands.append)
    monkeypatch.setattr(cli, "_serve", lambda *_: 0)

    assert invoke("--fore", "--job-queue-size", "3").exit_code == 0

    (command,) = commands
    assert command[0] == sys.executable
    assert command[3:] == [PROCESS_NAME, "--foreground", "--job-queue-size", "3"]


def test_a_server_with_that_name_does_not_become_another(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "...", PROCESS_NAME])
    monkeypatch.setattr(cli, "_serve", lambda *_: 3)

    assert invoke("--foreground").exit_code == 3


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--job-queue-size", "x"], 'For input string: "x" (job_queue_size, command line)'),
        (["--job-queue-size", "0"], "job_queue_size must be at least 1, not 0 (command line)"),
        (
            ["--inference-address", "localhost:80"],
            "Invalid binding address: localhost:80 (inference_address, command line)",
        ),
        (
            ["--inference-address", "http://a:65536"],
            "Invalid port number: http://a:65536 (inference_address, command line)",
        ),
    ],
)
def test_an_invalid_configuration(invoke: Invoke, typed: Sequence[str], message: str) -> None:
    result = invoke(*typed)

    assert (result.exit_code, result.output) == (1, f"Invalid configuration: {message}\n")


def test_an_invalid_configuration_file(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "config.properties").write_text("job_queue_size=many")

    result = invoke("--start")

    assert result.exit_code == 1
    assert result.output == (
        'Invalid configuration: For input string: "many" (job_queue_size, file config.properties)\n'
    )


def test_stop_without_a_server(invoke: Invoke) -> None:
    result = invoke("--stop", "--models", "ignored", "--model-store", "also ignored")

    assert (result.exit_code, result.output) == (0, "Model server is not currently running.\n")


@pytest.mark.parametrize("content", ["", "garbage", "1\n"])
def test_stop_with_a_stale_pid_file_harms_nobody(invoke: Invoke, tmp_path: Path, content: str) -> None:
    (tmp_path / ".model_server.pid").write_text(content)

    result = invoke("--stop")

    assert (result.exit_code, result.output) == (0, "Model server is not currently running.\n")


def test_a_pid_file_that_is_a_link_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    (tmp_path / ".model_server.pid").symlink_to(tmp_path / "precious")

    for verb in ("--start", "--stop"):
        result = invoke(verb)
        assert result.exit_code == 1
        assert result.output.startswith("Invalid configuration: cannot use the pid file ")


def test_a_pid_file_without_a_server_is_told(
    invoke: Invoke, started: list[LoadedConfig], tmp_path: Path
) -> None:
    assert "orphan" not in invoke().output
    (tmp_path / ".model_server.pid").touch()

    assert invoke().output == "Removing orphan pid file.\n"
    assert len(started) == 2


def test_a_server_that_failed_but_does_not_end_was_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_KILL_AFTER_S", 0.0)
    receiving, sending = os.pipe()
    os.write(sending, b'{"event": "failed", "message": "no port"}\n')
    os.close(sending)
    config = replace(Config(), drain_timeout_s=0.0, log_location=tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
        with pytest.raises(cli._Exit) as caught:
            cli._follow(receiving, server, config, None)
        server.kill()

    assert str(caught.value) == f"Model server was not started.\nLogs: {tmp_path}"
    assert caught.value.code == 1
    assert capsys.readouterr().out == "no port\n"


@pytest.mark.parametrize("name", ["mms-lite", "multi-model-server", "mxnet-model-server"])
def test_the_installed_commands(tmp_path: Path, name: str) -> None:
    script = Path(sys.executable).parent / name
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    environ = {**os.environ, "TMPDIR": str(tmp_path)}

    result = subprocess.run(
        [script, "--stop"], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30
    )

    warning = "Warning: Calling MMS with mxnet-model-server. Please move to multi-model-server.\n"
    said = (warning if name == "mxnet-model-server" else "") + "Model server is not currently running.\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, said, "")


def test_closed_standard_files_do_no_harm(tmp_path: Path) -> None:
    code = "import os, mms_lite.cli as c; c._open_closed_files(); os.write(9, str(os.open('x', 65)).encode())"
    line = f'exec 9>out 0<&- 1>&- 2>&-; exec {sys.executable} -c "{code}"'

    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, timeout=30)

    assert int((tmp_path / "out").read_text()) > 2


def test_python_m(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mms_lite", "--models"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert result.returncode == 2
    assert "Option '--models' requires an argument." in result.stderr


def test_what_starts_a_server_does_not_import_it() -> None:
    """`--start` and `--stop` are quick: aiohttp and the engine are the server's."""
    code = "import sys, mms_lite.cli; print({'aiohttp', 'mms_lite.server', 'numpy'} & set(sys.modules))"

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )

    assert result.stdout == "set()\n"
