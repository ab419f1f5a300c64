"""The tiny model as OpenVINO IR, and a writer of others."""

from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from tiny import BIAS, WEIGHT, TinyModel


def make(folder: Path) -> TinyModel:
    x = ops.parameter([-1, 3], np.float32, name="x")
    y = ops.add(ops.matmul(x, ops.constant(WEIGHT), False, False), ops.constant(BIAS))
    named(x, "x")
    named(y, "y")
    path = save(ov.Model([y], [x], "tiny"), folder / "tiny.xml")
    return TinyModel("openvino", (path, path.with_suffix(".bin")))


def named(node: ov.Node, *names: str) -> ov.Node:
    """Give the node's first output these names."""
    node.output(0).get_tensor().set_names(set(names))
    return node


def save(model: ov.Model, path: Path) -> Path:
    ov.save_model(model, path, compress_to_fp16=False)
    return path
