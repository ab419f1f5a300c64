"""The tiny model as an ONNX file."""

from pathlib import Path

import tiny_onnx
from tiny import TinyModel


def make(folder: Path) -> TinyModel:
    return TinyModel("onnxruntime", (tiny_onnx.tiny(folder),))
