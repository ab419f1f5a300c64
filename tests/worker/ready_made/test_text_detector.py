"""The text detector: the boxes of bright regions, where the model's map is an image's brightness."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx, which writes the models of these tests, is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
cv2 = pytest.importorskip("cv2", reason="the handlers extra is not installed")

import packed  # noqa: E402
from onnx_files import FLOAT, Node, write  # noqa: E402

from mms_lite.errors import HandlerError, InvalidArchive, InvalidRequest  # noqa: E402
from mms_lite.handlers.text_detector import clockwise, reading_order  # noqa: E402
from mms_lite.worker.handler import MmsHandler  # noqa: E402

ANY_SIZE = ("n", 3, "h", "w")
# The core of each region as it is, at the image's own size.
PLAIN = {"unclip_ratio": 0, "dilate": False, "short_side": 32}


def write_brightness(folder: Path, dims: Any = ANY_SIZE, factor: float = 0.5) -> Path:
    """Write a net whose map is (mean of the channels + 1) * factor."""
    nodes = [
        Node("ReduceMean", ["x"], ["grey"], axes=[1], keepdims=1),
        Node("Add", ["grey", "one"], ["bright"]),
        Node("Mul", ["bright", "factor"], ["map"]),
    ]
    constants = {"one": np.float32(1), "factor": np.float32(factor)}
    return write(
        folder / "model.onnx",
        nodes,
        {"x": (FLOAT, dims)},
        {"map": (FLOAT, (dims[0], 1, *dims[2:]))},
        constants,
    )


def page(height: int, width: int, *regions: tuple[int, int, int, int], value: int = 255) -> np.ndarray:
    """Draw regions (left, top, right, bottom: the last pixels inside) on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for left, top, right, bottom in regions:
        pixels[top : bottom + 1, left : right + 1] = value
    return pixels


def corners(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def answers(model: MmsHandler, *images: np.ndarray) -> list[list[dict[str, Any]]]:
    found = packed.ask(model, *map(packed.png, images))
    assert [each.error for each in found] == [None] * len(images)
    return [json.loads(bytes(each.outputs[0].data)) for each in found]


def test_boxes_are_in_reading_order_and_faint_or_tiny_regions_are_left_out(tmp_path: Path) -> None:
    write_brightness(tmp_path)
    image = page(96, 192, (100, 10, 150, 22), (20, 12, 60, 24), (30, 60, 90, 75), (180, 90, 181, 91))
    image[40:50, 120:170] = 110  # .43: over threshold, under box_threshold
    found = answers(packed.load("text_detector", tmp_path, PLAIN), image)[0]
    assert [each["box"] for each in found] == [
        corners(20, 12, 60, 24),
        corners(100, 10, 150, 22),
        corners(30, 60, 90, 75),
    ]
    assert [each["score"] for each in found] == [pytest.approx(1)] * 3


def test_a_box_grows_by_its_area_over_its_outline_times_the_ratio(tmp_path: Path) -> None:
    write_brightness(tmp_path)
    model = packed.load("text_detector", tmp_path, {**PLAIN, "unclip_ratio": 1.5})
    found = answers(model, page(96, 192, (50, 40, 110, 60)))[0]
    margin = 60 * 20 * 1.5 / (2 * (60 + 20))  # 11.25
    assert found[0]["box"] == corners(
        round(50 - margin), round(40 - margin), round(110 + margin), round(60 + margin)
    )


def test_boxes_are_in_pixels_of_the_image_that_was_sent_whatever_the_model_sees(tmp_path: Path) -> None:
    image = page(50, 100, (20, 10, 69, 29))
    write_brightness(tmp_path)
    scaled_up = answers(packed.load("text_detector", tmp_path, {**PLAIN, "short_side": 400}), image)[0]
    scaled_down = answers(packed.load("text_detector", tmp_path, {**PLAIN, "long_side": 64}), image)[0]
    write_brightness(tmp_path, ("n", 3, 64, 256))
    fixed = answers(packed.load("text_detector", tmp_path, PLAIN), image)[0]
    for found in (scaled_up, scaled_down, fixed):
        np.testing.assert_allclose(found[0]["box"], corners(20, 10, 69, 29), atol=2)


def test_a_slanted_region_has_a_slanted_box(tmp_path: Path) -> None:
    write_brightness(tmp_path)
    slanted = np.array([[30, 100], [150, 40], [160, 60], [40, 120]])
    image = page(160, 192)
    cv2.fillPoly(image, [slanted], (255, 255, 255))
    found = answers(packed.load("text_detector", tmp_path, PLAIN), image)[0]
    np.testing.assert_allclose(found[0]["box"], slanted, atol=2)


def test_regions_a_pixel_apart_are_one_where_they_are_dilated(tmp_path: Path) -> None:
    write_brightness(tmp_path)
    image = page(96, 192, (20, 20, 40, 40), (42, 20, 60, 40))
    counts = {
        dilate: len(answers(packed.load("text_detector", tmp_path, {**PLAIN, "dilate": dilate}), image)[0])
        for dilate in (False, True)
    }
    assert counts == {False: 2, True: 1}


def test_images_of_several_sizes_in_a_batch_are_answered_as_alone(tmp_path: Path) -> None:
    write_brightness(tmp_path)
    model = packed.load("text_detector", tmp_path, PLAIN)
    images = [
        page(96, 192, (20, 12, 60, 24)),
        page(64, 64, (5, 5, 40, 20)),
        page(96, 192, (100, 50, 160, 70), value=200),
        page(96, 192),
    ]
    together = answers(model, *images)
    assert together == [answers(model, image)[0] for image in images]
    assert [len(each) for each in together] == [1, 1, 1, 0]


def test_a_region_too_thin_for_text_is_no_box_though_it_would_grow(tmp_path: Path) -> None:
    write_brightness(tmp_path)
    model = packed.load("text_detector", tmp_path, {**PLAIN, "unclip_ratio": 1.6})
    assert answers(model, page(96, 192, (20, 40, 150, 42))) == [[]]
    assert len(answers(model, page(96, 192, (20, 40, 150, 43)))[0]) == 1


def test_a_body_that_is_no_image_fails_alone(tmp_path: Path) -> None:
    write_brightness(tmp_path)
    model = packed.load("text_detector", tmp_path, PLAIN)
    found = packed.ask(model, b"no image", packed.png(page(64, 64, (5, 5, 40, 20))))
    assert isinstance(found[0].error, InvalidRequest)
    assert found[1].error is None


@pytest.mark.parametrize("color", ["BGR", "RGB"])
def test_the_channels_are_in_the_models_order(tmp_path: Path, color: str) -> None:
    nodes = [
        Node("Slice", ["x", "from", "to", "axis"], ["first"]),
        Node("Add", ["first", "one"], ["bright"]),
        Node("Mul", ["bright", "half"], ["map"]),
    ]
    constants = {
        "from": np.array([0]),
        "to": np.array([1]),
        "axis": np.array([1]),
        "one": np.float32(1),
        "half": np.float32(0.5),
    }
    write(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, ANY_SIZE)},
        {"map": (FLOAT, ("n", 1, "h", "w"))},
        constants,
    )
    image = page(64, 128)
    image[10:30, 10:50, 0] = 255  # red
    image[10:30, 70:120, 2] = 255  # blue
    found = answers(packed.load("text_detector", tmp_path, {**PLAIN, "color": color}), image)[0]
    assert [each["box"][0] for each in found] == [[70, 10] if color == "BGR" else [10, 10]]


def test_a_model_that_gives_no_map_of_probabilities_does_not_load(tmp_path: Path) -> None:
    write_brightness(tmp_path, factor=100)  # of an empty image already 100
    with pytest.raises(InvalidArchive, match=r"a map of probabilities.*outside 0\.\.1"):
        packed.load("text_detector", tmp_path)
    mean = Node("GlobalAveragePool", ["x"], ["y"])
    write(
        tmp_path / "model.onnx",
        [mean],
        {"x": (FLOAT, ANY_SIZE)},
        {"y": (FLOAT, ("n", 3, 1, 1))},
    )
    with pytest.raises(
        InvalidArchive, match=r"a map of probabilities \[images,1,height,width\]; it is y FP32"
    ):
        packed.load("text_detector", tmp_path)


def test_a_recognizers_model_does_not_load(tmp_path: Path) -> None:
    steps = Node("ReduceMean", ["x"], ["steps"], axes=[2], keepdims=0)
    write(tmp_path / "model.onnx", [steps], {"x": (FLOAT, ANY_SIZE)}, {"steps": (FLOAT, ("n", 3, "w"))})
    with pytest.raises(
        InvalidArchive, match=r"first output should be a map .*width\]; it is steps FP32 \[-1,3,-1\]"
    ):
        packed.load("text_detector", tmp_path)


def test_a_model_that_takes_no_images_does_not_load(tmp_path: Path) -> None:
    relu = Node("Relu", ["x"], ["y"])
    row = (FLOAT, ("n", 4))
    write(tmp_path / "model.onnx", [relu], {"x": row}, {"y": row})
    with pytest.raises(InvalidArchive, match=r"images FP32 \[-1,3,height,width\]; this one has: x FP32"):
        packed.load("text_detector", tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"threshold": 3}, "threshold is not a number from 0 to 1: 3"),
        ({"box_threshold": "0.5"}, "box_threshold is not a number from 0 to 1: '0.5'"),
        ({"threshold": True}, "threshold is not a number from 0 to 1: True"),
        ({"unclip_ratio": True}, "unclip_ratio is not a number from 0: True"),
        ({"short_side": 0}, "short_side is not a positive whole number: 0"),
        ({"color": "rgb"}, "there are: BGR, RGB"),
        ({"dilate": "no"}, "dilate is neither true nor false"),
        ({"unclip": 2}, "did you mean unclip_ratio"),
    ],
)
def test_a_setting_that_is_none_is_named(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    write_brightness(tmp_path)
    with pytest.raises(InvalidArchive, match=said):
        packed.load("text_detector", tmp_path, config)


def test_a_map_that_is_not_finite_is_an_error_of_that_image(tmp_path: Path) -> None:
    nodes = [  # (x + 1) / (x + 1): 1, and 0 / 0 where the image is black
        Node("ReduceMean", ["x"], ["grey"], axes=[1], keepdims=1),
        Node("Add", ["grey", "zero"], ["shifted"]),
        Node("Div", ["shifted", "shifted"], ["map"]),
    ]
    write(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, ANY_SIZE)},
        {"map": (FLOAT, ("n", 1, "h", "w"))},
        {"zero": np.float32(1)},
    )
    model = packed.load("text_detector", tmp_path, PLAIN)
    found = packed.ask(model, packed.png(page(64, 64)), packed.png(page(64, 64, (0, 0, 63, 63))))
    assert isinstance(found[0].error, HandlerError)
    assert "not finite" in found[0].error.message
    assert found[1].error is None


def test_corners_go_clockwise_from_the_upper_left_one_however_they_come() -> None:
    box = np.array([[10, 40], [90, 10], [95, 25], [15, 55]], np.float32)
    for turned in (box, box[::-1], np.roll(box, 2, axis=0), box[[2, 0, 3, 1]]):
        np.testing.assert_array_equal(clockwise(turned), box)


def test_boxes_of_one_line_are_read_from_the_left_though_they_are_not_level() -> None:
    def box(left: int, top: int) -> np.ndarray:
        return np.array(corners(left, top, left + 30, top + 20), np.float32)

    assert reading_order([box(200, 0), box(100, 6), box(0, 9), box(0, 40), box(100, 34)]) == [2, 1, 0, 3, 4]
    assert reading_order([]) == []
