"""The command in a folder of its own, and files to pack."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from model_content import CONTENT

from model_archiver.cli import main


@dataclass
class Answer:
    """What the command did: its exit code, its output and its error output."""

    code: int
    out: str
    err: str


Archiver = Callable[..., Answer]


@pytest.fixture
def archiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Archiver:
    """Run the command in `tmp_path`, where there is a folder `out`."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)

    def invoke(*words: str) -> Answer:
        try:
            code = main(list(words))
        except SystemExit as left:
            code = int(left.code or 0)
        return Answer(code, *capsys.readouterr())

    return invoke


@pytest.fixture
def pack(archiver: Archiver) -> Archiver:
    """Pack what the words say as `net` into `out`."""
    return lambda *words: archiver("--model-name", "net", "--export-path", "out", *words)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Write files, each with the content of its kind, or with the one that is given."""

    def write(*names: str, content: bytes | None = None) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(CONTENT.get(path.suffix, b"x") if content is None else content)

    return write
