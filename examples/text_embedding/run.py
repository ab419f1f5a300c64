"""Fetch MiniLM and its tokenizer, serve them with ONNX Runtime, compare the meaning of three sentences.

Every command is printed as it can be typed in this folder.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where serving.py is

from serving import shell_of

STORE = "model-archives"
SENTENCES = "sentences.json"


def main() -> None:
    """Run the example."""
    shell = shell_of(Path(__file__), onnxruntime="onnx", tokenizers="onnx")
    shell.run("python", "fetch_weights.py")
    shell.run("mkdir", "-p", STORE)
    shell.run(
        *("model-archiver", "--model-name", "minilm", "--model-file", "model.onnx"),
        *("--extra-file", "tokenizer.json", "--handler", "text_embedder"),
        *("--sample", SENTENCES, "--export-path", STORE, "--force"),
    )
    shell.run("mms-lite", "check", f"{STORE}/minilm.mar")
    with shell.serving(STORE, "minilm.mar") as address:
        answer = shell.ask(f"{address}/predictions/minilm", SENTENCES, "application/json")
        print(f"{answer[:120]} ... {len(answer)} characters in all")
    vectors = json.loads(answer)["embeddings"]
    sentences = json.loads((shell.folder / SENTENCES).read_text())
    print("\nHow alike the sentences are, from -1 to 1:")
    for (one, first), (other, second) in itertools.combinations(zip(sentences, vectors, strict=True), 2):
        print(f"{similarity(first, second):6.3f}  {one} | {other}")


def similarity(first: list[float], second: list[float]) -> float:
    """Return the cosine of the angle between two vectors of length 1."""
    return sum(a * b for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
