"""What is OpenCV's alone: blobs for TensorFlow graphs, pairs of files, inner layers, boxes, copies."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx, which writes the models of these tests, is not installed")
pytest.importorskip("cv2", reason="the opencv extra is not installed")

from tiny_onnx import build, save  # noqa: E402
from tiny_opencv import make  # noqa: E402

from mms_lite.errors import BadTensor, InvalidArchive  # noqa: E402
from mms_lite.types import TensorSpec  # noqa: E402
from mms_lite.worker.backends import BackendSettings  # noqa: E402
from mms_lite.worker.backends.opencv import OpenCvBackend  # noqa: E402
from mms_lite.worker.predictor import Predictor  # noqa: E402

NODE = onnx.helper.make_node
Shapes = dict[str, list[int | str]]
KERNEL = np.array([[1, 10], [2, 20], [3, 30]], np.float32)  # from three channels to two
TEXT_GRAPH = """
node { name: "photo" op: "Placeholder"  # three channels, which come last
  attr { key: "shape" value { shape { dim { size: -1 } dim { size: 4 } dim { size: 5 } dim { size: 3 } } } } }
node { name: "mixed" op: "Conv2D" input: "photo" input: "kernel"
  attr { key: "padding" value { s: "VALID" } }
  attr { key: "strides" value { list { i: 1 i: 1 i: 1 i: 1 } } } }
"""
BOXES = """
name: "boxes"
input: "places" input_shape { dim: 1 dim: 8 }
input: "scores" input_shape { dim: 1 dim: 4 }
layer { name: "priors" type: "Input" top: "priors" input_param { shape: { dim: 1 dim: 2 dim: 8 } } }
layer { name: "found" type: "DetectionOutput" bottom: "places" bottom: "scores" bottom: "priors" top: "found"
  detection_output_param { num_classes: 2 share_location: true background_label_id: 0 keep_top_k: 5
    confidence_threshold: 0.5 nms_param { nms_threshold: 0.5 top_k: 5 } code_type: CORNER } }
"""


def write(path: Path, nodes: list[Any], inputs: Shapes, outputs: Shapes, **weights: np.ndarray) -> Path:
    """Write an ONNX graph whose inputs and outputs are FP32."""
    ports = (
        {name: (onnx.TensorProto.FLOAT, shape) for name, shape in side.items()} for side in (inputs, outputs)
    )
    return save(build(nodes, *ports, weights), path)


def open_files(*paths: Path, **settings: object) -> OpenCvBackend:
    return OpenCvBackend.open(BackendSettings(files=paths, **settings))


def field(number: int, content: bytes | str | int) -> bytes:
    """Return one field of a protobuf message."""
    if isinstance(content, int):
        return bytes([number << 3]) + varint(content % (1 << 64))
    raw = content.encode() if isinstance(content, str) else content
    return bytes([number << 3 | 2]) + varint(len(raw)) + raw


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def attribute(key: str, value: bytes) -> bytes:
    return field(5, field(1, key) + field(2, value))


def shape(lengths: list[int]) -> bytes:
    return b"".join(field(2, field(1, length)) for length in lengths)


def write_graph(path: Path, data_format: str = "NHWC", photo: tuple[int, ...] = (-1, 4, 5, 3)) -> Path:
    """Write a frozen graph that mixes the channels of a photo (graph.proto, attr_value.proto)."""
    kernel = field(1, 1) + field(2, shape([1, 1, 3, 2])) + field(4, KERNEL.tobytes())
    nodes = [
        field(1, "photo") + field(2, "Placeholder") + attribute("shape", field(7, shape(list(photo)))),
        field(1, "kernel") + field(2, "Const") + attribute("value", field(8, kernel)),
        field(1, "mixed") + field(2, "Conv2D") + field(3, "photo") + field(3, "kernel")
        + attribute("padding", field(2, "VALID"))
        + attribute("strides", field(1, b"".join(field(3, 1) for _ in range(4))))
        + attribute("data_format", field(2, data_format)),
    ]  # fmt: skip
    path.write_bytes(b"".join(field(1, node) for node in nodes))
    return path


def photos(rows: int) -> np.ndarray:
    return np.random.default_rng(5).random((rows, 3, 4, 5), np.float32)


def mixed(blob: np.ndarray) -> np.ndarray:
    return np.einsum("nchw,cd->ndhw", blob, KERNEL)


def test_a_frozen_graph_is_described_as_the_blob_that_opencv_takes(tmp_path: Path) -> None:
    backend = open_files(write_graph(tmp_path / "g.pb"))
    assert backend.inputs == (TensorSpec("photo", "FP32", (-1, 3, 4, 5)),)
    assert backend.outputs == (TensorSpec("mixed", "FP32", (-1, 2, 4, 5)),)
    np.testing.assert_allclose(
        backend.infer({"photo": photos(2)}, ["mixed"])["mixed"], mixed(photos(2)), rtol=1e-5
    )


def test_a_graph_with_its_channels_first_keeps_its_axes(tmp_path: Path) -> None:
    backend = open_files(write_graph(tmp_path / "g.pb", "NCHW", photo=(-1, 3, 4, 5)))
    assert backend.inputs == (TensorSpec("photo", "FP32", (-1, 3, 4, 5)),)


@pytest.mark.parametrize("first", [".pb", ".pbtxt"])
def test_a_graph_and_its_text_are_taken_in_any_order(tmp_path: Path, first: str) -> None:
    weights, text = write_graph(tmp_path / "g.pb"), tmp_path / "other.pbtxt"
    text.write_text(TEXT_GRAPH)
    backend = open_files(*sorted((weights, text), key=lambda path: path.suffix != first))
    assert backend.inputs == (TensorSpec("photo", "FP32", (-1, 3, 4, 5)),)
    found = backend.infer({"photo": photos(1)}, ["mixed"])["mixed"]
    np.testing.assert_allclose(found, mixed(photos(1)), rtol=1e-5)


def test_bytes_are_taken_where_the_archive_declares_them(tmp_path: Path) -> None:
    stated = TensorSpec("photo", "UINT8", (-1, 3, 4, 5))
    backend = open_files(write_graph(tmp_path / "g.pb"), inputs=(stated,))
    pixels = np.arange(60, dtype=np.uint8).reshape(1, 3, 4, 5)
    found = Predictor(backend).infer({"photo": pixels})["mixed"]
    np.testing.assert_allclose(found, mixed(pixels.astype(np.float32)), rtol=1e-5)


def test_a_datatype_that_opencv_does_not_take_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(InvalidArchive, match=r"takes FP32 or UINT8; .* photo INT64 \[-1,3,4,5\]"):
        open_files(write_graph(tmp_path / "g.pb"), inputs=(TensorSpec("photo", "INT64", (-1, 3, 4, 5)),))


def test_boxes_of_many_images_are_no_rows_of_a_batch(tmp_path: Path) -> None:
    layers, weights = tmp_path / "boxes.prototxt", tmp_path / "boxes.caffemodel"
    layers.write_text(BOXES)
    weights.write_bytes(field(1, "boxes"))
    backend = open_files(weights, layers)
    assert [str(spec) for spec in backend.inputs] == [
        "places FP32 [-1,8]", "scores FP32 [-1,4]", "priors FP32 [-1,2,8]",
    ]  # fmt: skip
    assert backend.outputs == (TensorSpec("found", "FP32", (1, 1, -1, 7)),)
    assert not Predictor(backend).batches
    corners = np.array([[0.1, 0.1, 0.2, 0.2, 0.5, 0.5, 0.9, 0.9]], np.float32)
    found = backend.infer(
        {
            "places": np.zeros((1, 8), np.float32),
            "scores": np.array([[0.1, 0.9, 0.8, 0.2]], np.float32),  # of each box: background, thing
            "priors": np.stack([corners, np.full((1, 8), 0.1, np.float32)], 1),
        },
        ["found"],
    )["found"]
    assert found.shape == (1, 1, 5, 7)
    np.testing.assert_allclose(found[0, 0, 0], [0, 1, 0.9, 0.1, 0.1, 0.2, 0.2], atol=1e-6)
    assert not found[0, 0, 1:].any()  # places of boxes that were not found


def test_answers_stay_as_they_are_when_the_net_runs_again_on_another_batch(tmp_path: Path) -> None:
    backend = open_files(*make(tmp_path).files)
    answers = {}
    for rows in (1, 5, 2, 5, 1):
        x = np.full((rows, 3), rows, np.float32)
        answers[rows] = backend.infer({"x": x}, ["y"])["y"]
    for rows, found in answers.items():
        np.testing.assert_allclose(found, np.full((rows, 2), [9 * rows + 0.5, 12 * rows - 0.5]))
        assert found.flags.owndata


def test_an_inner_layer_is_an_output_where_the_archive_declares_it(tmp_path: Path) -> None:
    nodes = [NODE("Relu", ["x"], ["h"], name="hidden"), NODE("Neg", ["h"], ["y"], name="last")]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["N", 2]}, {"y": ["N", 2]})
    inner = TensorSpec("onnx_node!hidden", "FP32", (-1, 2))
    backend = open_files(path, outputs=(inner,))
    assert backend.outputs == (inner,)
    found = backend.infer({"x": np.array([[-1, 2]], np.float32)}, [inner.name])
    assert found[inner.name].tolist() == [[0, 2]]
    with pytest.raises(InvalidArchive, match="no layer 'hidden' to be an output; it ends in: y"):
        open_files(path, outputs=(TensorSpec("hidden", "FP32", (-1, 2)),))


def test_axes_are_kept_with_three_and_with_one(tmp_path: Path) -> None:
    nodes = [
        NODE("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        NODE("ReduceSum", ["x", "axes"], ["s"], keepdims=0),
    ]
    path = write(
        tmp_path / "m.onnx",
        nodes,
        {"x": ["N", 4, 3]},
        {"t": ["N", 3, 4], "s": ["N"]},
        axes=np.array([1, 2]),
    )
    backend = open_files(path)
    x = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    found = backend.infer({"x": x}, ["t", "s"])
    np.testing.assert_array_equal(found["t"], x.transpose(0, 2, 1))
    np.testing.assert_array_equal(found["s"], x.sum((1, 2)))
    assert {spec.name: spec.shape for spec in backend.outputs} == {"t": (-1, 3, 4), "s": (-1,)}


def test_inputs_of_one_axis_are_refused_at_load(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [NODE("Neg", ["x"], ["y"])], {"x": ["N"]}, {"y": ["N"]})
    with pytest.raises(InvalidArchive, match=r"two axes or more; the model has x FP32 \[-1\]"):
        open_files(path)


def test_free_axes_are_left_to_opencv_which_says_what_it_does_not_take(tmp_path: Path) -> None:
    square = [NODE("Reshape", ["x", "lengths"], ["y"])]
    path = write(tmp_path / "m.onnx", square, {"x": ["N", "M"]}, {"y": [2, 2]}, lengths=np.array([2, 2]))
    backend = open_files(path)
    assert backend.inputs == (TensorSpec("x", "FP32", (-1, -1)),)
    assert backend.outputs == (TensorSpec("y", "FP32", None),)
    assert backend.infer({"x": np.ones((4, 1), np.float32)}, ["y"])["y"].tolist() == [[1, 1], [1, 1]]
    with pytest.raises(BadTensor, match=r"does not take x FP32 \[1,5\]: .+ == maskTotal$"):
        backend.infer({"x": np.ones((1, 5), np.float32)}, ["y"])


def test_metadata_of_an_onnx_file_is_kept(tmp_path: Path) -> None:
    (path,) = make(tmp_path).files
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"character": "abcäöü"})
    onnx.save(model, path)
    assert open_files(path).metadata == {"character": "abcäöü"}


def test_inputs_that_no_file_names_have_to_be_declared(tmp_path: Path) -> None:
    layers, weights = tmp_path / "less.prototxt", tmp_path / "less.caffemodel"
    layers.write_text("""
        input: ["images"]
        layer { name: "less" type: "Power" bottom: "images" top: "less" power_param { shift: -1 } }""")
    weights.write_bytes(field(1, "boxes"))
    with pytest.raises(InvalidArchive, match=r'"inputs": \[\{"name": "data", "datatype": "FP32", "shape"'):
        open_files(layers, weights)
    backend = open_files(layers, weights, inputs=(TensorSpec("images", "FP32", (-1, 2)),))
    assert backend.outputs == (TensorSpec("less", "FP32", (-1, 2)),)
    assert backend.infer({"images": np.array([[1, 2]], np.float32)}, ["less"])["less"].tolist() == [[0, 1]]


def test_files_that_are_no_pair_and_damaged_ones_are_named_without_their_folder(tmp_path: Path) -> None:
    (path,) = make(tmp_path).files
    with pytest.raises(InvalidArchive, match=r"OpenCV reads \.onnx, .*; got: tiny\.onnx with tiny\.onnx$"):
        open_files(path, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InvalidArchive, match=r"cannot read tiny\.onnx: ") as caught:
        open_files(path)
    assert str(tmp_path) not in caught.value.message


def test_options_and_unknown_inputs_are_refused(tmp_path: Path) -> None:
    (path,) = make(tmp_path).files
    with pytest.raises(InvalidArchive, match="the backend opencv has no options; got: winograd"):
        open_files(path, options={"winograd": True})
    with pytest.raises(InvalidArchive, match="declares the input 'z'; the model has: x"):
        open_files(path, inputs=(TensorSpec("z", "FP32", (-1, 3)),))


def test_a_gpu_that_opencv_cannot_use_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import cv2

    if cv2.cuda.getCudaEnabledDeviceCount():
        pytest.skip("this OpenCV is built with CUDA and has a GPU")
    with caplog.at_level(logging.WARNING):
        backend = open_files(*make(tmp_path).files, device=0)
    assert "GPU 0 is not used: this OpenCV is built without CUDA" in caplog.text
    assert backend.infer({"x": np.ones((1, 3), np.float32)}, ["y"])["y"].tolist() == [[9.5, 11.5]]
