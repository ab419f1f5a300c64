"""Fetch SqueezeNet, pack it without code and with a handler derived from the ready-made one, ask both.

Every command is printed as it can be typed in this folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where serving.py is

from serving import Shell, shell_of

STORE = "model-archives"
PHOTO = "../photos/coffee.png"


def main() -> None:
    """Run the example."""
    shell = shell_of(Path(__file__), onnxruntime="onnx,weights")
    shell.run("python", "fetch_weights.py")
    shell.run("mkdir", "-p", STORE)
    pack(shell, "squeezenet", "image_classifier")
    pack(shell, "best_name", "service:BestName", "--extra-file", "service.py")
    shell.run("mms-lite", "check", f"{STORE}/squeezenet.mar")
    with shell.serving(STORE, "squeezenet.mar", "best_name.mar") as address:
        answer = shell.ask(f"{address}/predictions/squeezenet", PHOTO)
        print(answer)
        name = shell.ask(f"{address}/predictions/best_name", PHOTO)
        print(name)
    best = json.loads(answer)[0]
    print(f"\nThe photo shows: {best['class']} ({best['probability']:.0%}).")
    print(f"The derived handler says: {name}.")


def pack(shell: Shell, name: str, handler: str, *code: str) -> None:
    """Make an archive of SqueezeNet with a handler."""
    shell.run(
        *("model-archiver", "--model-name", name, "--model-file", "squeezenet1.1.onnx"),
        *("--handler", handler, *code, "--handler-config", "image_classifier.json"),
        *("--labels", "labels.txt", "--sample", PHOTO, "--export-path", STORE, "--force"),
    )


if __name__ == "__main__":
    main()
