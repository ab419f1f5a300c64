"""The command's options, messages and exit codes, beside those of model-archiver 1.0.3 on the same input."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from model_archiver.cli import export_main, main

MANIFEST = "MAR-INF/MANIFEST.json"
GIVEN = {"--model-name": "net", "--model-path": "src", "--handler": "svc:handle", "--export-path": "out"}
NAME_ERROR = (
    "ERROR - Model name contains special characters.\n"
    "The allowed regular expression filter for model name is: ^[A-Za-z0-9][A-Za-z0-9_\\-.]*$\n"
)
EXISTS_ERROR = (
    "ERROR - {} already exists.\n"
    "Please specify --force/-f option to overwrite the model archive output file.\n"
    "See -h/--help for more details.\n"
)
EXPORT_ERROR = "ERROR - Given export-path {} is not a directory. Point to a valid export-path directory.\n"
PATH_ERROR = "ERROR - Given model-path {} is not a valid directory. Point to a valid model-path directory.\n"
PARSE_ERROR = "model-archiver: error: "


@dataclass
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in a folder with a model `src`, an empty folder `empty` and an output folder `out`."""
    for name, text in {"src/svc.py": "def handle(data, context): return data", "src/sub/a.txt": "a"}.items():
        write(tmp_path / name, text)
    (tmp_path / "out").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*words: str) -> Ran:
        try:
            code = main(list(words))
        except SystemExit as left:
            code = int(left.code or 0)
        return Ran(code, *capsys.readouterr())

    return invoke


@pytest.fixture
def run(call: Run) -> Run:
    """Run the command with the arguments of GIVEN, some changed or (None) left out, and more flags."""

    def invoke(*flags: str, **changed: str | None) -> Ran:
        options = GIVEN | {f"--{key.replace('_', '-')}": value for key, value in changed.items()}
        pairs = [word for key, value in options.items() if value is not None for word in (key, value)]
        return call(*pairs, *flags)

    return invoke


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def members(path: Path) -> list[str]:
    """Return what the output holds, sorted, whatever its format."""
    if path.is_dir():
        return sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())
    if path.suffix == ".mar":
        with zipfile.ZipFile(path) as archive:
            return sorted(archive.namelist())
    with tarfile.open(path) as archive:
        return sorted(archive.getnames())


MANIFEST_TEXT = """{
  "runtime": "%s",
  "model": {
    "modelName": "net",
    "handler": "svc:handle"
  },
  "modelServerVersion": "1.0",
  "implementationVersion": "1.0",
  "specificationVersion": "1.0"
}"""


@pytest.mark.parametrize("runtime", ["python", "python2", "python3"])
def test_success_prints_nothing_and_writes_the_manifest_of_mms_byte_for_byte(
    run: Run, tmp_path: Path, runtime: str
) -> None:
    assert run("--runtime", runtime) == Ran(0, "", "")
    with zipfile.ZipFile(tmp_path / "out/net.mar") as archive:
        assert archive.read(MANIFEST).decode() == MANIFEST_TEXT % runtime
        assert archive.namelist()[-1] == MANIFEST
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}


@dataclass
class Case:
    """Arguments that change GIVEN, files that are there before; what mms and we answer to them.

    `members` is what the one output holds besides the manifest; None: there is no new output.
    """

    changed: dict[str, str | None] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    code: int = 0
    err: str = ""
    output: str = "out/net.mar"
    members: tuple[str, ...] | None = ("sub/a.txt", "svc.py")


def refused(
    err: str, code: int = 1, files: tuple[str, ...] = (), flags: tuple[str, ...] = (), **changed: str | None
) -> Case:
    return Case(changed=changed, flags=flags, files=files, code=code, err=err, members=None)


JUNK = (
    "__MACOSX/x", "__pycache__/y.pyc", "sub/__pycache__/z", ".git/config", ".hidden", "sub/.hid", "a.pyc",
    ".DS_Store", "x.DS_Store", "old.mar", "MANIFEST.json", "sub/MANIFEST.json", "MAR-INF/MANIFEST.json",
    "MAR-INF/extra.txt", "manifest.json", "net.model", "x.PYC", "m.onnx", "n.MAR", "a b.txt", "\u00fc.txt",
)  # fmt: skip
KEPT = (
    ".hidden", "MAR-INF/extra.txt", "a b.txt", "m.onnx", "manifest.json", "n.MAR", "net.model", "sub/.hid",
    "sub/a.txt", "svc.py", "x.PYC", "\u00fc.txt",
)  # fmt: skip
JUNK_FILES = tuple(f"src/{name}" for name in JUNK)

# What model-archiver 1.0.3 was seen to do: exit code, the end of its error output, the members it packs.
AS_MMS = {
    "plain": Case(),
    "tgz": Case({"archive_format": "tgz"}, output="out/net.tar.gz"),
    "folder": Case({"archive_format": "no-archive"}, output="out/net"),
    "default format by name": Case({"archive_format": "default"}),
    "dots, dashes, underscores": Case({"model_name": "a.b-c_d"}, output="out/a.b-c_d.mar"),
    "a digit": Case({"model_name": "1"}, output="out/1.mar"),
    "a long name": Case({"model_name": "x" * 100}, output=f"out/{'x' * 100}.mar"),
    "export path with a slash": Case({"export_path": "out/"}),
    "model path with a slash": Case({"model_path": "src/"}),
    "model path with dots": Case({"model_path": "./src/../src"}),
    "no export path": Case({"export_path": None}, output="net.mar"),
    "empty export path": Case({"export_path": ""}, output="net.mar"),
    "force without need": Case(flags=("-f",)),
    "force": Case(flags=("-f",), files=("out/net.mar",), err="WARNING - Overwriting out/net.mar ...\n"),
    "force in full": Case(
        flags=("--force",), files=("out/net.mar",), err="WARNING - Overwriting out/net.mar ...\n"
    ),
    "force for a tgz": Case(
        {"archive_format": "tgz"},
        ("-f",),
        ("out/net.tar.gz",),
        err="WARNING - Overwriting out/net.tar.gz ...\n",
        output="out/net.tar.gz",
    ),
    "output of another format": Case(
        {"archive_format": "tgz"}, files=("out/net.mar",), output="out/net.tar.gz"
    ),
    "last of two names": Case(flags=("--model-name", "other"), output="out/other.mar"),
    "what is left out": Case(files=JUNK_FILES, members=KEPT),
    "what is left out of a tgz": Case(
        {"archive_format": "tgz"}, files=JUNK_FILES, members=KEPT, output="out/net.tar.gz"
    ),
    "what is left out of a folder": Case(
        {"archive_format": "no-archive"}, files=JUNK_FILES, members=KEPT, output="out/net"
    ),
    "onnx without convert": Case(files=("src/m.onnx",), members=("m.onnx", "sub/a.txt", "svc.py")),
    "convert without onnx": Case(flags=("-c",)),
    "convert with onnx in a folder below": Case(
        flags=("--convert",), files=("src/sub/m.onnx",), members=("sub/a.txt", "sub/m.onnx", "svc.py")
    ),
    "two onnx to convert": refused(
        "ERROR - model-archiver expects only one .onnx file in the folder. "
        "Found 2 files ['m.onnx', 'n.onnx'] in model-path.\n",
        files=("src/m.onnx", "src/n.onnx"),
        flags=("-c",),
    ),
    "convert and a bad name": refused(NAME_ERROR, model_name="a b", flags=("-c",)),
    "name with a slash": refused(NAME_ERROR, model_name="a/b"),
    "name with dots and a slash": refused(NAME_ERROR, model_name="../net"),
    "empty name": refused(NAME_ERROR, model_name=""),
    "name with a dot first": refused(NAME_ERROR, model_name=".x"),
    "name with a blank": refused(NAME_ERROR, model_name="a b"),
    "name that is not ASCII": refused(NAME_ERROR, model_name="\u00fcn\u00ef"),
    "name before paths": refused(NAME_ERROR, model_name="a b", export_path="nope", model_path="nope"),
    "no such export path": refused(EXPORT_ERROR.format("nope"), export_path="nope"),
    "export path before model path": refused(
        EXPORT_ERROR.format("nope"), export_path="nope", model_path="no"
    ),
    "export path is a file": refused(EXPORT_ERROR.format("f"), export_path="f", files=("f",)),
    "no such model path": refused(PATH_ERROR.format("nope"), model_path="nope"),
    "model path is a file": refused(PATH_ERROR.format("src/svc.py"), model_path="src/svc.py"),
    "unknown runtime": refused(PARSE_ERROR + "argument --runtime: invalid choice: 'perl'", 2, runtime="perl"),
    "runtime in capitals": refused(PARSE_ERROR + "argument --runtime: invalid choice", 2, runtime="Python"),
    "unknown format": refused(
        PARSE_ERROR + "argument --archive-format: invalid choice: 'zip'", 2, archive_format="zip"
    ),
    "no name": refused(
        PARSE_ERROR + "the following arguments are required: --model-name\n", 2, model_name=None
    ),
    "no model path": refused(
        PARSE_ERROR + "the following arguments are required: --model-path\n", 2, model_path=None
    ),
    "no handler": refused(PARSE_ERROR + "the following arguments are required: --handler\n", 2, handler=None),
    "misspelt flag": refused(PARSE_ERROR + "unrecognized arguments: --forse\n", 2, flags=("--forse",)),
    "unknown flag": refused(PARSE_ERROR + "unrecognized arguments: --bogus\n", 2, flags=("--bogus",)),
    "a word too many": refused(PARSE_ERROR + "unrecognized arguments: extra\n", 2, flags=("extra",)),
    "a name like a flag": refused(
        PARSE_ERROR + "argument --model-name: expected one argument\n", 2, model_name="-x"
    ),
}
# What was mended: MMS prints a literal %s, packs nothing and calls it done, or ends in a traceback.
MENDED = {
    "existing output": refused(EXISTS_ERROR.format("out/net.mar"), files=("out/net.mar",)),
    "existing tgz": refused(
        EXISTS_ERROR.format("out/net.tar.gz"), archive_format="tgz", files=("out/net.tar.gz",)
    ),
    "existing folder": refused(
        EXISTS_ERROR.format("out/net"), archive_format="no-archive", files=("out/net/old.txt",)
    ),
    "existing output before convert": refused(
        EXISTS_ERROR.format("out/net.mar"), files=("out/net.mar", "src/m.onnx"), flags=("-c",)
    ),
    "name with a line break": refused(NAME_ERROR, model_name="a\n"),
    "empty model path": refused(PATH_ERROR.format(""), model_path=""),
    "a folder in the output's place": refused(
        "net.mar: Is a directory\n", files=("out/net.mar/x",), flags=("-f",)
    ),
    "forced over a folder of others": refused(
        "was not written by model-archiver (no MAR-INF/MANIFEST.json); remove it first.\n",
        archive_format="no-archive",
        files=("out/net/theirs.txt",),
        flags=("-f",),
    ),
    "forced over a folder of ours, which is replaced": Case(
        {"archive_format": "no-archive"},
        ("-f",),
        ("out/net/old.txt", f"out/net/{MANIFEST}"),
        err="WARNING - Overwriting out/net ...\n",
        output="out/net",
    ),
    "onnx to convert": refused(
        "ERROR - ONNX is not converted to MXNet here. Pack m.onnx as it is, "
        "without -c/--convert, and have the handler load it.\n",
        files=("src/m.onnx",),
        flags=("-c",),
    ),
    "handler that is not in the model": Case(
        {"handler": "sagemaker_service:handle"},
        err="WARNING - handler file sagemaker_service not found in model-path src; "
        "the module must then be importable where the model is served\n",
    ),
}
CASES = {**AS_MMS, **MENDED}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exit_code_messages_and_members(run: Run, tmp_path: Path, case: Case) -> None:
    for name in case.files:
        write(tmp_path / name)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    ran = run(*case.flags, **case.changed)
    assert (ran.code, ran.out) == (case.code, "")
    assert case.err in ran.err if case.code else ran.err == case.err
    if case.members is None:
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
        return
    folder = "net/" if case.output.endswith(".gz") else ""
    assert members(tmp_path / case.output) == sorted(folder + name for name in (*case.members, MANIFEST))


@pytest.mark.parametrize(
    "words",
    [
        ("--model-n", "net", "--model-p", "src", "--hand", "svc:handle", "--exp", "out"),
        ("--model-name=net", "--model-path=src", "--handler=svc", "--export-path=out"),
    ],
)
def test_arguments_may_be_abbreviated_and_joined_as_for_mms(
    call: Run, tmp_path: Path, words: tuple[str, ...]
) -> None:
    assert call(*words) == Ran(0, "", "")
    assert (tmp_path / "out/net.mar").exists()


def test_an_abbreviation_of_two_options_is_refused(call: Run) -> None:
    ran = call("--model", "net")
    assert (ran.code, ran.out) == (2, "")
    assert "ambiguous option: --model could match --model-name, --model-path" in ran.err


def test_without_arguments_every_missing_one_is_named(call: Run) -> None:
    ran = call()
    assert ran.code == 2
    assert ran.err.endswith(
        "required: --model-name, and --model-file (a model file) or --model-path with --handler (code)\n"
    )


def test_a_folder_that_is_its_own_output_only_gets_the_manifest(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "out/net/svc.py")
    ran = run("-f", model_path="out/net", archive_format="no-archive")
    assert ran == Ran(0, "", "WARNING - Overwriting out/net ...\n")
    assert members(tmp_path / "out/net") == [MANIFEST, "svc.py"]


def test_links_to_files_are_followed_and_links_to_folders_skipped(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "target.txt", "from outside")
    os.symlink("../target.txt", tmp_path / "src/link.txt")
    os.symlink("../out", tmp_path / "src/folder")
    assert run() == Ran(0, "", "WARNING - folder is a link to a directory; it is skipped\n")
    with zipfile.ZipFile(tmp_path / "out/net.mar") as archive:
        assert archive.read("link.txt") == b"from outside"


def test_the_handler_goes_into_the_manifest_as_it_was_typed(run: Run, tmp_path: Path) -> None:
    run(handler='a/b.py:f:g "q" \u00fc')
    with zipfile.ZipFile(tmp_path / "out/net.mar") as archive:
        assert b'"handler": "a/b.py:f:g \\"q\\" \\u00fc"' in archive.read(MANIFEST)
        assert json.loads(archive.read(MANIFEST))["model"]["handler"] == 'a/b.py:f:g "q" \u00fc'


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_option(call: Run, flag: str) -> None:
    ran = call(flag)
    assert (ran.code, ran.err) == (0, "")
    for option in (
        "--model-name", "--model-path", "--handler", "--runtime", "--export-path", "--archive-format",
        "-f, --force", "-c, --convert", "--version",
    ):  # fmt: skip
        assert option in ran.out


def test_the_version_can_be_asked(call: Run) -> None:
    ran = call("--version")
    assert ran.code == 0
    assert ran.out.startswith("model-archiver ")


def test_the_old_export_command_says_in_yellow_what_to_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main() == 0
    out = capsys.readouterr().out
    assert out.startswith("\033[93mmulti-model-export is no longer supported.\n")
    assert "Please use model-archiver" in out
    assert out.endswith("\033[0m\n")


def test_the_module_runs_as_a_command_without_importing_the_server(run: Run, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('model_archiver', run_name='__main__', alter_sys=True)\n"
        "finally:\n    assert not {'mms_lite', 'numpy', 'click'} & set(sys.modules)\n"
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
