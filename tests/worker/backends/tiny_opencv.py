"""The tiny model as an ONNX file, the one of OpenCV's formats that says all of its inputs."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny import BIAS, WEIGHT, TinyModel

_OPSET = 13


def make(folder: Path) -> TinyModel:
    nodes = [helper.make_node("Gemm", ["x", "W", "b"], ["y"])]
    path = write(folder / "tiny.onnx", nodes, {"x": ["N", 3]}, {"y": ["N", 2]}, {"W": WEIGHT, "b": BIAS})
    return TinyModel("opencv", (path,))


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[str | int]],
    outputs: dict[str, list[str | int]],
    weights: dict[str, np.ndarray],
) -> Path:
    """Write an ONNX graph whose inputs and outputs are FP32."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path
