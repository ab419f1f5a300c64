"""The vocabulary that every layer shares: tensors, requests, responses, and what a model is made of.

Standard library only: these types also live in workers that have no numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform

    T = TypeVar("T")

    @dataclass_transform(frozen_default=True)
    def message(cls: type[T]) -> type[T]:
        """Make a slotted dataclass that nobody changes once it is made, as mypy checks.

        Python's own frozen dataclasses check at run time, and are made at a third of the speed.
        """
else:
    message = dataclass(slots=True)

BYTES = "BYTES"


@message
class Tensor:
    """A named array, or one raw part of a request (datatype BYTES, a bytearray, with its content type).

    `datatype` is a KServe v2 name ("FP32", "INT64", ..., "BYTES"). `data` is a buffer of the array's bytes
    in C order: a `bytearray` for a raw part, else anything with the buffer protocol. It is never reused.
    In the server, before a worker has it, a large raw part may be `SharedBytes`.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any
    content_type: str = ""

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return self.data.nbytes if type(self.data) is memoryview else len(self.data)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model says of one of its inputs or outputs.

    `datatype` is a KServe v2 name. In `shape` -1 stands for any length; None is a shape of any rank.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        shape = "[...]" if self.shape is None else f"[{','.join(map(str, self.shape))}]"
        return f"{self.name} {self.datatype} {shape}"


@dataclass(frozen=True, slots=True)
class Signature:
    """A model's own tensors; both are empty where only its handler's code knows them.

    `takes_tensors` says that requests may hold these tensors; else the handler takes raw bodies.
    """

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    takes_tensors: bool = False


@message
class InferRequest:
    """One client's question. `deadline` is in `time.monotonic()` seconds, or None for no limit."""

    id: str
    model: str
    version: str | None = None
    inputs: Sequence[Tensor] = ()
    outputs: Sequence[str] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    headers: Sequence[tuple[str, str]] = ()
    deadline: float | None = None


@message
class InferResponse:
    """One answer. `status` and `reason` are what the handler chose, `headers` what it added."""

    id: str
    model: str
    version: str
    outputs: Sequence[Tensor] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    headers: Sequence[tuple[str, str]] = ()
    status: int = 200
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything needed to load one version of a model.

    `path` is the folder with the model's files. `owns_path` says that the folder was made for this load
    and is deleted when the version is unloaded. `devices` are GPU ids, dealt to workers in turn; None
    and empty mean CPU. `python` is the interpreter of the workers; None means the server's own. `config` is
    the configuration of a model of a Triton repository (a ModelConfig as JSON, complete); None for others.
    `scratch` is the folder in which workers make the folders that they work in, instead of in `path`.
    """

    name: str
    version: str
    path: str
    url: str = ""
    handler: str = ""
    owns_path: bool = False
    batch_size: int = 1
    max_batch_delay_ms: float = 0
    min_workers: int = 1
    max_workers: int = 1
    queue_size: int = 100
    response_timeout_s: float = 120.0
    load_timeout_s: float = 600.0
    devices: tuple[int | None, ...] = ()
    python: str | None = None
    runtime: str = "python"
    isolate_failures: bool = True
    decode_input_request: bool = True
    at_startup: bool = False
    manifest: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    scratch: str | None = None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a user says when a model is to be loaded; None leaves it to the archive or the configuration.

    `url` is a path relative to the model store, or an http(s) address; `sha256` is the hexadecimal digest
    that the archive must have. With `replace`, a loaded version of the same name and version is
    drained once the new one is ready. `wait=False` loads in the background.
    """

    url: str
    sha256: str | None = None
    name: str | None = None
    version: str | None = None
    handler: str | None = None
    runtime: str | None = None
    batch_size: int = 1
    max_batch_delay_ms: int = 0
    workers: int | None = None
    response_timeout_s: float | None = None
    replace: bool = False
    set_default: bool = False
    wait: bool = True
    at_startup: bool = False


class RepositoryState(Enum):
    """How a version of a model in the repository is doing (KServe v2, model repository extension)."""

    READY = "READY"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


UNLOADED = "unloaded"  # Triton's word
NO_WORKERS = "no workers"


@dataclass(frozen=True, slots=True)
class RepositoryEntry:
    """A version of a model that is loaded or was; a model that never was has its name only.

    The reason is UNLOADED, NO_WORKERS, or why it failed.
    """

    name: str
    version: str = ""
    state: RepositoryState | None = None
    reason: str = ""


class WorkerState(Enum):
    """Where a worker is in its life."""

    STARTING = "STARTING"
    READY = "READY"
    BUSY = "BUSY"
    BACKOFF = "BACKOFF"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


class VersionState(Enum):
    """Where a loaded version of a model is in its life."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What `describe` tells of one worker. `memory_bytes` is the resident size, 0 where unknown."""

    id: str
    state: WorkerState
    pid: int | None
    started_at: float
    restarts: int
    memory_bytes: int
    device: int | None
    last_exit: str | None


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What `describe` tells of one version of a model. `detail` says why it is FAILED.

    `signature` is what the model said when it was loaded, empty before and for handlers of raw bodies.
    `answered` and `refused` count requests since the version, or what it replaced, was loaded; `refused` are
    those that no worker was given.
    """

    spec: ModelSpec
    state: VersionState
    is_default: bool
    detail: str | None
    workers: tuple[WorkerStatus, ...]
    queue_depth: int
    in_flight: int
    answered: int
    refused: int
    signature: Signature = Signature()
