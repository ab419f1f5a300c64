"""The manifest of an archive, today's and 0.x's: its keys, its order when written, the checks of its types.

Apart from `archive` because a folder and an HTTP answer hold the same manifest as a zip.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MANIFEST_NAME = "MAR-INF/MANIFEST.json"
MAX_MANIFEST_BYTES = 1024 * 1024


class ManifestError(ValueError):
    """The text is no manifest that a server could use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestModel:
    """The `model` object; what is None was not stated."""

    name: str | None = None
    handler: str | None = None
    description: str | None = None
    version: str | None = None
    extensions: Mapping[str, Any] | None = None


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
            model=ManifestModel(
                name=_text(model, "modelName", of="model."),
                handler=_text(model, "handler", of="model."),
                description=_text(model, "description", of="model."),
                version=_version(model, "modelVersion", of="model."),
                extensions=_object(model, "extensions", of="model.") or None,
            ),
            engine=_engine(raw),
            publisher=_publisher(raw),
            description=_text(raw, "description"),
            license=_text(raw, "license"),
            model_server_version=_version(raw, "modelServerVersion"),
            implementation_version=_version(raw, "implementationVersion"),
            specification_version=_version(raw, "specificationVersion"),
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
