"""`inspect` and `verify`: what they show of good archives, and say of bad ones."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_archiver.manifest import MANIFEST_NAME

Run = Callable[..., Any]
Put = Callable[..., None]


@pytest.fixture
def net(pack: Run, put: Put) -> str:
    """The path of an archive with a model file, labels and a sample."""
    put("m.onnx", content=b"\x08\x07" * 2000)
    put("names.txt", content=b"cat\ndog\n")
    put("cat.png")
    words = ("--labels", "names.txt", "--sample", "cat.png", "--handler-config", '{"size": 224}')
    assert pack("--model-file", "m.onnx", *words, "--model-version", "3").code == 0
    return "out/net.mar"


def rewrite(path: str, changes: dict[str, bytes | None]) -> None:
    """Replace, add or (None) remove files of an archive."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)


def test_inspect_shows_what_the_manifest_says_and_the_files(archiver: Run, net: str) -> None:
    answer = archiver("inspect", net)
    assert (answer.code, answer.err) == (0, "")
    facts, _, table = answer.out.partition("\n\n")
    assert facts == (
        "net.mar\n"
        "  name            net\n"
        "  version         3\n"
        "  description     m.onnx served by onnxruntime with the handler tensor\n"
        "  backend         onnxruntime\n"
        "  handler         tensor\n"
        '  handler config  {"size": 224}\n'
        "  model files     m.onnx\n"
        "  labels          names.txt\n"
        "  samples         samples/cat.png\n"
        "  runtime         python\n"
        "  specification   1.0"
    )
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["bytes", "sha256", "file"]
    assert [(line[0], line[2]) for line in lines[1:4]] == [
        ("4,000", "m.onnx"), ("8", "names.txt"), ("1", "samples/cat.png"),
    ]  # fmt: skip
    assert table.splitlines()[4] == "  4,009  in 3 files, besides the manifest"


def test_inspect_as_json_has_the_records_of_the_manifest(archiver: Run, net: str) -> None:
    found = json.loads(archiver("inspect", "--json", net).out)
    with zipfile.ZipFile(net) as archive:
        manifest = json.loads(archive.read(MANIFEST_NAME))
    assert found["files"] == manifest["files"]
    assert (found["name"], found["backend"], found["handlerConfig"]) == ("net", "onnxruntime", {"size": 224})
    assert (found["samples"], found["runtime"], found["bytes"]) == (["samples/cat.png"], "python", 4009)


@pytest.mark.parametrize("archive_format", ["default", "no-archive"])
def test_archives_and_folders_of_mms_are_shown_and_read(
    pack: Run, put: Put, archiver: Run, archive_format: str
) -> None:
    put("src/svc.py", "src/sub/a.txt")
    pack("--model-path", "src", "--handler", "svc:handle", "--archive-format", archive_format)
    path = {"default": "out/net.mar", "no-archive": "out/net"}[archive_format]
    shown = archiver("inspect", path).out
    assert "  handler         svc:handle\n" in shown
    assert "backend" not in shown
    assert "  sub/a.txt\n" in shown
    verified = archiver("verify", path)
    ending = {"default": "only CRCs were checked", "no-archive": "nothing could be compared"}[archive_format]
    assert (verified.code, verified.err) == (0, "")
    assert verified.out == f"{os.path.basename(path)}: 2 files; no digests are recorded, so {ending}\n"


def test_archives_of_version_0_and_without_a_manifest_are_shown(archiver: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.model", "w") as archive:
        archive.writestr("MANIFEST.json", '{"Model": {"Model-Name": "old", "Service": "service.py"}}')
        archive.writestr("service.py", "x")
    shown = archiver("inspect", "old.model").out
    assert "  name            old\n  version         snapshot\n  handler         service.py\n" in shown
    assert "  specification   0.1\n" in shown
    with zipfile.ZipFile(tmp_path / "bare.mar", "w") as archive:
        archive.writestr("a", "x")
    assert "no manifest: whoever loads it has to name" in archiver("inspect", "bare.mar").out
    assert archiver("verify", "bare.mar").code == 0


def test_verify_finds_a_good_archive_and_folder_as_recorded(archiver: Run, pack: Run, net: str) -> None:
    answer = archiver("verify", net)
    assert (answer.code, answer.out, answer.err) == (0, "net.mar: 3 files, all as recorded\n", "")
    words = ("--model-file", "m.onnx", "--archive-format", "no-archive")
    assert pack(*words).code == 0
    assert archiver("verify", "out/net").out == "net: 1 file, all as recorded\n"


def test_verify_names_each_file_that_is_not_as_recorded(archiver: Run, net: str) -> None:
    rewrite(net, {"m.onnx": b"\x08\x08" * 2000, "names.txt": b"cat\n", "samples/cat.png": None, "new": b"x"})
    answer = archiver("verify", net)
    lines = answer.err.splitlines()
    assert (answer.code, answer.out, len(lines)) == (1, "", 4)
    assert lines[0].startswith("ERROR - net.mar: m.onnx has the SHA-256 ")
    assert lines[1:] == [
        "ERROR - net.mar: names.txt has 4 bytes, recorded are 8",
        "ERROR - net.mar: new is not recorded",
        "ERROR - net.mar: samples/cat.png is missing",
    ]


def test_verify_goes_on_after_a_damaged_file(archiver: Run, net: str, tmp_path: Path) -> None:
    rewrite(net, {"names.txt": b"cat\n"})  # stored, so that its bytes can be found
    content = (tmp_path / net).read_bytes()
    (tmp_path / net).write_bytes(
        content.replace(b"cat\n", b"cut\n").replace(b"\x08\x07" * 2000, b"\0\0" * 2000)
    )
    answer = archiver("verify", net)
    assert answer.code == 1
    assert [line.partition("damaged")[0] for line in answer.err.splitlines()] == [
        "ERROR - net.mar: entry 'm.onnx' is ", "ERROR - net.mar: entry 'names.txt' is ",
    ]  # fmt: skip
    answer = archiver("inspect", net)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("ERROR - net.mar: entry 'm.onnx' is damaged")


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_what_is_no_archive_is_one_error_line(
    archiver: Run, put: Put, net: str, tmp_path: Path, verb: str
) -> None:
    put("text.mar", content=b"hello")
    put("gzip.mar", content=b"\x1f\x8b" + bytes(40))
    put("cut.mar", content=(tmp_path / net).read_bytes()[:-30])
    put("folder/MAR-INF/MANIFEST.json", content=b"[")
    os.mkfifo("folder.fifo")
    rewrite(net, {"../evil": b"x"})
    for path, message in {
        "nope.mar": "nope.mar: No such file or directory",
        "text.mar": "text.mar is not a model archive (zip)",
        "gzip.mar": "gzip.mar is not a model archive (zip): it is a gzip file; the server loads",
        "cut.mar": "cut.mar is not a model archive (zip): it is cut short or damaged.",
        "folder": "folder: The manifest is not valid JSON",
        "folder.fifo": "folder.fifo is not a model archive (zip): not a regular file.",
        net: "net.mar: entry '../evil' is refused: its name has an empty, '.' or '..' component.",
    }.items():
        answer = archiver(verb, path)
        assert (answer.code, answer.out) == (1, "")
        assert answer.err.startswith(f"ERROR - {message}")
        assert answer.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_folder_of_archives_is_no_model(archiver: Run, put: Put, net: str, verb: str) -> None:
    answer = archiver(verb, "out")
    assert (answer.code, answer.out) == (1, "")
    told = "ERROR - out is no model: it has no MAR-INF/MANIFEST.json; it holds the archives "
    assert answer.err == f"{told}net.mar\n"
    put(*(f"out/{name}.mar" for name in "abcdef"), "out/notes.txt")
    assert archiver(verb, "out").err == f"{told}a.mar, b.mar, c.mar, d.mar, e.mar and 2 more\n"


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_an_empty_folder_is_no_model_but_one_without_a_manifest_may_be(
    archiver: Run, put: Put, tmp_path: Path, verb: str
) -> None:
    answer = archiver(verb, "out")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == "ERROR - out is no model: it has no MAR-INF/MANIFEST.json\n"
    put("out/svc.py")
    assert archiver(verb, "out").code == 0


def test_what_strangers_wrote_sends_nothing_to_the_terminal(archiver: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.mar", "w") as archive:
        model = {"modelName": "net", "description": "\x1b[2J\u202etext", "handler": "h\nname  fake"}
        archive.writestr(MANIFEST_NAME, json.dumps({"model": model}))
    shown = archiver("inspect", "net.mar").out
    assert "  description     \\x1b[2J\\u202etext\n  handler         h\\nname  fake\n" in shown


def test_nothing_is_unpacked(archiver: Run, net: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    archiver("inspect", net)
    archiver("verify", net)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_verbs_are_told_of_in_the_help_and_have_their_own(archiver: Run) -> None:
    answer = archiver("--help")
    assert "inspect [--json] ARCHIVE" in answer.out
    assert "verify ARCHIVE" in answer.out
    assert "--json" in archiver("inspect", "--help").out
    assert archiver("verify").code == 2


def test_a_model_may_be_called_inspect(pack: Run, archiver: Run, put: Put, tmp_path: Path) -> None:
    put("m.onnx")
    assert archiver("--model-name", "inspect", "--model-file", "m.onnx").code == 0
    assert (tmp_path / "inspect.mar").exists()
