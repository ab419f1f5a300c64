"""The tiny model as an ONNX file, the one of OpenCV's formats that says all of its inputs."""

from pathlib import Path

import tiny_onnx
from tiny import TinyModel


def make(folder: Path) -> TinyModel:
    return TinyModel("opencv", (tiny_onnx.tiny(folder),))
