"""An image of one line of text to its characters: a CTC recognizer, such as CRNN or PP-OCR's SVTR.

Source: Graves et al. 2006 (CTC); PP-OCR for the scaling, the padding and the place of blank and space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mms_lite.errors import InvalidArchive
from mms_lite.handlers import images
from mms_lite.handlers.model_handler import Parts, single_part
from mms_lite.handlers.text_image import TextImageHandler, TextImageSettings
from mms_lite.tensors import Array

_BLANK = 0  # the class of no character
_WIDTH_STEP = 32  # widths are rounded up to it, so that lines of about one length share a batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecognizerSettings(TextImageSettings):
    """Height and widths in pixels, where the model leaves them free.

    Lines are padded on the right to `min_width`, or the next multiple of 32 over it; one that would be
    wider than `max_width` is refused.
    """

    height: int = 48
    min_width: int = 320
    max_width: int = 3200

    def __post_init__(self) -> None:
        TextImageSettings.__post_init__(self)
        self.require_positive("height", "min_width", "max_width")


@dataclass(frozen=True, slots=True)
class Line:
    """An image, uint8 RGB [height, width, 3], and the widths to which it is scaled, then padded."""

    image: Array
    width: int
    padded: int


class TextRecognizer(TextImageHandler):
    """Answers an image with {"text": ..., "score": mean probability of its characters}.

    A line is padded to a width of its own and runs with lines of that width only: its answer does not
    depend on the batch in which it came.
    """

    settings_type = TextRecognizerSettings

    def __init__(self) -> None:
        super().__init__()
        self.characters: tuple[str, ...]  # by class; that of the blank is empty

    @property
    def height(self) -> int:
        """Of the model's input, in pixels."""
        stated: int = self.settings.height
        return self.fixed_height or stated

    def warm_up(self) -> None:
        """Run an empty line, and check that each class that the model tells has a character."""
        width = self.fixed_width or self.settings.min_width
        found = self.try_out(self.height, width, "probabilities [images,steps,classes]", (1, -1, -1))
        self.characters = self._characters(found.shape[2])

    def decode(self, parts: Parts) -> Line:
        """Return the image of a request."""
        image = images.decode(
            single_part(parts, "image"),
            max_pixels=self.settings.max_pixels,
            max_aspect_ratio=self.settings.max_width / self.height,
        )
        height, width = image.shape[:2]
        scaled = math.ceil(width * self.height / height)
        if self.fixed_width is not None:  # a longer line is squeezed, as in the training of such models
            return Line(image, min(scaled, self.fixed_width), self.fixed_width)
        least = max(scaled, self.settings.min_width)
        return Line(image, scaled, math.ceil(least / _WIDTH_STEP) * _WIDTH_STEP)

    def batch_key(self, item: Line) -> int:
        """Return the width to which a line is padded: those of one width run together."""
        return item.padded

    def preprocess(self, items: list[Line]) -> dict[str, Array]:
        """Return the lines scaled to the model's height and padded with 0, which is grey."""
        return self.batch(
            [
                np.pad(
                    self.normalize(line.image, line.width, self.height),
                    ((0, 0), (0, 0), (0, line.padded - line.width)),
                )
                for line in items
            ]
        )

    def postprocess(self, outputs: Mapping[str, Array], items: list[Line]) -> Sequence[Any]:
        """Return text and score of each line by greedy decoding: the best class of each step."""
        return [self._read(each) for each in self.probabilities(outputs)]

    def _read(self, probabilities: Array) -> dict[str, Any]:
        """Decode one line's [steps, classes]."""
        best = probabilities.argmax(axis=1)
        kept = best != _BLANK
        kept[1:] &= best[1:] != best[:-1]  # a class told by steps on end is one character
        scores = probabilities.max(axis=1)[kept]
        return {
            "text": "".join(self.characters[index] for index in best[kept]),
            "score": float(scores.mean()) if scores.size else 0.0,
        }

    def _characters(self, classes: int) -> tuple[str, ...]:
        """Return the character of each class: the archive's labels, else what the model's file says.

        Raises:
            InvalidArchive: there are none, or not as many as the model has classes.
        """
        stated = self.predictor.metadata.get("character")
        if self.package.labels is not None:
            source, listed = "the labels file", self.package.labels
        elif stated:
            source, listed = "the model's metadata", tuple(stated.removesuffix("\n").split("\n"))
        else:
            raise InvalidArchive(
                "the model does not say which characters it reads: pack a labels file, one character a line"
            )
        missing = classes - 1 - len(listed)
        if missing not in (0, 1):  # PP-OCR lists all but the space, which comes last
            raise InvalidArchive(
                f"{source} lists {len(listed)} characters; the model has {classes} classes, "
                f"which is blank and {classes - 1} characters (the last may be an unlisted space)"
            )
        return ("", *listed, *(" " * missing))
