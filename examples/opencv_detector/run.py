"""Fetch SSD MobileNet-v2, serve it with OpenCV's dnn, find the objects of a photo, draw their boxes.

Every command is printed as it can be typed in this folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where serving.py is

from serving import shell_of

STORE = "model-archives"
PHOTO = "../photos/coffee.png"
BLACK = (0, 0, 0)
COLORS = ((80, 220, 80), (60, 200, 250), (240, 170, 80))  # in OpenCV's order: blue, green, red


def main() -> None:
    """Run the example."""
    shell = shell_of(Path(__file__), cv2="opencv")
    shell.run("python", "fetch_weights.py")
    shell.run("mkdir", "-p", STORE)
    shell.run(
        *("model-archiver", "--model-name", "ssd", "--model-file", "frozen_inference_graph.pb"),
        *("--model-file", "frozen_inference_graph.pbtxt"),
        *("--handler", "object_detector", "--handler-config", "object_detector.json"),
        *("--labels", "coco_labels.txt", "--sample", PHOTO, "--export-path", STORE, "--force"),
    )
    shell.run("mms-lite", "check", f"{STORE}/ssd.mar")
    with shell.serving(STORE, "ssd.mar") as address:
        answer = shell.ask(f"{address}/predictions/ssd", PHOTO)
        print(answer)
    objects = json.loads(answer)
    draw(shell.folder / PHOTO, objects, shell.folder / "detected.jpg")
    found = ", ".join(f"{each['label']} ({each['score']:.0%})" for each in objects)
    print(f"\nThe photo shows: {found}. The boxes are drawn in detected.jpg.")


def draw(photo: Path, objects: list[dict[str, Any]], into: Path) -> None:
    """Draw a box around each object, with its label and score in its upper or lower left corner by turns."""
    import cv2

    image = cv2.imread(str(photo))
    for place, each in reversed(list(enumerate(objects))):  # the best comes last, over the others
        color = COLORS[place % len(COLORS)]
        left, top, right, bottom = (round(edge) for edge in each["box"])
        text = f"{each['label']} {each['score']:.2f}"
        (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 1)
        line = height + below
        upper = bottom - line if place % 2 else top  # or the labels of boxes of one corner hide each other
        cv2.rectangle(image, (left, top), (right, bottom), color, 2)
        cv2.rectangle(image, (left, upper), (left + width, upper + line), color, cv2.FILLED)
        cv2.putText(image, text, (left, upper + height), cv2.FONT_HERSHEY_SIMPLEX, 0.6, BLACK, 1, cv2.LINE_AA)
    cv2.imwrite(str(into), image, [cv2.IMWRITE_JPEG_QUALITY, 80])


if __name__ == "__main__":
    main()
