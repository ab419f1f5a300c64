"""Small nets for image handlers, of which one can tell the answer by looking, and how they are opened."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnx
from onnx_files import FLOAT, Node, write
from PIL import Image

from mms_lite.handlers.model_handler import ModelHandler
from mms_lite.worker.context import Context

PHOTOS = Path(__file__).parents[3] / "examples" / "photos"
COLORS = ("red", "green", "blue")

Handler = TypeVar("Handler", bound=ModelHandler)


def mean_color(
    path: Path,
    *,
    rows: int | str = "N",
    size: Sequence[int | str] = (8, 8),
    layout: str = "NCHW",
    kind: int = FLOAT,
    gives: int = FLOAT,
    last: Sequence[onnx.NodeProto] = (),
    weights: Mapping[str, Any] | None = None,
) -> Path:
    """Write a net whose output `prob` [rows,3] is the mean of each channel; `last` goes from mean to prob.

    `kind` and `gives` are the element types of input and output.
    """
    shape = [rows, 3, *size] if layout == "NCHW" else [rows, *size, 3]
    axes = [2, 3] if layout == "NCHW" else [1, 2]
    nodes = [
        Node("Cast", ["data"], ["values"], to=FLOAT),
        Node("ReduceMean", ["values"], ["mean"], axes=axes, keepdims=0),
        *(last or [Node("Identity", ["mean"], ["prob"])]),
    ]
    return write(path, nodes, {"data": (kind, shape)}, {"prob": (gives, [rows, 3])}, weights)


def opened(cls: type[Handler], model: Path, labels: Sequence[str] | None = COLORS, **config: Any) -> Handler:
    """Return a handler that has loaded a model, as out of an archive in the model's folder."""
    handler = cls()
    handler.initialize(context(model, labels, **config))
    return handler


def context(model: Path, labels: Sequence[str] | None = COLORS, **config: Any) -> Context:
    """Return the context of an archive of this model."""
    manifest: dict[str, Any] = {
        "backend": "onnxruntime",
        "modelFiles": [model.name],
        "handlerConfig": config,
    }
    if labels is not None:
        (model.parent / "labels.json").write_text(json.dumps(labels))
        manifest["labels"] = "labels.json"
    return Context("model", str(model.parent), {"model": manifest}, 1, None, "1")


def answers(handler: ModelHandler, *bodies: Any) -> list[Any]:
    """Have a handler answer bodies as one batch."""
    return handler.handle([{"body": body} for body in bodies], Context("model", "", None, 1, None, "1"))


def png(color: str | tuple[int, int, int], size: tuple[int, int] = (20, 20)) -> bytearray:
    """Return a PNG file of one colour."""
    return encoded(Image.new("RGB", size, color))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytearray:
    """Return a picture as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return bytearray(file.getvalue())
