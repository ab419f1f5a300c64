"""Put MiniLM as int8 ONNX, and its tokenizer, into this folder.

Weights are not kept in this repository: examples/weights fetches them once into a cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package `weights` is

from weights.fetch import main

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.exit(main(["minilm_l6_v2", "--into", str(HERE), *sys.argv[1:]]))
