"""What a model says of itself that the configuration of its Triton repository leaves out (auto-completion).

Apart from the backends: for Python code it is what its class adds, for all others what their files tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mms_lite.types import BYTES, Signature, TensorSpec

_FIELDS: dict[str, Any] = {"max_batch_size": 0, "input": [], "output": [], "dynamic_batching": None}


def completed(
    config: Mapping[str, Any] | None, own: Mapping[str, Any] | None, signature: Signature
) -> dict[str, Any]:
    """Return the fields of a ModelConfig that differ from `config`; none for models without one.

    `own` is the configuration as the model's code has completed it. Without it the tensors of `signature`
    stand for those of a side of which the configuration says nothing.
    """
    if config is None:
        return {}
    if own is not None:
        return {
            field: own[field]
            for field, default in _FIELDS.items()
            if own.get(field, default) != config.get(field, default)
        }
    batched = config.get("max_batch_size", 0) > 0
    sides = {"input": signature.inputs, "output": signature.outputs}
    return {
        side: [described(spec, batched=batched) for spec in specs]
        for side, specs in sides.items()
        if specs and not config.get(side)
    }


def described(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    """Return a tensor as a ModelConfig states it, whose dims have no axis for the batch."""
    dims = [-1] if spec.shape is None else list(spec.shape[batched:])
    return {"name": spec.name, "data_type": data_type(spec.datatype), "dims": dims}


def data_type(datatype: str) -> str:
    """Return what a ModelConfig calls a datatype of KServe v2."""
    return "TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}"
