"""What the folder of a model lacks, in words for who made it.

Apart from `triton` and `model_config`, which read folders that are as they should be.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

_MOST_SHOWN = 5


def no_version(root: Path, name: str, model_files: Collection[str]) -> str:
    """Tell what is wrong with a model of the repository `root` that has no version folder."""
    folder = root / name
    is_version = name.isdecimal() and any((folder / file).is_file() for file in model_files)
    if is_version or (root / "config.pbtxt").is_file():
        return "the model repository looks like the folder of one model: its parent folder is the repository"
    others = sorted(f"{entry.name}/" for entry in folder.iterdir() if entry.is_dir())
    there = f"; there are: {', '.join(others[:_MOST_SHOWN])}" if others else ""
    return f"it has no version folder, whose name is a whole number such as 1/{there}"


def other_file(version: str, found: Iterable[str], wanted: Iterable[str], *, fields: str) -> str:
    """Tell which file of a version is called otherwise than one that is wanted; empty if none is like it.

    `fields` are those of config.pbtxt that would name it.
    """
    named = sorted(found)
    for file in wanted:
        for other in named:
            if PurePosixPath(other).suffix == PurePosixPath(file).suffix:
                return f"{version}/ has {other} but no {file}: rename it, or set {fields} in config.pbtxt"
    return ""
