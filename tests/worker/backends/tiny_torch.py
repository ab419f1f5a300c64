"""The tiny model as TorchScript, which tells its input's name and neither its datatype nor its shape."""

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import BIAS, WEIGHT, TinyModel


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHT.copy()))
        self.bias = torch.nn.Parameter(torch.from_numpy(BIAS.copy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def make(folder: Path) -> TinyModel:
    path = script(Tiny(), folder / "tiny.pt")
    stated = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }
    return TinyModel("torch", (path,), stated)


def script(module: torch.nn.Module, path: Path) -> Path:
    """Write a module as TorchScript, which PyTorch calls deprecated and people have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.jit.script(module.eval()).save(path)
    return path


def rewritten(path: Path, to: Path, ends: str, change: Callable[[bytes], bytes]) -> Path:
    """Write a copy of a model's file in which the members with this ending are changed; some must change."""
    changes = 0
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(to, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith(ends):
                changed = change(content)
                changes += changed != content
                content = changed
            bad.writestr(name, content)
    assert changes
    return to
