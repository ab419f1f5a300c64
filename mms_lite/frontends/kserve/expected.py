"""What a version of a model takes and gives, and what is said of a request that does not fit.

The checks' order and their texts are Triton's (core, InferenceRequest::Normalize): clients compare them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mms_lite.errors import BadTensor
from mms_lite.frontends.message import shown
from mms_lite.frontends.tensor_calls import MOST_INPUTS, MOST_OUTPUTS, visible
from mms_lite.shared import SharedBytes
from mms_lite.tensors import DTYPES, pack
from mms_lite.types import BYTES, ModelSpec, Signature, Tensor, TensorSpec

_LENGTH = struct.Struct("<I")
_MOST_SHOWN = 10  # names that a client made up, in a message
_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended"
    " to each input shape. If you want to specify the full shape including the batch dim in your input dims"
    " config, try setting max_batch_size to zero. See the model configuration docs for more info on"
    " max_batch_size."
)


@dataclass(frozen=True, slots=True)
class Expected:
    """A version's side of every request. It is made once, for `spec` and `signature`.

    `raw` models take bodies: any names, and arrays too if their handler knows them. `labels` are those that
    were looked up, by output.
    """

    spec: ModelSpec
    signature: Signature
    raw: bool
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    required: frozenset[str]
    max_batch_size: int
    labels: dict[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: ModelSpec, signature: Signature) -> Expected:
        """Return it for a version with the signature that `Engine.interface` gives."""
        seen = visible(signature)
        config = spec.config or {}
        optional = {each["name"] for each in config.get("input", ()) if each.get("optional")}
        return cls(
            spec,
            signature,
            not signature.takes_tensors,
            {each.name: each for each in seen.inputs},
            {each.name: each for each in seen.outputs},
            frozenset(each.name for each in seen.inputs) - optional,
            int(config.get("max_batch_size", 0)),
        )

    @property
    def batches(self) -> bool:
        """Whether the first axis of all inputs and outputs is that of a batch."""
        if self.spec.config is not None:
            return bool(self.max_batch_size)
        return not self.raw and has_free_rows(self.signature)

    def check_count(self, names: Sequence[str]) -> None:
        """Check that a request has no more inputs than the model, by their names, before they are read.

        Raises:
            BadTensor: it has.
        """
        if self.raw and len(names) > MOST_INPUTS:
            raise BadTensor(f"the model takes at most {MOST_INPUTS} inputs, got {len(names)}")
        if not self.raw and len(names) > len(self.inputs):
            raise self._wrong_count(_distinct(names))

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Check a request's inputs.

        Raises:
            BadTensor: they do not fit.
        """
        names = _distinct([tensor.name for tensor in inputs])
        if not self.raw:
            self._check_names(inputs, names)
            if self.max_batch_size:
                self._check_batch(inputs)
        elif not inputs:
            raise self._wrong_count(names)
        for tensor in inputs:
            if not self.raw:
                self._check_kind(tensor, self.inputs[tensor.name])
            self._check_size(tensor)

    def check_outputs(self, names: Sequence[str]) -> None:
        """Check the names of the outputs that a request wants.

        Raises:
            BadTensor: there are too many; one is unknown, or is there twice.
        """
        if len(names) > MOST_OUTPUTS:
            raise BadTensor(f"a request wants at most {MOST_OUTPUTS} outputs, got {len(names)}")
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise BadTensor(f"output '{shown(name)}' already exists in request")
            if not self.raw and name not in self.outputs:
                raise self.unexpected_output(name)
            seen.add(name)

    def unexpected_output(self, name: str, known: Iterable[str] | None = None) -> BadTensor:
        """Return the error for the name of an output that is not among the model's, or `known` ones."""
        allowed = ", ".join(self.outputs if known is None else known)
        return BadTensor(f"unexpected inference output '{shown(name)}', allowed outputs are: {allowed}")

    def raw_input(self, body: bytearray | SharedBytes) -> Tensor:
        """Return the one input of a request whose body is nothing but its bytes (binary tensor extension).

        Raises:
            BadTensor: the model has several inputs, or its shape leaves more than one length open; or there
                are no bytes.
        """
        if len(self.inputs) != 1:
            raise BadTensor(
                f"Raw request must only have 1 input (found 1) to be deduced but got {len(self.inputs)}"
                f" inputs in '{self.spec.name}' model configuration"
            )
        (spec,) = self.inputs.values()
        shape = list((-1,) if spec.shape is None else spec.shape)
        if self.max_batch_size or (self.batches and shape.count(-1) > 1):
            shape[0] = 1
        if spec.datatype == BYTES:
            if any(length not in (1, -1) for length in shape):
                raise BadTensor(
                    f"For BYTE datatype raw input '{spec.name}', the model must have input shape [1]"
                )
            data = body.view if isinstance(body, SharedBytes) else body
            return Tensor(spec.name, BYTES, (1,) * len(shape), pack([bytes(data)]))
        if shape.count(-1) > 1:
            raise BadTensor(
                f"The shape of the raw input '{spec.name}' can not be deduced because there are more than one"
                " variable-sized dimension"
            )
        if -1 in shape:
            rest = -math.prod(shape) * DTYPES[spec.datatype].itemsize
            if rest and not len(body):
                raise BadTensor(f"The body of the raw input '{spec.name}' is empty")
            shape[shape.index(-1)] = len(body) // rest if rest else 0
        return Tensor(spec.name, spec.datatype, tuple(shape), body)

    def _check_names(self, inputs: Sequence[Tensor], names: set[str]) -> None:
        if not len(self.required) <= len(inputs) <= len(self.inputs):
            raise self._wrong_count(names)
        for tensor in inputs:
            if tensor.name not in self.inputs:
                allowed, name = ", ".join(self.inputs), shown(tensor.name)
                raise BadTensor(f"unexpected inference input '{name}', allowed inputs are: {allowed}")
        if not self.required <= names:
            raise self._wrong_count(names)

    def _wrong_count(self, names: set[str]) -> BadTensor:
        most, least = len(self.inputs), len(self.required)
        counts = (
            f"expected {most} inputs"
            if most == least
            else f"expected number of inputs between {least} and {most}"
        )
        missing = [name for name in self.inputs if name in self.required and name not in names]
        return BadTensor(
            f"{counts} but got {len(names)} inputs for model '{self.spec.name}'. Got input(s)"
            f" {_quoted(sorted(names))}, but missing required input(s) {_quoted(missing)}. Please provide all"
            " required input(s)."
        )

    def _check_batch(self, inputs: Sequence[Tensor]) -> None:
        model, rows = self.spec.name, None
        for tensor in inputs:
            if not tensor.shape:
                raise BadTensor(
                    f"input '{tensor.name}' has no shape but model requires batch dimension for '{model}'"
                )
            if rows is None:
                rows = tensor.shape[0]
            elif tensor.shape[0] != rows:
                raise BadTensor(f"input '{tensor.name}' batch size does not match other inputs for '{model}'")
        if rows is not None and rows > self.max_batch_size:
            raise BadTensor(f"inference request batch-size must be <= {self.max_batch_size} for '{model}'")

    def _check_kind(self, tensor: Tensor, spec: TensorSpec) -> None:
        """Check datatype and shape."""
        model = self.spec.name
        if tensor.datatype != spec.datatype:
            raise BadTensor(
                f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{model}'"
                f" expects '{spec.datatype}'"
            )
        want, have = spec.shape, tensor.shape
        if want is None or want == have:
            return
        if len(want) != len(have) or any(w not in (h, -1) for w, h in zip(want, have, strict=True)):
            note = f" {_NOTE}" if self.max_batch_size else ""
            raise BadTensor(
                f"unexpected shape for input '{tensor.name}' for model '{model}'. Expected {_shape(want)},"
                f" got {_shape(have)}.{note}"
            )

    def _check_size(self, tensor: Tensor) -> None:
        data, model = tensor.data, self.spec.name
        if tensor.datatype == BYTES:
            view = data.view if isinstance(data, SharedBytes) else memoryview(data).cast("B")
            _check_elements(
                view, math.prod(tensor.shape), f"for inference input '{tensor.name}' for model '{model}'"
            )
            return
        dtype = DTYPES.get(tensor.datatype)
        if dtype is None:
            raise BadTensor(f"invalid datatype for input {tensor.name}: {tensor.datatype}")
        size = tensor.nbytes
        needed = math.prod(tensor.shape) * dtype.itemsize
        if size != needed:
            raise BadTensor(
                f"input byte size mismatch for input '{tensor.name}' for model '{model}'. Expected {needed},"
                f" got {size}"
            )


def has_free_rows(signature: Signature) -> bool:
    """Tell whether the first axis of every input and output is free, as that of a batch is."""
    specs = (*signature.inputs, *signature.outputs)
    return bool(specs) and all(spec.shape is not None and spec.shape[:1] == (-1,) for spec in specs)


def _check_elements(data: memoryview, count: int, where: str) -> None:
    """Check that the data of a BYTES tensor holds so many elements, each after its length.

    Raises:
        BadTensor: it holds others.
    """
    at, found, size = 0, 0, len(data)
    while at < size:
        if found == count:
            raise BadTensor(f"unexpected number of string elements {found + 1} {where}, expecting {count}")
        if size - at < _LENGTH.size:
            raise BadTensor(
                f"incomplete string length indicator {where}, expecting {_LENGTH.size} bytes but only"
                f" {size - at} bytes available."
            )
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > size - at:
            raise BadTensor(
                f"incomplete string data {where}, expecting string of length {length} but only {size - at}"
                " bytes available."
            )
        at += length
        found += 1
    if found != count:
        raise BadTensor(f"expected {count} string elements {where}, got {found}")


def _distinct(names: Sequence[str]) -> set[str]:
    """Return the names of inputs.

    Raises:
        BadTensor: one is there twice.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadTensor(f"input '{shown(name)}' already exists in request")
        seen.add(name)
    return seen


def _quoted(names: Sequence[str]) -> str:
    told = [f"'{shown(name)}'" for name in names[:_MOST_SHOWN]]
    more = len(names) - len(told)
    return f"[{','.join(told)}{f',... and {more} more' if more else ''}]"


def _shape(lengths: Sequence[Any]) -> str:
    return "[" + ",".join(map(str, lengths)) + "]"
