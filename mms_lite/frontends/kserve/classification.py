"""The classification extension: the highest elements of an output, each with its index and its label."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mms_lite.errors import BadTensor
from mms_lite.tensors import DTYPES, Array, pack
from mms_lite.types import BYTES, ModelSpec, Tensor

_KINDS = "iuf"  # of numpy's types: those whose elements have an order
_MOST_CLASSES = 100_000  # texts in an answer


def classify(tensor: Tensor, count: int, labels: Sequence[str], *, batched: bool) -> Tensor:
    """Return the `count` highest elements, each as "value:index[:label]", the highest first.

    With `batched` they are those of each row, and the shape is [rows, count], else [count]; there are no more
    than elements. Of equal elements the first comes first (Triton, classification extension).

    Raises:
        BadTensor: the output's elements have no order, or the answer would be too long.
    """
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None or dtype.kind not in _KINDS:
        raise BadTensor(f"class result not available for output due to unsupported type '{tensor.datatype}'")
    batched = batched and bool(tensor.shape)
    rows = tensor.shape[0] if batched else 1
    each = math.prod(tensor.shape[1:] if batched else tensor.shape)
    kept = min(count, each)
    if rows * kept > _MOST_CLASSES:
        raise BadTensor(
            f"output '{tensor.name}' would be {rows * kept} classes; {_MOST_CLASSES} are the most"
        )
    values = np.frombuffer(tensor.data, dtype).reshape(rows, each)
    order = _highest(values, kept)
    highest = np.take_along_axis(values, order, 1).reshape(-1).tolist()
    spelt = (_spell(*one, labels).encode() for one in zip(highest, order.reshape(-1).tolist(), strict=True))
    return Tensor(tensor.name, BYTES, (rows, kept) if batched else (kept,), pack(spelt))


def _highest(values: Array, count: int) -> Array:
    """Return the indices of each row's highest elements [rows,count]."""
    # Backwards, so that a stable order from the lowest up has the first of equal elements at its end.
    return values.shape[1] - 1 - np.argsort(values[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]


def _spell(value: float, index: int, labels: Sequence[str]) -> str:
    number = f"{value:f}" if isinstance(value, float) else str(value)
    return f"{number}:{index}:{labels[index]}" if index < len(labels) else f"{number}:{index}"


def read_labels(spec: ModelSpec, output: str) -> list[str]:
    """Return the labels of an output's indices: of a Triton repository's model, or of an archive; else none.

    It reads files, so it blocks.
    """
    model = (spec.manifest or {}).get("model")
    if not isinstance(model, Mapping):
        return []
    named = model.get("labelsByOutput")
    if isinstance(named, Mapping):
        return [str(label) for label in named.get(output, ())]
    if not isinstance(model.get("labels"), str):
        return []
    config: Any = model.get("handlerConfig")
    offset = config.get("label_offset", 0) if isinstance(config, Mapping) else 0
    background = [""] * offset if isinstance(offset, int) else []  # classes that the labels leave out
    return [*background, *_read(spec, model["labels"])]


def _read(spec: ModelSpec, name: str) -> list[str]:
    """Return the lines of a model's file, or the texts of its JSON list; nothing if it is no such file."""
    folder = Path(spec.path).resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return [str(label) for label in json.loads(text)]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return text.splitlines()
