"""An image to the objects in it: models that end in a list of boxes, as Caffe's or TensorFlow's SSD do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mms_lite.errors import HandlerError
from mms_lite.handlers import images
from mms_lite.handlers.image_handler import ImageHandler, ImageSettings
from mms_lite.handlers.images import AnyImage
from mms_lite.handlers.package import is_number, is_whole
from mms_lite.tensors import Array, describe
from mms_lite.types import TensorSpec

_TENSORFLOW = ("detection_boxes", "detection_scores", "detection_classes")
_COUNT = "num_detections"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectDetectorSettings(ImageSettings):
    """What `ObjectDetector` adds.

    Objects with a score under `threshold` are left out, and all but the best `max_detections`.
    `label_offset` is the class of the first label: 1 where class 0 is the background, which labels leave out.
    """

    threshold: float = 0.5
    max_detections: int = 100
    label_offset: int = 1

    def __post_init__(self) -> None:
        ImageSettings.__post_init__(self)
        self.require_positive("max_detections")
        if not (is_number(self.threshold) and 0 <= self.threshold <= 1):
            raise ValueError(f"threshold is not a number from 0 to 1: {self.threshold!r}")
        if not is_whole(self.label_offset):
            raise ValueError(f"label_offset is not a whole number from 0: {self.label_offset!r}")


@dataclass(frozen=True, slots=True)
class Detections:
    """What a model found in one image, any number n of objects: classes and scores [n], boxes [n,4].

    A box is left, top, right, bottom, relative to what the model saw: 0 to 1.
    """

    classes: Array
    scores: Array
    boxes: Array


class ObjectDetector(ImageHandler):
    """Answers an image with a list of {"label": ..., "score": ..., "box": [x1, y1, x2, y2]}, the best first.

    Boxes are in pixels of the image that came, upright. Without labels an object's label is its class's
    number as text.
    """

    settings_type = ObjectDetectorSettings

    @property
    def batches(self) -> bool:
        """Whether the model can be run for several images at once: the rows of Caffe's list tell theirs."""
        signature = self.predictor.signature
        free = all(spec.shape is None or spec.shape[:1] == (-1,) for spec in signature.inputs)
        return self.predictor.batches or (free and all(map(_is_caffe, signature.outputs)))

    def postprocess(self, outputs: Mapping[str, Array], items: list[AnyImage]) -> Sequence[Any]:
        """Turn the model's lists into objects in pixels of each image."""
        found = self.detections(outputs, len(items))
        return [self._answer(each, images.size_of(item)) for each, item in zip(found, items, strict=True)]

    def detections(self, outputs: Mapping[str, Array], count: int) -> list[Detections]:
        """Read the outputs for a batch of `count` images. A model of another family needs no more than this.

        Raises:
            HandlerError: they are of no kind that is known.
        """
        for array in outputs.values():
            if array.ndim == 4 and array.shape[3] == 7:
                return _of_caffe(array.reshape(-1, 7), count)
        by_name = {name.partition(":")[0]: array for name, array in outputs.items()}
        if all(name in by_name for name in _TENSORFLOW):
            return [_of_tensorflow(by_name, row) for row in range(count)]
        listed = "; ".join(f"{name} {describe(array)}" for name, array in outputs.items())
        raise HandlerError(
            f"an object detector reads an output [1,1,objects,7], or {', '.join(_TENSORFLOW)}; got: {listed}"
        )

    def label(self, index: int) -> str:
        """Return the name of a class, its number where there is none."""
        labels, place = self.package.labels or (), index - self.settings.label_offset
        return labels[place] if 0 <= place < len(labels) else str(index)

    def _answer(self, found: Detections, size: tuple[int, int]) -> list[dict[str, Any]] | HandlerError:
        if not all(np.isfinite(each).all() for each in (found.classes, found.scores, found.boxes)):
            return HandlerError("the model answered this image with numbers that are not finite (NaN)")
        best = np.argsort(-found.scores, kind="stable")[: self.settings.max_detections]
        best = best[found.scores[best] >= self.settings.threshold]
        boxes = self._in_pixels(found.boxes[best], size)
        return [
            {"label": self.label(int(found.classes[index])), "score": float(found.scores[index]), "box": box}
            for index, box in zip(best, boxes.tolist(), strict=True)
        ]

    def _in_pixels(self, boxes: Array, size: tuple[int, int]) -> Array:
        """Return relative boxes [n,4] in pixels of an image of this width and height, to a tenth."""
        left, top, right, bottom = self.image_input.box(size)
        scaled = boxes.astype(np.float64) * np.tile([right - left, bottom - top], 2) + np.tile([left, top], 2)
        pixels: Array = scaled.clip(0, np.tile(size, 2)).round(1)
        return pixels


def _is_caffe(spec: TensorSpec) -> bool:
    return spec.shape is not None and len(spec.shape) == 4 and spec.shape[3] == 7


def _of_caffe(rows: Array, count: int) -> list[Detections]:
    """Read [n,7]: image, class, score, left, top, right, bottom (Caffe's DetectionOutput, as in OpenCV).

    OpenVINO ends a list that is not full with a row of image -1.
    """
    of_image = [rows[rows[:, 0] == index] for index in range(count)]
    return [Detections(found[:, 1], found[:, 2], found[:, 3:]) for found in of_image]


def _of_tensorflow(outputs: Mapping[str, Array], row: int) -> Detections:
    """Read one row of TensorFlow's object detection API: boxes [rows,n,4] are top, left, bottom, right."""
    boxes, scores, classes = (outputs[name][row] for name in _TENSORFLOW)
    count = int(outputs[_COUNT][row]) if _COUNT in outputs else len(scores)
    return Detections(classes[:count], scores[:count], boxes[:count, [1, 0, 3, 2]])
