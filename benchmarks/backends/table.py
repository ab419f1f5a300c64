"""Write what measure.py found into docs/backends.md, between its two marks.

    python benchmarks/backends/table.py mxnet.json today.json

The same model must have the same five classes in every backend; where it has not, this fails.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backends.md"
BEGIN, END = "<!-- measured: make bench-backends -->", "<!-- end of measured -->"
TOLERANCE = 0.01  # of a probability


def rows(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, model by model.

    Raises:
        ValueError: two backends disagree.
    """
    models: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in found:
        model, _, backend = each["name"].partition("-")
        models[model].append({**each, "backend": backend})
    yield "| model | backend | answer to the photo | load, s | answer, ms | worker, MiB |"
    yield "|---|---|---|---|---|---|"
    for model, measured in sorted(models.items()):
        for each in measured:
            _compare(model, measured[0], each)
            yield (
                f"| {model} | {each['backend']} | {_words(each['answer'])} | {each['load_s']:.1f} "
                f"| {each['median_ms']:.1f} | {each['memory_mib']:.0f} |"
            )


def _keys(item: dict[str, Any]) -> tuple[str, str]:
    return ("class", "probability") if "class" in item else ("label", "score")


def _words(answer: list[dict[str, Any]]) -> str:
    named = [(item, *_keys(item)) for item in answer]
    return ", ".join(f"{item[key].split(',')[0]} {item[value]:.3f}" for item, key, value in named)


def _compare(model: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    for first, second in zip(one["answer"], other["answer"], strict=True):
        key, value = _keys(first)
        # Classes that are equally unlikely may change places.
        same = first[key] == second[key] or max(first[value], second[value]) < TOLERANCE
        if not same or abs(first[value] - second[value]) > TOLERANCE:
            raise ValueError(f"{model}: {one['backend']} says {first}, {other['backend']} says {second}")


def main() -> None:
    """Run the command line."""
    found: dict[str, dict[str, Any]] = {}
    for file in sys.argv[1:]:
        for each in json.loads(Path(file).read_text()):
            found.setdefault(each["name"], each)
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    table = "\n".join(rows(list(found.values())))
    PAGE.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


if __name__ == "__main__":
    main()
