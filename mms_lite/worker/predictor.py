"""A backend made safe to call: inputs are checked against what the model says, requests run as one batch.

The rules for shapes, datatypes, missing and unknown inputs exist here once, whatever the framework.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from mms_lite.errors import BadTensor, HandlerError, ServingError
from mms_lite.types import BYTES, Signature, TensorSpec
from mms_lite.worker.backends import Backend
from mms_lite.worker.tensors import DTYPES, Array, datatype, describe

_MOST_ZEROS = 1 << 28  # elements of a warm-up's input


class Predictor:
    """A loaded model. With `allow_nan` a NaN in an input is passed on to the model."""

    def __init__(self, backend: Backend, *, allow_nan: bool = False) -> None:
        self.signature = Signature(tuple(backend.inputs), tuple(backend.outputs))
        self.metadata = backend.metadata
        self._backend = backend
        self._allow_nan = allow_nan
        self._inputs = {spec.name: spec for spec in backend.inputs}
        self._outputs = {spec.name: spec for spec in backend.outputs}

    @property
    def batches(self) -> bool:
        """Whether requests can be joined along the first axis: it is free in all inputs and outputs."""
        specs = [*self.signature.inputs, *self.signature.outputs]
        return all(spec.shape is None or spec.shape[:1] == (-1,) for spec in specs)

    def input(self, name: str) -> TensorSpec:
        """Return what the model says of one input.

        Raises:
            BadTensor: it has none of this name.
        """
        if name not in self._inputs:
            raise BadTensor(f"the model has no input {name!r}; {self._takes()}")
        return self._inputs[name]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Check the inputs and run the model once; return all outputs, or those that are named.

        Raises:
            BadTensor: an input or the name of an output does not fit the model.
            OutOfMemory: of the host or the device.
        """
        self.check(inputs, outputs)
        ready = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        return self._backend.infer(ready, list(outputs or self._outputs))

    def infer_each(
        self, requests: Sequence[Mapping[str, Array]], outputs: Sequence[str] | None = None
    ) -> list[dict[str, Array] | ServingError]:
        """Answer each request, or say why not; those that fit together run as one batch.

        Raises:
            ServingError: the model failed.
        """
        answers: list[dict[str, Array] | ServingError | None] = [None] * len(requests)
        groups: dict[object, list[int]] = defaultdict(list)
        for index, inputs in enumerate(requests):
            try:
                self.check(inputs, outputs)
                groups[self._key(index, inputs)].append(index)
            except BadTensor as error:
                answers[index] = error
        for members in groups.values():
            for index, answer in zip(
                members, self._run([requests[i] for i in members], outputs), strict=True
            ):
                answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def check(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> None:
        """Check a request against the model's signature.

        Raises:
            BadTensor: an input is missing, unknown, or of another datatype or shape; an output is unknown.
        """
        for name in self._inputs:
            if name not in inputs:
                raise BadTensor(f"input {name!r} is missing; {self._takes()}")
        for name, array in inputs.items():
            _check(self.input(name), array)
            if not self._allow_nan and array.dtype.kind == "f" and np.isnan(array.min()):
                raise BadTensor(f"input {name!r} has elements that are not numbers (NaN)")
        for name in outputs or ():
            if name not in self._outputs:
                raise BadTensor(f"the model has no output {name!r}; it has: {', '.join(self._outputs)}")

    def warm_up(self) -> None:
        """Run the model once on zeros, where its inputs' shapes are known but for the first axis.

        Raises:
            ServingError: the model cannot run.
        """
        shapes = [(spec, _least_shape(spec)) for spec in self.signature.inputs]
        if any(shape is None or np.prod(shape) > _MOST_ZEROS for _, shape in shapes):
            return
        self.infer({spec.name: np.zeros(shape or (), DTYPES[spec.datatype]) for spec, shape in shapes})

    def close(self) -> None:
        """Let go of the model."""
        self._backend.close()

    def _takes(self) -> str:
        return f"the model takes: {'; '.join(map(str, self.signature.inputs))}"

    def _key(self, index: int, inputs: Mapping[str, Array]) -> object:
        rows = {array.shape[0] for array in inputs.values() if array.ndim}
        if not self.batches or len(rows) != 1 or any(not array.ndim for array in inputs.values()):
            return index  # runs alone
        return tuple((name, inputs[name].shape[1:], datatype(inputs[name])) for name in self._inputs)

    def _run(
        self, requests: list[Mapping[str, Array]], outputs: Sequence[str] | None
    ) -> list[dict[str, Array]]:
        if len(requests) == 1:
            return [self.infer(requests[0], outputs)]
        counts = [len(next(iter(inputs.values()))) for inputs in requests]
        joined = {name: np.concatenate([inputs[name] for inputs in requests]) for name in self._inputs}
        found = self.infer(joined, outputs)
        for name, array in found.items():
            if not array.ndim or len(array) != sum(counts):
                raise HandlerError(
                    f"the output {name!r} has the shape {list(array.shape)} for a batch of {sum(counts)} rows"
                )
        ends = np.cumsum(counts)[:-1]
        pieces = {name: np.split(array, ends) for name, array in found.items()}
        return [{name: parts[index] for name, parts in pieces.items()} for index in range(len(requests))]


def _check(spec: TensorSpec, array: Array) -> None:
    fits = spec.shape is None or (
        len(spec.shape) == array.ndim
        and all(want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True))
    )
    if not fits or datatype(array) != spec.datatype:
        raise BadTensor(
            f"input {spec.name!r} does not fit: the model expects {_expected(spec)}, got {describe(array)}"
        )
    if not array.size:
        raise BadTensor(f"input {spec.name!r} is empty: got {describe(array)}")


def _expected(spec: TensorSpec) -> str:
    return str(spec).removeprefix(f"{spec.name} ")


def _least_shape(spec: TensorSpec) -> tuple[int, ...] | None:
    """Return the smallest shape of an input, None where only its user knows one."""
    if spec.shape is None or spec.datatype == BYTES or -1 in spec.shape[1:]:
        return None
    return tuple(1 if length == -1 else length for length in spec.shape)
