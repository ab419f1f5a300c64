"""What a model file is, what belongs to it, which backend loads it; which files are refused, and why."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from model_content import ONNX_APART, zip_of

from model_archiver.model_files import collect, is_model_file
from model_archiver.packing import PackError

Put = Callable[..., None]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "beside", "backend", "names"),
    [
        ("a/m.onnx", "", "onnxruntime", "m.onnx"),
        ("m.onnx", "m.onnx_data", "onnxruntime", "m.onnx m.onnx_data"),
        ("a/m.onnx", "m.onnx.data m.data n.data", "onnxruntime", "m.onnx m.onnx.data m.data"),
        ("m.xml", "m.bin n.bin", "openvino", "m.xml m.bin"),
        ("a/m.xml a/m.bin", "", "openvino", "m.xml m.bin"),
        ("a/m.bin a/m.xml", "", "openvino", "m.xml m.bin"),
        ("m.pb", "m.pbtxt", "openvino", "m.pb"),
        ("m.pb other.pbtxt", "", "opencv", "m.pb other.pbtxt"),
        ("other.pbtxt m.pb", "", "opencv", "m.pb other.pbtxt"),
        ("m.tflite", "", "openvino", "m.tflite"),
        ("a/m.pdmodel", "m.pdiparams", "openvino", "m.pdmodel m.pdiparams"),
        ("a/m.caffemodel", "m.prototxt", "opencv", "m.caffemodel m.prototxt"),
        ("a/m.prototxt", "m.caffemodel", "opencv", "m.caffemodel m.prototxt"),
        ("a/m.caffemodel b/deploy.prototxt", "m.prototxt", "opencv", "m.caffemodel deploy.prototxt"),
        ("m.pt", "", "torch", "m.pt"),
        ("m.pth", "", "torch", "m.pth"),
        ("m.pt2", "", "torch", "m.pt2"),
        ("m-symbol.json", "m-0009.params m-0010.params n-99.params", "mxnet", "m-symbol.json m-0010.params"),
        ("m-0002.params", "m-0010.params m-symbol.json", "mxnet", "m-symbol.json m-0002.params"),
        ("m-symbol.json a/other.params", "m-0010.params", "mxnet", "m-symbol.json other.params"),
        ("model.py layers.py m.onnx", "", "python", "model.py layers.py m.onnx"),
        ("m.onnx m.onnx", "", "onnxruntime", "m.onnx"),
    ],
)  # fmt: skip
def test_what_is_named_gets_its_companions_and_a_backend(
    put: Put, given: str, beside: str, backend: str, names: str
) -> None:
    paths = given.split()
    put(*paths, *(os.path.join(os.path.dirname(paths[0]), name) for name in beside.split()))
    found = collect(paths)
    assert (found.backend, list(found.names)) == (backend, names.split())
    assert [member.name for member in found.members] == names.split()
    assert all(os.path.isfile(member.path) for member in found.members)


@pytest.mark.parametrize(
    ("given", "backends"),
    [
        ("m.onnx", "onnxruntime openvino opencv"),
        ("m.pb", "openvino opencv"),
        ("m.tflite", "openvino"),
        ("m.caffemodel m.prototxt", "opencv"),
        ("m.pt", "torch"),
        ("m-symbol.json m-0000.params", "mxnet"),
        ("m.py", "python"),
    ],
)
def test_a_backend_is_taken_if_it_loads_the_files_and_refused_otherwise(
    put: Put, given: str, backends: str
) -> None:
    put(*given.split())
    for backend in ("onnxruntime", "openvino", "opencv", "torch", "mxnet", "python"):
        if backend in backends.split():
            assert collect(given.split(), backend=backend).backend == backend
        else:
            with pytest.raises(PackError, match=rf"^m.* is loaded by .*, not by {backend}\.$"):
                collect(given.split(), backend=backend)


@pytest.mark.parametrize(
    ("given", "backend", "message"),
    [
        ("m.onnx", "torch", "m.onnx is loaded by onnxruntime, openvino or opencv, not by torch."),
        ("m.pb", "onnxruntime", "m.pb is loaded by openvino or opencv, not by onnxruntime."),
        ("m.pb m.pbtxt", "openvino", "m.pbtxt is loaded by opencv, not by openvino."),
    ],
)
def test_who_names_the_wrong_backend_is_told_the_right_ones(
    put: Put, given: str, backend: str, message: str
) -> None:
    put(*given.split())
    with pytest.raises(PackError) as caught:
        collect(given.split(), backend=backend)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["a/m1.1.onnx", "m.xml", "m.pt2", "m-symbol.json", "m-0000.params"])
def test_a_model_file_is_told_by_its_name(name: str) -> None:
    assert is_model_file(name)


@pytest.mark.parametrize("name", ["m.mar", "m", "m.json", "m.bin", "labels.txt", "m.onnx.zip", ""])
def test_what_is_named_otherwise_is_no_model_file(name: str) -> None:
    assert not is_model_file(name)


def test_of_folders_a_saved_model_is_a_model_file_unless_it_was_packed(put: Put) -> None:
    put("net.onnx/a.txt")
    assert not is_model_file("net.onnx")
    put("net/saved_model.pb")
    assert is_model_file("net")
    put("net/MAR-INF/MANIFEST.json")
    assert not is_model_file("net")


def test_files_that_no_backend_loads_together_are_refused(put: Put) -> None:
    put("m.onnx", "m.pt")
    with pytest.raises(PackError, match=r"^No backend loads all of m\.onnx and m\.pt\. Model files and"):
        collect(["m.onnx", "m.pt"])


def test_a_saved_model_is_packed_whole_under_its_name(put: Put) -> None:
    put(
        "a/net/saved_model.pb",
        "a/net/variables/variables.index",
        "a/net/assets/words.txt",
        "a/net/.git/config",
    )
    put("a/net/fingerprint.pb", content=b"")
    found = collect(["a/net/"])
    assert (found.backend, found.names) == ("openvino", ("net",))
    assert [member.name for member in found.members] == [
        "net/assets/words.txt", "net/fingerprint.pb", "net/saved_model.pb", "net/variables/variables.index",
    ]  # fmt: skip


def test_the_weights_that_an_onnx_model_names_are_packed_and_must_be_there(put: Put) -> None:
    put("m.onnx", content=ONNX_APART)
    with pytest.raises(
        PackError, match=r"^m\.onnx needs net\.weights, which was not found in this folder\.$"
    ):
        collect(["m.onnx"])
    put("net.weights")
    assert collect(["m.onnx"]).names == ("m.onnx", "net.weights")


def test_the_signature_beside_an_mxnet_model_is_packed_but_is_no_model_file(put: Put) -> None:
    put("m-symbol.json", "m-0000.params", "signature.json")
    found = collect(["m-symbol.json"])
    assert found.names == ("m-symbol.json", "m-0000.params")
    assert "signature.json" in [member.name for member in found.members]


def test_a_link_is_packed_under_its_own_name_with_what_lies_beside_it(put: Put, tmp_path: Path) -> None:
    put("blobs/1234.xml", "cache/m.bin")
    (tmp_path / "cache/m.xml").symlink_to("../blobs/1234.xml")
    assert collect(["cache/m.xml"]).names == ("m.xml", "m.bin")
    put("cache/a.tflite")
    (tmp_path / "cache/b.tflite").symlink_to("a.tflite")
    assert collect(["cache/a.tflite", "cache/b.tflite"]).names == ("a.tflite", "b.tflite")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a/m.xml", "a/m.xml needs m.bin, which was not found in a."),
        ("a/m.pdmodel", "a/m.pdmodel needs m.pdiparams, which was not found in a."),
        ("m.caffemodel", "m.caffemodel needs m.prototxt, which was not found in this folder."),
        ("m.prototxt", "m.prototxt needs m.caffemodel, which was not found in this folder."),
        ("m-symbol.json", "m-symbol.json needs m-NNNN.params (as in m-0000.params), which was not found in"),
        ("m-0001.params", "m-0001.params needs m-symbol.json, which was not found in this folder."),
        ("m.params", "m.params does not say what its graph is called: give the -symbol.json too."),
        ("m.pbtxt", "m.pbtxt is not a model of its own (OpenCV's text graph of a .pb): give both files."),
        ("saved_model.pb", "saved_model.pb is a part of a TensorFlow SavedModel: give its folder."),
        ("m.bin", "m.bin cannot be a model file: give the .xml of the OpenVINO model"),
        ("m.h5", "m.h5 cannot be a model file: save the model as a TensorFlow SavedModel (model.export) or"),
        ("m.keras", "or convert it with tf2onnx."),
        ("m.ckpt", "a checkpoint holds weights without the model: load it into its model and save that"),
        ("m.safetensors", "it holds weights without the model: load it into its model and save"),
        ("m.xyz", "m.xyz is of no kind that is known. Model files are:\n  .onnx: ONNX (onnxruntime"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_what_is_missing(put: Put, given: str, message: str) -> None:
    put(given)
    with pytest.raises(PackError) as caught:
        collect([given])
    assert message in str(caught.value)


def test_what_is_not_there_or_no_saved_model_is_refused(put: Put) -> None:
    with pytest.raises(PackError, match=r"^Given model-file m\.onnx does not exist\.$"):
        collect(["m.onnx"])
    put("folder/m.onnx")
    with pytest.raises(PackError, match=r"^folder is a folder without saved_model\.pb"):
        collect(["folder"])
    os.mkfifo("pipe.pt")
    with pytest.raises(PackError, match=r"^pipe\.pt: not a regular file\.$"):
        collect(["pipe.pt"])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
STATE_DICT = zip_of("m/data.pkl", "m/data/0", "m/version")
WEIGHTS_ONLY = (
    "holds weights without the model's code, which cannot be served: load them into their model and"
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.onnx", b"", "m.onnx is empty."),
        ("m.onnx", LFS, "m.onnx is a Git LFS pointer, not the file itself: fetch it with git lfs pull."),
        ("m.onnx", b"\n<!DOCTYPE html><html>", "m.onnx is a web page (HTML): the download of the file went"),
        ("m.onnx", zip_of("x"), "m.onnx is not what its name says: it is a zip archive."),
        ("m.onnx", b"\x89HDF\r\n\x1a\n\0", "it is an HDF5 file (Keras)."),
        ("m.onnx", b'<?xml version="1.0"?>', "it is XML."),
        ("m.onnx", b"Not found", "it is text."),
        ("m.pb", b"node { }", "m.pb is not what its name says: it is text."),
        ("m.pb", b"\x1c\0\0\0TFL3", "it is a TensorFlow Lite model."),
        ("m.tflite", b"\x1c\0\0\0XXXX", "m.tflite is not a TensorFlow Lite model: it has no TFL3 at byte 4."),
        ("m.xml", b"<annotation/>", "m.xml is not an OpenVINO model: it has no <net> element."),
        ("m.pt", STATE_DICT, WEIGHTS_ONLY),
        ("m.pth", b"\x80\x02\x8a\nl\xfc\x9cF", f"m.pth is a pickle, which {WEIGHTS_ONLY}"),
        ("m.pt", STATE_DICT[:-30], "m.pt is damaged or incomplete"),
        ("m.pt2", zip_of("x"), "m.pt2 is a zip, but neither TorchScript nor a torch.export archive."),
        ("m.pt", b"\x08\x07\x12\x07pytorch", "m.pt is neither TorchScript nor a torch.export archive"),
        ("m-symbol.json", b"{}", 'm-symbol.json is not an MXNet symbol: it has no list "nodes".'),
        ("m-symbol.json", b"[" * 100_000, "m-symbol.json is not an MXNet symbol: it is not valid JSON"),
        ("m-0000.params", b"\0" * 16, "m-0000.params is not a file of MXNet parameters"),
        ("m.prototxt", b"\x89PNG\r\n\x1a\n\0", "m.prototxt is not text: it is a PNG image."),
        ("m.py", b"\0\1", "m.py is not text: it is binary."),
    ],
)  # fmt: skip
def test_content_that_contradicts_the_name_is_refused(
    put: Put, name: str, content: bytes, message: str
) -> None:
    put("m.bin", "m-symbol.json", "m-0000.params", "m.caffemodel")
    put(name, content=content)
    with pytest.raises(PackError) as caught:
        collect([name])
    assert message in str(caught.value)


def test_companions_are_looked_at_too(put: Put) -> None:
    put("m.xml", "net/saved_model.pb")
    put("m.bin", "net/variables/data", content=LFS)
    with pytest.raises(PackError, match=r"^m\.bin is a Git LFS pointer"):
        collect(["m.xml"])
    with pytest.raises(PackError, match=r"^net/variables/data is a Git LFS pointer"):
        collect(["net"])
    put("m.bin", content=b"")  # what OpenVINO writes for a model without constants
    assert collect(["m.xml"]).names == ("m.xml", "m.bin")


def test_a_symbol_larger_than_a_head_is_read_whole(put: Put) -> None:
    put("m-0000.params")
    put("m-symbol.json", content=json.dumps({"attrs": "x" * 100_000, "nodes": []}).encode())
    assert collect(["m-symbol.json"]).backend == "mxnet"
