"""The model store that both servers read: good archives, and everything that people put there by mistake."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from model_archiver.manifest import Manifest, ManifestModel
from model_archiver.packing import ArchiveFormat, pack

HANDLERS = Path(__file__).parent / "handlers"
STARTUP = ("echo", "facts", "answers", "failures", "classy")
"""The models that both servers load when they start."""

_MANIFEST = "MAR-INF/MANIFEST.json"
_ODD_MANIFESTS = {
    "no_manifest": None,
    "empty_manifest": {},
    "no_name": {"model": {"handler": "service:handle"}},
    "no_handler": {"model": {"modelName": "no_handler"}},
    "no_model": {"runtime": "python"},
    "odd_runtime": {"runtime": "ruby", "model": {"modelName": "odd_runtime", "handler": "service:handle"}},
    "versioned": {
        "runtime": "python",
        "description": "a model with all that a manifest may say",
        "license": "MIT",
        "model": {
            "modelName": "versioned",
            "modelVersion": "3.2",
            "description": "third",
            "handler": "service:handle",
            "extensions": {"labels": 5},
        },
        "engine": {"engineName": "MXNet", "engineVersion": "1.9"},
        "publisher": {"author": "A. Nonymous", "email": "a@example.com"},
        "modelServerVersion": "1.0",
        "implementationVersion": "1.0",
        "specificationVersion": "1.0",
    },
    "no_engine_name": {
        "model": {"modelName": "no_engine_name", "handler": "service:handle"},
        "engine": {"engineVersion": "1"},
    },
    "wrong_module": {"model": {"modelName": "wrong_module", "handler": "nothing_here:handle"}},
    "wrong_function": {"model": {"modelName": "wrong_function", "handler": "service:nothing"}},
    "odd.name-1_x": {"model": {"modelName": "odd.name-1_x", "handler": "service:handle"}},
    "spaced": {"model": {"modelName": "a spaced näme", "handler": "service.py:handle"}},
}


def fill(folder: Path) -> None:
    """Put all models into a new folder.

    Raises:
        OSError: it cannot be written.
        PackError: a handler cannot be packed.
    """
    folder.mkdir(parents=True)
    for handler in sorted(HANDLERS.glob("*.py")):
        _pack(handler, folder)
    for name, manifest in _ODD_MANIFESTS.items():
        _zip(folder / f"{name}.mar", manifest)
    with zipfile.ZipFile(folder / "half_json.mar", "w") as archive:
        archive.writestr(_MANIFEST, '{"model": ')
    (folder / "text.txt").write_text("no archive\n")
    (folder / "text.mar").write_text("no archive either\n")
    (folder / "empty.mar").write_bytes(b"")
    whole = (folder / "echo.mar").read_bytes()
    (folder / "cut.mar").write_bytes(whole[: len(whole) // 2])
    shutil.copy(folder / "echo.mar", folder / "archive.zip")
    _folder(folder / "as_folder", {"modelName": "as_folder", "handler": "service:handle"})
    _folder(folder / "deep" / "er", {"modelName": "deeper", "handler": "service:handle"})
    (folder / "empty_folder").mkdir()


def _pack(handler: Path, folder: Path) -> None:
    """Make NAME.mar of one handler, as `model-archiver` does."""
    source = folder.parent / "sources" / handler.stem
    source.mkdir(parents=True)
    shutil.copy(handler, source / "service.py")
    in_class = "(self, data, context)" in handler.read_text() or "two_classes" in handler.name
    model = ManifestModel(name=handler.stem, handler="service" if in_class else "service:handle")
    pack(str(source), Manifest(model=model), export_path=str(folder), archive_format=ArchiveFormat.MAR)


def _zip(path: Path, manifest: object) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(HANDLERS / "echo.py", "service.py")
        if manifest is not None:
            archive.writestr(_MANIFEST, json.dumps(manifest))


def _folder(path: Path, model: object) -> None:
    (path / "MAR-INF").mkdir(parents=True)
    shutil.copy(HANDLERS / "echo.py", path / "service.py")
    (path / _MANIFEST).write_text(json.dumps({"runtime": "python", "model": model}))
