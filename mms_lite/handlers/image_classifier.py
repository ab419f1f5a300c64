"""An image to the names of what it shows: a model with one probability or score for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mms_lite.errors import HandlerError, InvalidArchive
from mms_lite.handlers.image_handler import ImageHandler, ImageSettings
from mms_lite.handlers.package import is_whole
from mms_lite.tensors import Array, datatype, describe
from mms_lite.types import TensorSpec

BACKGROUND = "background"
_TOLERANCE = 1e-3  # of what a probability is, and of a sum of them
_ZERO_POINTS = {np.dtype(np.uint8): 0, np.dtype(np.int8): -128}  # the byte that stands for a probability of 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageClassifierSettings(ImageSettings):
    """What `ImageClassifier` adds: which output it reads, what its numbers are, and how many it answers with.

    `softmax` is True for outputs that are scores (logits), False to answer with the numbers as they are; with
    None they have to be probabilities. `top_k` is how many classes an answer has. `output` is the output's
    name; None is the first that has [rows, classes]. `label_offset` is the class of the first label: with 1,
    class 0 is "background".
    """

    crop: float | None = 0.875  # what most nets for ImageNet were measured with
    softmax: bool | None = None
    top_k: int = 5
    output: str | None = None
    label_offset: int = 0

    def __post_init__(self) -> None:
        ImageSettings.__post_init__(self)
        if self.softmax is not None:
            self.require_bool("softmax")
        self.require_positive("top_k")
        if self.output is not None and not isinstance(self.output, str):
            raise ValueError(f"output is not the name of an output: {self.output!r}")
        if not is_whole(self.label_offset):
            raise ValueError(f"label_offset is not a whole number from 0: {self.label_offset!r}")


class ImageClassifier(ImageHandler):
    """Answers an image with a list of {"probability": ..., "class": label}, the best first.

    Without labels the class is its number as text.
    """

    settings_type = ImageClassifierSettings

    def __init__(self) -> None:
        super().__init__()
        self.output: str
        self._warming_up = False

    def prepare(self) -> None:
        """Fit the settings to the model's input, and choose the output."""
        super().prepare()
        self.output = self._choose().name

    def warm_up(self) -> None:
        """Answer an image of the model's own size, and see whether `softmax` suits its scores."""
        self._warming_up = True
        super().warm_up()
        self._warming_up = False

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model on a batch for the one output."""
        return self.predictor.infer(inputs, [self.output])

    def postprocess(self, outputs: Mapping[str, Array], items: list[Any]) -> Sequence[Any]:
        """Name the best classes of each image.

        Raises:
            InvalidArchive: there are not as many labels as classes, or in the warm-up the scores are of
                another kind than `softmax` says.
        """
        scores = outputs[self.output]
        if scores.ndim < 2 or len(scores) != len(items) or scores[0].size != scores.shape[1]:
            raise HandlerError(
                f"the output {self.output!r} of an image classifier is [images,classes]; "
                f"for {len(items)} it is {describe(scores)}"
            )
        self._check_labels(scores.shape[1])
        rows = scores.reshape(len(items), -1)
        if self._warming_up:
            self._check_scores(rows)
        return [self._answer(row) for row in self._as_floats(rows)]

    def label(self, index: int) -> str:
        """Return the name of a class."""
        labels, offset = self.package.labels, self.settings.label_offset
        if labels is None:
            return str(index)
        return labels[index - offset] if index >= offset else BACKGROUND

    def _answer(self, scores: Array) -> list[dict[str, Any]] | HandlerError:
        """Return the best of one image's [classes]."""
        if not np.isfinite(scores).all():
            return HandlerError("the model answered this image with numbers that are not finite (NaN)")
        if self.settings.softmax:
            scores = _softmax(scores)
        best = np.argsort(-scores, kind="stable")[: self.settings.top_k]
        return [{"probability": float(scores[index]), "class": self.label(int(index))} for index in best]

    def _as_floats(self, scores: Array) -> Array:
        """Return FP32; of bytes the probabilities that they stand for, unless they are to stay as they are.

        Source: TensorFlow Lite's 8-bit quantization specification, which fixes scale and zero point of a
        softmax and a sigmoid (INT8: 1/256 and -128).
        """
        floats = scores.astype(np.float32, copy=False)
        if self.settings.softmax is not None or scores.dtype not in _ZERO_POINTS:
            return floats
        return (floats - np.float32(_ZERO_POINTS[scores.dtype])) / np.float32(256)

    def _check_scores(self, scores: Array) -> None:
        """Refuse scores [images,classes] of another kind than `softmax` says.

        Raises:
            InvalidArchive: they are.
        """
        softmax, values, what = self.settings.softmax, self._as_floats(scores), f"the output {self.output!r}"
        of_floats = scores.dtype.kind == "f"
        if not np.isfinite(values).all():
            return  # which each answer tells
        least, most = values.min(), values.max()
        in_range = -_TOLERANCE <= least <= most <= 1 + _TOLERANCE
        if softmax is None and not in_range:
            found = f"goes up to {most:.4g}" if most > 1 + _TOLERANCE else f"goes down to {least:.4g}"
            choices = "true in the handler config, or false" if of_floats else "false in the handler config"
            raise InvalidArchive(
                f'{what} holds no probabilities (it {found}): say "softmax": {choices} '
                "to have the numbers as they are"
            )
        if softmax and not of_floats:
            raise InvalidArchive(
                f'{what} is {datatype(scores)}, to which softmax does not apply: leave "softmax" out'
            )
        if softmax and in_range and np.abs(values.sum(axis=1) - 1).max() <= _TOLERANCE:
            raise InvalidArchive(f'{what} holds probabilities already: leave "softmax" out')

    def _choose(self) -> TensorSpec:
        outputs, wanted = self.predictor.signature.outputs, self.settings.output
        if wanted is not None:
            fitting = [spec for spec in outputs if spec.name == wanted]
        else:
            fitting = [spec for spec in outputs if _has_classes(spec)]
        if not fitting:
            named = "" if wanted is None else f" named {wanted!r}"
            raise InvalidArchive(
                f"an image classifier reads an output [rows,classes]{named}; "
                f"the model has: {'; '.join(map(str, outputs))}"
            )
        return fitting[0]

    def _check_labels(self, classes: int) -> None:
        labels, offset = self.package.labels, self.settings.label_offset
        if labels is None or len(labels) + offset == classes:
            return
        hint = f"with label_offset {offset}" if offset else "one is needed for each"
        if classes == len(labels) + 1:
            hint = 'if the first class is the background, say "label_offset": 1 in the handler config'
        raise InvalidArchive(f"the model has {classes} classes, and there are {len(labels)} labels: {hint}")


def _has_classes(spec: TensorSpec) -> bool:
    """Tell whether an output is [rows, classes]; some frameworks add axes of length 1."""
    return spec.shape is None or (len(spec.shape) >= 2 and set(spec.shape[2:]) <= {1})


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    probabilities: Array = powers / powers.sum()
    return probabilities
