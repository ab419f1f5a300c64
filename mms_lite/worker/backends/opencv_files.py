"""What model files say of their inputs and of themselves, read from the files: OpenCV's nets do not tell.

Apart from the backend because it is about file formats: of protobuf only the walk over fields is needed.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from mms_lite.types import TensorSpec

_Message = memoryview
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_QUOTED = r"""["']([^"']+)["']"""
_INPUT_LAYER = re.compile(r"""\btype:\s*["']Input["']""")
_CHANNELS_FIRST = b"\x12\x04NCHW"  # the attribute data_format of a node of a TensorFlow graph


def read_inputs(path: Path) -> list[TensorSpec]:
    """Return a model's inputs as OpenCV takes them: FP32, images as [N,C,H,W]; a shape is None if unsaid.

    Raises:
        ValueError: the file is damaged.
    """
    text_reader = {".pbtxt": _of_text_graph, ".prototxt": _of_caffe}.get(path.suffix)
    if text_reader:
        return list(text_reader(re.sub("#.*", "", path.read_text(encoding="utf-8"))))
    content = _content(path)
    return list(_of_onnx(_Message(content)) if path.suffix == ".onnx" else _of_graph(content))


def read_metadata(path: Path) -> dict[str, str]:
    """Return what an ONNX file says of itself (`metadata_props`).

    Raises:
        ValueError: the file is damaged.
    """
    entries = _every(_Message(_content(path)), 14)
    return {_text(entry, 1): _text(entry, 2) for entry in entries}


def _of_onnx(model: _Message) -> Iterator[TensorSpec]:
    """Source: onnx/onnx.proto, from ModelProto to TensorShapeProto."""
    graph = _first(model, 7)
    weights = {_text(tensor, 8) for tensor in _every(graph, 5)}  # which files of IR version 3 list as inputs
    for value in _every(graph, 11):
        tensor = _first(_first(value, 2), 1)
        shape = [_length(dim) for dim in _every(_first(tensor, 2), 1)] if _has(tensor, 2) else None
        if _text(value, 1) not in weights:
            yield _spec(_text(value, 1), shape)


def _of_graph(content: mmap.mmap) -> Iterator[TensorSpec]:
    """Source: tensorflow/core/framework, graph.proto to tensor_shape.proto."""
    images_last = content.find(_CHANNELS_FIRST) < 0
    for node in _every(_Message(content), 1):
        if _text(node, 2) == "Placeholder":
            attributes = {_text(entry, 1): _first(entry, 2) for entry in _every(node, 5)}
            lengths = [_length(dim) for dim in _every(_first(attributes.get("shape", _NOTHING), 7), 2)]
            yield _spec(_text(node, 1), _as_blob(lengths, images_last))


def _of_text_graph(text: str) -> Iterator[TensorSpec]:
    for node in re.split(r"(?m)^node\s*\{", text)[1:]:
        name = re.search(rf"\bname:\s*{_QUOTED}", node)
        if name and re.search(r"""\bop:\s*["']Placeholder["']""", node):
            lengths = [int(size) for size in re.findall(r"\bsize:\s*(-?\d+)", node)]
            yield _spec(name[1], _as_blob(lengths, "NCHW" not in text))


def _of_caffe(text: str) -> Iterator[TensorSpec]:
    """Source: caffe.proto; the first axis is a default batch, to which OpenCV does not hold a net."""
    head, *layers = re.split(r"\blayers?\s*\{", text)
    found = [(head, rf"\binput:\s*{_QUOTED}")]
    found += [(layer, rf"\btop:\s*{_QUOTED}") for layer in layers if _INPUT_LAYER.search(layer)]
    for block, name in found:
        shapes = re.findall(r"shape\s*:?\s*\{([^}]*)\}", block)
        shapes = shapes or re.findall(r"(?:\binput_dim:\s*\d+\s*){4}", block)
        for at, each in enumerate(re.findall(name, block)):
            lengths = [int(length) for length in re.findall(r"dim:\s*(\d+)", shapes[at])] if shapes else None
            yield _spec(each, [-1, *lengths[1:]] if lengths else None)


def _as_blob(lengths: list[int], images_last: bool) -> list[int] | None:
    """Return the shape of OpenCV's blob for a TensorFlow placeholder; without lengths its rank is unknown."""
    if len(lengths) == 4 and images_last:
        rows, height, width, channels = lengths
        return [rows, channels, height, width]
    return lengths or None


def _spec(name: str, shape: list[int] | None) -> TensorSpec:
    return TensorSpec(name, "FP32", None if shape is None else tuple(shape))


def _content(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


_NOTHING = _Message(b"")


def _length(dim: _Message) -> int:
    """Return an axis's length, -1 if it is free: a name, nothing at all, or a negative number."""
    lengths = [value for number, value in _fields(dim) if number == 1 and isinstance(value, int)]
    return lengths[0] if lengths and 0 < lengths[0] < 1 << 63 else -1


def _text(message: _Message, number: int) -> str:
    return str(_first(message, number), "utf-8")


def _first(message: _Message, number: int) -> _Message:
    return next(_every(message, number), _NOTHING)


def _has(message: _Message, number: int) -> bool:
    return any(found == number for found, _ in _fields(message))


def _every(message: _Message, number: int) -> Iterator[_Message]:
    return (value for found, value in _fields(message) if found == number and not isinstance(value, int))


def _fields(message: _Message) -> Iterator[tuple[int, int | _Message]]:
    """Yield each field of a protobuf message: its number, and its value or content."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"there is no wire type {kind}")
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if size is None:
            size, at = _varint(message, at)
        if at + size > len(message):
            raise ValueError("a field reaches past the end")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: _Message, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte, the lowest first; return it and where it ends."""
    number = shift = 0
    while at < len(message):
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
    raise ValueError("it ends within a number")
