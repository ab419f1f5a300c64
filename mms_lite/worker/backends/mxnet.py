"""MXNet: the NAME-symbol.json and NAME-NNNN.params that `net.export()` and `Module.save_checkpoint()` write.

It hides what they do not say: which arguments of the symbol are inputs, and their shapes and datatypes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mms_lite.errors import BadTensor, InvalidArchive, OutOfMemory, ServingError
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import BackendSettings, declared, on_cpu
from mms_lite.worker.tensors import DTYPES, Array, datatype, describe

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # MXNet 1.9 uses names that numpy 1.20 deprecated
    import mxnet as mx

_log = logging.getLogger("mms_lite.backend")

Shape = tuple[int, ...]

_DATATYPES = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "FP16", "FP32", "FP64")
_SIGNATURE = "signature.json"
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
_MOST_PRIMITIVES = "1024"
_CPP = re.compile(r"^MXNetError: |\[\d\d:\d\d:\d\d\] \S+:\d+: |Check failed: .+?: ")


class MxnetBackend:
    """A symbol with its parameters, run by what Gluon runs hybridized blocks with.

    It takes any batch size; nothing is bound to a shape. Options are the flags of `hybridize()`, and
    `subgraph_backend`, the fusion on the CPU ("MKLDNN" as in Module, or "NONE"). MXNet reads its number of
    threads from OMP_NUM_THREADS when it is imported; `settings.threads` cannot change it.
    """

    def __init__(
        self,
        symbol: Any,
        parameters: dict[str, Any],
        flags: Mapping[str, Any],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        device: Any,
    ) -> None:
        self.inputs: Sequence[TensorSpec] = inputs
        self.outputs: Sequence[TensorSpec] = outputs
        self.metadata: Mapping[str, str] = {}
        self._symbol = symbol
        self._parameters = parameters
        self._flags = list(flags.items())
        self._run = mx.nd.CachedOp(symbol, self._flags)
        self._device = device
        self._arguments = symbol.list_inputs()
        known = {spec.name for spec in inputs} | set(parameters)
        self._labels = [name for name in self._arguments if name not in known]
        self._zeros: tuple[object, dict[str, Any]] = (None, {})

    @classmethod
    def open(cls, settings: BackendSettings) -> MxnetBackend:
        """Load the symbol and the parameters.

        Raises:
            InvalidArchive: the files, the stated inputs or the options are not ones for MXNet.
            OutOfMemory: of the host or the device.
        """
        # One for each shape: without a limit oneDNN's cache grows with every new one.
        os.environ.setdefault("MXNET_MKLDNN_CACHE_NUM", _MOST_PRIMITIVES)
        threads = os.environ.get("OMP_NUM_THREADS", str(settings.threads))
        if threads != str(settings.threads):
            _log.warning("MXNet uses OMP_NUM_THREADS=%s, not %d threads", threads, settings.threads)
        if settings.device is not None and settings.device >= mx.context.num_gpus():
            settings = on_cpu(settings, "this build of MXNet does not see it")
        try:
            return cls._load(settings)
        except mx.MXNetError as error:
            if _lacks_memory(error):
                raise OutOfMemory("MXNet ran out of memory while the model was loaded") from error
            raise InvalidArchive(f"MXNet cannot load the model: {_first_line(error)}") from error

    @classmethod
    def _load(cls, settings: BackendSettings) -> MxnetBackend:
        symbol_file, parameters_file = _files(settings.files)
        symbol = _read_symbol(symbol_file)
        arguments, auxiliary = _read_parameters(parameters_file)
        names = _inputs(symbol, {**arguments, **auxiliary})
        shapes = {**_shapes(symbol, arguments), **_signature(symbol_file.parent / _SIGNATURE, names)}
        types = _input_types(symbol, names, arguments)
        found = [TensorSpec(name, _datatype(types.get(name)), shapes.get(name)) for name in names]
        inputs = declared(found, settings.inputs, "input")
        for spec in inputs:
            if spec.datatype not in _DATATYPES:
                raise InvalidArchive(f"MXNet has no {spec.datatype}, the datatype of the input {spec.name!r}")
        outputs = declared(_outputs(symbol, inputs, arguments), settings.outputs, "output")
        device = mx.cpu() if settings.device is None else mx.gpu(settings.device)
        flags = {"static_alloc": True, **settings.options}
        fusion = flags.pop("subgraph_backend", "MKLDNN")
        if settings.device is None and fusion != "NONE" and mx.runtime.Features().is_enabled("MKLDNN"):
            stated = {spec.name: DTYPES[spec.datatype] for spec in inputs}
            # It may change the parameters too. Without fusion ResNet-50 takes a tenth longer.
            symbol = symbol.optimize_for(fusion, arguments, auxiliary, device, type_dict=stated)
        parameters = {name: array.as_in_context(device) for name, array in {**arguments, **auxiliary}.items()}
        return cls(symbol, parameters, flags, inputs, outputs, device)

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the model once; see `Backend`."""
        for name, array in inputs.items():
            if not array.ndim:
                raise BadTensor(f"input {name!r} is a scalar, which MXNet does not take")
        try:
            given = {name: self._on_device(array) for name, array in inputs.items()}
            values = {**self._parameters, **given, **self._unused_labels(given)}
            found = self._run(*[values[name] for name in self._arguments])
            results = found if isinstance(found, list) else [found]
            by_name = {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}
            return {name: by_name[name].asnumpy() for name in outputs}
        except (mx.MXNetError, MemoryError) as error:
            with contextlib.suppress(mx.MXNetError):
                mx.nd.waitall()  # else what failed in the background is raised again by a later request
            self._run = mx.nd.CachedOp(self._symbol, self._flags)  # lets go of what was too much for memory
            fault = self._fault(error, inputs)
            if fault is None:
                raise
            raise fault from error

    def close(self) -> None:
        """Let go of the model."""
        self._parameters.clear()
        del self._run

    def _on_device(self, array: Array) -> Any:
        copy = mx.nd.empty(array.shape, self._device, array.dtype)
        copy[:] = array
        return copy

    def _unused_labels(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return zeros for the labels of losses, which MXNet wants to see although it does not use them."""
        if not self._labels:
            return {}
        key = [array.shape for array in given.values()]
        if key != self._zeros[0]:
            shapes, _, _ = self._symbol.infer_shape_partial(**_shapes_of(given))
            by_name = dict(zip(self._symbol.list_arguments(), shapes, strict=True))
            dtype = next(iter(given.values())).dtype
            self._zeros = key, {n: mx.nd.zeros(by_name[n], self._device, dtype) for n in self._labels}
        return self._zeros[1]

    def _fault(self, error: Exception, inputs: Mapping[str, Array]) -> ServingError | None:
        """Return whose fault an error is, where that is known: the inputs' or the memory's."""
        if isinstance(error, MemoryError) or _lacks_memory(error):
            return OutOfMemory("the model ran out of memory")
        try:
            self._symbol.infer_shape_partial(**_shapes_of({**self._parameters, **inputs}))
            self._symbol.infer_type_partial(**_types_of({**self._parameters, **inputs}))
        except mx.MXNetError as misfit:
            came = ", ".join(f"{name} {describe(array)}" for name, array in inputs.items())
            return BadTensor(f"the model cannot take {came}: {_first_line(misfit)}")
        return None


def _files(files: Sequence[Path]) -> tuple[Path, Path]:
    symbols = [file for file in files if file.suffix == ".json" and file.name != _SIGNATURE]
    parameters = [file for file in files if file.suffix == ".params"]
    if len(symbols) != 1 or len(parameters) != 1:
        names = ", ".join(file.name for file in files)
        raise InvalidArchive(
            f"an MXNet model is one NAME-symbol.json and one NAME-NNNN.params; the archive has: {names}"
        )
    return symbols[0], parameters[0]


def _read_symbol(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)  # MXNet itself takes a file that was cut off after what it wants
        return mx.sym.load_json(text)
    except (ValueError, RecursionError, mx.MXNetError) as error:
        raise InvalidArchive(f"{file.name} is not a symbol of MXNet: {_first_line(error)}") from error


def _read_parameters(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments' and the auxiliary states' values by name."""
    try:
        found = mx.nd.load(str(file))
    except (ValueError, mx.MXNetError) as error:  # ValueError: MXNet quotes bytes that are no text
        raise InvalidArchive(
            f"{file.name} does not hold parameters of MXNet: {_first_line(error)}"
        ) from error
    kinds: dict[str, dict[str, Any]] = {"arg": {}, "aux": {}}
    for key, array in found.items() if isinstance(found, dict) else ():
        kind, _, name = key.partition(":")
        kinds.get(kind, {})[name] = array
    if found and not (kinds["arg"] or kinds["aux"]):
        raise InvalidArchive(
            f"{file.name} does not name its parameters as the symbol does: write both files "
            "with net.export() or Module.save_checkpoint(), not with save_parameters()"
        )
    return kinds["arg"], kinds["aux"]


def _inputs(symbol: Any, parameters: Mapping[str, Any]) -> list[str]:
    """Return the arguments that have no parameter and are no labels of a loss."""
    nodes = json.loads(symbol.tojson())["nodes"]
    labels = {nodes[node["inputs"][1][0]]["name"] for node in nodes if node["op"] in _LOSSES}
    names = [name for name in symbol.list_inputs() if name not in parameters]
    lost = [name for name in symbol.list_auxiliary_states() if name in names]
    lost += [name for name in names if name.endswith(_PARAMETERS)]
    if lost:
        raise InvalidArchive(f"the file of parameters lacks: {', '.join(dict.fromkeys(lost))}")
    return [name for name in names if name not in labels]


def _signature(file: Path, names: Sequence[str]) -> dict[str, Shape]:
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
            f'{_SIGNATURE} is not {{"inputs": [{{"data_name": "data", "data_shape": [0, 3, 224, 224]}}]}}'
        ) from error
    for name in shapes:
        if name not in names:
            raise InvalidArchive(f"{_SIGNATURE} names the input {name!r}; the model has: {', '.join(names)}")
    return shapes


def _shapes(symbol: Any, arguments: Mapping[str, Any]) -> dict[str, Shape]:
    """Return what the symbol and its parameters tell of shapes: those in its variables, those of filters."""
    known, _, _ = symbol.infer_shape_partial(**_shapes_of(arguments))
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
            found, _, _ = symbol.infer_type_partial(**guesses, **_types_of(arguments))
        except mx.MXNetError:  # Dropout wants to know its input's type beforehand
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


def _outputs(symbol: Any, inputs: Sequence[TensorSpec], arguments: Mapping[str, Any]) -> list[TensorSpec]:
    names = symbol.list_outputs()
    types = {spec.name: DTYPES[spec.datatype] for spec in inputs} | _types_of(arguments)
    shapes = _output_shapes(symbol, inputs, arguments)
    found = zip(names, symbol.infer_type_partial(**types)[1], shapes, strict=True)
    return [TensorSpec(name, _datatype(dtype), shape) for name, dtype, shape in found]


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
            found.append(symbol.infer_shape_partial(**filled, **_shapes_of(arguments))[1])
        except mx.MXNetError:
            if any(-1 in shape[1:] for shape in shapes.values()):
                return unknown  # the model takes certain sizes only
            raise
    return [_common(one, other) for one, other in zip(*found, strict=True)]


def _common(one: Shape, other: Shape) -> Shape | None:
    if not one or len(one) != len(other):
        return None  # MXNet's word for a shape that it does not know
    return tuple(a if a == b and a else -1 for a, b in zip(one, other, strict=True))


def _shapes_of(arrays: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: array.shape for name, array in arrays.items()}


def _types_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array.dtype for name, array in arrays.items()}


def _datatype(dtype: Any) -> str:
    return "FP32" if dtype is None else datatype(np.empty(0, dtype))


def _lacks_memory(error: Exception) -> bool:
    text = str(error).lower()
    return "failed to allocate" in text or "out of memory" in text


def _first_line(error: Exception) -> str:
    """Return what an error says in its first line that is not about MXNet's own source."""
    lines = [_CPP.sub("", line) for line in str(error).splitlines()]
    told = [line for line in lines if line.strip() and not line.startswith(("Traceback", "  File "))]
    return told[0] if told else type(error).__name__
