"""Models on PyTorch: TorchScript and programs of torch.export. Both hold code, which `torch_files` checks.

Hides the two formats' ways of naming tensors, and that arrays have no bfloat16: it crosses as FP32.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from mms_lite.errors import BadTensor, HandlerError, InvalidArchive, OutOfMemory
from mms_lite.tensors import Array, datatype
from mms_lite.types import BYTES, TensorSpec
from mms_lite.worker.backends import BackendSettings, declared, on_cpu
from mms_lite.worker.backends.faults import raise_if_no_memory, reason
from mms_lite.worker.backends.torch_files import check_example, check_export, check_script, is_export

# Operators raise the first two, guards of torch.export also the third, and code in TorchScript the last.
_REFUSALS = (RuntimeError, IndexError, AssertionError, torch.jit.Error)
# Of a traceback of TorchScript, all that comes before the last line with an error.
_NOISE = re.compile(r"\A.*^\s*[\w.]*(?:Error|Exception): (?=\S)", re.M | re.S)
_OUTPUTS_EXAMPLE = '"backend": {"outputs": [{"name": "boxes", "datatype": "FP32", "shape": [-1, 4]}, ...]}'


@dataclass(frozen=True, slots=True)
class _Program:
    """A model's code: `call` takes tensors by the inputs' names; its result is named after `outputs`."""

    call: Callable[[Mapping[str, torch.Tensor]], Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class TorchBackend:
    """A program on one device. One output is called `output`, several `output__0`, `output__1`, ..."""

    def __init__(self, program: _Program, device: torch.device, metadata: Mapping[str, str]) -> None:
        self.inputs = program.inputs
        self.outputs = program.outputs
        self.metadata = metadata
        self._call: Any = program.call
        self._device = device

    @classmethod
    def open(cls, settings: BackendSettings) -> TorchBackend:
        """Load the one file, which is TorchScript or torch.export by what it holds.

        Raises:
            InvalidArchive: it is neither, or has other inputs and outputs than are declared.
            OutOfMemory: of the device.
        """
        if settings.options:
            raise InvalidArchive(f"the backend torch has no options; got: {', '.join(settings.options)}")
        if settings.device is not None and not torch.cuda.is_available():
            settings = on_cpu(settings, "this PyTorch has no CUDA or finds no GPU")
        device = torch.device("cpu" if settings.device is None else f"cuda:{settings.device}")
        _share_cpus(settings.threads)
        path = settings.files[0]
        try:
            opened = _open_export if is_export(path) else _open_script
            return cls(opened(path, device, settings), device, {})
        except (InvalidArchive, MemoryError):
            raise
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemory("the GPU has too little memory for the model") from error
        except Exception as error:  # PyTorch's readers raise whatever damage makes them stumble over
            raise InvalidArchive(f"PyTorch cannot load {path.name}: {_told(error)}") from error

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the program once.

        Raises:
            BadTensor: it does not take the inputs.
            OutOfMemory: of the host or the device.
            HandlerError: it gives other outputs than were declared.
        """
        try:
            with torch.inference_mode():
                given = {name: _tensor(array).to(self._device) for name, array in inputs.items()}
                found = _by_name(self._call(given), [spec.name for spec in self.outputs])
                return {name: _array(name, found) for name in outputs}
        except _REFUSALS as error:
            told = _told(error)
            of_gpu = "cuda" in told.lower()
            raise_if_no_memory(error, "the GPU" if of_gpu else "the host")
            if of_gpu:  # a fault of the device, not of the inputs
                raise
            raise BadTensor(f"the model does not take its inputs: {told}") from error

    def close(self) -> None:
        """Let go of the program."""
        self._call = None


def _share_cpus(threads: int) -> None:
    """Let operators use `threads` CPUs, and branches that TorchScript forks run one after the other."""
    torch.set_num_threads(threads)
    with suppress(RuntimeError):  # can be set once in a process: tests open several models in one
        torch.set_num_interop_threads(1)


def _open_script(path: Path, device: torch.device, settings: BackendSettings) -> _Program:
    """Load TorchScript. It names the arguments of `forward` and tells neither datatypes nor shapes."""
    check_script(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.load", DeprecationWarning)
        module = torch.jit.load(path, map_location=device).eval()
    stated = {spec.name: spec for spec in settings.inputs}
    inputs = []
    for argument in module.forward.schema.arguments[1:]:  # after self
        if argument.has_default_value() and argument.name not in stated:
            continue
        if argument.type.kind() not in ("TensorType", "OptionalType"):
            raise InvalidArchive(f"the input {argument.name!r} is a {argument.type}: only tensors are served")
        inputs.append(TensorSpec(argument.name, "FP32", None))
    outputs = _script_outputs(module.forward.schema.returns[0].type, settings.outputs)
    return _Program(
        lambda given: module(**given), _checked(declared(inputs, settings.inputs, "input")), outputs
    )


def _script_outputs(result: Any, stated: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    kind = result.kind()
    parts = {"TupleType": "elements", "ListType": "getElementType", "DictType": "getValueType"}
    held = getattr(result, parts[kind])() if kind in parts else result
    if any(each.kind() != "TensorType" for each in (held if isinstance(held, list) else [held])):
        raise InvalidArchive(f"the model returns {result}: only tensors, or one tuple, list or dict of them")
    if kind in ("ListType", "DictType"):
        if not stated:
            raise InvalidArchive(
                f"the model returns {result}, whose length or names only a run tells: declare its outputs "
                f"in the handler config, as in {_OUTPUTS_EXAMPLE}"
            )
        return tuple(stated)
    count = len(held) if kind == "TupleType" else 1
    return _named([TensorSpec(name, "FP32", None) for name in _numbered(count)], stated)


def _open_export(path: Path, device: torch.device, settings: BackendSettings) -> _Program:
    """Load a program of torch.export, which tells all of its inputs and outputs."""
    check_export(path)
    with _no_pickle(), path.open("rb") as file:
        program = torch.export.load(file)
    check_example(path, program)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    taken = [_spec(arg.name, values[arg.name]) for arg in given if isinstance(arg, TensorArgument)]
    found = [spec.arg for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    result = program.call_spec.out_spec.unflatten([values.get(arg.name) for arg in found])
    by_name = _by_name(result, _numbered(len(found)))
    outputs = [_spec(name, value) for name, value in by_name.items()]
    module, in_spec = program.module(), program.call_spec.in_spec

    def call(tensors: Mapping[str, torch.Tensor]) -> Any:
        leaves = [
            tensors[arg.name].to(values[arg.name].dtype) if arg.name in tensors else arg.value
            for arg in given
        ]
        args, kwargs = in_spec.unflatten(leaves)
        return module(*args, **kwargs)

    inputs = _checked(declared(taken, settings.inputs, "input"))
    if isinstance(result, dict):
        return _Program(call, inputs, declared(outputs, settings.outputs, "output"))
    return _Program(call, inputs, _named(outputs, settings.outputs))


@contextmanager
def _no_pickle() -> Iterator[None]:
    """Have torch.load build tensors only: torch.export.load else falls back to running pickles."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _spec(name: str, value: Any) -> TensorSpec:
    if not isinstance(value, torch.Tensor):
        raise InvalidArchive(f"the model's {name!r} is {type(value).__name__}: only tensors are served")
    shape = tuple(length if isinstance(length, int) else -1 for length in value.shape)
    return TensorSpec(name, _datatype(value.dtype), shape)


def _datatype(dtype: torch.dtype) -> str:
    return "FP32" if dtype == torch.bfloat16 else datatype(torch.empty(0, dtype=dtype).numpy())


def _checked(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    for spec in inputs:
        if spec.datatype == BYTES:
            raise InvalidArchive(f"PyTorch takes no BYTES; the handler config declares {spec}")
    return inputs


def _numbered(count: int) -> list[str]:
    return ["output"] if count == 1 else [f"output__{index}" for index in range(count)]


def _named(found: Sequence[TensorSpec], stated: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the outputs as the archive declares them, in their order, or as they were found."""
    if stated and len(stated) != len(found):
        raise InvalidArchive(
            f"the handler config declares {len(stated)} outputs; the model returns {len(found)}"
        )
    return tuple(stated or found)


def _by_name(result: Any, names: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(result, Mapping):
        return result
    values = result if isinstance(result, (tuple, list)) else [result]
    return dict(zip(names, values, strict=False))


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _array(name: str, found: Mapping[str, Any]) -> Array:
    if not isinstance(found.get(name), torch.Tensor):
        raise HandlerError(f"the model gave no output {name!r}; it gave: {', '.join(map(str, found))}")
    tensor = found[name].detach()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array


def _told(error: BaseException) -> str:
    return reason(error, _NOISE, most_lines=1)
