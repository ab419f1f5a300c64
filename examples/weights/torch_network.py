"""Run a network in PyTorch and write it in its two formats; apart because it imports torch."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from .networks import NO_PADS, Network, Pads


class TorchNetwork(torch.nn.Module):
    """The layers of networks.py as PyTorch's functions; the arrays are the module's buffers."""

    def __init__(self, network: Network, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self._network = network
        for name, value in arrays.items():
            self.register_buffer(attribute(name), torch.tensor(np.ascontiguousarray(value)))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        probabilities: torch.Tensor = self._network.layers(self, data)
        return probabilities

    def weights(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, attribute(f"{layer}/kernel")), getattr(self, attribute(f"{layer}/bias"))

    def conv(
        self, value: torch.Tensor, name: str, *, stride: int = 1, pads: Pads = NO_PADS, groups: int = 1
    ) -> torch.Tensor:
        above, left, below, right = pads
        if pads != NO_PADS:
            value = functional.pad(value, (left, right, above, below))
        return functional.conv2d(value, *self.weights(name), stride=stride, groups=groups)

    def relu(self, value: torch.Tensor) -> torch.Tensor:
        return functional.relu(value)

    def relu6(self, value: torch.Tensor) -> torch.Tensor:
        return functional.relu6(value)

    def max_pool(self, value: torch.Tensor, pads: Pads = NO_PADS) -> torch.Tensor:
        above, left, below, right = pads
        value = functional.pad(value, (left, right, above, below), value=-math.inf)
        return functional.max_pool2d(value, 3, 2)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right

    def concat(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.cat((left, right), 1)

    def mean(self, value: torch.Tensor, window: int = 0) -> torch.Tensor:
        return value[:, :, : window or None, : window or None].mean((2, 3))

    def dense(self, value: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(value, *self.weights(name))

    def softmax(self, value: torch.Tensor) -> torch.Tensor:
        return functional.softmax(value, 1)


def attribute(name: str) -> str:
    """Turn an array's name into that of an attribute."""
    return name.replace("/", "_").replace(".", "_")


def write(network: Network, arrays: dict[str, np.ndarray], prefix: Path) -> tuple[Path, Path]:
    """Write `prefix`.pt (TorchScript) and `prefix`.pt2 (an exported program), for any number of images."""
    module = TorchNetwork(network, arrays).eval()
    example = torch.zeros(2, 3, network.size, network.size)
    script, program = Path(f"{prefix}.pt"), Path(f"{prefix}.pt2")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated; many files are of it
        torch.jit.trace(module, example).save(str(script))
        batch = {"data": {0: torch.export.Dim("N")}}
        torch.export.save(torch.export.export(module, (example,), dynamic_shapes=batch), program)
    return script, program


def classify(path: Path, data: np.ndarray) -> np.ndarray:
    """Run a file of either kind on `data` [N, 3, size, size]; return the probabilities [N, 1000]."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(str(path))
        return np.asarray(net(torch.tensor(data)))
