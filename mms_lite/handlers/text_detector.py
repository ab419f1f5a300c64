"""An image to the places of its text: a model that gives a map of probabilities, such as PP-OCR's DB.

Source: Liao et al. 2020, "Real-time Scene Text Detection with Differentiable Binarization", section 3.5;
RapidOCR for the scaling and the values of the settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mms_lite.handlers import images
from mms_lite.handlers.model_handler import Parts, single_part
from mms_lite.handlers.package import is_number
from mms_lite.handlers.text_image import TextImageHandler, TextImageSettings
from mms_lite.tensors import Array

_STRIDE = 32  # the model halves height and width five times
_LEAST_SIDE = 3  # of a region, in pixels of the map; of a box, in pixels of the image
_MOST_REGIONS = 1000  # the largest count: a map of noise has many thousands

Size = tuple[int, int]  # height, width
Box = NDArray[np.float32]  # [4, 2]: x and y of the corners, clockwise from the top left


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDetectorSettings(TextImageSettings):
    """How an image is scaled, and what counts as text.

    Where the model leaves the size free, an image is scaled up until its short side has `short_side`
    pixels, and in any case so that its long side has at most `long_side`. Pixels of the map over `threshold`
    are text; regions with a mean of at least `box_threshold` become boxes, which grow by `unclip_ratio`.
    `dilate` joins regions that are a pixel apart.
    """

    threshold: float = 0.3
    box_threshold: float = 0.5
    unclip_ratio: float = 1.6
    dilate: bool = True
    short_side: int = 736
    long_side: int = 2000

    def __post_init__(self) -> None:
        TextImageSettings.__post_init__(self)
        self.require_bool("dilate")
        self.require_positive("short_side", "long_side")
        for name in ("threshold", "box_threshold"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} is not a number from 0 to 1: {value!r}")
        if not (is_number(self.unclip_ratio) and self.unclip_ratio >= 0):
            raise ValueError(f"unclip_ratio is not a number from 0: {self.unclip_ratio!r}")


class TextDetector(TextImageHandler):
    """Answers an image with a list of {"box": four [x, y] clockwise from the top left, "score": ...}.

    Boxes are in pixels of the image as it was sent, in reading order. Images that are scaled to one size run
    together. It is for pages and photos: a strip of one line is left too little height by `long_side`.
    """

    settings_type = TextDetectorSettings

    def warm_up(self) -> None:
        """Run an empty image, and check that the answer is a map of probabilities."""
        size = self._scaled(self.settings.short_side, self.settings.short_side)
        self.try_out(*size, "a map of probabilities [images,1,height,width]", (1, 1, -1, -1))

    def decode(self, parts: Parts) -> Array:
        """Return the image of a request, uint8 RGB [height, width, 3]."""
        return images.decode(single_part(parts, "image"), max_pixels=self.settings.max_pixels)

    def batch_key(self, item: Array) -> Size:
        """Return the size to which an image is scaled: those of one size run together."""
        return self._scaled(*item.shape[:2])

    def preprocess(self, items: list[Array]) -> dict[str, Array]:
        """Return the images, all scaled to one size."""
        height, width = self.batch_key(items[0])
        return self.batch([self.normalize(item, width, height) for item in items])

    def postprocess(self, outputs: Mapping[str, Array], items: list[Array]) -> Sequence[Any]:
        """Return the boxes of each image."""
        maps = self.probabilities(outputs)
        return [self._answer(found[0], item) for found, item in zip(maps, items, strict=True)]

    def _answer(self, probabilities: Array, image: Array) -> list[dict[str, Any]]:
        height, width = image.shape[:2]
        scale = np.array([width / probabilities.shape[1], height / probabilities.shape[0]], np.float32)
        found = []
        for corners, score in self._regions(probabilities.astype(np.float32)):
            box = np.clip(np.round(clockwise(corners * scale)), 0, [width - 1, height - 1])
            across, down = np.linalg.norm(box[1] - box[0]), np.linalg.norm(box[3] - box[0])
            if min(across, down) > _LEAST_SIDE:
                found.append((box, score))
        return [
            {"box": found[place][0].astype(int).tolist(), "score": found[place][1]}
            for place in reading_order([box for box, _ in found])
        ]

    def _regions(self, probabilities: NDArray[np.float32]) -> Iterator[tuple[Box, float]]:
        """Yield corners, in pixels of the map, and score of each region of text."""
        mask = (probabilities > self.settings.threshold).astype(np.uint8)
        if self.settings.dilate:
            mask = cv2.dilate(mask, np.ones((2, 2), np.uint8))
        contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        for contour in sorted(contours, key=cv2.contourArea, reverse=True)[:_MOST_REGIONS]:
            centre, (length, breadth), angle = cv2.minAreaRect(contour)
            if min(length, breadth) < _LEAST_SIDE:
                continue
            score = _mean_inside(probabilities, cv2.boxPoints((centre, (length, breadth), angle)))
            if score < self.settings.box_threshold:
                continue
            # The model tells the core of each text. The paper offsets its outline by area * ratio / length of
            # the outline; the outline here is a rectangle, for which that is a larger rectangle.
            margin = length * breadth * self.settings.unclip_ratio / (2 * (length + breadth))
            grown = (length + 2 * margin, breadth + 2 * margin)
            yield cv2.boxPoints((centre, grown, angle)), score

    def _scaled(self, height: int, width: int) -> Size:
        """Return the size at which the model sees an image."""
        ratio = max(1.0, self.settings.short_side / min(height, width))
        ratio = min(ratio, self.settings.long_side / max(height, width))
        free = (max(round(int(side * ratio) / _STRIDE), 1) * _STRIDE for side in (height, width))
        high, wide = free
        return self.fixed_height or high, self.fixed_width or wide


def clockwise(corners: Box) -> Box:
    """Return the corners of a rectangle clockwise, from the upper of the two on the left."""
    x, y = (corners - corners.mean(axis=0)).T
    ordered = corners[np.argsort(np.arctan2(y, x))]  # y points down, so angles grow clockwise
    left = np.argsort(ordered[:, 0], kind="stable")[:2]
    return np.roll(ordered, -int(left[ordered[left, 1].argmin()]), axis=0)


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Return the places of boxes line by line from the top, each line from the left.

    A box belongs to the line above it where its middle is less than half a line's height below.
    """
    middles = [float(box[:, 1].mean()) for box in boxes]
    lines: list[list[int]] = []
    for place in sorted(range(len(boxes)), key=lambda place: middles[place]):
        if lines:
            first = lines[-1][0]
            height = float(np.linalg.norm(boxes[first][3] - boxes[first][0]))
            if middles[place] - middles[first] < height / 2:
                lines[-1].append(place)
                continue
        lines.append([place])
    return [place for line in lines for place in sorted(line, key=lambda place: float(boxes[place][0, 0]))]


def _mean_inside(probabilities: NDArray[np.float32], corners: Box) -> float:
    """Return the mean of the map inside a box."""
    height, width = probabilities.shape
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, [width - 1, height - 1])
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int), 0, [width - 1, height - 1])
    inside = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
    cv2.fillPoly(inside, [(corners - [left, top]).astype(np.int32)], 1)
    return float(cv2.mean(probabilities[top : bottom + 1, left : right + 1], inside)[0])
