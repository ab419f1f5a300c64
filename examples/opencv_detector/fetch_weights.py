"""Put SSD MobileNet-v2, its text graph for OpenCV, and the names of COCO's classes into this folder.

Weights are not kept in this repository: examples/weights fetches them once into a cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package `weights` is

from weights.fetch import main

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.exit(main(["ssd_mobilenet_v2_coco", "--into", str(HERE), *sys.argv[1:]]))
