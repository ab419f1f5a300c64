"""Images out of requests: every kind of file and tensor, and what is said of what is none."""

import base64
import io
import json
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from image_nets import PHOTOS, encoded
from PIL import Image, ImageFile

from mms_lite.errors import BadTensor, InvalidRequest
from mms_lite.handlers import images

# Left to right: red, green, blue, grey. High enough that JPEG keeps the middles as they are.
BARS = np.repeat(np.array([[[250, 10, 10], [10, 250, 10], [10, 10, 250], [90, 90, 90]]], np.uint8), 16, 1)
BARS = np.repeat(BARS, 32, 0)
RGB = Image.fromarray(BARS)


def middles(array: np.ndarray) -> np.ndarray:
    """Return what is in the middle of each bar."""
    return array[array.shape[0] // 2, 8::16].astype(int)


@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_format_is_decoded_to_rgb(kind: str) -> None:
    found = images.decode(encoded(RGB, kind))
    assert found.dtype == np.uint8
    assert found.shape == BARS.shape
    assert np.abs(middles(found) - middles(BARS)).max() <= 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright_as_its_exif_data_says(kind: str, orientation: int) -> None:
    # TIFF 6.0, tag 274: where the first row and the first column of the file belong.
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[274] = orientation
    found = images.decode(encoded(RGB, kind, exif=exif)).astype(int)
    upright = turns[orientation](BARS)
    assert found.shape == upright.shape
    assert np.median(np.abs(found - upright)) <= 8  # bars at a wrong place are hundreds away


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK"])
def test_other_kinds_of_pixels_become_rgb(mode: str) -> None:
    image = RGB.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(40)  # nearly transparent: the colours stay
    found = images.decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    wanted = np.asarray(RGB.convert("L" if mode == "LA" else mode).convert("RGB"))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_their_upper_half(kind: str, channels: int) -> None:
    grey = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    file = cv2.imencode(kind, np.dstack([grey] * channels))[1].tobytes()
    np.testing.assert_array_equal(images.decode(file), np.dstack([(grey >> 8).astype(np.uint8)] * 3))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty: send a JPEG"),
        (b'\n{"instances": []}', 'JSON without an image, {"image": {"b64": "..."}}'),
        (b'{"b64": "', "the body looks like JSON and is not: Unterminated string"),
        (b'["b64"]', "it is JSON"),
        (b"<!doctype html><html>", "it is HTML or XML"),
        ("grün".encode(), "it is text"),
        ("a cat", "it is text; send a JPEG"),
        ([1, 2], "the body is JSON, not an image"),
        ({"instances": []}, 'JSON without an image, {"image": {"b64": "..."}}'),
        ({"b64": "%%%"}, 'the value of "b64" is not base64'),
        (b"%PDF-1.7 ...", "it is a PDF"),
        (b"\0\0\0\x18ftypheic", "it is a video, HEIC or AVIF file"),
        (b"\x01\x02\x03\x04\xff", "it is 5 bytes of an unknown kind, which begin with 01 02 03 04"),
        (
            encoded(RGB, "JPEG")[:60],
            "it is a JPEG file that is damaged or cut short; if it was sent with curl -d",
        ),
        (
            encoded(RGB).replace(b"\n", b""),
            "damaged or cut short; if it was sent with curl -d, use -T or --data",
        ),
        (np.zeros((2, 2, 3), np.float32), "is UINT8 [height,width,3] in RGB; got FP32 [2,2,3]"),
        (np.zeros((3, 8, 8), np.uint8), "is UINT8 [height,width,3] in RGB; got UINT8 [3,8,8]"),
        (np.array([b"a", b"b"], np.object_), "a BYTES tensor of one element; got BYTES [2]"),
    ],
)
def test_what_is_no_image_is_refused_by_its_name(body: Any, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        images.decode(body)
    assert said in caught.value.message
    assert isinstance(caught.value, BadTensor) == isinstance(body, np.ndarray)


@pytest.mark.parametrize("kind", images.FORMATS)
def test_a_file_that_was_cut_short_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # gluoncv, which a test of the examples imports into this process, sets it for everybody.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    file = encoded(RGB.resize((300, 200), Image.Resampling.BICUBIC), kind)
    with pytest.raises(
        InvalidRequest,
        match=r"damaged or cut short: got .* if it was sent with curl -d|damaged or cut short; if",
    ):
        images.decode(file[: len(file) * 2 // 3])


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 9000, 8000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))  # no pixels to decode
    with pytest.raises(InvalidRequest, match="too large: 9000 x 8000 is over 50000000 pixels"):
        images.decode(b"\x89PNG\r\n\x1a\n" + chunk + data)
    with pytest.raises(InvalidRequest, match="too large: 64 x 32 is over 2047 pixels"):
        images.decode(BARS, max_pixels=2047)
    assert images.decode(BARS, max_pixels=2048).shape == BARS.shape


def test_a_strip_is_refused() -> None:
    with pytest.raises(
        InvalidRequest, match="strip: of 510 x 10, the longer side is over 50 times the shorter"
    ):
        images.decode(encoded(Image.new("RGB", (510, 10))))
    assert images.decode(encoded(Image.new("RGB", (500, 10)))).shape == (10, 500, 3)


def test_tensors_and_base64_hold_images_too() -> None:
    file = encoded(RGB)
    text = base64.b64encode(file).decode()
    for part in (
        bytes(file),
        BARS,
        BARS[None],
        np.array([bytes(file)], np.object_),
        {"b64": text},
        json.dumps({"b64": text}),
        json.dumps({"b64": text}).encode(),
        bytearray(b'\xef\xbb\xbf {"image": ' + json.dumps({"b64": text}).encode() + b"}"),
        json.loads(json.dumps({"image": {"b64": text}})),
    ):
        np.testing.assert_array_equal(images.decode(part), BARS)


def test_scaling_is_pillows_or_opencvs_by_name() -> None:
    photo = images.read_image((PHOTOS / "chelsea.png").read_bytes())
    pixels = np.asarray(photo)
    box = (20, 10, 320, 210)
    smooth = photo.resize((90, 60), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(images.resize(photo, 90, 60, "bilinear", box=box), np.asarray(smooth))
    np.testing.assert_array_equal(images.resize(pixels, 90, 60, "bilinear", box=box), np.asarray(smooth))
    # What cv2.dnn.blobFromImage does, with which detectors are measured.
    blob = cv2.dnn.blobFromImage(pixels, size=(90, 60))[0].transpose(1, 2, 0)
    for image in (photo, pixels):
        np.testing.assert_array_equal(images.resize(image, 90, 60, "opencv-linear"), blob)


@pytest.mark.parametrize("name", images.INTERPOLATIONS)
def test_every_interpolation_scales_to_width_and_height(name: str) -> None:
    assert images.resize(BARS, 7, 5, name).shape == (5, 7, 3)


def test_damaged_exif_data_do_not_spoil_a_photo() -> None:
    exif = Image.Exif()
    exif[274] = 6
    file = encoded(RGB, "JPEG", exif=exif)
    at = file.index(b"Exif\0\0") + 6
    file[at : at + 8] = b"nonsense"
    assert images.decode(file).shape == BARS.shape


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(file, "JPEG", progressive=True)
    encoded = file.getvalue()
    last = encoded.rindex(b"\xff\xda")
    scan, end = encoded[last:-2], encoded[-2:]
    assert images.decode(encoded).shape == (64, 64, 3)
    with pytest.raises(InvalidRequest, match="over 100 scans"):
        images.decode(encoded[:last] + scan * 101 + end)
