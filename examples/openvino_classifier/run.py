"""Fetch MobileNet-v1, a frozen TensorFlow graph, serve it with OpenVINO, classify a photo.

Every command is printed as it can be typed in this folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where serving.py is

from serving import shell_of

STORE = "model-archives"
PHOTO = "../photos/coffee.png"


def main() -> None:
    """Run the example."""
    shell = shell_of(Path(__file__), openvino="openvino")
    shell.run("python", "fetch_weights.py")
    shell.run("mkdir", "-p", STORE)
    shell.run(
        *("model-archiver", "--model-name", "mobilenet", "--model-file", "mobilenet_v1.pb"),
        *("--handler", "image_classifier", "--handler-config", "image_classifier.json"),
        *("--labels", "labels.txt", "--sample", PHOTO, "--export-path", STORE, "--force"),
    )
    shell.run("mms-lite", "check", f"{STORE}/mobilenet.mar")
    with shell.serving(STORE, "mobilenet.mar") as address:
        answer = shell.ask(f"{address}/predictions/mobilenet", PHOTO)
        print(answer)
    best = json.loads(answer)[0]
    print(f"\nThe photo shows: {best['class']} ({best['probability']:.0%}).")


if __name__ == "__main__":
    main()
