"""Write a network as an ONNX file, layer by layer; apart from the rest because it imports onnx."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .networks import NO_PADS, Network, Pads

# Old enough for OpenVINO, ONNX Runtime and OpenCV 4 alike.
OPSET = 13
IR_VERSION = 8


class Graph:
    """The layers of networks.py as ONNX nodes; a value is the name of a node's output."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._arrays = arrays

    def node(self, operation: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node and return the name of its one output."""
        name = f"{operation.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, list(inputs), [name], name, **attributes))
        return name

    def weights(self, layer: str) -> list[str]:
        """Append a layer's arrays and return their names."""
        names = (f"{layer}/kernel", f"{layer}/bias")
        return [self.constant(name, self._arrays[name]) for name in names]

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def conv(self, value: str, name: str, *, stride: int = 1, pads: Pads = NO_PADS, groups: int = 1) -> str:
        inputs = [value, *self.weights(name)]
        size = self._arrays[f"{name}/kernel"].shape[2:]
        strides = (stride, stride)
        return self.node("Conv", inputs, kernel_shape=size, strides=strides, pads=pads, group=groups)

    def relu(self, value: str) -> str:
        return self.node("Relu", [value])

    def relu6(self, value: str) -> str:
        number = len(self.nodes)
        low = self.constant(f"low_{number}", np.array(0, np.float32))
        return self.node("Clip", [value, low, self.constant(f"high_{number}", np.array(6, np.float32))])

    def max_pool(self, value: str, pads: Pads = NO_PADS) -> str:
        return self.node("MaxPool", [value], kernel_shape=(3, 3), strides=(2, 2), pads=pads)

    def add(self, left: str, right: str) -> str:
        return self.node("Add", [left, right])

    def concat(self, left: str, right: str) -> str:
        return self.node("Concat", [left, right], axis=1)

    def mean(self, value: str, window: int = 0) -> str:
        if window:
            size = (window, window)
            pooled = self.node("AveragePool", [value], kernel_shape=size, strides=size)
        else:
            pooled = self.node("GlobalAveragePool", [value])
        return self.node("Flatten", [pooled], axis=1)

    def dense(self, value: str, name: str) -> str:
        return self.node("Gemm", [value, *self.weights(name)], transB=1)

    def softmax(self, value: str) -> str:
        return self.node("Softmax", [value], axis=1)


def write(network: Network, name: str, arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write a network: input `data` [N, 3, size, size], output `prob` [N, 1000], both float32, any N."""
    graph = Graph(arrays)
    network.layers(graph, "data")
    graph.nodes[-1].output[0] = "prob"
    data = helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, network.size, network.size])
    prob = helper.make_tensor_value_info("prob", TensorProto.FLOAT, ["N", 1000])
    model = helper.make_model(
        helper.make_graph(graph.nodes, name, [data], [prob], graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mms-lite",
    )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def classify(path: Path, data: np.ndarray) -> np.ndarray:
    """Run a file on `data` with onnx's own interpreter, which is slow but needs no runtime; return `prob`."""
    from onnx.reference import ReferenceEvaluator

    (prob,) = ReferenceEvaluator(str(path)).run(["prob"], {"data": data})
    return np.asarray(prob)
