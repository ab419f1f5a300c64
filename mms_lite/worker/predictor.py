"""A backend made safe to call: inputs are checked against what the model says, requests run as one batch.

The rules for shapes, datatypes, missing and unknown inputs exist here once, whatever the framework.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mms_lite.errors import BadTensor, HandlerError, ServingError
from mms_lite.tensors import DTYPES, Array, datatype, describe
from mms_lite.types import BYTES, Signature, TensorSpec
from mms_lite.worker import outputs as wanted_outputs
from mms_lite.worker.backends import Answer, Backend, Request, RequestBackend

_MOST_ELEMENTS = 1 << 28  # of a warm-up's input
_ROUNDING = 1e-3  # between a row alone and in company
_SHOWN = 80  # characters of a name that a client made up


class Predictor:
    """A loaded model. With `allow_nan` a NaN in an input is passed on to the model.

    `batch` says whether the rows of the first axis are independent of each other; None leaves it to be seen.
    `config` is what a Triton repository says of the model: with a max_batch_size each input has an axis for
    the batch, and the model never gets more rows at once.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        allow_nan: bool = False,
        batch: bool | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.signature = Signature(tuple(backend.inputs), tuple(backend.outputs))
        self.metadata = backend.metadata
        self._backend = backend
        self._by_request = backend if isinstance(backend, RequestBackend) else None
        self._optional = self._by_request.optional if self._by_request is not None else ()
        stated = (self._by_request.config if self._by_request is not None else config) or {}
        self._name = str(stated.get("name", ""))
        self._most_rows = int(stated.get("max_batch_size", 0))  # 0: no limit
        self._allow_nan = allow_nan
        self._batch = batch
        self._joins = batch  # whether requests of different clients are joined; None until it was tried
        self._inputs = {spec.name: spec for spec in backend.inputs}
        self._outputs = {spec.name: spec for spec in backend.outputs}

    @property
    def batches(self) -> bool:
        """Whether the model takes several rows at once: its first axis is free in all inputs and outputs."""
        specs = [*self.signature.inputs, *self.signature.outputs]
        return self._batch is not False and all(
            spec.shape is None or spec.shape[:1] == (-1,) for spec in specs
        )

    @property
    def takes_requests(self) -> bool:
        """Whether the model is given the requests of a batch as they came."""
        return self._by_request is not None

    @property
    def needs_inputs(self) -> bool:
        """Whether a request must have inputs: not all are optional."""
        return any(name not in self._optional for name in self._inputs)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The configuration as the model's code has completed it; None for models without code."""
        return None if self._by_request is None else self._by_request.config

    def input(self, name: str) -> TensorSpec:
        """Return what the model says of one input.

        Raises:
            BadTensor: it has none of this name.
        """
        if name not in self._inputs:
            raise BadTensor(f"the model has no input {name[:_SHOWN]!r}; {self._takes()}")
        return self._inputs[name]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Check the inputs and run the model once; return all outputs, or those that are named.

        Raises:
            BadTensor: an input or the name of an output does not fit the model.
            OutOfMemory: of the host or the device.
        """
        self.check(inputs, outputs)
        return self._infer(inputs, outputs)

    def infer_each(self, requests: Sequence[Mapping[str, Array]]) -> list[Answer | ServingError]:
        """Answer each request with the outputs that it wants, or say why not.

        Those that fit together run as one batch: joined where the rows have been seen to be independent, or
        are said to be; one by one where the model takes requests as they come.

        Raises:
            ServingError: the model failed.
        """
        answers: list[Answer | ServingError | None] = [None] * len(requests)
        checked: dict[int, Request] = {}
        for index, inputs in enumerate(requests):
            request = Request.of(inputs)
            try:
                self.check(request, request.outputs)
                checked[index] = request
            except BadTensor as error:
                answers[index] = error
        for members in self._groups(checked):
            for index, answer in zip(members, self._run([checked[i] for i in members]), strict=True):
                answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def check(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> None:
        """Check a request against the model's signature.

        Raises:
            BadTensor: an input is missing, unknown, or of another datatype or shape; an output is unknown.
        """
        for name in self._inputs:
            if name not in inputs and name not in self._optional:
                raise BadTensor(f"input {name!r} is missing; {self._takes()}")
        for name, array in inputs.items():
            _check(self.input(name), array)
            if not self._allow_nan and _has_nan(array):
                raise BadTensor(f"input {name!r} has elements that are not numbers (NaN)")
        if self._most_rows:
            self._check_rows(inputs)
        wanted_outputs.check(outputs, self._outputs)

    def warm_up(self) -> None:
        """Run the model once on zeros, where its inputs' shapes are known but for the first axis.

        Then see whether requests may be joined.

        Raises:
            ServingError: the model cannot run.
        """
        shapes = self._least_shapes()
        if shapes is not None:
            self.infer({name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})
        if self._joins is None and self._by_request is None:
            self._joins = self.batches and self._rows_are_independent()

    def close(self) -> None:
        """Let go of the model."""
        self._backend.close()

    def _least_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]] | None:
        """Return the smallest shape of each input with its type; None where one is unknown, or too large."""
        found = {}
        for spec in self.signature.inputs:
            shape = _least_shape(spec)
            if shape is None or math.prod(shape) > _MOST_ELEMENTS:
                return None
            found[spec.name] = (shape, DTYPES[spec.datatype])
        return found

    def _check_rows(self, inputs: Mapping[str, Array]) -> None:
        """Check that inputs have the same number of rows, and not too many; the words are Triton's."""
        rows: int | None = None
        for name, array in inputs.items():
            have = len(array) if array.ndim else 0
            if rows not in (None, have):
                raise BadTensor(f"input {name!r} batch size does not match other inputs for {self._name!r}")
            rows = have
        if rows is not None and rows > self._most_rows:
            raise BadTensor(f"inference request batch-size must be <= {self._most_rows} for {self._name!r}")

    def _takes(self) -> str:
        return f"the model takes: {'; '.join(map(str, self.signature.inputs)) or 'no inputs'}"

    def _rows_are_independent(self) -> bool:
        """Try two rows apart and together: a free first axis need not be a batch."""
        shapes = self._least_shapes()
        if not shapes:
            return False
        random = np.random.default_rng(0)
        rows = [
            {name: _noise(random, shape, dtype) for name, (shape, dtype) in shapes.items()} for _ in range(2)
        ]
        try:
            alone = [self.infer(row) for row in rows]
            together = self.infer({name: np.concatenate([row[name] for row in rows]) for name in shapes})
        except Exception:  # whatever a framework says to noise
            return False
        return all(_nearly_equal([found[name] for found in alone], array) for name, array in together.items())

    def _groups(self, requests: Mapping[int, Request]) -> list[list[int]]:
        """Return the places of the requests that run together: no more rows than the model takes."""
        groups: dict[object, list[int]] = defaultdict(list)
        rows: dict[object, int] = {}
        found = []
        for index, inputs in requests.items():
            key = None if self._by_request is not None else self._key(index, inputs)
            more = _rows(inputs) if self._most_rows else 0
            if key in rows and rows[key] + more > self._most_rows > 0:
                found.append(groups.pop(key))
                rows[key] = 0
            groups[key].append(index)
            rows[key] = rows.get(key, 0) + more
        return [*found, *groups.values()]

    def _key(self, index: int, inputs: Mapping[str, Array]) -> object:
        rows = {array.shape[0] for array in inputs.values() if array.ndim}
        if (
            not (self._joins and self.batches)
            or len(rows) != 1
            or any(not array.ndim for array in inputs.values())
        ):
            return index  # runs alone
        return tuple((name, inputs[name].shape[1:], datatype(inputs[name])) for name in self._inputs)

    def _infer(self, checked: Mapping[str, Array], outputs: Sequence[str] | None) -> dict[str, Array]:
        # Not ascontiguousarray, which turns a scalar into a row.
        ready = {name: np.asarray(array, order="C") for name, array in checked.items()}
        return self._backend.infer(ready, list(outputs or self._outputs))

    def _run(self, requests: Sequence[Request]) -> Sequence[Answer | ServingError]:
        if self._by_request is not None:
            return self._by_request.infer_requests(requests)
        if len(requests) == 1:
            (request,) = requests
            return [Answer(self._infer(request, request.outputs))]
        wanted = [request.outputs or self._outputs for request in requests]
        of_some = [name for name in self._outputs if any(name in names for names in wanted)]
        rows = self._run_joined(requests, of_some)
        return [Answer(wanted_outputs.pick(found, names)) for found, names in zip(rows, wanted, strict=True)]

    def _run_joined(
        self, requests: Sequence[Mapping[str, Array]], outputs: Sequence[str]
    ) -> list[dict[str, Array]]:
        counts = [len(next(iter(inputs.values()))) for inputs in requests]
        joined = {name: np.concatenate([inputs[name] for inputs in requests]) for name in self._inputs}
        found = self._infer(joined, outputs)
        for name, array in found.items():
            if not array.ndim or len(array) != sum(counts):
                raise HandlerError(
                    f"the output {name!r} has the shape {list(array.shape)} for a batch of {sum(counts)} rows"
                )
        ends = np.cumsum(counts)[:-1]
        pieces = {name: np.split(array, ends) for name, array in found.items()}
        return [{name: parts[index] for name, parts in pieces.items()} for index in range(len(requests))]


def _rows(inputs: Mapping[str, Array]) -> int:
    return next((len(array) for array in inputs.values() if array.ndim), 0)


def _nearly_equal(rows: Sequence[Array], together: Array) -> bool:
    """Tell whether an array consists of these rows."""
    if together.shape[:1] != (len(rows),) or any(row.shape != (1, *together.shape[1:]) for row in rows):
        return False
    if together.dtype.kind != "f":
        return bool((np.concatenate(rows) == together).all())
    return bool(np.allclose(np.concatenate(rows), together, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True))


def _check(spec: TensorSpec, array: Array) -> None:
    fits = spec.shape is None or (
        len(spec.shape) == array.ndim
        and all(want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True))
    )
    if not fits or datatype(array) != spec.datatype:
        raise BadTensor(
            f"input {spec.name!r} does not fit: the model expects {_expected(spec)}, got {describe(array)}"
        )


def _has_nan(array: Array) -> bool:
    if array.dtype.kind == "f":  # the least of all is NaN where one is, and takes no memory to find
        return array.size > 0 and bool(np.isnan(array.min()))
    return array.dtype.kind == "V" and bool(np.isnan(array).any())  # bfloat16


def _expected(spec: TensorSpec) -> str:
    return str(spec).removeprefix(f"{spec.name} ")


def _noise(random: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    values = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
    return np.asarray(values).astype(dtype)


def _least_shape(spec: TensorSpec) -> tuple[int, ...] | None:
    """Return the smallest shape of an input, None where only its user knows one."""
    if spec.shape is None or spec.datatype == BYTES or -1 in spec.shape[1:]:
        return None
    return tuple(1 if length == -1 else length for length in spec.shape)
