"""The tiny model as a checkpoint of MXNet's, with the signature.json that an MMS package has beside it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny import BIAS, WEIGHT, TinyModel

from mms_lite.worker.backends.mxnet import mx


def make(folder: Path) -> TinyModel:
    symbol = mx.sym.FullyConnected(mx.sym.var("x"), num_hidden=2, name="y")
    files = save(folder, symbol, {"arg:y_weight": WEIGHT.T, "arg:y_bias": BIAS})
    sign(folder, x=[0, 3])
    return TinyModel("mxnet", files, output="y_output")


def save(folder: Path, symbol: Any, parameters: dict[str, np.ndarray]) -> tuple[Path, Path]:
    """Write a symbol and its parameters, whose names begin with `arg:` or `aux:`."""
    files = folder / "tiny-symbol.json", folder / "tiny-0000.params"
    symbol.save(str(files[0]))
    mx.nd.save(str(files[1]), {name: on_device(array) for name, array in parameters.items()})
    return files


def sign(folder: Path, **shapes: list[int]) -> None:
    """Write a signature.json."""
    inputs = [{"data_name": name, "data_shape": shape} for name, shape in shapes.items()]
    (folder / "signature.json").write_text(json.dumps({"inputs": inputs}))


def on_device(array: np.ndarray) -> Any:
    """Return MXNet's copy of an array; `mx.nd.array` warns of what it imports from scipy."""
    copy = mx.nd.empty(array.shape, dtype=array.dtype)
    copy[:] = array
    return copy
