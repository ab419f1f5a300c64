"""The command line without a server: how arguments are read, what is refused and in which words."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import mms_lite
from mms_lite import cli
from mms_lite.cli import command, spread_models
from mms_lite.config import OPTIONS, LoadedConfig

Invoke = Any


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command line in an empty folder that is also the temporary one; no server is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("MMS_CONFIG_FILE", "LOG_LOCATION", "METRICS_LOCATION"):
        monkeypatch.delenv(name, raising=False)

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
    ("typed", "read"),
    [
        (["--models", "a"], ["--models", "a"]),
        (["--models", "a.mar", "n=b.mar"], ["--models", "a.mar", "--models", "n=b.mar"]),
        (["--models", "a", "--models", "b"], ["--models", "a", "--models", "b"]),
        (["--models", "a", "b", "--models", "c"], ["--models", "a", "--models", "b", "--models", "c"]),
        (["--models=a"], ["--models=a"]),
        (["--models=a", "b"], ["--models=a", "--models", "b"]),
        (
            ["--models", "a", "b", "--model-store", "s", "--start"],
            ["--models", "a", "--models", "b", "--model-store", "s", "--start"],
        ),
        (["--start", "--models", "a"], ["--start", "--models", "a"]),
        (["--model-store", "s", "left over"], ["--model-store", "s", "left over"]),
        ([], []),
    ],
)
def test_several_models_after_one_flag(typed: Sequence[str], read: Sequence[str]) -> None:
    assert spread_models(typed) == read


@pytest.mark.parametrize(
    "typed", [["--models"], ["--models", "--start"], ["--models", "--models", "a"], ["--start", "--models"]]
)
def test_models_without_a_value_is_a_usage_error(invoke: Invoke, typed: Sequence[str]) -> None:
    with pytest.raises(click.UsageError, match="requires an argument"):
        spread_models(typed)

    result = invoke(*typed)
    assert result.exit_code == 2
    assert "Option '--models' requires an argument." in result.output


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
        "model_store": str(tmp_path),
        "load_models": "ALL",
        "number_of_gpu": "1",
        "decode_input_request": "false",
        "default_service_handler": "a:b",
        "log_location": "l",
        "metrics_location": "m",
        "temp_directory": "t",
    }
    flags = [option for option in OPTIONS if option.flag]
    typed: list[str] = []
    for option in flags:
        assert option.flag
        is_switch = option.name == "strict"
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


def test_start_and_stop_exclude_each_other(invoke: Invoke) -> None:
    result = invoke("--start", "--stop")

    assert result.exit_code == 2
    assert "--start and --stop exclude each other." in result.output


@pytest.mark.parametrize("typed", [["--bogus"], ["--port", "80"], ["--stop", "--bogus"], ["left over"]])
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
    flags = ("--start", "--stop", "--foreground", "--mms-config", "--log-config")
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
    ],
)
def test_mistakes_in_the_words_of_mms(
    invoke: Invoke, tmp_path: Path, typed: Sequence[str], message: str
) -> None:
    (tmp_path / "config.txt").touch()

    result = invoke("--start", *typed)

    assert (result.exit_code, result.output) == (1, message.format(folder=tmp_path) + "\n")


def test_the_log_config_is_checked_first_as_in_mms(invoke: Invoke) -> None:
    result = invoke("--model-store", "no", "--mms-config", "no", "--log-config", "no")

    assert result.output.startswith("--log-config file not found: ")


def test_all_without_a_store_is_not_refused_as_in_mms(invoke: Invoke, started: list[LoadedConfig]) -> None:
    assert invoke("--models", "ALL").exit_code == 0
    assert started[0].config.load_models == "ALL"


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


@pytest.mark.parametrize("name", ["mms-lite", "multi-model-server", "mxnet-model-server"])
def test_the_installed_commands(tmp_path: Path, name: str) -> None:
    script = Path(sys.executable).parent / name
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    environ = {**os.environ, "TMPDIR": str(tmp_path)}

    result = subprocess.run(
        [script, "--stop"], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30
    )

    assert (result.returncode, result.stdout) == (0, "Model server is not currently running.\n")
    assert result.stderr == ""


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
