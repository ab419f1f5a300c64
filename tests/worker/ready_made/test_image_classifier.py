"""The image classifier: names and probabilities for images, and what an archive gets wrong told at load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from image_nets import (
    COLORS,
    PHOTOS,
    answers,
    context,
    encoded,
    mean_color,
    opened,
    png,
)
from onnx_files import FLOAT, INT8, UINT8, Node, write
from PIL import Image

from mms_lite.errors import HandlerError, InvalidArchive, InvalidRequest
from mms_lite.handlers.image_classifier import ImageClassifier
from mms_lite.handlers.image_handler import ImageSettings
from mms_lite.worker import entry

COFFEE, CHELSEA = ((PHOTOS / name).read_bytes() for name in ("coffee.png", "chelsea.png"))
AS_IS = {"softmax": False}  # what `mean_color` tells are no probabilities
IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def center(image: Image.Image, size: int, share: float) -> np.ndarray:
    """Crop and scale as nets for ImageNet are measured; uint8 [size,size,3]."""
    width, height = image.size
    cut = round(min(width, height) * share)
    left, top = (width - cut) // 2, (height - cut) // 2
    box = (left, top, left + cut, top + cut)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return mean_color(tmp_path / "net.onnx")


def test_an_answer_lists_probability_and_class_the_best_first(net: Path) -> None:
    handler = opened(ImageClassifier, net, scale=1 / 255)
    (answer,) = answers(handler, png((51, 255, 102)))
    assert [each["class"] for each in answer] == ["green", "blue", "red"]
    assert [each["probability"] for each in answer] == pytest.approx([1.0, 0.4, 0.2])
    json.dumps(answer)


def test_top_k_says_how_many_classes_an_answer_has(net: Path) -> None:
    (answer,) = answers(opened(ImageClassifier, net, top_k=1, **AS_IS), png("blue"))
    assert answer == [{"probability": 255.0, "class": "blue"}]


def test_softmax_turns_scores_into_probabilities(net: Path) -> None:
    (answer,) = answers(opened(ImageClassifier, net, softmax=True, scale=1 / 50), png((0, 100, 50)))
    powers = np.exp([2, 1, 0])
    assert [each["class"] for each in answer] == ["green", "blue", "red"]
    np.testing.assert_allclose([each["probability"] for each in answer], powers / powers.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "(it goes up to 1"),  # the mean of a grey ramp is half of 255
        ({"scale": -1}, "(it goes down to -1"),
    ],
)
def test_scores_are_told_from_probabilities_when_the_model_is_loaded(
    net: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidArchive) as caught:
        opened(ImageClassifier, net, **config)
    assert caught.value.message.startswith(f"the output 'prob' holds no probabilities {said}")
    assert caught.value.message.endswith(
        '): say "softmax": true in the handler config, or false to have the numbers as they are'
    )


def test_softmax_of_what_has_been_through_it_is_refused(tmp_path: Path, net: Path) -> None:
    opened(ImageClassifier, net, softmax=True, scale=1 / 255)  # each score within 0..1, their sum is not 1
    net = convolution(tmp_path / "softmax.onnx", "N")
    with pytest.raises(InvalidArchive, match="the output 'prob' holds probabilities already: leave"):
        opened(ImageClassifier, net, None, softmax=True, **IMAGENET)


@pytest.mark.parametrize(
    ("kind", "zero", "config", "told"),
    [
        (UINT8, 0, {}, [0.75, 0.25, 0]),
        (INT8, 128, {}, [0.75, 0.25, 0]),
        (UINT8, 0, AS_IS, [192, 64, 0]),
        (INT8, 128, AS_IS, [64, -64, -128]),
    ],
)
def test_bytes_of_a_quantised_net_are_the_probabilities_that_they_stand_for(
    tmp_path: Path, kind: int, zero: int, config: dict[str, Any], told: list[float]
) -> None:
    last = [Node("Sub", ["mean", "zero"], ["shifted"]), Node("Cast", ["shifted"], ["prob"], to=kind)]
    net = mean_color(
        tmp_path / "net.onnx", kind=UINT8, gives=kind, last=last, weights={"zero": np.float32(zero)}
    )
    (answer,) = answers(opened(ImageClassifier, net, **config), png((192, 64, 0)))
    assert [each["probability"] for each in answer] == told
    with pytest.raises(InvalidArchive, match='INT8, to which softmax does not apply: leave "softmax" out'):
        opened(ImageClassifier, net, softmax=True)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        (UINT8, {"mean": 127.5, "std": 127.5}, "takes UINT8: .* leave only 2 of 256 values: leave them out"),
        (UINT8, {"mean": [0, 0, 127], "std": [1, 1, 50]}, "leave only 4 of 256"),
        (INT8, {"scale": 1 / 255}, 'takes INT8: .* leave only 2 of 256 values: say "mean": 128 alone'),
    ],
)
def test_numbers_for_a_net_of_floats_do_not_fit_one_of_integers(
    tmp_path: Path, kind: int, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidArchive, match=said):
        opened(ImageClassifier, mean_color(tmp_path / "net.onnx", kind=kind), **config)


def test_with_an_offset_the_first_class_is_the_background(net: Path) -> None:
    handler = opened(ImageClassifier, net, ["green", "blue"], label_offset=1, **AS_IS)
    (answer,) = answers(handler, png((30, 20, 10)))
    assert [each["class"] for each in answer] == ["background", "green", "blue"]


def test_without_labels_a_class_is_its_number(net: Path) -> None:
    (answer,) = answers(opened(ImageClassifier, net, None, **AS_IS), png("green"))
    assert answer[0]["class"] == "1"


@pytest.mark.parametrize("share", [None, 0.875, 1.0])
@pytest.mark.parametrize("photo", [COFFEE, CHELSEA])
def test_the_model_gets_what_the_net_was_measured_with(tmp_path: Path, share: Any, photo: bytes) -> None:
    handler = opened(
        ImageClassifier, mean_color(tmp_path / "net.onnx", size=(64, 64)), crop=share, **IMAGENET
    )
    image = handler.decode({"body": photo})
    found = handler.preprocess([image])["data"]
    if share is None:
        pixels = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    else:
        pixels = center(image, 64, share)
    wanted = (pixels / 255 - IMAGENET["mean"]) / IMAGENET["std"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], wanted.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_colours_and_layout_are_the_models(tmp_path: Path, layout: str) -> None:
    net = mean_color(tmp_path / "net.onnx", layout=layout)
    handler = opened(ImageClassifier, net, color="BGR", mean=[1, 2, 3], std=[1, 2, 4], **AS_IS)
    found = handler.preprocess([handler.decode({"body": png((103, 22, 11))})])["data"]
    pixel = found[0, :, 4, 4] if layout == "NCHW" else found[0, 4, 4]
    assert found.shape == ((1, 3, 8, 8) if layout == "NCHW" else (1, 8, 8, 3))
    assert pixel.tolist() == [10, 10, 25]  # blue, green, red


def test_a_model_for_grey_images_gets_grey_ones(tmp_path: Path) -> None:
    nodes = [Node("Flatten", ["data"], ["values"]), Node("Identity", ["values"], ["prob"])]
    net = write(tmp_path / "net.onnx", nodes, {"data": (FLOAT, ["N", 1, 2, 2])}, {"prob": (FLOAT, ["N", 4])})
    handler = opened(ImageClassifier, net, None, color="GRAY", mean=6, std=10, **AS_IS)
    (answer,) = answers(handler, png((100, 100, 100)))
    assert [each["probability"] for each in answer] == pytest.approx([9.4] * 4)


def test_a_crop_has_the_shape_of_the_input(tmp_path: Path) -> None:
    net = mean_color(tmp_path / "net.onnx", size=("H", "W"))
    handler = opened(ImageClassifier, net, size=[20, 40], crop=0.5, **AS_IS)
    assert handler.image_input.box((400, 400)) == (100, 150, 300, 250)
    assert handler.image_input.box((1000, 100)) == (450, 25, 550, 75)
    assert handler.preprocess([handler.decode({"body": COFFEE})])["data"].shape == (1, 3, 20, 40)


def test_a_model_of_bytes_gets_the_pixels_as_they_are(tmp_path: Path) -> None:
    net = mean_color(tmp_path / "net.onnx", layout="NHWC", kind=UINT8, size=(64, 64))
    handler = opened(ImageClassifier, net, **AS_IS)
    image = handler.decode({"body": COFFEE})
    found = handler.preprocess([image])["data"]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], center(image, 64, 0.875))


@pytest.mark.parametrize(
    ("kind", "config", "pixel"),
    [
        (UINT8, {"scale": 2, "mean": [300, 0.7, 0]}, [0, 99, 255]),
        (INT8, {"mean": 128}, [-28, -78, 72]),
        (INT8, {}, [100, 50, 127]),
    ],
)
def test_numbers_for_a_model_of_integers_are_rounded_and_kept_in_range(
    tmp_path: Path, kind: int, config: dict[str, Any], pixel: list[int]
) -> None:
    handler = opened(ImageClassifier, mean_color(tmp_path / "net.onnx", kind=kind), **config, **AS_IS)
    found = handler.preprocess([handler.decode({"body": png((100, 50, 200))})])["data"]
    assert found[0, :, 0, 0].tolist() == pixel


def convolution(path: Path, rows: int | str) -> Path:
    """Write a net with random weights and 50 classes; of how they are numbered nothing is known."""
    random = np.random.default_rng(7)
    kernel = random.standard_normal((50, 3, 5, 5)).astype(np.float32) / 8
    nodes = [
        Node("Conv", ["data", "kernel"], ["maps"], strides=[2, 2]),
        Node("Relu", ["maps"], ["positive"]),
        Node("GlobalAveragePool", ["positive"], ["means"]),
        Node("Flatten", ["means"], ["flat"]),
        Node("Softmax", ["flat"], ["prob"], axis=1),
    ]
    shapes = {"data": (FLOAT, [rows, 3, 32, 32])}, {"prob": (FLOAT, [rows, 50])}
    return write(path, nodes, *shapes, {"kernel": kernel})


@pytest.mark.parametrize("rows", ["N", 1])
def test_a_batch_of_eight_images_is_answered_as_eight_single_images(tmp_path: Path, rows: Any) -> None:
    handler = opened(ImageClassifier, convolution(tmp_path / "net.onnx", rows), None, top_k=50, **IMAGENET)
    photos = [Image.open(PHOTOS / name).convert("RGB") for name in ("coffee.png", "chelsea.png")]
    crops = [photo.crop((0, 0, 100 + 60 * step, 290 - 50 * step)) for photo in photos for step in range(4)]
    batch = answers(handler, *map(encoded, crops))
    for crop, answer in zip(crops, batch, strict=True):
        (alone,) = answers(handler, encoded(crop))
        single = {each["class"]: each["probability"] for each in alone}
        assert {each["class"]: each["probability"] for each in answer} == pytest.approx(single, abs=1e-5)
    assert len({answer[0]["probability"] for answer in batch}) == 8


def test_a_body_that_is_no_image_fails_alone(net: Path) -> None:
    first, second, third = answers(
        opened(ImageClassifier, net, **AS_IS), png("red"), b"no image", png("blue")
    )
    assert (first[0]["class"], third[0]["class"]) == ("red", "blue")
    assert isinstance(second, InvalidRequest)


def test_an_answer_that_is_not_finite_fails_alone_and_names_no_class(tmp_path: Path) -> None:
    net = mean_color(tmp_path / "net.onnx", last=[Node("Log", ["mean"], ["prob"])])  # of 0 it is -inf
    grey, red = answers(opened(ImageClassifier, net, **AS_IS), png("grey"), png("red"))
    assert len(grey) == 3
    assert isinstance(red, HandlerError)
    assert "not finite" in red.message


def test_a_model_whose_answers_are_never_finite_does_not_load(tmp_path: Path) -> None:
    last = [Node("Neg", ["mean"], ["negative"]), Node("Log", ["negative"], ["prob"])]
    with pytest.raises(InvalidArchive, match=r"cannot run as it is configured: .* not finite"):
        opened(ImageClassifier, mean_color(tmp_path / "net.onnx", last=last))


def test_max_pixels_is_the_archives(net: Path) -> None:
    handler = opened(ImageClassifier, net, max_pixels=400, **AS_IS)
    small, large = answers(handler, png("red", (20, 20)), png("red", (20, 21)))
    assert small[0]["class"] == "red"
    assert "over 400 pixels" in large.message


@pytest.mark.parametrize(
    ("labels", "config", "said"),
    [
        (["green", "blue"], {}, 'if the first class is the background, say "label_offset": 1'),
        (["a"], {}, "the model has 3 classes, and there are 1 labels: one is needed for each"),
        (COLORS, {"label_offset": 1}, "the model has 3 classes, and there are 3 labels: with label_offset 1"),
        (COLORS, {"output": "logits"}, "an output [rows,classes] named 'logits'; the model has: prob FP32"),
        (COLORS, {"size": 9}, "size 9; the model's input is data FP32 [-1,3,8,8]"),
        (COLORS, {"color": "GRAY"}, "not one for GRAY images in NCHW"),
        (COLORS, {"layout": "NHWC"}, "not one for RGB images in NHWC"),
        (COLORS, {"top_k": 0}, "top_k is not a positive whole number: 0"),
        (COLORS, {"softmax": 1}, "softmax is neither true nor false: 1"),
        (COLORS, {"label_offset": -1}, "label_offset is not a whole number from 0: -1"),
        (COLORS, {"output": 0}, "output is not the name of an output: 0"),
        (COLORS, {"crops": 1}, "unknown key 'crops'; did you mean crop?"),
    ],
)
def test_an_archive_that_does_not_fit_its_model_is_refused(
    net: Path, labels: list[str], config: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(InvalidArchive) as caught:
        opened(ImageClassifier, net, labels, **config)
    assert said in caught.value.message


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    image, mask = (FLOAT, ["N", 3, 8, 8]), (FLOAT, ["N", 3, 8, 8])
    two = write(
        tmp_path / "two.onnx",
        [Node("Add", ["image", "mask"], ["sum"])],
        {"image": image, "mask": mask},
        {"sum": image},
    )
    with pytest.raises(InvalidArchive, match=r"with one input, an image; this one has: image .*; mask"):
        opened(ImageClassifier, two)
    with pytest.raises(InvalidArchive, match=r"reads an output \[rows,classes\]; the model has: prob FP32"):
        maps = [Node("Identity", ["data"], ["prob"])]
        opened(ImageClassifier, write(tmp_path / "maps.onnx", maps, {"data": image}, {"prob": image}))
    with pytest.raises(InvalidArchive, match="takes 4 images at a time"):
        opened(ImageClassifier, mean_color(tmp_path / "four.onnx", rows=4))
    with pytest.raises(InvalidArchive, match="say one with size in the handler config"):
        opened(ImageClassifier, mean_color(tmp_path / "free.onnx", size=("H", "W")))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"size": 0}, "size is neither"),
        ({"size": [224]}, "size is neither"),
        ({"size": "224"}, "size is neither"),
        ({"crop": 1.5}, "crop is not a number over 0 and up to 1"),
        ({"crop": True}, "crop is not a number"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; there are: bicubic, "),
        ({"color": "rgb"}, "color is 'rgb'; there are: RGB, BGR, GRAY"),
        ({"layout": "CHW"}, "layout is 'CHW'; there are: NCHW, NHWC"),
        ({"scale": "1/255"}, "scale is not a number"),
        ({"mean": [1, 2]}, r"mean is not a number or a list of 3, for RGB: \[1, 2\]"),
        ({"color": "GRAY", "mean": [1, 2, 3]}, "a list of 1, for GRAY"),
        ({"std": [1, 1, 0]}, "std has a 0"),
        ({"std": [1, 1, float("nan")]}, "std is not a number"),
        ({"max_pixels": 1e6}, "max_pixels is not a positive whole number"),
        ({"backend": []}, "backend is not an object"),
        ({"allow_nan": 1}, "allow_nan is neither true nor false: 1"),
    ],
)
def test_settings_that_are_none_are_named(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ImageSettings(**config)


class Inverting(ImageClassifier):
    """Overrides `decode` alone: what is dark is light."""

    def decode(self, parts: Mapping[str, Any]) -> np.ndarray:
        return 255 - np.asarray(super().decode(parts))


class Dark(ImageClassifier):
    """Overrides `preprocess` alone."""

    def preprocess(self, items: list[Any]) -> dict[str, np.ndarray]:
        return {name: array / 2 for name, array in super().preprocess(items).items()}


class Mirrored(ImageClassifier):
    """Overrides `infer` alone: blue is told as red."""

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array[:, ::-1] for name, array in super().infer(inputs).items()}


class Best(ImageClassifier):
    """Overrides `postprocess` alone."""

    def postprocess(self, outputs: Mapping[str, np.ndarray], items: list[Any]) -> list[str]:
        return [best["class"] for best, *_ in super().postprocess(outputs, items)]


@pytest.mark.parametrize(
    ("cls", "answer"),
    [
        (Inverting, [{"probability": 255, "class": "green"}, {"probability": 155, "class": "red"}]),
        (Dark, [{"probability": 127.5, "class": "blue"}, {"probability": 50, "class": "red"}]),
        (Mirrored, [{"probability": 255, "class": "red"}, {"probability": 100, "class": "blue"}]),
        (Best, "blue"),
    ],
)
def test_a_derived_class_overrides_one_step(net: Path, cls: type[ImageClassifier], answer: Any) -> None:
    found = answers(opened(cls, net, top_k=2, **AS_IS), png((100, 0, 255)), png((100, 0, 255)))
    assert found == [answer, answer]


def test_a_file_in_the_archive_derives_its_own_handler(net: Path) -> None:
    (net.parent / "best.py").write_text(
        "from mms_lite.handlers.image_classifier import ImageClassifier\n\n\n"
        "class Best(ImageClassifier):\n"
        "    def postprocess(self, outputs, items):\n"
        "        return [answer[0]['class'] for answer in super().postprocess(outputs, items)]\n"
    )
    ready_made = entry.find("image_classifier", context(net, **AS_IS))
    assert ready_made.signature.inputs[0].shape == (-1, 3, 8, 8)
    assert ready_made.call([{"data": png("blue")}], None)[0][0]["class"] == "blue"
    derived = entry.find("best.py", context(net, **AS_IS))
    assert derived.call([{"data": png("blue")}, {"data": png("red")}], None) == ["blue", "red"]
