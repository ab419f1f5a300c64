"""Read the arrays of a PyTorch checkpoint of the format before 1.6, without PyTorch.

Such a file is pickled, and unpickling runs what the file names: this reader knows three names.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGES = {"FloatStorage": "<f4", "LongStorage": "<i8"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where an array lies: in which storage, from which element on, and its shape and strides in elements."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unpickler(pickle.Unpickler):
    """Build dicts, numbers, strings and tensors, and nothing else; collects the storages that it meets."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, np.dtype[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Resolve the three kinds of names in a checkpoint of weights.

        Raises:
            pickle.UnpicklingError: for any other name.
        """
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise pickle.UnpicklingError(f"a checkpoint of weights has no use for {module}.{name}")

    def persistent_load(self, pid: Any) -> str:
        """Note a storage, of which are told kind, type, key, device, length and view, and return its key."""
        _kind, dtype, key, _device, _length, _view = pid
        self.storages[key] = dtype
        return str(key)


def rebuild_tensor(storage: str, offset: int, shape: Any, strides: Any, *_rest: Any) -> Tensor:
    """Stand in for torch._utils._rebuild_tensor_v2."""
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def read(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read a state dict.

    Raises:
        ValueError: if the file is not a checkpoint of this format.
        pickle.UnpicklingError: if it names anything but arrays.
    """
    load: Callable[[], Any] = lambda: Unpickler(file).load()  # noqa: E731
    if load() != MAGIC or load() != PROTOCOL:
        raise ValueError("this is not a PyTorch checkpoint of the format before 1.6")
    load()  # the sizes of C types where it was written; the storages' types say it all
    unpickler = Unpickler(file)
    tensors = unpickler.load()
    buffers = {}
    for key in load():  # the storages follow in this order: a count, then the elements
        count = int.from_bytes(file.read(8), "little")
        dtype = unpickler.storages[key]
        buffers[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    return {name: view(tensor, buffers[tensor.storage]) for name, tensor in tensors.items()}


def view(tensor: Tensor, buffer: np.ndarray) -> np.ndarray:
    """Return a tensor's array; its elements must lie inside the storage."""
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
    if min(tensor.shape, default=1) < 1 or min((tensor.offset, *tensor.strides)) < 0 or last >= len(buffer):
        raise ValueError("a tensor reaches out of its storage")
    strides = [stride * buffer.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(buffer[tensor.offset :], tensor.shape, strides)
