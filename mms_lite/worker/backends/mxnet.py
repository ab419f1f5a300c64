"""MXNet: NAME-symbol.json and NAME-NNNN.params, written by `net.export()` or `Module.save_checkpoint()`."""

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

from mms_lite.errors import BadTensor, InvalidArchive
from mms_lite.tensors import DTYPES, Array, describe
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import BackendSettings, declared, on_cpu, refuse_empty
from mms_lite.worker.backends.faults import raise_if_no_memory, reason
from mms_lite.worker.backends.mxnet_signature import (
    SIGNATURE,
    input_specs,
    output_specs,
    shapes_of,
    types_of,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # MXNet 1.9 uses names that numpy 1.20 deprecated
    import mxnet as mx

_log = logging.getLogger("mms_lite.backend")

_DATATYPES = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "FP16", "FP32", "FP64")
_MOST_PRIMITIVES = "1024"
_NOISE = re.compile(
    r"^Traceback.*|^  File .*|^MXNetError: |\[\d\d:\d\d:\d\d\] \S+:\d+: |Check failed: .+?: ", re.M
)


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
            raise_if_no_memory(error, "MXNet")
            raise InvalidArchive(f"MXNet cannot load the model: {_told(error)}") from error

    @classmethod
    def _load(cls, settings: BackendSettings) -> MxnetBackend:
        symbol_file, parameters_file = _files(settings.files)
        symbol = _read_symbol(symbol_file)
        arguments, auxiliary = _read_parameters(parameters_file)
        found = input_specs(symbol, arguments, auxiliary, symbol_file.parent / SIGNATURE)
        inputs = declared(found, settings.inputs, "input")
        for spec in inputs:
            if spec.datatype not in _DATATYPES:
                raise InvalidArchive(f"MXNet has no {spec.datatype}, the datatype of the input {spec.name!r}")
        outputs = declared(output_specs(symbol, inputs, arguments), settings.outputs, "output")
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
        refuse_empty(inputs, "MXNet")
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
            raise_if_no_memory(error, "MXNet")
            self._refuse_misfits(inputs)
            raise

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
            shapes, _, _ = self._symbol.infer_shape_partial(**shapes_of(given))
            by_name = dict(zip(self._symbol.list_arguments(), shapes, strict=True))
            dtype = next(iter(given.values())).dtype
            self._zeros = key, {n: mx.nd.zeros(by_name[n], self._device, dtype) for n in self._labels}
        return self._zeros[1]

    def _refuse_misfits(self, inputs: Mapping[str, Array]) -> None:
        """Raise BadTensor for inputs whose shapes or datatypes the symbol cannot have."""
        try:
            self._symbol.infer_shape_partial(**shapes_of({**self._parameters, **inputs}))
            self._symbol.infer_type_partial(**types_of({**self._parameters, **inputs}))
        except mx.MXNetError as error:
            came = ", ".join(f"{name} {describe(array)}" for name, array in inputs.items())
            raise BadTensor(f"the model cannot take {came}: {_told(error)}") from error


def _files(files: Sequence[Path]) -> tuple[Path, Path]:
    symbols = [file for file in files if file.suffix == ".json" and file.name != SIGNATURE]
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
        raise InvalidArchive(f"{file.name} is not a symbol of MXNet: {_told(error)}") from error


def _read_parameters(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments' and the auxiliary states' values by name."""
    try:
        found = mx.nd.load(str(file))
    except (ValueError, mx.MXNetError) as error:  # ValueError: MXNet quotes bytes that are no text
        raise InvalidArchive(f"{file.name} does not hold parameters of MXNet: {_told(error)}") from error
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


def _told(error: Exception) -> str:
    return reason(error, _NOISE, most_lines=1)
