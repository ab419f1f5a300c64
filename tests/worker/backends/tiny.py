"""The tiny model that every backend is tried with: y = x W + b, x FP32 [-1,3], y FP32 [-1,2].

`tiny_<backend>.py` beside this file has `make(folder)`, which writes it in that framework's format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WEIGHT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
BIAS = np.array([0.5, -0.5], np.float32)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """Its files (the primary first), what the handler config must state, and the names of its tensors."""

    backend: str
    files: tuple[Path, ...]
    stated: Mapping[str, Any] = field(default_factory=dict)
    input: str = "x"
    output: str = "y"


def answer(x: np.ndarray) -> np.ndarray:
    """Return what the model must answer."""
    return x @ WEIGHT + BIAS
