"""Any model as protocols of tensors see it: what its inputs and outputs are, and how it is asked.

A model whose handler takes raw bodies has BYTES tensors here, one element for each body.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from mms_lite.engine.engine import Engine
from mms_lite.errors import BadTensor, HandlerError
from mms_lite.shared import SharedBytes
from mms_lite.tensors import pack, to_array
from mms_lite.types import BYTES, InferRequest, InferResponse, ModelSpec, Signature, Tensor, TensorSpec

BODY = "body"  # what MMS calls the only part of a request, and wire the only output
_BODIES = Signature((TensorSpec(BODY, BYTES, (-1,)),), (TensorSpec(BODY, BYTES, (-1,)),))
_SHOWN = 2000  # characters of what a handler says with an error
_MOST_AXES = 32  # numpy's own limit before 2.0
_MOST_ELEMENTS = 1 << 40
MOST_INPUTS = 1024  # of a model that takes them under any name
MOST_OUTPUTS = 1024  # that a request may name: what a model of bodies has is known by its answer alone
_MOST_PARTS = 8192  # of the bodies of one request together


def interface(
    engine: Engine, name: str, version: str | None, *, asking: bool = False
) -> tuple[ModelSpec, Signature]:
    """Return what a version is and its inputs and outputs: the model's own, or bodies.

    `asking` as in `Engine.interface`.

    Raises:
        ModelNotFound, VersionNotFound, ModelNotReady: as `Engine.interface`.
    """
    spec, signature = engine.interface(name, version, asking=asking)
    return spec, visible(signature)


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Check that an input's shape is one that arrays have, before anything else is done with it.

    The product of a long list of lengths takes minutes; and numpy, in the worker, only fails.

    Raises:
        BadTensor: it is not.
    """
    if len(shape) > _MOST_AXES:
        raise BadTensor(f"input '{name}' has {len(shape)} axes; {_MOST_AXES} are the most")
    # Only without elements: else there are as many bytes as the lengths say, or another error.
    if 0 in shape and math.prod(length for length in shape if length) > _MOST_ELEMENTS:
        raise BadTensor(f"input '{name}' has lengths that no array has")


def visible(signature: Signature) -> Signature:
    """Return the inputs and outputs that clients see: the model's own, or bodies."""
    return signature if signature.takes_tensors else _BODIES


async def infer(engine: Engine, request: InferRequest) -> InferResponse:
    """Ask a model; each element of BYTES inputs is a body for one that takes bodies.

    Elements of several inputs with the same place are the parts of one request; all go to one version. A
    handler that takes bodies may also be given arrays, if it knows what to do with them.

    Raises:
        ServingError: as `Engine.infer`; BadTensor for inputs with different numbers of bodies, or too many.
    """
    spec, signature = engine.interface(request.model, request.version)
    if not signature.takes_tensors and len(request.inputs) > MOST_INPUTS:
        raise BadTensor(f"the model takes at most {MOST_INPUTS} inputs, got {len(request.inputs)}")
    if any(tensor.datatype == BYTES and not tensor.shape for tensor in request.inputs):
        raise BadTensor("a tensor of datatype BYTES has at least one axis")
    if signature.takes_tensors or any(tensor.datatype != BYTES for tensor in request.inputs):
        answer = await engine.infer(request)
        _check_status(answer)
        return replace(answer, outputs=[_with_axis([each]) for each in answer.outputs])
    _check_bodies(request.inputs, spec)
    bodies = _bodies(replace(request, version=spec.version))
    answers = await _all([engine.infer(each) for each in bodies])
    for each in answers:
        _check_status(each)
    return replace(answers[0], outputs=_joined([each.outputs for each in answers]))


def _check_bodies(inputs: Sequence[Tensor], spec: ModelSpec) -> None:
    """Check that there is room for all bodies, before any of them is made.

    Raises:
        BadTensor: the queue could not even hold them if it were empty, or they have too many parts.
    """
    bodies = max((math.prod(each.shape) for each in inputs), default=0)
    if bodies > spec.queue_size:
        raise BadTensor(f"the model takes at most {spec.queue_size} bodies in a request, got {bodies}")
    parts = bodies * len(inputs)
    if bodies > 1 and parts > max(_MOST_PARTS, spec.queue_size):
        raise BadTensor(f"the bodies of a request have at most {_MOST_PARTS} parts, got {parts}")


def _bodies(request: InferRequest) -> list[InferRequest]:
    """Return a request for each body.

    Raises:
        BadTensor: inputs have different numbers of bodies, or none.
    """
    parts = [[_part(tensor, each) for each in _elements(tensor)] for tensor in request.inputs]
    counts = {len(each) for each in parts}
    if len(counts) != 1 or 0 in counts:
        raise BadTensor("the model takes one body or more, and of each input as many")
    if len(parts[0]) == 1:
        return [replace(request, inputs=[each[0] for each in parts], outputs=None)]
    return [
        replace(request, id=f"{request.id}-{index}", inputs=inputs, outputs=None)
        for index, inputs in enumerate(zip(*parts, strict=True))
    ]


def _elements(tensor: Tensor) -> Any:
    """Return the bodies of an input, which are copied out of shared memory."""
    if isinstance(tensor.data, SharedBytes):
        tensor = replace(tensor, data=tensor.data.view)
    return to_array(tensor).reshape(-1)


def _part(tensor: Tensor, body: bytes) -> Tensor:
    return Tensor(tensor.name, BYTES, (), bytearray(body), tensor.content_type)


async def _all(calls: Sequence[Coroutine[Any, Any, InferResponse]]) -> list[InferResponse]:
    """Return all answers; the first error, or the caller's end, cancels what is open."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        while tasks:  # none is kept: a task has its error, and that this frame
            tasks.pop().cancel()


def _joined(answers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the answers to several bodies as tensors with an element, or a first axis, for each."""
    if len({len(each) for each in answers}) != 1:
        raise HandlerError("the model gave different outputs for the bodies of one request")
    return [_with_axis(column) for column in zip(*answers, strict=True)]


def _with_axis(column: Sequence[Tensor]) -> Tensor:
    first = column[0]
    if first.datatype == BYTES and not first.shape:
        elements = pack(each.data for each in column)
        return Tensor(first.name, BYTES, (len(column),), elements, first.content_type)
    if len(column) == 1:
        return first
    raise HandlerError("the model answered bodies with tensors, which cannot be joined")


def _check_status(answer: InferResponse) -> None:
    """Let an answer that its handler says is an error be one.

    Raises:
        HandlerError: it is.
    """
    if answer.status >= 400:
        said = b"".join(bytes(each.data) for each in answer.outputs).decode("utf-8", "replace")[:_SHOWN]
        raise HandlerError(said or answer.reason or "Prediction failed", status=answer.status)
