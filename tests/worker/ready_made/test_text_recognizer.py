"""The text recognizer: CTC decoding of a net that tells a class for each column by its brightness."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx, which writes the models of these tests, is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("cv2", reason="the handlers extra is not installed")

import packed
from onnx_files import FLOAT, Node, write

from mms_lite.errors import InvalidArchive, InvalidRequest
from mms_lite.worker.handler import MmsHandler

HEIGHT = 8
ANY_WIDTH = ("n", 3, HEIGHT, "w")
BLANK, A, B, C = 128, 0, 255, 191  # the grey values of the classes
LEVELS = [0, -1, 1, 0.5]  # of the same, as the model sees them; padding is 0, a blank
CHARACTERS = {"character": "a\nb\nc"}


def write_columns(
    folder: Path,
    metadata: dict[str, str] | None = None,
    dims: tuple[int | str, ...] = ANY_WIDTH,
    levels: list[float] = LEVELS,
) -> None:
    """Write a net that gives each column 1 - |brightness - level| for each class, and 0 below that."""
    nodes = [
        Node("ReduceMean", ["x"], ["columns"], axes=[1, 2], keepdims=0),
        Node("Unsqueeze", ["columns", "last"], ["each"]),
        Node("Sub", ["each", "levels"], ["off"]),
        Node("Abs", ["off"], ["distance"]),
        Node("Sub", ["one", "distance"], ["near"]),
        Node("Relu", ["near"], ["classes"]),
    ]
    write(
        folder / "model.onnx",
        nodes,
        {"x": (FLOAT, dims)},
        {"classes": (FLOAT, (dims[0], dims[3], len(levels)))},
        {
            "last": np.array([2]),
            "levels": np.array(levels, np.float32),
            "one": np.float32(1),
        },
        CHARACTERS if metadata is None else metadata,
    )


def line(*columns: int, height: int = HEIGHT) -> np.ndarray:
    """Return grey columns, each four pixels wide."""
    return np.tile(np.repeat(np.array(columns, np.uint8), 4), (height, 1))


def answers(model: MmsHandler, *images: np.ndarray) -> list[dict[str, Any]]:
    found = packed.ask(model, *map(packed.png, images))
    assert [each.error for each in found] == [None] * len(images)
    return [json.loads(bytes(each.outputs[0].data)) for each in found]


def test_repeated_steps_are_one_character_and_a_blank_parts_two(tmp_path: Path) -> None:
    write_columns(tmp_path)
    model = packed.load("text_recognizer", tmp_path)
    found = answers(model, line(A, A, BLANK, A, B, B, A))[0]
    assert found == {"text": "aaba", "score": pytest.approx(1)}


def test_the_score_is_the_mean_over_the_characters_that_are_kept(tmp_path: Path) -> None:
    write_columns(tmp_path)
    model = packed.load("text_recognizer", tmp_path)
    faint = 20  # tells `a` with less than 1
    assert answers(model, line(A, BLANK, faint))[0] == {
        "text": "aa",
        "score": pytest.approx((1 + 1 - 20 / 127.5) / 2, abs=1e-5),
    }


def test_an_empty_line_has_no_text_and_no_score(tmp_path: Path) -> None:
    write_columns(tmp_path)
    model = packed.load("text_recognizer", tmp_path)
    assert answers(model, line(BLANK, BLANK)) == [{"text": "", "score": 0}]


def test_a_line_is_scaled_to_the_height_of_the_model(tmp_path: Path) -> None:
    write_columns(tmp_path)
    model = packed.load("text_recognizer", tmp_path)
    wide = line(A, A, A, BLANK, BLANK, BLANK, B, B, B, height=2 * HEIGHT)
    assert answers(model, wide)[0]["text"] == "ab"


def test_the_labels_file_comes_before_what_the_model_says(tmp_path: Path) -> None:
    write_columns(tmp_path)
    model = packed.load("text_recognizer", tmp_path, labels="x\ny\nz\n")
    assert answers(model, line(A, B))[0]["text"] == "xy"


def test_a_last_class_that_is_not_listed_is_the_space(tmp_path: Path) -> None:
    write_columns(tmp_path, {"character": "a\nb"})
    model = packed.load("text_recognizer", tmp_path)
    assert answers(model, line(A, C, B))[0]["text"] == "a b"


@pytest.mark.parametrize(
    ("metadata", "labels", "said"),
    [
        ({}, None, "does not say which characters it reads: pack a labels file"),
        ({"character": "a"}, None, "the model's metadata lists 1 characters; the model has 4 classes"),
        (CHARACTERS, "a\nb\nc\nd\n", "the labels file lists 4 characters; the model has 4 classes"),
    ],
)
def test_another_number_of_characters_than_classes_does_not_load(
    tmp_path: Path, metadata: dict[str, str], labels: str | None, said: str
) -> None:
    write_columns(tmp_path, metadata)
    with pytest.raises(InvalidArchive, match=said):
        packed.load("text_recognizer", tmp_path, labels=labels)


def test_lines_of_several_lengths_in_a_batch_are_answered_as_alone(tmp_path: Path) -> None:
    """The net answers by the mean of the whole row: what it is padded with shows."""
    nodes = [
        Node("ReduceMean", ["x"], ["columns"], axes=[1, 2], keepdims=0),
        Node("ReduceMean", ["columns"], ["mean"], axes=[1], keepdims=1),
        Node("Abs", ["mean"], ["ink"]),
        Node("Unsqueeze", ["ink", "last"], ["a"]),
        Node("Sub", ["one", "a"], ["blank"]),
        Node("Concat", ["blank", "a"], ["classes"], axis=2),
    ]
    write(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, ANY_WIDTH)},
        {"classes": (FLOAT, ("n", 1, 2))},
        {"last": np.array([2]), "one": np.float32(1)},
        {"character": "a"},
    )
    model = packed.load("text_recognizer", tmp_path, {"min_width": 32})
    lines = [line(*[A] * 30), line(*[A] * 5), line(*[A] * 100), line(*[A] * 29)]
    together = answers(model, *lines)
    assert together == [answers(model, each)[0] for each in lines]
    # 120, 20, 400 and 116 columns of ink, in a width of 128, 32, 416 and 128
    assert [each["score"] for each in together] == [
        pytest.approx(share, abs=1e-5) for share in (120 / 128, 20 / 32, 400 / 416, 116 / 128)
    ]


def test_a_line_over_the_width_of_the_model_is_squeezed_into_it(tmp_path: Path) -> None:
    write_columns(tmp_path, dims=("n", 3, HEIGHT, 16))
    model = packed.load("text_recognizer", tmp_path)
    assert answers(model, line(*[A] * 8, *[BLANK] * 8, *[B] * 8), line(A, B)) == [
        {"text": "ab", "score": pytest.approx(1)},
        {"text": "ab", "score": pytest.approx(1)},
    ]


def test_a_body_that_is_no_image_or_a_strip_fails_alone(tmp_path: Path) -> None:
    write_columns(tmp_path)
    model = packed.load("text_recognizer", tmp_path, {"max_width": 80})
    found = packed.ask(model, b"no image", packed.png(line(A)), packed.png(line(*[A] * 21)))
    assert found[1].error is None
    assert isinstance(found[0].error, InvalidRequest)
    assert isinstance(found[2].error, InvalidRequest)
    assert "84 x 8, the longer side is over 10 times the shorter" in found[2].error.message


def test_a_detectors_model_does_not_load(tmp_path: Path) -> None:
    grey = Node("ReduceMean", ["x"], ["map"], axes=[1], keepdims=1)
    sizes = {"x": (FLOAT, ANY_WIDTH)}, {"map": (FLOAT, ("n", 1, HEIGHT, "w"))}
    write(tmp_path / "model.onnx", [grey], *sizes, metadata=CHARACTERS)
    with pytest.raises(
        InvalidArchive, match=r"should be probabilities .*classes\]; it is map FP32 \[-1,1,8,-1\]"
    ):
        packed.load("text_recognizer", tmp_path)


def test_a_model_whose_output_is_no_probabilities_by_step_does_not_load(tmp_path: Path) -> None:
    nodes = [
        Node("ReduceMean", ["x"], ["rows"], axes=[1], keepdims=0),
        Node("Transpose", ["rows"], ["steps"], perm=[2, 0, 1]),
    ]
    write(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, ANY_WIDTH)},
        {"steps": (FLOAT, ("w", "n", HEIGHT))},
        metadata=CHARACTERS,
    )
    with pytest.raises(
        InvalidArchive,
        match=r"probabilities \[images,steps,classes\]; for one image it is FP32 \[320,1,8\]",
    ):
        packed.load("text_recognizer", tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"max_width": "wide"}, "max_width is not a positive whole number: 'wide'"),
        ({"heigth": 48}, "did you mean height"),
    ],
)
def test_a_setting_that_is_none_is_named(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    write_columns(tmp_path)
    with pytest.raises(InvalidArchive, match=said):
        packed.load("text_recognizer", tmp_path, config)
