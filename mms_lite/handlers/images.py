"""Requests to images: what counts as an image, how large one may be, and what a client is told otherwise.

Pillow reads the header, decodes and scales: an image is in memory once, and refused before it is unfolded.
"""

from __future__ import annotations

import base64
import codecs
import io
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mms_lite.errors import BadTensor, InvalidRequest
from mms_lite.tensors import Array, describe

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_JPEG_SCAN = b"\xff\xda"
_MOST_SCANS = 100  # progressive JPEG is written with about ten
MAX_PIXELS = 50_000_000
MAX_ASPECT_RATIO = 50  # a strip: what scales its short side up would make gigabytes of it

# Pillow's method, or the name of OpenCV's.
INTERPOLATIONS: dict[str, Image.Resampling | str] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "opencv-linear": "INTER_LINEAR",
    "opencv-cubic": "INTER_CUBIC",
    "opencv-area": "INTER_AREA",
    "opencv-nearest": "INTER_NEAREST",
}

AnyImage = Image.Image | Array  # Pillow's in mode RGB, or uint8 [height, width, 3] in RGB

_ORIENTATION = 0x0112  # EXIF: how the camera was held
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_READABLE = "send a JPEG, PNG, WebP, BMP, TIFF or GIF file, or a UINT8 tensor [height,width,3] in RGB"
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, white space
_DAMAGED = "damaged or cut short"
_KEEP_NEWLINES = "if it was sent with curl -d, use -T or --data-binary"  # -d strips line ends
_KINDS = (  # of what Pillow cannot open
    (0, b"\xff\xd8", f"a JPEG file that is {_DAMAGED}"),
    (0, b"\x89PNG", f"a PNG file that is {_DAMAGED}"),
    (8, b"WEBP", f"a WebP file that is {_DAMAGED}"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x93NUMPY", "an array (.npy)"),
    (4, b"ftyp", "a video, HEIC or AVIF file"),
)


def decode(part: Any, *, max_pixels: int = MAX_PIXELS, max_aspect_ratio: float = MAX_ASPECT_RATIO) -> Array:
    """Return the image that a part of a request holds as uint8 [height, width, 3] in RGB (see `read_image`).

    Raises:
        InvalidRequest: it holds none, a damaged one, or one that is too large.
    """
    return np.asarray(read_image(part, max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio))


def read_image(
    part: Any, *, max_pixels: int = MAX_PIXELS, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> Image.Image:
    """Return the image that a part of a request holds: mode RGB, upright as its EXIF data says.

    A part is a file's bytes, a typed tensor (UINT8 [height,width,3] in RGB, or BYTES with one file), or the
    JSON object {"b64": "..."}, also as the value of "image", parsed or not. Of an animation it is the first
    frame.

    Raises:
        InvalidRequest: it holds none, a damaged one, or one that is too large.
    """
    if isinstance(part, np.ndarray) and part.dtype != np.object_:
        image = _from_pixels(part)
        _check_size(image.size, max_pixels, max_aspect_ratio)
        return image
    encoded = _encoded(part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata: a client's, which nobody here can mend
        image = _open(encoded)
        _check_size(image.size, max_pixels, max_aspect_ratio)
        _check_scans(image, encoded)
        return _load(image, len(encoded))


def resize(
    image: AnyImage,
    width: int,
    height: int,
    interpolation: str = "bicubic",
    *,
    box: tuple[int, int, int, int] | None = None,
) -> Array:
    """Scale an RGB image, or its part in `box` (left, top, right, bottom), to uint8 [height, width, 3].

    The interpolations are the keys of INTERPOLATIONS. Pillow's average over what a pixel covers when they
    scale down (antialiasing); those of OpenCV do not, but for opencv-area.
    """
    method = INTERPOLATIONS[interpolation]
    if isinstance(method, str):
        return _resize_with_opencv(np.asarray(image), width, height, method, box)
    source = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.asarray(source.resize((width, height), method, box=box))


def size_of(image: AnyImage) -> tuple[int, int]:
    """Return an image's width and height in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _resize_with_opencv(
    pixels: Array, width: int, height: int, method: str, box: tuple[int, int, int, int] | None
) -> Array:
    import cv2  # for models that were trained or measured with it; others need not load it

    left, top, right, bottom = box or (0, 0, pixels.shape[1], pixels.shape[0])
    resized: Array = cv2.resize(
        pixels[top:bottom, left:right], (width, height), interpolation=getattr(cv2, method)
    )
    return resized


def _encoded(part: Any) -> Any:
    """Return the bytes of an image file."""
    if isinstance(part, np.ndarray):
        if part.size != 1:
            raise BadTensor(f"a request holds one image, a BYTES tensor of one element; got {describe(part)}")
        return _encoded(part.item())
    if isinstance(part, str):
        part = part.encode("utf-8", "replace")
    if isinstance(part, (bytes, bytearray, memoryview)):
        begins_json = bytes(part[:64]).lstrip(_BEFORE_JSON).startswith(b"{")
        return _from_base64(_parsed(part)) if begins_json else part
    if isinstance(part, Mapping):
        return _from_base64(part)
    raise InvalidRequest(f"the body is JSON, not an image: {_READABLE}")


def _parsed(part: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Return the JSON object that begins with this part's brace."""
    try:
        found: dict[str, Any] = json.loads(bytes(part))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body looks like JSON and is not: {error}") from error
    return found


def _from_base64(part: Mapping[str, Any]) -> bytes:
    inner = part.get("image", part)
    text = inner.get("b64") if isinstance(inner, Mapping) else None
    if not isinstance(text, str):
        raise InvalidRequest(f'the body is JSON without an image, {{"image": {{"b64": "..."}}}}: {_READABLE}')
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InvalidRequest(f'the value of "b64" is not base64: {error}') from error


def _from_pixels(array: Array) -> Image.Image:
    pixels = array[0] if array.ndim == 4 and len(array) == 1 else array  # a batch of one
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise BadTensor(f"an image as a tensor is UINT8 [height,width,3] in RGB; got {describe(array)}")
    return Image.fromarray(pixels)


def _open(encoded: Any) -> Image.Image:
    """Read an image's header."""
    if not len(encoded):
        raise InvalidRequest(f"the body is empty: {_READABLE}")
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise InvalidRequest("the image is too large to be decoded") from error
    except MemoryError:
        raise
    except Exception as error:  # of a parser that is fed by strangers, anything
        kind = _guess(encoded)
        advice = _KEEP_NEWLINES if kind.endswith(_DAMAGED) else _READABLE
        raise InvalidRequest(f"the body is not an image that can be read: it is {kind}; {advice}") from error


def _check_size(size: tuple[int, int], max_pixels: int, max_aspect_ratio: float) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(
            f"the image is too large: {width} x {height} is over {max_pixels} pixels; scale it down"
        )
    if max(size) > max_aspect_ratio * min(size):
        raise InvalidRequest(
            f"the image is a strip: of {width} x {height}, the longer side is over "
            f"{max_aspect_ratio:g} times the shorter"
        )


def _check_scans(image: Image.Image, encoded: Any) -> None:
    """Refuse a progressive JPEG of thousands of passes over all pixels: it takes minutes to decode.

    Within a pass the mark of another cannot occur: there 0xff is followed by 0.
    """
    if image.format in ("JPEG", "MPO") and bytes(encoded).count(_JPEG_SCAN) > _MOST_SCANS:
        raise InvalidRequest(f"the JPEG image has over {_MOST_SCANS} scans; save it anew")


def _load(image: Image.Image, size_bytes: int) -> Image.Image:
    """Decode what `_open` has found."""
    if image.mode == "F":
        raise InvalidRequest(f"the {image.format} image has floating-point pixels; convert it to 8 bits")
    try:
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # as in _open
        raise InvalidRequest(
            f"the {image.format} image of {image.width} x {image.height} pixels "
            f"is {_DAMAGED}: got {size_bytes} bytes; {_KEEP_NEWLINES}"
        ) from error
    return rgb if upright is None else rgb.transpose(upright)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata; the image itself is fine
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return 8 bits each of red, green and blue; alpha is dropped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip instead of scale
        high = np.asarray(image).astype(np.int32) >> 8
        image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _guess(encoded: Any) -> str:
    """Say in words what bytes are that are no image."""
    start = bytes(encoded[:512])
    for offset, magic, name in _KINDS:
        if start.startswith(magic, offset):
            return name
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)  # the cut may be inside a character
    except UnicodeDecodeError:
        text = "\0"
    if re.search("[\x00-\x08\x0e-\x1f]", text):
        return f"{len(encoded)} bytes of an unknown kind, which begin with {start[:4].hex(' ')}"
    return {"<": "HTML or XML", "{": "JSON", "[": "JSON"}.get(text.lstrip()[:1], "text")
