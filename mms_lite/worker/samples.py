"""Sample requests that an archive brings: a model is ready only when it has answered each of them.

They are files named by the manifest; what a client would send as a body.
"""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mms_lite.errors import InvalidArchive
from mms_lite.types import BYTES, InferRequest, Tensor
from mms_lite.wire import Item, Outcome

_KINDS = {".npy": "application/x-npy", ".npz": "application/x-npz"}


class Model(Protocol):
    """What samples are tried on."""

    def run(self, items: list[Item], started: Any, emit: Any) -> None:
        """Answer a batch."""


def read(folder: str, manifest: Mapping[str, Any] | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each sample of a manifest, and the body of its request.

    Raises:
        InvalidArchive: a sample is not in the archive.
    """
    model = (manifest or {}).get("model")
    names = model.get("samples") if isinstance(model, Mapping) else None
    for name in names or ():
        path = os.path.realpath(os.path.join(folder, str(name)))
        if not path.startswith(os.path.realpath(folder) + os.sep) or not os.path.isfile(path):
            raise InvalidArchive(f"the sample {name} is not in the archive")
        yield str(name), body(path)


def body(path: str) -> Tensor:
    """Return the body of a request that sends a file, with the content type of its suffix."""
    kind = _KINDS.get(os.path.splitext(path)[1]) or mimetypes.guess_type(path)[0] or ""
    with open(path, "rb") as file:
        return Tensor("body", BYTES, (), bytearray(file.read()), kind)


def run(model: Model, folder: str, manifest: Mapping[str, Any] | None) -> None:
    """Have the model answer every sample, each as a batch of its own.

    Raises:
        InvalidArchive: it fails on one.
    """
    for name, sent in read(folder, manifest):
        outcomes: list[Outcome] = []
        item = Item(0, None, InferRequest(id=f"sample-{name}", model="", inputs=[sent]))
        model.run([item], _ignore, outcomes.extend)
        fault = _fault(outcomes)
        if fault:
            raise InvalidArchive(f"the model fails on its sample {name}: {fault}")


def _fault(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "it gives no answer"
    error = outcomes[-1].error
    if error is not None:
        return error.message
    return f"it answers with status {outcomes[-1].status}" if outcomes[-1].status >= 400 else ""


def _ignore(job_ids: Iterable[int]) -> None:
    """Take no note of what starts: a load has its own time-out."""
