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


def _classifier(recipe: str, file: str, backend: str, config: Mapping[str, Any]) -> Archive:
    """Return a network that was trained on ImageNet."""
    whole = {"crop": 0.875, "interpolation": "bicubic", **config}
    labels = ("imagenet_labels", "labels.txt")
    return Archive(recipe, (file,), backend, "image_classifier", whole, labels, sample=COFFEE)


def _detector(backend: str, *files: str) -> Archive:
    config = {"label_offset": 1, "size": 300, "interpolation": "opencv-linear"}
    recipe = "ssd_mobilenet_v2_coco"
    labels = (recipe, "coco_labels.txt")
    return Archive(recipe, files, backend, "object_detector", config, labels, sample=COFFEE)


def _in_mxnet(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config for Gluon's networks: they end in scores, and their files state no shape."""
    data = {"name": "data", "datatype": "FP32", "shape": [-1, 3, config["size"], config["size"]]}
    return {**config, "backend": {"inputs": [data]}, "softmax": True}


_ONNX = ("onnxruntime", "openvino", "opencv")
_IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_RESNET = {**_IMAGENET, "size": 224}
_SQUEEZENET = {**_IMAGENET, "size": 227}
_LITE = {"size": 224, "mean": 127, "std": 128}
_MOBILENET = {"size": 224, "mean": 128, "std": 128, "softmax": True, "label_offset": 1}

ARCHIVES: dict[str, Archive] = {
    **{f"resnet50-{each}": _classifier("resnet50_onnx", "resnet50.onnx", each, _RESNET) for each in _ONNX},
    "resnet50-torch-pt": _classifier("resnet50_torch", "resnet50.pt", "torch", _RESNET),
    "resnet50-torch-pt2": _classifier("resnet50_torch", "resnet50.pt2", "torch", _RESNET),
    "resnet50-mxnet": _classifier("resnet50_v1", "resnet50_v1-symbol.json", "mxnet", _in_mxnet(_RESNET)),
    **{
        f"squeezenet-{each}": _classifier("squeezenet1_1_onnx", "squeezenet1.1.onnx", each, _SQUEEZENET)
        for each in _ONNX
    },
    "squeezenet-torch-pt": _classifier("squeezenet1_1_torch", "squeezenet1.1.pt", "torch", _SQUEEZENET),
    "squeezenet-torch-pt2": _classifier("squeezenet1_1_torch", "squeezenet1.1.pt2", "torch", _SQUEEZENET),
    "squeezenet-mxnet": _classifier(
        "squeezenet1_1", "squeezenet1_1-symbol.json", "mxnet", _in_mxnet(_SQUEEZENET)
    ),
    **{
        f"efficientnet_lite0-{each}": _classifier(
            "efficientnet_lite0_onnx", "efficientnet_lite0.onnx", each, _LITE
        )
        for each in _ONNX
    },
    "mobilenet_v1-openvino": _classifier("mobilenet_v1_tf", "mobilenet_v1.pb", "openvino", _MOBILENET),
    "mobilenet_v1-opencv": _classifier("mobilenet_v1_tf", "mobilenet_v1.pb", "opencv", _MOBILENET),
    "ssd_mobilenet_v2-opencv": _detector(
        "opencv", "frozen_inference_graph.pb", "frozen_inference_graph.pbtxt"
    ),
    "ssd_mobilenet_v2-openvino": _detector("openvino", "frozen_inference_graph.pb"),
    "ppocr_det-onnxruntime": Archive("ppocr_v4", ("det.onnx",), "onnxruntime", "text_detector"),
    "ppocr_rec-onnxruntime": Archive("ppocr_v4", ("rec.onnx",), "onnxruntime", "text_recognizer"),
    "minilm-onnxruntime": Archive(
        "minilm_l6_v2", ("model.onnx",), "onnxruntime", "text_embedder", extra=("tokenizer.json",)
    ),
}


def command(name: str, export_path: Path) -> list[str]:
    """Return the model-archiver command for an archive, having fetched its weights."""
    archive = ARCHIVES[name]
    folder = cached(archive.recipe)
    given = ["--model-name", name]
    given += ["--backend", archive.backend, "--handler", archive.handler]
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
