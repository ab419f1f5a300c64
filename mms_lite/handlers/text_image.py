"""Images of text to the one input of a model that answers with probabilities, as PP-OCR's models do.

What `text_detector` and `text_recognizer` share. Unlike `image_handler`, which has one size for all, here an
image's own size decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mms_lite.errors import HandlerError, InvalidArchive
from mms_lite.handlers import images
from mms_lite.handlers.model_handler import HandlerSettings, ModelHandler
from mms_lite.tensors import Array, describe


@dataclass(frozen=True, slots=True, kw_only=True)
class TextImageSettings(HandlerSettings):
    """`color` is the order of the model's channels: BGR or RGB."""

    color: str = "BGR"
    max_pixels: int = images.MAX_PIXELS

    def __post_init__(self) -> None:
        HandlerSettings.__post_init__(self)
        self.require_one_of("color", ("BGR", "RGB"))
        self.require_positive("max_pixels")


class TextImageHandler(ModelHandler):
    """Serves a model that takes images FP32 [-1,3,height,width] of values -1..1."""

    settings_type = TextImageSettings

    def __init__(self) -> None:
        super().__init__()
        self.fixed_height: int | None  # of the model's input; None where it takes any
        self.fixed_width: int | None

    def prepare(self) -> None:
        """Check that the model takes images."""
        inputs = self.predictor.signature.inputs
        shape = inputs[0].shape if len(inputs) == 1 else None
        if shape is None or len(shape) != 4 or shape[1] not in (3, -1) or inputs[0].datatype != "FP32":
            raise InvalidArchive(
                "the handler serves models with one input, images FP32 [-1,3,height,width]; "
                f"this one has: {'; '.join(map(str, inputs))}"
            )
        self.fixed_height, self.fixed_width = (None if length == -1 else length for length in shape[2:])

    def try_out(self, height: int, width: int, expected: str, shape: tuple[int, ...]) -> Array:
        """Run an empty image of this size, and return what the model answers.

        Raises:
            InvalidArchive: it is not probabilities of this shape, where -1 is any; `expected` is it in words.
        """
        output = self.predictor.signature.outputs[0]
        if output.shape is not None and not _fits(output.shape, shape):
            raise InvalidArchive(f"the model's first output should be {expected}; it is {output}")
        found = self.probabilities(self.infer(self.batch([np.zeros((3, height, width), np.float32)])))
        if not _fits(found.shape, shape):
            raise InvalidArchive(
                f"the model's first output should be {expected}; for one image it is {describe(found)}"
            )
        if not found.size or found.min() < 0 or found.max() > 1:
            raise InvalidArchive(
                f"the model's first output should be {expected}; it has numbers outside 0..1"
            )
        return found

    def normalize(self, image: Array, width: int, height: int) -> NDArray[np.float32]:
        """Return uint8 RGB [height, width, 3] scaled, in the model's order: [3, height, width], -1..1."""
        scaled = images.resize(image, width, height, "opencv-linear")
        channels = scaled[:, :, ::-1] if self.settings.color == "BGR" else scaled
        return channels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1

    def batch(self, pixels: list[NDArray[np.float32]]) -> dict[str, Array]:
        """Return normalized images of one size as the model's input."""
        return {self.predictor.signature.inputs[0].name: np.stack(pixels)}

    def probabilities(self, outputs: Mapping[str, Array]) -> Array:
        """Return the model's answer.

        Raises:
            HandlerError: it has numbers that are none.
        """
        found = outputs[self.predictor.signature.outputs[0].name]
        if not np.isfinite(found).all():
            raise HandlerError("the model answered with numbers that are not finite (NaN)")
        return found


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether a shape may be another; in both -1 is any length."""
    return len(found) == len(wanted) and all(
        -1 in (have, want) or have == want for have, want in zip(found, wanted, strict=True)
    )
