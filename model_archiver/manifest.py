"""The manifest of an archive, today's and 0.x's: its keys, its order when written, the checks of its types.

Apart from `archive` because a folder and an HTTP answer hold the same manifest as a zip.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model_archiver.names import name_fault

MANIFEST_NAME = "MAR-INF/MANIFEST.json"
MAX_MANIFEST_BYTES = 1024 * 1024
# The handlers that the server brings along for bare model files; the default is for where none is stated.
READY_MADE = (
    "image_classifier",
    "object_detector",
    "text_detector",
    "text_recognizer",
    "text_embedder",
    "tensor",
)
DEFAULT_HANDLER = "tensor"


class ManifestError(ValueError):
    """The text is no manifest that a server could use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestModel:
    """The `model` object; what is None or empty was not stated.

    The five fields from `backend` on are ours, and count only where there are `model_files` (the primary one
    first): other tools may mean something else by these keys. All files are named as in the archive.
    """

    name: str | None = None
    handler: str | None = None
    description: str | None = None
    version: str | None = None
    extensions: Mapping[str, Any] | None = None
    backend: str | None = None
    model_files: tuple[str, ...] = ()
    labels: str | None = None
    handler_config: Mapping[str, Any] | None = None
    samples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What was packed under a name: its size and its SHA-256 as 64 hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEngine:
    """The `engine` object: the framework that the model was made for."""

    name: str
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestPublisher:
    """The `publisher` object."""

    author: str | None = None
    email: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One manifest; `raw` is the object exactly as parsed, which handlers see as `context.manifest`.

    `files` records every packed file but the manifest, by name; it is empty without `model.model_files`.
    `folder` is the archive's folder that holds the model: "", or where an archive of version 0.x has it.
    """

    runtime: str = "python"
    model: ManifestModel = ManifestModel()
    engine: ManifestEngine | None = None
    publisher: ManifestPublisher | None = None
    description: str | None = None
    license: str | None = None
    model_server_version: str | None = "1.0"
    implementation_version: str | None = "1.0"
    specification_version: str | None = "1.0"
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    folder: str = ""

    @classmethod
    def parse(cls, text: bytes | str) -> "Manifest":
        """Read a manifest; keys that are missing or null take their defaults, unknown ones stay in `raw`.

        Raises:
            ManifestError: over 1 MiB, not JSON, not an object, or a known key of the wrong type.
        """
        raw = _load(text)
        model = _object(raw, "model")
        return cls(
            runtime=_text(raw, "runtime") or "python",
            model=_model(model),
            engine=_engine(raw),
            publisher=_publisher(raw),
            description=_text(raw, "description"),
            license=_text(raw, "license"),
            model_server_version=_version(raw, "modelServerVersion"),
            implementation_version=_version(raw, "implementationVersion"),
            specification_version=_version(raw, "specificationVersion"),
            files=_files(raw) if model.get("modelFiles") else {},
            raw=raw,
        )

    @classmethod
    def parse_legacy(cls, text: bytes | str, *, folder: str = "") -> "Manifest":
        """Read the top-level MANIFEST.json of an archive of version 0.x (MMS reference, section 7.2).

        Raises:
            ManifestError: as `parse`, or it names no model or no service.
        """
        raw = _load(text)
        if raw.get("Model") is None:
            raise ManifestError("Missing Model entry in manifest file.")
        model = _object(raw, "Model")
        service = _text(model, "Service", of="Model.")
        if not service:
            raise ManifestError("Missing Service entry in MANIFEST.json")
        author = _object(raw, "Created-By")
        files = {
            "parametersFile": _text(model, "Parameters", of="Model."),
            "symbolFile": _text(model, "Symbol", of="Model."),
        }
        return cls(
            model=ManifestModel(
                name=_text(model, "Model-Name", of="Model."),
                handler=service,
                description=_text(model, "Description", of="Model."),
                version="snapshot",
                extensions=_stated(files) or None,
            ),
            engine=_legacy_engine(raw),
            publisher=ManifestPublisher(
                author=_text(author, "Author", of="Created-By."),
                email=_text(author, "Author-Email", of="Created-By."),
            )
            if author
            else None,
            description=_text(raw, "Model-Archive-Description"),
            license=_text(raw, "License"),
            specification_version="0.1",
            raw=raw,
            folder=folder,
        )

    def to_json(self) -> str:
        """Write the manifest in model-archiver's order and indentation; what was not stated is left out."""
        model = {
            "modelName": self.model.name,
            "handler": self.model.handler,
            "description": self.model.description,
            "modelVersion": self.model.version,
            "extensions": self.model.extensions,
            "backend": self.model.backend,
            "modelFiles": self.model.model_files or None,
            "labels": self.model.labels,
            "handlerConfig": self.model.handler_config,
            "samples": self.model.samples or None,
        }
        files = {
            name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in self.files.items()
        }
        engine = self.engine and {"engineName": self.engine.name, "engineVersion": self.engine.version}
        publisher = self.publisher and {"author": self.publisher.author, "email": self.publisher.email}
        document = {
            "runtime": self.runtime,
            "model": _stated(model),
            "engine": engine and _stated(engine),
            "publisher": publisher and _stated(publisher),
            "description": self.description,
            "license": self.license,
            "modelServerVersion": self.model_server_version,
            "implementationVersion": self.implementation_version,
            "specificationVersion": self.specification_version,
            "files": files or None,
        }
        return json.dumps(_stated(document), indent=2)


def _stated(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}


def _load(text: bytes | str) -> dict[str, Any]:
    if len(text) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"The manifest is larger than {MAX_MANIFEST_BYTES} bytes.")
    try:
        raw = json.loads(text)
        # The parser lets NaN and lone surrogates through; they would break whoever writes them again.
        json.dumps(raw, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as err:
        raise ManifestError(f"The manifest is not valid JSON: {err}.") from err
    if not isinstance(raw, dict):
        raise ManifestError("The manifest is not a JSON object.")
    return raw


def _object(parent: Mapping[str, Any], key: str, *, of: str = "") -> dict[str, Any]:
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ManifestError(f"The manifest's {of}{key} is not an object.")
    return value


def _text(parent: Mapping[str, Any], key: str, *, of: str = "") -> str | None:
    value = parent.get(key)
    if value is not None and not isinstance(value, str):
        raise ManifestError(f"The manifest's {of}{key} is not a string.")
    return value


def _version(parent: Mapping[str, Any], key: str, *, of: str = "") -> str | None:
    value = parent.get(key)
    # Versions are often written by hand as numbers, and multi-model-server takes them.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _text(parent, key, of=of)


def _name(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ManifestError(f"The manifest's {key} is not the name of a file.")
    if fault := name_fault(value):
        raise ManifestError(f"The manifest's {key} names {value[:255]!r}, which is refused: {fault}.")
    return value


def _names(parent: Mapping[str, Any], key: str, *, of: str) -> tuple[str, ...]:
    value = parent.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ManifestError(f"The manifest's {of}{key} is not a list.")
    return tuple(_name(each, f"{of}{key}") for each in value)


def _model(model: Mapping[str, Any]) -> ManifestModel:
    stated = ManifestModel(
        name=_text(model, "modelName", of="model."),
        handler=_text(model, "handler", of="model."),
        description=_text(model, "description", of="model."),
        version=_version(model, "modelVersion", of="model."),
        extensions=_object(model, "extensions", of="model.") or None,
    )
    model_files = _names(model, "modelFiles", of="model.")
    if not model_files:
        return stated
    return replace(
        stated,
        backend=_text(model, "backend", of="model."),
        model_files=model_files,
        labels=None if model.get("labels") is None else _name(model["labels"], "model.labels"),
        handler_config=_object(model, "handlerConfig", of="model.") or None,
        samples=_names(model, "samples", of="model."),
    )


def _files(raw: Mapping[str, Any]) -> dict[str, FileRecord]:
    files = _object(raw, "files")
    return {_name(name, "files"): _record(_object(files, name, of="files."), name) for name in files}


def _record(record: Mapping[str, Any], name: str) -> FileRecord:
    size, sha256 = record.get("bytes"), record.get("sha256")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ManifestError(f"The manifest's files.{name}.bytes is not a number of bytes.")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ManifestError(f"The manifest's files.{name}.sha256 is not 64 hexadecimal digits.")
    return FileRecord(bytes=size, sha256=sha256)


def _engine(raw: Mapping[str, Any]) -> ManifestEngine | None:
    if raw.get("engine") is None:
        return None
    engine = _object(raw, "engine")
    name = _text(engine, "engineName", of="engine.")
    if name is None:
        raise ManifestError("engineName is required in <engine>.")  # MMS's words
    return ManifestEngine(name=name, version=_version(engine, "engineVersion", of="engine."))


def _legacy_engine(raw: Mapping[str, Any]) -> ManifestEngine | None:
    version = _object(raw, "Engine").get("MXNet")
    if isinstance(version, bool) or not isinstance(version, int | float):
        return None
    try:
        return ManifestEngine(name="MXNet", version=str(float(version)))
    except OverflowError as error:
        raise ManifestError("Engine.MXNet in the manifest is no version.") from error


def _publisher(raw: Mapping[str, Any]) -> ManifestPublisher | None:
    if raw.get("publisher") is None:
        return None
    publisher = _object(raw, "publisher")
    return ManifestPublisher(
        author=_text(publisher, "author", of="publisher."),
        email=_text(publisher, "email", of="publisher."),
    )
