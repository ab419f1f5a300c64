"""The tiny model as an ONNX file, and a writer of other small ONNX files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from tiny import BIAS, WEIGHT

Ports = Mapping[str, tuple[int, Sequence[str | int] | None]]  # name -> element type, shape

X: Ports = {"x": (TensorProto.FLOAT, ["N", 3])}
Y: Ports = {"y": (TensorProto.FLOAT, ["N", 2])}
GEMM = helper.make_node("Gemm", ["x", "W", "b"], ["y"])
WEIGHTS = {"W": WEIGHT, "b": BIAS}


def tiny(folder: Path) -> Path:
    return save(build([GEMM], X, Y, WEIGHTS), folder / "tiny.onnx")


def reaching_outside(folder: Path) -> Path:
    """Write a model whose weights are said to lie outside its folder."""
    model = build([GEMM], X, Y, WEIGHTS)
    set_external_data(model.graph.initializer[0], "../secret.bin", offset=0, length=WEIGHT.nbytes)
    model.graph.initializer[0].ClearField("raw_data")
    folder.mkdir()
    (folder.parent / "secret.bin").write_bytes(WEIGHT.tobytes())
    return save(model, folder / "m.onnx")


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Ports,
    outputs: Ports,
    weights: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Return a model, in versions of the format that every runtime of these years reads."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *port) for name, port in inputs.items()],
        [helper.make_tensor_value_info(name, *port) for name, port in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("ai.onnx.ml", 2)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
