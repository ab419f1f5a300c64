"""What MXNet's files do not say of inputs and outputs: which arguments are inputs, their shapes, datatypes.

Works on a symbol that is loaded, and on its parameters by name. MXNetError is a RuntimeError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mms_lite.errors import InvalidArchive
from mms_lite.tensors import DTYPES, datatype
from mms_lite.types import TensorSpec

Shape = tuple[int, ...]

SIGNATURE = "signature.json"
# Losses, whose second input is what training compares with; their forward pass does not look at it.
_LOSSES = {
    "SoftmaxOutput",
    "SVMOutput",
    "LinearRegressionOutput",
    "LogisticRegressionOutput",
    "MAERegressionOutput",
}
_KEEP_SHAPE = ("BatchNorm", "Cast", "_copy", "_plus_scalar", "_minus_scalar", "_mul_scalar", "_div_scalar")
_PARAMETERS = ("_weight", "_bias", "_gamma", "_beta")  # never inputs: mxnet/module/base_module.py
_FREE = (224, 320)  # two lengths for a free axis: what differs between their outputs is free too


def input_specs(
    symbol: Any, arguments: Mapping[str, Any], auxiliary: Mapping[str, Any], signature: Path
) -> list[TensorSpec]:
    """Return the inputs, with what `signature`, the parameters and the symbol tell of them, in that order.

    Raises:
        InvalidArchive: parameters are missing, or the signature is none or of another model.
    """
    names = _input_names(symbol, {**arguments, **auxiliary})
    shapes = {**_known_shapes(symbol, arguments), **_signed_shapes(signature, names)}
    types = _input_types(symbol, names, arguments)
    return [TensorSpec(name, _datatype(types.get(name)), shapes.get(name)) for name in names]


def output_specs(symbol: Any, inputs: Sequence[TensorSpec], arguments: Mapping[str, Any]) -> list[TensorSpec]:
    """Return the outputs for these inputs; a shape is None where it depends on what the inputs leave open."""
    names = symbol.list_outputs()
    types = {spec.name: DTYPES[spec.datatype] for spec in inputs} | types_of(arguments)
    shapes = _output_shapes(symbol, inputs, arguments)
    found = zip(names, symbol.infer_type_partial(**types)[1], shapes, strict=True)
    return [TensorSpec(name, _datatype(dtype), shape) for name, dtype, shape in found]


def _input_names(symbol: Any, parameters: Mapping[str, Any]) -> list[str]:
    """Return the arguments that have no parameter and are no labels of a loss."""
    nodes = json.loads(symbol.tojson())["nodes"]
    labels = {nodes[node["inputs"][1][0]]["name"] for node in nodes if node["op"] in _LOSSES}
    names = [name for name in symbol.list_inputs() if name not in parameters]
    lost = [name for name in symbol.list_auxiliary_states() if name in names]
    lost += [name for name in names if name.endswith(_PARAMETERS)]
    if lost:
        raise InvalidArchive(f"the file of parameters lacks: {', '.join(dict.fromkeys(lost))}")
    return [name for name in names if name not in labels]


def _signed_shapes(file: Path, names: Sequence[str]) -> dict[str, Shape]:
    """Return the inputs' shapes as the signature.json of an MMS package states them.

    Its first axis is the batch, and other axes declared 0 are free
    (awslabs/multi-model-server, examples/model_service_template/mxnet_model_service.py).
    """
    if not file.is_file():
        return {}
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))["inputs"]
        shapes = {
            str(each["data_name"]): (-1, *(int(n) or -1 for n in each["data_shape"][1:])) for each in stated
        }
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidArchive(
            f'{SIGNATURE} is not {{"inputs": [{{"data_name": "data", "data_shape": [0, 3, 224, 224]}}]}}'
        ) from error
    for name in shapes:
        if name not in names:
            raise InvalidArchive(f"{SIGNATURE} names the input {name!r}; the model has: {', '.join(names)}")
    return shapes


def _known_shapes(symbol: Any, arguments: Mapping[str, Any]) -> dict[str, Shape]:
    """Return what the symbol and its parameters tell of shapes: those in its variables, those of filters."""
    known, _, _ = symbol.infer_shape_partial(**shapes_of(arguments))
    shapes = {
        name: tuple(length or -1 for length in shape)
        for name, shape in zip(symbol.list_arguments(), known, strict=True)
        if shape
    }
    nodes = json.loads(symbol.tojson())["nodes"]
    for index, node in enumerate(nodes):
        convolved = None if node["inputs"] else _convolved(nodes, index, arguments)
        if convolved:
            shapes.setdefault(node["name"], convolved)
    return shapes


def _input_types(symbol: Any, names: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs' types as the parameters' make them; where operators hold that back, what fits."""
    for guess in (None, np.float32, np.float16, np.float64):
        guesses = {} if guess is None else dict.fromkeys(names, guess)
        try:
            found, _, _ = symbol.infer_type_partial(**guesses, **types_of(arguments))
        except RuntimeError:  # Dropout wants to know its input's type beforehand
            continue
        return dict(zip(symbol.list_arguments(), found, strict=True))
    return {}


def _convolved(nodes: list[Any], index: int, arguments: Mapping[str, Any]) -> Shape | None:
    """Return the shape of a node that a convolution reads: its filters have the rank and the channels."""
    for at, node in enumerate(nodes):  # readers come after what they read
        if not node["inputs"] or node["inputs"][0][0] != index:
            continue
        if node["op"] in _KEEP_SHAPE:
            index = at
        elif node["op"] == "Convolution":
            filters = arguments.get(nodes[node["inputs"][1][0]]["name"])
            options = node.get("attrs", {})
            if filters is None:
                return None
            last = options.get("layout", "").endswith("C")
            channels = filters.shape[-1 if last else 1] * int(options.get("num_group", 1))
            free = (-1,) * (len(filters.shape) - 2)
            return (-1, *free, channels) if last else (-1, channels, *free)
    return None


def _output_shapes(
    symbol: Any, inputs: Sequence[TensorSpec], arguments: Mapping[str, Any]
) -> list[Shape | None]:
    shapes = {spec.name: spec.shape for spec in inputs if spec.shape is not None}
    unknown: list[Shape | None] = [None] * len(symbol.list_outputs())
    if len(shapes) < len(inputs):
        return unknown
    found = []
    for free in _FREE:
        filled = {name: tuple(free if n == -1 else n for n in shape) for name, shape in shapes.items()}
        try:
            found.append(symbol.infer_shape_partial(**filled, **shapes_of(arguments))[1])
        except RuntimeError:
            if any(-1 in shape[1:] for shape in shapes.values()):
                return unknown  # the model takes certain sizes only
            raise
    return [_common(one, other) for one, other in zip(*found, strict=True)]


def _common(one: Shape, other: Shape) -> Shape | None:
    if not one or len(one) != len(other):
        return None  # MXNet's word for a shape that it does not know
    return tuple(a if a == b and a else -1 for a, b in zip(one, other, strict=True))


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, Shape]:
    """Return what `infer_shape` is to be told of arrays."""
    return {name: array.shape for name, array in arrays.items()}


def types_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `infer_type` is to be told of arrays."""
    return {name: array.dtype for name, array in arrays.items()}


def _datatype(dtype: Any) -> str:
    return "FP32" if dtype is None else datatype(np.empty(0, dtype))
