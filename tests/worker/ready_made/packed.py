"""A model file as `model-archiver --model-file` packs it, unpacked and loaded by a ready-made handler."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mms_lite.tensors import to_tensor
from mms_lite.types import InferRequest, Tensor
from mms_lite.wire import Item, Outcome
from mms_lite.worker import handler
from mms_lite.worker.handler import MmsHandler


def load(
    kind: str, folder: Path, config: Mapping[str, Any] | None = None, labels: str | None = None
) -> MmsHandler:
    """Load the model.onnx of a folder with a ready-made handler."""
    model = {"backend": "onnxruntime", "modelFiles": ["model.onnx"], "handlerConfig": dict(config or {})}
    if labels is not None:
        (folder / "labels.txt").write_text(labels, encoding="utf-8")
        model["labels"] = "labels.txt"
    settings = {
        "name": "m",
        "path": str(folder),
        "handler": kind,
        "manifest": {"model": model},
        "batch_size": 8,
        "device": None,
        "isolate_failures": True,
        "decode_input_request": True,
    }
    return handler.load(settings)


def ask(model: MmsHandler, *bodies: Any, kind: str = "") -> list[Outcome]:
    """Ask a batch: each body is bytes of this content type, or an array, or an image to be sent as PNG."""
    items = [
        Item(n, None, InferRequest(id=f"r{n}", model="m", inputs=[_part(body, kind)]))
        for n, body in enumerate(bodies)
    ]
    outcomes: list[Outcome] = []
    model.run(items, lambda _: None, outcomes.extend)
    return sorted(outcomes, key=lambda each: each.job_id)


def _part(body: Any, kind: str) -> Tensor:
    if isinstance(body, np.ndarray):
        return to_tensor("input", body)
    return Tensor("body", "BYTES", (), bytearray(body), kind)


def png(pixels: np.ndarray) -> bytes:
    """Return uint8 RGB [height, width, 3], or grey [height, width], as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
