"""What a worker does with a model file from load to end: samples, handlers that are missing, letting go."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_files import FLOAT, Node, write
from packed import ask, load

from mms_lite.errors import BackendMissing, InvalidArchive
from mms_lite.handlers.package import Package
from mms_lite.worker import handler, samples
from mms_lite.worker.context import Context

PYTHON_MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(
            each, "x").as_numpy())]) for each in requests]

    def finalize(self):
        open(__file__ + ".finalized", "w").close()
"""
TENSORS = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]


def write_double(folder: Path) -> None:
    two = np.array(2, np.float32)
    rows = (FLOAT, ("N", 3))
    write(folder / "model.onnx", [Node("Mul", ["x", "two"], ["y"])], {"x": rows}, {"y": rows}, {"two": two})


@pytest.mark.parametrize(
    ("name", "body", "fault"),
    [
        ("good.json", b'{"x": [[1, 2, 3]]}', None),
        ("wide.json", b'{"x": [[1, 2]]}', r"its sample samples/wide\.json: input 'x' does not fit"),
        ("broken.npy", b"\x93NUMPY", r"its sample samples/broken\.npy: "),
    ],
)
def test_a_model_is_ready_only_when_it_answers_its_samples(
    tmp_path: Path, name: str, body: bytes, fault: str | None
) -> None:
    write_double(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / name).write_bytes(body)
    manifest = {"model": {"samples": [f"samples/{name}"]}}
    model = load("tensor", tmp_path)
    if fault is None:
        samples.run(model, str(tmp_path), manifest)
        return
    with pytest.raises(InvalidArchive, match=fault):
        samples.run(model, str(tmp_path), manifest)


def test_a_sample_outside_the_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArchive, match=r"the sample \.\./secret is not in the archive"):
        list(samples.read(str(tmp_path), {"model": {"samples": ["../secret"]}}))


def test_a_model_is_let_go_of_when_its_handler_is(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(PYTHON_MODEL)
    config = {"backend": {"inputs": TENSORS, "outputs": [{**TENSORS[0], "name": "y"}]}}
    model = {"backend": "python", "modelFiles": ["model.py"], "handlerConfig": config}
    loaded = handler.load(
        {
            "name": "m",
            "path": str(tmp_path),
            "handler": "tensor",
            "manifest": {"model": model},
            "batch_size": 1,
            "device": None,
            "isolate_failures": True,
            "decode_input_request": True,
        }
    )
    (outcome,) = ask(loaded, b'{"x": [[1, 2, 3]]}', kind="application/json")
    assert json.loads(bytes(outcome.outputs[0].data)) == {"y": [[1, 2, 3]]}
    assert not (tmp_path / "model.py.finalized").exists()
    loaded.close()
    assert (tmp_path / "model.py.finalized").exists()


def test_a_handler_whose_library_is_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_double(tmp_path)
    monkeypatch.delitem(sys.modules, "mms_lite.handlers.text_embedder", raising=False)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BackendMissing, match=r"needs tokenizers.*pip install 'mms-lite\[handlers\]'"):
        load("text_embedder", tmp_path)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"threads": 300_000}, "threads is not a number from 1 to 1024"),
        ({"threads": True}, "threads is not a number from 1 to 1024"),
        ({"batch": "yes"}, "batch is neither true nor false"),
        ({"inputs": [{**TENSORS[0], "shape": [True, 3]}]}, r"\[True, 3\] is not a shape"),
        ({"inputs": [{**TENSORS[0], "shape": [-1, 10**30]}]}, "is not a shape"),
        ({"inputs": 5}, "inputs is not a list of"),
        ({"options": []}, "options is not an object"),
    ],
)
def test_a_backend_config_that_is_none_fails_the_load(
    tmp_path: Path, config: dict[str, object], fault: str
) -> None:
    write_double(tmp_path)
    with pytest.raises(InvalidArchive, match=fault):
        load("tensor", tmp_path, {"backend": config})


def test_a_label_may_hold_any_character_but_a_line_break(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("one\u2028half\r\ntwo\x85\n", encoding="utf-8", newline="")
    manifest = {"model": {"modelFiles": ["labels.txt"], "backend": "onnxruntime", "labels": "labels.txt"}}
    package = Package.of(Context("m", str(tmp_path), manifest, 1, None, ""))
    assert package.labels == ("one\u2028half", "two\x85")


@pytest.mark.parametrize("labels", ["folder", "deep.json", "../labels.txt"])
def test_labels_that_cannot_be_read_are_told_of_without_a_path(tmp_path: Path, labels: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "deep.json").write_text("[" * 100_000)
    manifest = {"model": {"modelFiles": ["folder"], "backend": "onnxruntime", "labels": labels}}
    with pytest.raises(InvalidArchive) as refused:
        Package.of(Context("m", str(tmp_path), manifest, 1, None, ""))
    assert str(tmp_path) not in refused.value.message


def test_links_out_of_the_folder_are_followed_in_a_repository_and_not_in_an_archive(tmp_path: Path) -> None:
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "blob").touch()
    (folder / "model.onnx").symlink_to(tmp_path / "blob")

    def package(file: str, **context: object) -> Package:
        manifest = {"model": {"modelFiles": [file], "backend": "onnxruntime"}}
        return Package.of(Context("m", str(folder), manifest, 1, None, "", **context))  # type: ignore[arg-type]

    assert package("model.onnx", model_config={}).files == (folder / "model.onnx",)
    for file, context in (("model.onnx", {}), ("../../blob", {"model_config": {}})):
        with pytest.raises(InvalidArchive, match=f"the archive has no file {file}"):
            package(file, **context)


def test_a_body_whose_content_type_lies_reaches_the_handler_as_it_came(tmp_path: Path) -> None:
    write_double(tmp_path)
    model = load("tensor", tmp_path)
    array = io.BytesIO()
    np.save(array, np.array([[1, 2, 3]], np.float32))
    answered, refused = (
        ask(model, body, kind=kind)[0]
        for body, kind in ((array.getvalue(), "text/plain"), (b"{", "application/json"))
    )
    assert json.loads(bytes(answered.outputs[0].data)) == {"y": [[2, 4, 6]]}
    assert refused.error is not None
    assert "looks like JSON and is not" in refused.error.message
