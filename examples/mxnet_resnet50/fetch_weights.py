"""Put published ImageNet weights, ported to MXNet, into a model folder for model-archiver.

Weights are not kept in this repository: examples/weights fetches them once into a cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package `weights` is

from weights.cache import cached, default_cache, place
from weights.fetch import add_cache_option, status
from weights.recipes import RECIPES

__all__ = ["default_cache", "main"]

HERE = Path(__file__).resolve().parent
HANDLER_FOLDER = HERE / "mxnet_resnet50"
HANDLER_FILES = ("__init__.py", "img_classifier_service.py", "classes.json")
MODEL_STORE = HERE.parent / "model-archives"
MODEL_FOLDERS = {"resnet50_v1": HANDLER_FOLDER, "squeezenet1_1": HERE / "mxnet_squeezenet"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(description="Fetch ImageNet weights and put them into a model folder.")
    parser.add_argument("name", nargs="?", choices=sorted(MODEL_FOLDERS), default="resnet50_v1")
    add_cache_option(parser)
    options = parser.parse_args(arguments)
    return status("fetch_weights.py", lambda: fill(options.name, cached(options.name, options.cache)))


def fill(name: str, weights: Path) -> None:
    """Copy the weights into the model folder, with the handler where the folder is not the handler's own."""
    folder = MODEL_FOLDERS[name]
    sources = [weights / file for file in RECIPES[name].files]
    if folder != HANDLER_FOLDER:
        sources += [HANDLER_FOLDER / file for file in HANDLER_FILES]
    MODEL_STORE.mkdir(exist_ok=True)  # model-archiver wants its --export-path to exist
    folder.mkdir(exist_ok=True)
    for source in sources:
        place(source, folder)
    print(f"{name} is in {os.path.relpath(folder)}")


if __name__ == "__main__":
    sys.exit(main())
