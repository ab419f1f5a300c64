"""The frame of every ready-made handler: decode each request, run the model once for all, answer each.

A user derives a class from one of the handlers and overrides a step; the rest stays.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from mms_lite.errors import HandlerError, InvalidArchive, InvalidRequest, OutOfMemory, ServingError
from mms_lite.handlers.package import Package, backend_settings, is_whole, read_settings
from mms_lite.tensors import Array
from mms_lite.types import Signature
from mms_lite.worker.backends import open_backend
from mms_lite.worker.completion import completed
from mms_lite.worker.context import Context
from mms_lite.worker.predictor import Predictor
from mms_lite.worker.reshaping import reshaped

Parts = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerSettings:
    """What every handler's config may say: how the backend runs, and whether NaN may enter the model.

    A derived class checks its own in `__post_init__`, after those of its parent, which it calls by name:
    super() needs the class that `slots=True` replaces. Each check raises ValueError.
    """

    backend: Mapping[str, Any] = field(default_factory=dict)
    allow_nan: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.backend, Mapping):
            raise ValueError("backend is not an object")
        self.require_bool("allow_nan")

    def require_bool(self, *names: str) -> None:
        """Refuse settings that are neither true nor false."""
        for name in names:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is neither true nor false: {value!r}")

    def require_positive(self, *names: str) -> None:
        """Refuse settings that are not whole numbers from 1."""
        for name in names:
            if not is_whole(value := getattr(self, name), least=1):
                raise ValueError(f"{name} is not a positive whole number: {value!r}")

    def require_one_of(self, name: str, choices: Collection[str]) -> None:
        """Refuse a setting that is none of these."""
        if (value := getattr(self, name)) not in list(choices):
            raise ValueError(f"{name} is {value!r}; there are: {', '.join(choices)}")


class ModelHandler:
    """Serves the model file of an archive. Derived classes say what an item is and what an answer is."""

    settings_type: ClassVar[type[HandlerSettings]] = HandlerSettings
    takes_tensors: ClassVar[bool] = False  # whether `decode` takes arrays by the names of the model's inputs

    def __init__(self) -> None:
        self.package: Package
        self.settings: Any  # of settings_type
        self.predictor: Predictor

    @property
    def signature(self) -> Signature:
        """The model's own inputs and outputs."""
        return replace(self.predictor.signature, takes_tensors=self.takes_tensors)

    @property
    def completed_config(self) -> dict[str, Any]:
        """What the model adds to its configuration in a Triton repository, by field."""
        return completed(self.package.model_config, self.predictor.config, self.predictor.signature)

    @property
    def batches(self) -> bool:
        """Whether the model can be run for several items at once."""
        return self.predictor.batches

    def initialize(self, context: Context) -> None:
        """Open the model and run it once.

        Raises:
            LoadError: InvalidArchive where the archive is at fault, BackendMissing where a library is.
        """
        self.package = Package.of(context)
        self.settings = read_settings(self.settings_type, self.package.config)
        backend = backend_settings(
            self.package,
            self.settings.backend,
            threads=_threads(),
            device=context.system_properties["gpu_id"],
        )
        self.predictor = Predictor(
            reshaped(open_backend(self.package.backend, backend), self.package.model_config),
            allow_nan=self.settings.allow_nan,
            batch=backend.batch,
            config=self.package.model_config,
        )
        try:
            self.prepare()
            self.warm_up()
        except (InvalidArchive, OutOfMemory):
            raise
        except ServingError as error:
            raise InvalidArchive(f"the model cannot run as it is configured: {error.message}") from error
        except Exception as error:  # a defect of a derived class, or of the framework
            traceback.print_exc()
            said = "".join(traceback.format_exception_only(error)).strip()
            raise InvalidArchive(f"the model cannot run as it is configured: {said}") from error

    def close(self) -> None:
        """Let go of the model."""
        self.predictor.close()

    def handle(self, data: Sequence[Parts], context: Context) -> list[Any]:
        """Answer a batch: for each request its answer, or the error that it gets instead.

        Raises:
            ServingError: the model failed for all.
        """
        answers: list[Any] = [None] * len(data)
        items: dict[int, Any] = {}
        for index, parts in enumerate(data):
            try:
                items[index] = self.decode(parts)
            except InvalidRequest as error:
                answers[index] = error
        if items:
            for index, answer in zip(items, self.answer(items, context), strict=True):
                answers[index] = answer
        return answers

    def prepare(self) -> None:
        """Check the settings against the model that was opened, and keep what each request needs.

        Raises:
            InvalidArchive: they do not fit.
        """

    def warm_up(self) -> None:
        """Run the model once, so that the first request finds it warm and a misfit fails the load."""
        self.predictor.warm_up()

    def decode(self, parts: Parts) -> Any:
        """Return the item that a request's parts hold.

        Raises:
            InvalidRequest: they hold none.
        """
        raise NotImplementedError

    def answer(self, items: Mapping[int, Any], context: Context) -> Sequence[Any]:
        """Return the answer to each item; `items` are by the place of their request in the batch.

        Raises:
            ServingError: the model failed for all.
        """
        return self.predict(list(items.values()))

    def predict(self, items: list[Any]) -> Sequence[Any]:
        """Answer items: preprocess, infer, postprocess; those with an equal `batch_key` as one batch."""
        answers: list[Any] = [None] * len(items)
        for members in self._batches(items):
            batch = [items[index] for index in members]
            found = self.postprocess(self.infer(self.preprocess(batch)), batch)
            if len(found) != len(batch):
                raise HandlerError(f"postprocess returned {len(found)} answers for {len(batch)} items")
            for index, answer in zip(members, found, strict=True):
                answers[index] = answer
        return answers

    def batch_key(self, item: Any) -> Hashable:
        """Return what items have in common that fit into one batch, such as the size of their inputs."""
        return None

    def preprocess(self, items: list[Any]) -> dict[str, Array]:
        """Turn items into the model's inputs, one row each."""
        raise NotImplementedError

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model on a batch.

        Raises:
            ServingError: it cannot take the inputs, or failed.
        """
        return self.predictor.infer(inputs)

    def postprocess(self, outputs: Mapping[str, Array], items: list[Any]) -> Sequence[Any]:
        """Turn the model's outputs into one answer for each item: what `handle` may return in MMS."""
        raise NotImplementedError

    def _batches(self, items: list[Any]) -> Iterable[list[int]]:
        """Return the places of the items that run together; each runs alone where the model takes one."""
        if not self.batches:
            return [[index] for index in range(len(items))]
        groups: dict[Hashable, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(self.batch_key(item), []).append(index)
        return groups.values()


def single_part(parts: Parts, *names: str) -> Any:
    """Return a request's one part: the only one, or the first that has one of these names.

    Raises:
        InvalidRequest: there is none, or there are several and none has such a name.
    """
    if any(name.lstrip()[:1] in ("{", "[") for name in parts):
        raise InvalidRequest(
            "the body is declared as a form and looks like JSON: send it as application/json"
        )
    if len(parts) == 1:
        return next(iter(parts.values()))
    for name in (*names, "body", "data"):
        if name in parts:
            return parts[name]
    found = ", ".join(map(repr, parts)) or "none"
    wanted = (*names, "body")[0]
    raise InvalidRequest(f"the request should have one part, or one named {wanted!r}; got: {found}")


def _threads() -> int:
    """Return how many threads the server gives this worker, or what its user says in the environment."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdecimal() and int(stated) else os.cpu_count() or 1
