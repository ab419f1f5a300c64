"""Pack published models without code: one model-archiver command each, printed before it is run.

    python examples/weights/archives.py squeezenet-onnxruntime --export-path model-archives

What is here of a model is what its makers say of it: preprocessing, outputs, labels.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from weights.cache import cached

COFFEE = Path(__file__).resolve().parent.parent / "photos" / "coffee.png"

_IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_CENTRE = {"crop": 0.875, "interpolation": "bicubic"}


@dataclass(frozen=True, slots=True)
class Archive:
    """One model in one backend. `recipe` names its weights, `labels` and `extra` further recipes' files."""

    recipe: str
    files: tuple[str, ...]
    backend: str
    handler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, str] | None = None  # recipe, file
    extra: tuple[str, ...] = ()
    sample: Path | None = None


def _input(name: str, *shape: int) -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": "FP32", "shape": [-1, *shape]}]}


def _classifiers() -> dict[str, Archive]:
    """Return four networks trained on ImageNet, each in all backends that can load it."""
    labels = ("imagenet_labels", "labels.txt")
    found = {}
    for name, stem, mxnet_name, size in (
        ("resnet50", "resnet50", "resnet50_v1", 224),
        ("squeezenet", "squeezenet1.1", "squeezenet1_1", 227),
    ):
        config = {**_CENTRE, **_IMAGENET, "size": size}
        onnx = f"{mxnet_name if name == 'squeezenet' else name}_onnx"
        torch = onnx.replace("_onnx", "_torch")
        shaped = {**config, "backend": _input("data", 3, size, size)}
        for backend in ("onnxruntime", "openvino", "opencv"):
            found[f"{name}-{backend}"] = Archive(
                onnx, (f"{stem}.onnx",), backend, "image_classifier", config, labels, sample=COFFEE
            )
        for ending in ("pt", "pt2"):
            found[f"{name}-torch-{ending}"] = Archive(
                torch, (f"{stem}.{ending}",), "torch", "image_classifier", config, labels, sample=COFFEE
            )
        found[f"{name}-mxnet"] = Archive(
            mxnet_name,
            (f"{mxnet_name}-symbol.json",),
            "mxnet",
            "image_classifier",
            {**shaped, "softmax": True},
            labels,
            sample=COFFEE,
        )
    lite = {**_CENTRE, "size": 224, "mean": 127, "std": 128}
    mobile = {**_CENTRE, "size": 224, "mean": 128, "std": 128, "softmax": True, "label_offset": 1}
    for backend in ("onnxruntime", "openvino", "opencv"):
        found[f"efficientnet_lite0-{backend}"] = Archive(
            "efficientnet_lite0_onnx",
            ("efficientnet_lite0.onnx",),
            backend,
            "image_classifier",
            lite,
            labels,
            sample=COFFEE,
        )
    for backend in ("openvino", "opencv"):
        found[f"mobilenet_v1-{backend}"] = Archive(
            "mobilenet_v1_tf",
            ("mobilenet_v1.pb",),
            backend,
            "image_classifier",
            mobile,
            labels,
            sample=COFFEE,
        )
    return found


def _others() -> dict[str, Archive]:
    """Return detection, reading and embedding."""
    ssd, coco = "ssd_mobilenet_v2_coco", ("ssd_mobilenet_v2_coco", "coco_labels.txt")
    graph = "frozen_inference_graph.pb"
    found_by = {"label_offset": 1, "size": 300, "interpolation": "opencv-linear"}
    return {
        "ssd_mobilenet_v2-opencv": Archive(
            ssd, (graph, f"{graph}txt"), "opencv", "object_detector", found_by, coco, sample=COFFEE
        ),
        "ssd_mobilenet_v2-openvino": Archive(
            ssd, (graph,), "openvino", "object_detector", found_by, coco, sample=COFFEE
        ),
        "ppocr_det-onnxruntime": Archive("ppocr_v4", ("det.onnx",), "onnxruntime", "text_detector"),
        "ppocr_rec-onnxruntime": Archive("ppocr_v4", ("rec.onnx",), "onnxruntime", "text_recognizer"),
        "minilm-onnxruntime": Archive(
            "minilm_l6_v2", ("model.onnx",), "onnxruntime", "text_embedder", extra=("tokenizer.json",)
        ),
    }


ARCHIVES: dict[str, Archive] = {**_classifiers(), **_others()}


def command(name: str, export_path: Path) -> list[str]:
    """Return the model-archiver command for an archive, having fetched its weights."""
    archive = ARCHIVES[name]
    folder = cached(archive.recipe)
    given = [
        "--model-name",
        name.replace(".", "_"),
        "--backend",
        archive.backend,
        "--handler",
        archive.handler,
    ]
    for file in archive.files:
        given += ["--model-file", str(folder / file)]
    for file in archive.extra:
        given += ["--extra-file", str(folder / file)]
    if archive.labels is not None:
        recipe, file = archive.labels
        given += ["--labels", str(cached(recipe) / file)]
    if archive.config:
        given += ["--handler-config", json.dumps(archive.config)]
    if archive.sample is not None:
        given += ["--sample", str(archive.sample)]
    return [str(Path(sys.executable).parent / "model-archiver"), *given, "--export-path", str(export_path)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(description="Fetch a published model and pack it without code.")
    parser.add_argument(
        "names", nargs="+", choices=sorted(ARCHIVES), metavar="NAME", help=", ".join(ARCHIVES)
    )
    parser.add_argument("--export-path", type=Path, default=Path("model-archives"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.export_path.mkdir(exist_ok=True)
    for name in options.names:
        call = [*command(name, options.export_path), "--force"]
        print(f"$ {shlex.join(['model-archiver', *call[1:]])}", flush=True)
        if status := subprocess.run(call, check=False).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
