"""The command with --model-file: what is packed, what the manifest gets, and which calls are refused."""

import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_archiver import packing
from model_archiver.archive import read_manifest
from model_archiver.manifest import MANIFEST_NAME, READY_MADE

Pack = Callable[..., Any]
Put = Callable[..., None]


def manifest_of(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(MANIFEST_NAME))


def packed(path: Path) -> dict[str, bytes]:
    """Return the files of the output, whatever its format."""
    if path.is_dir():
        return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    if path.suffix == ".mar":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(path) as archive:
        return {each.name.removeprefix("net/"): archive.extractfile(each).read() for each in archive}


def test_one_file_is_a_model_with_the_handler_for_tensors(pack: Pack, put: Put, tmp_path: Path) -> None:
    put("a/m.onnx")
    answer = pack("--model-file", "a/m.onnx")
    assert (answer.code, answer.err) == (0, "")
    content = (tmp_path / "a/m.onnx").read_bytes()
    assert manifest_of(tmp_path / "out/net.mar") == {
        "runtime": "python",
        "model": {
            "modelName": "net",
            "handler": "tensor",
            "description": "m.onnx served by onnxruntime with the handler tensor",
            "backend": "onnxruntime",
            "modelFiles": ["m.onnx"],
        },
        "modelServerVersion": "1.0",
        "implementationVersion": "1.0",
        "specificationVersion": "1.0",
        "files": {"m.onnx": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    }


FULL = (
    "--model-file", "a/m.xml", "--backend", "openvino", "--handler", "image_classifier",
    "--labels", "a/names.txt", "--handler-config", '{"size": 224}', "--extra-file", "a/t.json",
    "--sample", "cat.png", "--sample", "a/dog.png", "--model-version", "2.1",
    "--description", "cats and dogs", "--runtime", "python3", "--model-path", "src",
)  # fmt: skip
OUTPUTS = {"default": "net.mar", "tgz": "net.tar.gz", "no-archive": "net"}


@pytest.mark.parametrize("archive_format", OUTPUTS)
def test_everything_is_packed_in_every_format_and_told_in_the_manifest(
    pack: Pack, put: Put, tmp_path: Path, archive_format: str
) -> None:
    put("a/m.xml", "a/m.bin", "cat.png", "a/dog.png", "src/lib/pre.py")
    put("a/names.txt", content=b"cat\ndog\n")
    put("a/t.json", content=b"{}")
    answer = pack(*FULL, "--archive-format", archive_format)
    assert (answer.code, answer.err) == (0, "")
    files = packed(tmp_path / "out" / OUTPUTS[archive_format])
    manifest = json.loads(files.pop(MANIFEST_NAME))
    assert sorted(files) == [
        "lib/pre.py", "m.bin", "m.xml", "names.txt", "samples/cat.png", "samples/dog.png", "t.json",
    ]  # fmt: skip
    assert manifest["runtime"] == "python3"
    assert manifest["model"] == {
        "modelName": "net",
        "handler": "image_classifier",
        "description": "cats and dogs",
        "modelVersion": "2.1",
        "backend": "openvino",
        "modelFiles": ["m.xml", "m.bin"],
        "labels": "names.txt",
        "handlerConfig": {"size": 224},
        "samples": ["samples/cat.png", "samples/dog.png"],
    }
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }


@pytest.mark.parametrize("archive_format", ["default", "tgz"])
def test_the_same_files_give_the_same_bytes(
    pack: Pack, put: Put, tmp_path: Path, archive_format: str
) -> None:
    put("a/m.xml", "a/m.bin", "cat.png")
    words = ("--model-file", "a/m.xml", "--sample", "cat.png", "--archive-format", archive_format)
    output = tmp_path / "out" / OUTPUTS[archive_format]
    pack(*words)
    first = output.read_bytes()
    (tmp_path / "a").rename(tmp_path / "b")
    put("b/m.xml", "b/m.bin", "cat.png")  # written anew, at another time
    answer = pack("-f", *(word.replace("a/m", "b/m") for word in words))
    assert answer.err.startswith("WARNING - Overwriting out/net")
    assert output.read_bytes() == first


def test_the_version_and_description_of_a_folder_go_into_its_manifest(
    pack: Pack, put: Put, tmp_path: Path
) -> None:
    put("src/svc.py")
    words = ("--model-path", "src", "--handler", "svc", "--model-version", "2", "--description", "mine")
    assert pack(*words).code == 0
    assert manifest_of(tmp_path / "out/net.mar")["model"] == {
        "modelName": "net", "handler": "svc", "description": "mine", "modelVersion": "2",
    }  # fmt: skip


def test_a_file_that_is_in_the_folder_too_is_packed_once(pack: Pack, put: Put, tmp_path: Path) -> None:
    put("src/m.onnx", "src/samples/cat.png", "src/svc.py")
    words = ("--model-path", "src", "--model-file", "src/m.onnx", "--sample", "src/samples/cat.png")
    answer = pack(*words, "--handler", "svc:handle")
    assert (answer.code, answer.err) == (0, "")
    files = packed(tmp_path / "out/net.mar")
    assert sorted(files) == [MANIFEST_NAME, "m.onnx", "samples/cat.png", "svc.py"]


def test_a_folder_that_is_its_own_output_gets_the_manifest_if_it_has_the_files(
    archiver: Pack, put: Put, tmp_path: Path
) -> None:
    put("src/m.onnx", "other/t.txt")
    words = ("--model-name", "src", "--model-path", "src", "--archive-format", "no-archive", "-f")
    answer = archiver(*words, "--model-file", "src/m.onnx", "--extra-file", "other/t.txt")
    assert answer.code == 1
    assert "ERROR - model-path is the output folder too, and other/t.txt is not t.txt in it" in answer.err
    assert archiver(*words, "--model-file", "src/m.onnx").code == 0
    manifest = read_manifest(tmp_path / "src")
    assert manifest is not None
    assert (manifest.model.model_files, list(manifest.files)) == (("m.onnx",), ["m.onnx"])


@pytest.mark.parametrize("form", ["config.json", '{"size": [1, 2]}', ' \n{"size": [1, 2]}'])
def test_a_handler_config_is_a_file_or_is_typed(pack: Pack, put: Put, tmp_path: Path, form: str) -> None:
    put("m.onnx")
    put("config.json", content=b'{"size": [1, 2]}')
    assert pack("--model-file", "m.onnx", "--handler-config", form).code == 0
    assert manifest_of(tmp_path / "out/net.mar")["model"]["handlerConfig"] == {"size": [1, 2]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "cat\nhérisson\n"),
        ("l.txt", "\ufeffcat\r\ndog\r\n"),
        ("l.json", '["cat", "dog"]'),
        ("l", "cat"),
    ],
)
def test_labels_are_lines_or_a_list_and_are_packed_as_they_are(
    pack: Pack, put: Put, tmp_path: Path, name: str, content: str
) -> None:
    put("m.onnx")
    put(name, content=content.encode())
    assert pack("--model-file", "m.onnx", "--labels", name).code == 0
    assert packed(tmp_path / "out/net.mar")[name] == content.encode()


ONNX = ("--model-file", "m.onnx")
LARGE = json.dumps({"a": "x" * 1_100_000})
LFS = b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        (("--labels", "f.txt"), b"", "f.txt is empty."),
        (("--labels", "f.txt"), b" \n\n", "f.txt holds no labels."),
        (("--labels", "f.txt"), b"caf\xe9\n", "f.txt is not text: it is binary."),
        (("--labels", "f.txt"), LFS, "f.txt is a Git LFS pointer"),
        (("--labels", "f.json"), b'{"a": 1}', "f.json is not a JSON list of strings."),
        (("--labels", "f.json"), b"[1]", "f.json is not a JSON list of strings."),
        (("--labels", "f.json"), b"[", "f.json cannot be read as labels: Expecting value"),
        (("--labels", "nope"), b"", "nope: No such file or directory."),
        (("--sample", "f.png"), b"", "f.png is empty."),
        (("--sample", "f.png"), LFS, "f.png is a Git LFS pointer"),
        (("--sample", "out"), b"", "out: not a regular file."),
        (("--extra-file", "nope"), b"", "nope: No such file or directory."),
        (("--extra-file", "f.json"), LFS, "f.json is a Git LFS pointer"),
        (("--handler-config", "f.json"), b"[1]", "f.json is not a JSON object."),
        (("--handler-config", "f.json"), b"{", "f.json is not valid JSON: Expecting property name"),
        (("--handler-config", "{"), b"", "The handler config is not valid JSON: Expecting property name"),
        (("--handler-config", '{"a": 1e999}'), b"", "The manifest is not valid JSON: Out of range float"),
        (("--handler-config", "nope"), b"", "nope: No such file or directory."),
        (("--handler-config", LARGE), b"", "The manifest is larger than 1048576 bytes"),
        (("--model-file", "pipe.onnx"), b"", "pipe.onnx: not a regular file"),
        (("--model-version", "1/2"), b"", "A model version has 1 to 128 printable characters"),
        (("--model-version", ""), b"", "A model version has 1 to 128 printable characters"),
        (("--description", "\udce9"), b"", "The manifest is not valid JSON: 'utf-8' codec can't encode"),
        (("--model-file", "sub/m.onnx"), b"", "Two files would be packed as m.onnx: m.onnx and sub/m.onnx."),
        (("--extra-file", "sub/m.onnx"), b"", "Two files would be packed as m.onnx: m.onnx and sub/m.onnx."),
        (("--extra-file", "sub/samples", "--sample", "m.onnx"), b"", "samples would be both a file and"),
        (("--extra-file", "sub/MAR-INF"), b"", "MAR-INF is a file, but the archive needs a folder"),
        (("--extra-file", "sub/a\\b"), b"", "'a\\\\b' cannot be packed: its name has a backslash"),
        (("--model-path", "nope"), b"", "Given model-path nope is not a valid directory."),
        (("--handler", "tensor", "--model-path", "src"), b"", "tensor is a ready-made handler, but"),
        (("--handler", "image_clasifier"), b"", "There is no handler image_clasifier; did you mean image_"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_error_and_leaves_nothing(
    pack: Pack, put: Put, tmp_path: Path, words: tuple[str, ...], content: bytes, message: str
) -> None:
    put("m.onnx", "src/tensor.py", "sub/m.onnx", "sub/samples", "sub/MAR-INF", "sub/a\\b")
    put("sub/m.onnx", content=b"\x08\x08\x12\x02tf")
    os.mkfifo(tmp_path / "pipe.onnx")
    for name in words:
        if name in ("f.txt", "f.json", "f.png"):
            put(name, content=content)
    answer = pack(*ONNX, *words)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith(f"ERROR - {message}")
    assert list((tmp_path / "out").iterdir()) == []


def test_more_files_than_a_manifest_can_record_are_refused(
    pack: Pack, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("m.onnx")
    monkeypatch.setattr(packing, "MAX_MANIFEST_BYTES", 400)
    answer = pack(*ONNX)
    assert (answer.code, list((tmp_path / "out").iterdir())) == (1, [])
    assert answer.err.startswith("ERROR - The manifest would be larger than 400 bytes, which no server reads")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: --model-path, --handler\n"),
        (("--model-path", "src"), "the following arguments are required: --handler\n"),
        (("--backend", "torch"), "argument --backend: only with argument --model-file\n"),
        (("--model-path", "src", "--handler", "s", "--labels", "l"), "--labels: only with argument"),
        (("--handler-config", "{}"), "argument --handler-config: only with argument --model-file\n"),
        (("--sample", "s"), "argument --sample: only with argument --model-file\n"),
        (("--extra-file", "s"), "argument --extra-file: only with argument --model-file\n"),
        ((*ONNX, "-c"), "argument -c/--convert: not allowed with argument --model-file\n"),
        ((*ONNX, "--backend", "caffe"), "argument --backend: invalid choice: 'caffe'"),
        ((*ONNX, "extra"), "unrecognized arguments: extra\n"),
        ((*ONNX, "--backend", "onnx"), "torch, mxnet, python); did you mean onnxruntime?\n"),
        ((*ONNX, "--backend", "ov"), "; did you mean openvino?\n"),
        ((*ONNX, "--backend", "cv2"), "; did you mean opencv?\n"),
        ((*ONNX, "--backend", "PyTorch"), "; did you mean torch?\n"),
        ((*ONNX, "--backend", "tf"), "; did you mean openvino or opencv?\n"),
        ((*ONNX, "--backend", "tensorflow"), "; did you mean openvino or opencv?\n"),
        ((*ONNX, "--backend", "openvnio"), "; did you mean openvino?\n"),
        ((*ONNX, "--sampel", "s"), "unrecognized arguments: --sampel s; did you mean --sample?\n"),
        ((*ONNX, "--handlr=x"), "unrecognized arguments: --handlr=x; did you mean --handler?\n"),
        ((*ONNX, "sample"), "unrecognized arguments: sample\n"),
        (("--model-fiel", "m.onnx"), "--model-fiel m.onnx; did you mean --model-file?\n"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together_are_a_usage_error(
    pack: Pack, words: tuple[str, ...], message: str
) -> None:
    answer = pack(*words)
    assert answer.code == 2
    assert "usage: model-archiver" in answer.err
    assert message in answer.err


def test_abbreviations_of_mms_options_mean_what_they_meant(archiver: Pack, put: Put, tmp_path: Path) -> None:
    put("src/svc.py")
    assert archiver("--model-n", "net", "--model-pa", "src", "--ha", "svc", "--e", "out").code == 0
    assert (tmp_path / "out/net.mar").exists()
    assert "ambiguous option: --model-" in archiver("--model-", "net").err


@pytest.mark.parametrize("archive_format", OUTPUTS)
def test_success_tells_what_was_packed_and_how_to_try_it(pack: Pack, put: Put, archive_format: str) -> None:
    put("m.onnx", content=b"\x08\x07" * 2_600_000)
    put("cat.png", "names.txt")
    words = ("--labels", "names.txt", "--sample", "cat.png", "--handler", "image_classifier")
    answer = pack(*ONNX, *words, "--archive-format", archive_format)
    output = f"out/{OUTPUTS[archive_format]}"
    told = f"{output}: 3 files, 5.2 MB, onnxruntime, handler image_classifier\n"
    advice = "" if archive_format == "tgz" else f"Try it: mms-lite check {output}\n"
    assert (answer.code, answer.out, answer.err) == (0, told + advice, "")


def test_what_is_packed_here_is_told_without_its_folder(archiver: Pack, put: Put) -> None:
    put("m.onnx")
    told = archiver("--model-name", "net", *ONNX).out
    assert told == (
        "net.mar: 1 file, 11 bytes, onnxruntime, handler tensor\nTry it: mms-lite check net.mar\n"
    )


def test_a_missing_export_path_is_told_with_the_command_that_makes_it(archiver: Pack, put: Put) -> None:
    put("m.onnx")
    message = "is not a directory. Point to a valid export-path directory."
    answer = archiver("--model-name", "net", *ONNX, "--export-path", "my store")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == f"ERROR - Given export-path my store {message} (mkdir -p 'my store')\n"
    answer = archiver("--model-name", "net", *ONNX, "--export-path", "m.onnx")
    assert answer.err == f"ERROR - Given export-path m.onnx {message}\n"


@pytest.mark.parametrize(
    "words",
    [
        (*ONNX, "--handler", "image_clasifier"),
        (*ONNX, "--archive-format", "no-archive"),
        ("--model-path", "src", "--handler", "image_classifier"),
    ],
)
def test_nothing_is_said_to_be_overwritten_where_an_error_follows(
    pack: Pack, put: Put, words: tuple[str, ...]
) -> None:
    put("m.onnx", "src/svc.py", "out/net.mar", "out/net/theirs.txt")
    answer = pack(*words, "-f")
    assert answer.code == 1
    assert answer.err.startswith("ERROR - ")
    assert "Overwriting" not in answer.err


def test_what_is_overwritten_is_told(pack: Pack, put: Put) -> None:
    put("m.onnx", "out/net.mar")
    answer = pack(*ONNX, "-f")
    assert (answer.code, answer.err) == (0, "WARNING - Overwriting out/net.mar ...\n")


@pytest.mark.parametrize(
    ("config", "needed"), [("{}", "tokenizer.json"), ('{"tokenizer": "words.json"}', "words.json")]
)
def test_a_text_embedder_needs_its_tokenizer(
    pack: Pack, put: Put, tmp_path: Path, config: str, needed: str
) -> None:
    put("m.onnx", "other.json", f"src/{needed}")
    words = (*ONNX, "--handler", "text_embedder", "--handler-config", config)
    answer = pack(*words, "--extra-file", "other.json")
    message = f"text_embedder needs the model's tokenizer: add --extra-file {needed}"
    assert (answer.code, answer.out, answer.err) == (1, "", f"ERROR - {message}\n")
    assert list((tmp_path / "out").iterdir()) == []
    assert pack(*words, "--extra-file", f"src/{needed}").code == 0
    assert pack(*words, "--model-path", "src", "-f").code == 0


@pytest.mark.parametrize("handler", READY_MADE)
def test_a_ready_made_handler_needs_a_model_file(pack: Pack, put: Put, handler: str) -> None:
    put("src/other.py", "m.onnx", "tokenizer.json")
    answer = pack("--model-path", "src", "--handler", handler)
    message = f"{handler} is a ready-made handler, which serves a model file: name it with --model-file."
    assert (answer.code, answer.err) == (1, f"ERROR - {message}\n")
    assert pack(*ONNX, "--extra-file", "tokenizer.json", "--handler", handler).code == 0


def test_a_folder_may_have_a_handler_called_as_a_ready_made_one(pack: Pack, put: Put) -> None:
    put("src/tensor.py")
    answer = pack("--model-path", "src", "--handler", "tensor")
    assert (answer.code, answer.err) == (0, "")


@pytest.mark.parametrize("handler", ["svc:handle", "svc.py"])
def test_a_handler_of_ones_own_is_an_extra_file(pack: Pack, put: Put, handler: str) -> None:
    put("m.onnx", "svc.py")
    answer = pack(*ONNX, "--handler", handler, "--extra-file", "svc.py")
    assert (answer.code, answer.err) == (0, "")
    answer = pack(*ONNX, "--handler", "image_clasifier:handle", "-f")
    assert answer.code == 0
    assert "WARNING - handler file image_clasifier not found among the packed files; the module" in answer.err
