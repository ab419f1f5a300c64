"""The object detector: boxes as Caffe's and TensorFlow's detectors list them, told in pixels of the image."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from image_nets import answers, opened, png
from onnx_files import FLOAT, Node, write

from mms_lite.errors import HandlerError, InvalidArchive
from mms_lite.handlers.object_detector import Detections, ObjectDetector

LABELS = ["cat", "dog"]
IMAGE = {"data": (FLOAT, ["N", 3, 8, 8])}
MEAN = [Node("ReduceMean", ["data"], ["mean"], axes=[2, 3], keepdims=0)]


def caffe(path: Path, rows: list[list[float]]) -> Path:
    """Write a net that finds `rows` (image, class, score, box), where a score is a share of image 0's red."""
    nodes = [
        *MEAN,
        Node("Gather", ["mean", "zero"], ["first"], axis=0),
        Node("Gather", ["first", "zero"], ["red"], axis=0),
        Node("Mul", ["scored", "red"], ["scores"]),
        Node("Add", ["rows", "scores"], ["found"]),
    ]
    scored = np.array(rows, np.float32)[None, None] * np.array([0, 0, 1, 0, 0, 0, 0], np.float32)
    plain = np.array(rows, np.float32)[None, None] - scored
    outputs = {"found": (FLOAT, [1, 1, "n", 7])}
    return write(path, nodes, IMAGE, outputs, {"zero": np.array(0), "scored": scored, "rows": plain})


def tensorflow(path: Path, *, counting: bool = False) -> Path:
    """Write a net that finds two boxes in each image: class 1 as sure as it is red, 2 as it is green.

    With `counting` the sum of both is how many of the two are meant.
    """
    nodes = [
        *MEAN,
        Node("MatMul", ["mean", "first_two"], ["detection_scores"]),
        Node("Mul", ["detection_scores", "zero"], ["nothing"]),
        Node("Add", ["nothing", "classes"], ["detection_classes"]),
        Node("Unsqueeze", ["nothing", "last"], ["column"]),
        Node("Add", ["column", "boxes"], ["detection_boxes"]),
    ]
    outputs = {
        "detection_boxes": (FLOAT, ["N", 2, 4]),
        "detection_scores": (FLOAT, ["N", 2]),
        "detection_classes": (FLOAT, ["N", 2]),
    }
    weights: dict[str, Any] = {
        "first_two": np.eye(3, 2, dtype=np.float32),
        "zero": np.float32(0),
        "classes": np.array([1, 2], np.float32),
        "last": np.array([2]),
        "boxes": np.array([[0.1, 0.2, 0.3, 0.4], [0, 0.5, 1, 1]], np.float32),
    }
    if counting:
        nodes.append(Node("ReduceSum", ["detection_scores", "rows"], ["num_detections"], keepdims=0))
        outputs["num_detections"] = (FLOAT, ["N"])
        weights["rows"] = np.array([1])
    return write(path, nodes, IMAGE, outputs, weights)


def test_caffes_list_becomes_labels_scores_and_boxes_in_pixels(tmp_path: Path) -> None:
    rows = [[0, 2, 0.6, 0.1, 0.2, 0.5, 0.9], [0, 1, 0.9, -0.2, 0, 0.25, 1.1], [0, 1, 0.4, 0, 0, 1, 1]]
    handler = opened(ObjectDetector, caffe(tmp_path / "net.onnx", rows), LABELS, scale=1 / 255)
    (answer,) = answers(handler, png("red", (200, 100)))
    assert answer == [
        {"label": "cat", "score": pytest.approx(0.9), "box": [0, 0, 50, 100]},  # clipped
        {"label": "dog", "score": pytest.approx(0.6), "box": [20, 20, 100, 90]},
    ]
    json.dumps(answer)


def test_the_rows_of_caffes_list_belong_to_the_images_of_a_batch(tmp_path: Path) -> None:
    rows = [[0, 1, 1, 0, 0, 1, 1], [1, 2, 1, 0, 0, 0.5, 0.5], [1, 1, 0.8, 0, 0, 1, 1], [-1, 0, 0, 0, 0, 0, 0]]
    handler = opened(ObjectDetector, caffe(tmp_path / "net.onnx", rows), LABELS, scale=1 / 255)
    first, second = answers(handler, png("red", (100, 60)), png("blue", (40, 80)))
    assert [(each["label"], each["box"]) for each in first] == [("cat", [0, 0, 100, 60])]
    assert [(each["label"], each["box"]) for each in second] == [
        ("dog", [0, 0, 20, 40]),
        ("cat", [0, 0, 40, 80]),
    ]


def test_tensorflows_outputs_are_read_row_by_row(tmp_path: Path) -> None:
    handler = opened(ObjectDetector, tensorflow(tmp_path / "net.onnx"), LABELS, scale=1 / 255)
    yellow, red = answers(handler, png((204, 255, 0), (100, 200)), png("red", (10, 10)))
    assert yellow == [
        {"label": "dog", "score": 1.0, "box": [50, 0, 100, 200]},
        {"label": "cat", "score": pytest.approx(0.8), "box": [20, 20, 40, 60]},
    ]
    assert [each["label"] for each in red] == ["cat"]


def test_num_detections_says_how_many_entries_count(tmp_path: Path) -> None:
    net = tensorflow(tmp_path / "net.onnx", counting=True)
    handler = opened(ObjectDetector, net, LABELS, threshold=0, scale=1 / 255)
    red, yellow = answers(handler, png("red"), png("yellow"))
    assert [each["label"] for each in red] == ["cat"]
    assert [each["label"] for each in yellow] == ["cat", "dog"]


def test_threshold_and_max_detections_bound_an_answer(tmp_path: Path) -> None:
    rows = [[0, 1, share / 10, 0, 0, 1, 1] for share in range(1, 10)]
    net = caffe(tmp_path / "net.onnx", rows)
    few = opened(ObjectDetector, net, LABELS, scale=1 / 255, threshold=0.25, max_detections=2)
    all_of_them = opened(ObjectDetector, net, LABELS, scale=1 / 255, threshold=0.25)
    assert [round(each["score"], 3) for each in answers(few, png("red"))[0]] == [0.9, 0.8]
    assert len(answers(all_of_them, png("red"))[0]) == 7


@pytest.mark.parametrize(
    ("labels", "config", "named"),
    [
        (LABELS, {}, ["cat", "dog", "3", "0"]),
        (LABELS, {"label_offset": 0}, ["dog", "2", "3", "cat"]),
        (None, {}, ["1", "2", "3", "0"]),
    ],
)
def test_a_class_without_a_label_is_its_number(
    tmp_path: Path, labels: list[str] | None, config: dict[str, int], named: list[str]
) -> None:
    rows = [[0, each, 1 - place / 100, 0, 0, 1, 1] for place, each in enumerate([1, 2, 3, 0])]
    handler = opened(ObjectDetector, caffe(tmp_path / "net.onnx", rows), labels, scale=1 / 255, **config)
    assert [each["label"] for each in answers(handler, png("red"))[0]] == named


def test_boxes_in_what_was_cut_out_are_told_in_the_whole_image(tmp_path: Path) -> None:
    net = caffe(tmp_path / "net.onnx", [[0, 1, 1, 0, 0, 0.5, 1]])
    handler = opened(ObjectDetector, net, LABELS, scale=1 / 255, crop=0.5)
    assert answers(handler, png("red", (400, 200)))[0][0]["box"] == [150, 50, 200, 150]


def test_an_answer_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    handler = opened(ObjectDetector, caffe(tmp_path / "net.onnx", [[0, 1, 1, 0, 0, 1, 1]]), LABELS)
    broken, whole = handler.postprocess(
        {"found": np.array([[[[0, 1, np.nan, 0, 0, 1, 1], [1, 1, 0.9, 0, 0, 1, 1]]]], np.float32)},
        [np.zeros((10, 10, 3), np.uint8)] * 2,
    )
    assert isinstance(broken, HandlerError)
    assert whole[0]["box"] == [0, 0, 10, 10]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"threshold": 1.1}, "threshold is not a number from 0 to 1: 1.1"),
        ({"max_detections": 0}, "max_detections is not a positive whole number: 0"),
        ({"label_offset": 0.5}, "label_offset is not a whole number from 0: 0.5"),
    ],
)
def test_settings_that_are_none_are_named(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArchive, match=said):
        opened(ObjectDetector, tensorflow(tmp_path / "net.onnx"), LABELS, **config)


class Corners(ObjectDetector):
    """Reads an output of its own: the mean of each channel is where the one object begins and ends."""

    def detections(self, outputs: Mapping[str, np.ndarray], count: int) -> list[Detections]:
        means = outputs["mean"][:count, None]
        return [Detections(np.ones(1), np.ones(1), np.tile(row[:, [0, 1]], (1, 2))) for row in means]


def test_outputs_of_another_kind_fail_the_load_and_need_one_method(tmp_path: Path) -> None:
    net = write(tmp_path / "net.onnx", MEAN, IMAGE, {"mean": (FLOAT, ["N", 3])})
    with pytest.raises(InvalidArchive, match=r"reads an output \[1,1,objects,7\].* got: mean FP32 \[1,3\]"):
        opened(ObjectDetector, net, LABELS)
    (answer,) = answers(opened(Corners, net, LABELS, scale=1 / 255), png((51, 102, 0), (100, 100)))
    assert answer == [{"label": "cat", "score": 1.0, "box": [20, 40, 20, 40]}]
