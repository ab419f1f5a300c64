"""Which requests may run in one batch, and how much of it each takes: a rule for each kind of model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mms_lite.shared import SharedBytes
from mms_lite.types import BYTES, InferRequest


def size_and_key(request: InferRequest, config: Mapping[str, Any] | None) -> tuple[int, Any]:
    """Return how many rows of a batch a request fills, and what it must share with others to join them.

    `config` is that of a model of a Triton repository. Such models are given what each request of a batch
    wants, so nothing but its tensors keeps one apart; without a max_batch_size, the first axis is no batch's.
    """
    if config is not None:
        return (rows(request) if config["max_batch_size"] else 1), tensor_key(request)
    plain = request.outputs is None and not request.parameters
    if plain and len(request.inputs) == 1 and not request.inputs[0].shape:  # one raw part
        return 1, None
    return rows(request), batch_key(request)


def rows(request: InferRequest) -> int:
    """Return how many rows of a batch the request fills: its tensors' first axis, 1 for raw parts.

    Where tensors disagree, their first axis is not that of a batch: the most that one has.
    """
    return max(1, max((t.shape[0] for t in request.inputs if t.shape), default=1))


def batch_key(request: InferRequest) -> Any:
    """Return what two requests must share to run in one batch: None for raw parts without options."""
    tensors, raw = tensor_key(request)
    if not tensors and not request.parameters and request.outputs is None:
        return None
    options = json.dumps(request.parameters, sort_keys=True, default=str) if request.parameters else ""
    return tensors, raw, tuple(request.outputs) if request.outputs is not None else None, options


def tensor_key(request: InferRequest) -> tuple[Any, bool]:
    """Return what tensors have but for their first axis, and whether there are raw parts."""
    tensors = tuple((t.name, t.datatype, t.shape[1:]) for t in request.inputs if t.shape)
    return tensors, any(t.datatype == BYTES and not t.shape for t in request.inputs)


def data_bytes(request: InferRequest) -> int:
    """Return the bytes of its tensors that would cross a socket: what lies in shared memory does not."""
    return sum(each.nbytes for each in request.inputs if type(each.data) is not SharedBytes)
