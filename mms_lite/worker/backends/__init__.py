"""Model files to loaded models: what every backend offers, and the table of backends.

A backend hides one framework: how it opens files, names inputs and outputs, uses threads and devices, and
reports faults. Checking and batching are not its business: `worker.predictor` does them once for all.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mms_lite.errors import BackendMissing, BadTensor, InvalidArchive, LoadError, ServingError
from mms_lite.tensors import Array, describe
from mms_lite.types import TensorSpec

_log = logging.getLogger("mms_lite.backend")


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """What a backend opens: `files` are existing paths, the primary first; `device` None means the CPU.

    `inputs` and `outputs` are what the archive declares of them; `options` go to the framework as they are.
    `model` and `version` name the model, `instance` is the number of its worker. `batch` says whether the
    rows of the first axis are independent; None leaves it to be seen. `config` is what a Triton repository
    says of the model (a ModelConfig as JSON), None for models from elsewhere.
    """

    files: tuple[Path, ...]
    model: str = "model"
    version: str = "1"
    instance: int = 0
    threads: int = 1
    device: int | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    batch: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


class Request(dict[str, Array]):
    """One client's request: its arrays by input, and what it says beside them.

    `outputs` are the names of those that it wants, none for all. A plain mapping of arrays may stand for a
    request that says nothing more.
    """

    __slots__ = ("id", "outputs", "parameters")

    def __init__(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        id: str = "",
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(inputs)
        self.outputs = tuple(dict.fromkeys(outputs or ()))
        self.id = id
        self.parameters = parameters or {}

    @classmethod
    def of(cls, inputs: Mapping[str, Array]) -> Request:
        """Return the request that it is, or one that says nothing more."""
        return inputs if isinstance(inputs, Request) else cls(inputs)


class Answer(dict[str, Array]):
    """The answer to one request: its arrays by output, and the parameters that go to the client."""

    __slots__ = ("parameters",)

    def __init__(self, outputs: Mapping[str, Array], *, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(outputs)
        self.parameters = parameters or {}


class Backend(Protocol):
    """A loaded model. `metadata` is what its file says of itself in words.

    A backend is opened by its class method `open(settings)`, which raises InvalidArchive for files that are
    damaged or of another kind, and for options that it does not know.
    """

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    metadata: Mapping[str, str]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the model once on checked, contiguous arrays; return the outputs of these names.

        Raises:
            BadTensor: the framework refuses the inputs.
            OutOfMemory: of the host or the device.
        """

    def close(self) -> None:
        """Let go of the model."""


@runtime_checkable
class RequestBackend(Backend, Protocol):
    """A backend whose model takes the requests of a batch one by one and answers each.

    Others get the arrays of all requests joined. `optional` are the inputs that a request need not have,
    `config` is the model's configuration as its code has completed it.
    """

    optional: Collection[str]
    config: Mapping[str, Any]

    def infer_requests(self, requests: Sequence[Request]) -> list[Answer | ServingError]:
        """Answer checked requests, or say why one has no answer.

        Raises:
            ServingError: the model failed for all of them.
        """


# name -> module, class, the extra that installs its framework
BACKENDS: dict[str, tuple[str, str, str]] = {
    "onnxruntime": ("mms_lite.worker.backends.onnxruntime", "OnnxRuntimeBackend", "onnx"),
    "openvino": ("mms_lite.worker.backends.openvino", "OpenVinoBackend", "openvino"),
    "opencv": ("mms_lite.worker.backends.opencv", "OpenCvBackend", "opencv"),
    "torch": ("mms_lite.worker.backends.torch", "TorchBackend", "torch"),
    "mxnet": ("mms_lite.worker.backends.mxnet", "MxnetBackend", "mxnet"),
    "python": ("mms_lite.worker.backends.python", "PythonBackend", "python"),
}


def open_backend(name: str, settings: BackendSettings) -> Backend:
    """Open a model's files with the backend of this name.

    Raises:
        BackendMissing: its framework is not installed.
        InvalidArchive: there is no such backend, or it cannot use the files.
    """
    if name not in BACKENDS:
        raise InvalidArchive(f"there is no backend {name!r}; there are: {', '.join(BACKENDS)}")
    module, cls, extra = BACKENDS[name]
    try:
        backend = getattr(importlib.import_module(module), cls)
    except ModuleNotFoundError as error:
        advice = f"pip install 'mms-lite[{extra}]'"
        raise BackendMissing(
            f"the backend {name} needs {error.name}, which is not installed: {advice}"
        ) from error
    except (ImportError, AttributeError) as error:  # AttributeError: MXNet with a numpy too new for it
        raise LoadError(f"the backend {name} cannot be imported: {error}") from error
    opened: Backend = backend.open(settings)
    return opened


def declared(found: Sequence[TensorSpec], stated: Sequence[TensorSpec], what: str) -> tuple[TensorSpec, ...]:
    """Return a model's own specs with those that the archive states in their place; `what` names the side.

    Raises:
        InvalidArchive: one is stated that the model does not have.
    """
    own = {spec.name for spec in found}
    for spec in stated:
        if spec.name not in own:
            names = ", ".join(sorted(own))
            raise InvalidArchive(
                f"the handler config declares the {what} {spec.name!r}; the model has: {names}"
            )
    by_name = {spec.name: spec for spec in stated}
    return tuple(by_name.get(spec.name, spec) for spec in found)


def refuse_empty(inputs: Mapping[str, Array], who: str) -> None:
    """Refuse arrays without elements, for a framework that cannot take them.

    Raises:
        BadTensor: there is one.
    """
    for name, array in inputs.items():
        if not array.size:
            raise BadTensor(f"input {name!r} is empty, which {who} does not take: got {describe(array)}")


def on_cpu(settings: BackendSettings, reason: str) -> BackendSettings:
    """Return the settings for the CPU; a GPU that was given and cannot be used is told of in the log."""
    if settings.device is not None:
        _log.warning("GPU %d is not used: %s", settings.device, reason)
    return replace(settings, device=None)
