"""Images to the one input of a model: size, crop, colours, layout and numbers, as the handler config says.

What `image_classifier` and `object_detector` share: they differ in what they make of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mms_lite.errors import InvalidArchive, ServingError
from mms_lite.handlers import images
from mms_lite.handlers.images import AnyImage
from mms_lite.handlers.model_handler import HandlerSettings, ModelHandler, Parts, single_part
from mms_lite.handlers.package import is_number, is_whole
from mms_lite.tensors import DTYPES, Array
from mms_lite.types import BYTES, TensorSpec

Numbers = float | Sequence[float]

_CHANNELS = {"RGB": (0, 1, 2), "BGR": (2, 1, 0), "GRAY": (0,)}  # of an RGB image, in the model's order
_LAYOUTS = ("NCHW", "NHWC")
_LEAST_LEVELS = 64  # of the 256 of a channel


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings(HandlerSettings):
    """How an image becomes a model's input: per channel (value * scale - mean) / std, of values 0..255.

    `size` is the input's height and width, or one number for both; None takes it from the model. `crop` is
    the share of the image that is kept, cut out of its middle in the shape of the input: 0.875 keeps
    seven eighths of the shorter side; None squeezes the whole image to the input's shape. `mean` and `std`
    are numbers, or lists in the order of `color`. `layout` None is read off the model's input.
    """

    size: int | Sequence[int] | None = None
    crop: float | None = None
    interpolation: str = "bicubic"
    color: str = "RGB"
    layout: str | None = None
    scale: float = 1.0
    mean: Numbers = 0.0
    std: Numbers = 1.0
    max_pixels: int = images.MAX_PIXELS

    def __post_init__(self) -> None:
        HandlerSettings.__post_init__(self)
        self.require_one_of("interpolation", images.INTERPOLATIONS)
        self.require_one_of("color", _CHANNELS)
        if self.layout is not None:
            self.require_one_of("layout", _LAYOUTS)
        self.require_positive("max_pixels")
        sizes = [] if self.size is None else self.height_and_width
        if len(sizes) not in (0, 2) or not all(is_whole(size, least=1) for size in sizes):
            raise ValueError(f"size is neither a positive whole number nor [height, width]: {self.size!r}")
        if self.crop is not None and not (is_number(self.crop) and 0 < self.crop <= 1):
            raise ValueError(f"crop is not a number over 0 and up to 1, or null: {self.crop!r}")
        if not is_number(self.scale):
            raise ValueError(f"scale is not a number: {self.scale!r}")
        self.per_channel("mean")
        if not all(self.per_channel("std")):
            raise ValueError("std has a 0, by which nothing can be divided")

    @property
    def height_and_width(self) -> Sequence[int]:
        """The stated size as a pair; empty where the model is to say it."""
        if self.size is None:
            return ()
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def per_channel(self, name: str) -> Sequence[float]:
        """Return `mean` or `std` for each channel.

        Raises:
            ValueError: it is not a number, nor a list of one for each.
        """
        value, count = getattr(self, name), len(_CHANNELS[self.color])
        numbers = value if isinstance(value, (list, tuple)) else [value] * count
        if len(numbers) != count or not all(map(is_number, numbers)):
            raise ValueError(f"{name} is not a number or a list of {count}, for {self.color}: {value!r}")
        return numbers


@dataclass(frozen=True, slots=True)
class ImageInput:
    """A model's input for images, with all that an image goes through on its way into it.

    `weight` and `bias` are float32 [channels]: value * weight + bias is (value * scale - mean) / std.
    """

    spec: TensorSpec
    settings: ImageSettings
    layout: str
    height: int
    width: int
    weight: Array
    bias: Array

    @classmethod
    def of(cls, inputs: Sequence[TensorSpec], settings: ImageSettings) -> ImageInput:
        """Fit the settings to a model that takes an image and nothing else.

        Raises:
            InvalidArchive: they do not fit, or the model takes something else.
        """
        listed = "; ".join(map(str, inputs))
        if len(inputs) != 1:
            raise InvalidArchive(
                f"the handler serves models with one input, an image; this one has: {listed}"
            )
        spec = inputs[0]
        layout = settings.layout or _layout(spec.shape, settings)
        rows, channels, height, width = _axes(spec, layout)
        if rows not in (-1, 1):
            raise InvalidArchive(f"the model takes {rows} images at a time, no more and no less: {listed}")
        if spec.datatype == BYTES or channels not in (-1, len(_CHANNELS[settings.color])):
            raise InvalidArchive(
                f"the model's input is not one for {settings.color} images in {layout}: {listed}; "
                "color and layout are keys of the handler config"
            )
        height, width = _size(spec, (height, width), settings)
        std = np.asarray(settings.per_channel("std"), np.float64)
        fitted = cls(
            spec=spec,
            settings=settings,
            layout=layout,
            height=height,
            width=width,
            weight=(settings.scale / std).astype(np.float32),
            bias=(-np.asarray(settings.per_channel("mean")) / std).astype(np.float32),
        )
        fitted._check_levels()
        return fitted

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return what the model sees of an image of this width and height: left, top, right, bottom."""
        width, height = size
        kept = self.settings.crop
        if kept is None:
            return 0, 0, width, height
        if width * self.height <= height * self.width:
            cut_width = max(1, round(width * kept))
            cut_height = max(1, round(cut_width * self.height / self.width))
        else:
            cut_height = max(1, round(height * kept))
            cut_width = max(1, round(cut_height * self.width / self.height))
        left, top = (width - cut_width) // 2, (height - cut_height) // 2
        return left, top, left + cut_width, top + cut_height

    def array(self, batch: Sequence[AnyImage]) -> Array:
        """Return images as the model's input, one row each."""
        settings, dtype = self.settings, DTYPES[self.spec.datatype]
        unchanged = bool((self.weight == 1).all() and not self.bias.any())
        plain = unchanged and dtype != np.int8  # which cannot hold all values
        channels = len(self.weight)
        first = self.layout == "NCHW"
        shape = (channels, self.height, self.width) if first else (self.height, self.width, channels)
        array = np.empty((len(batch), *shape), dtype if plain else np.float32)
        by_channel = array if first else np.moveaxis(array, 3, 1)  # a view
        for image, row in zip(batch, by_channel, strict=True):
            box = self.box(images.size_of(image))
            pixels = images.resize(image, self.width, self.height, settings.interpolation, box=box)
            self._fill(row, pixels, plain=plain)
        return array if array.dtype == dtype else _cast(array, dtype)

    def ramp(self) -> Image.Image:
        """Return an image to try the model with: one colour all over is a special case to some models."""
        return Image.linear_gradient("L").resize((self.width, self.height)).convert("RGB")

    def _check_levels(self) -> None:
        """Refuse numbers for a model of floats where this one takes integers.

        Raises:
            InvalidArchive: what is left of the 256 values of a channel is hardly an image.
        """
        dtype = DTYPES[self.spec.datatype]
        if dtype.kind not in "iu":
            return
        values = np.arange(256, dtype=np.float32)[:, None] * self.weight + self.bias
        left = min(len(np.unique(channel)) for channel in _cast(values, dtype).T)
        if left < _LEAST_LEVELS:
            advice = 'say "mean": 128 alone' if dtype == np.int8 else "leave them out"
            raise InvalidArchive(
                f"the model takes {self.spec.datatype}: scale, mean and std leave only {left} "
                f"of 256 values: {advice}"
            )

    def _fill(self, row: Array, pixels: Array, *, plain: bool) -> None:
        """Write uint8 [height, width, 3] to [channels, height, width], each channel in one pass."""
        color = self.settings.color
        if color == "GRAY":
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        for to, of in enumerate(_CHANNELS[color]):
            if plain:
                row[to] = pixels[:, :, of]
            else:
                np.multiply(pixels[:, :, of], self.weight[to], out=row[to])
                row[to] += self.bias[to]


class ImageHandler(ModelHandler):
    """Serves a model whose one input is an image. Derived classes say what its outputs mean.

    An item is an image: Pillow's in mode RGB, or uint8 [height, width, 3] in RGB.
    """

    settings_type = ImageSettings

    def __init__(self) -> None:
        super().__init__()
        self.image_input: ImageInput

    def prepare(self) -> None:
        """Fit the settings to the model's input."""
        self.image_input = ImageInput.of(self.predictor.signature.inputs, self.settings)

    def warm_up(self) -> None:
        """Answer an image of the model's own size."""
        for answer in self.predict([self.image_input.ramp()]):
            if isinstance(answer, ServingError):
                raise answer

    def decode(self, parts: Parts) -> AnyImage:
        """Return the image of a request: its only part, or the one that is named image, body or data."""
        return images.read_image(single_part(parts, "image"), max_pixels=self.settings.max_pixels)

    def preprocess(self, items: list[AnyImage]) -> dict[str, Array]:
        """Scale, crop and normalise images."""
        return {self.image_input.spec.name: self.image_input.array(items)}


def _layout(shape: tuple[int, ...] | None, settings: ImageSettings) -> str:
    """Return the layout of an input by where its channels are; NCHW where that cannot be seen."""
    channels = len(_CHANNELS[settings.color])
    last = shape is not None and len(shape) == 4 and shape[3] == channels != shape[1]
    return "NHWC" if last else "NCHW"


def _axes(spec: TensorSpec, layout: str) -> tuple[int, int, int, int]:
    """Return an input's rows, channels, height and width, -1 where any length will do."""
    shape = (-1,) * 4 if spec.shape is None else spec.shape
    if len(shape) != 4:
        raise InvalidArchive(f"the model's input is not for images, which take four axes: {spec}")
    rows, *rest = shape
    channels, height, width = rest if layout == "NCHW" else (rest[2], rest[0], rest[1])
    return rows, channels, height, width


def _size(spec: TensorSpec, own: tuple[int, int], settings: ImageSettings) -> tuple[int, int]:
    """Return the height and width of an input: the model's own where it says them, else the settings'."""
    stated = tuple(settings.height_and_width) or own
    if -1 in stated:
        raise InvalidArchive(
            f"the model takes images of any size: say one with size in the handler config ({spec})"
        )
    if any(length not in (-1, want) for length, want in zip(own, stated, strict=True)):
        raise InvalidArchive(f"the handler config says size {settings.size}; the model's input is {spec}")
    return stated[0], stated[1]


def _cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return float32 as a model's type; whole numbers are rounded and kept in its range."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        array = np.rint(array).clip(limits.min, limits.max)
    return array.astype(dtype)
