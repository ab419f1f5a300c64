"""The command's options, messages and exit codes."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model_archiver.cli import main

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/svc.py").write_text("def handle(data, context): return data")
    (tmp_path / "out").mkdir()
    given = {
        "--model-name": "net",
        "--model-path": str(tmp_path / "src"),
        "--handler": "svc:handle",
        "--export-path": str(tmp_path / "out"),
    }

    def invoke(*flags: str, **changed: str | None) -> Result:
        options = given | {f"--{key.replace('_', '-')}": value for key, value in changed.items()}
        pairs = [word for key, value in options.items() if value is not None for word in (key, value)]
        return CliRunner().invoke(main, [*pairs, *flags])

    return invoke


def test_success_prints_nothing(run: Run, tmp_path: Path) -> None:
    result = run("--runtime", "python3")
    assert (result.exit_code, result.output) == (0, "")
    with zipfile.ZipFile(tmp_path / "out/net.mar") as archive:
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    assert manifest["runtime"] == "python3"
    assert manifest["model"] == {"modelName": "net", "handler": "svc:handle"}


@pytest.mark.parametrize(
    ("archive_format", "name"), [("default", "net.mar"), ("tgz", "net.tar.gz"), ("no-archive", "net")]
)
def test_each_archive_format_has_its_output(run: Run, tmp_path: Path, archive_format: str, name: str) -> None:
    assert run("--archive-format", archive_format).exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("option", ["model_name", "model_path", "handler"])
def test_a_missing_required_option_exits_2(run: Run, option: str) -> None:
    result = run(**{option: None})
    assert result.exit_code == 2
    assert f"--{option.replace('_', '-')}" in result.stderr


def test_an_unknown_runtime_or_format_exits_2(run: Run) -> None:
    assert run("--runtime", "perl").exit_code == 2
    assert run("--archive-format", "rar").exit_code == 2


@pytest.mark.parametrize("name", ["a/b", "..", "", "-x", ".x", "a b", "a\n"])
def test_a_model_name_with_special_characters_exits_1(run: Run, name: str) -> None:
    result = run(model_name=name)
    assert result.exit_code == 1
    assert result.stderr == (
        "ERROR - Model name contains special characters.\n"
        "The allowed regular expression filter for model name is: ^[A-Za-z0-9][A-Za-z0-9_\\-.]*$\n"
    )


def test_a_wrong_export_path_is_reported_before_a_wrong_model_path(run: Run) -> None:
    result = run(export_path="/no/where", model_path="/no/there")
    assert result.exit_code == 1
    assert result.stderr == (
        "ERROR - Given export-path /no/where is not a directory. Point to a valid export-path directory.\n"
    )


def test_a_wrong_model_path_exits_1(run: Run) -> None:
    result = run(model_path="/no/there")
    assert result.exit_code == 1
    assert result.stderr == (
        "ERROR - Given model-path /no/there is not a valid directory. "
        "Point to a valid model-path directory.\n"
    )


@pytest.mark.parametrize("flag", ["-f", "--force"])
def test_existing_output_needs_force(run: Run, tmp_path: Path, flag: str) -> None:
    run()
    path = tmp_path / "out/net.mar"
    result = run()
    assert result.exit_code == 1
    assert result.stderr == (
        f"ERROR - {path} already exists.\n"
        "Please specify --force/-f option to overwrite the model archive output file.\n"
        "See -h/--help for more details.\n"
    )
    result = run(flag)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"WARNING - Overwriting {path} ...\n"


def test_a_handler_outside_the_model_is_only_a_warning(run: Run, tmp_path: Path) -> None:
    result = run(handler="sagemaker_service:handle")
    assert result.exit_code == 0
    assert result.stderr == (
        f"WARNING - handler file sagemaker_service not found in model-path {tmp_path / 'src'}; "
        "the module must then be importable where the model is served\n"
    )


@pytest.mark.parametrize("flag", ["-c", "--convert"])
def test_convert_is_refused_in_one_line(run: Run, tmp_path: Path, flag: str) -> None:
    result = run(flag)
    assert result.exit_code == 1
    assert result.stderr.startswith("ERROR - ONNX is not converted to MXNet here")
    assert result.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_option(flag: str) -> None:
    result = CliRunner().invoke(main, [flag])
    assert result.exit_code == 0
    for option in (
        "--model-name", "--model-path", "--handler", "--runtime", "--export-path", "--archive-format",
        "-f, --force", "-c, --convert", "--version",
    ):  # fmt: skip
        assert option in result.stdout


def test_the_module_runs_as_a_command_without_importing_the_server(run: Run, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('model_archiver', run_name='__main__', alter_sys=True)\n"
        "finally:\n    assert not [m for m in sys.modules if m.split('.')[0] in ('mms_lite', 'numpy')]\n"
    )
    options = ["--model-name", "net", "--model-path", "src", "--handler", "svc", "--export-path", "out"]
    for start in (["-c", code], ["-m", "model_archiver"]):
        done = subprocess.run(
            [sys.executable, *start, *options, "-f"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "out/net.mar").exists()
