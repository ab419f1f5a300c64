"""What a `.mar` archive or a model's folder in the model store means: path and manifest -> ModelSpec.

All of it blocks (extraction, hashing): the engine calls it on a thread. Each load extracts into a folder of
its own, so that two models made from one archive never share one.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mms_lite.errors import Forbidden, InvalidArchive, InvalidRequest, LoadError, ModelNotFound
from mms_lite.types import LoadOptions, ModelSpec
from model_archiver import archive
from model_archiver.manifest import Manifest, ManifestError

_MAX_NAME = 128
_RUNTIMES = ("python", "python2", "python3")
_REMOTE = re.compile(r"(https?|ftp|s3|gs|file)://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a spec gets where neither the user nor the archive says."""

    workers: int
    queue_size: int
    response_timeout_s: float
    load_timeout_s: float
    handler: str | None = None
    devices: tuple[int, ...] = ()
    decode_input_request: bool = True


class MarRepository:
    """The model store: a folder of archives and model folders. `work_dir` receives what is extracted."""

    def __init__(self, store: Path | None, work_dir: Path, defaults: Defaults) -> None:
        self._store = store
        self._work_dir = work_dir
        self._defaults = defaults

    def read(self, options: LoadOptions) -> ModelSpec:
        """Find and unpack a model. The caller gives the folder back with `discard` if it owns it.

        Raises:
            ModelNotFound: it is not in the store.
            Forbidden: the url names another host.
            InvalidArchive: archive or manifest cannot be used.
            InvalidRequest: a name, runtime or number is not one.
        """
        _check_options(options)
        try:
            source = self.locate(options.url)
            manifest = archive.read_manifest(source)
            name, handler = self._identity(options, manifest, source)
            path, owned = self._unpack(source)
        except (archive.InvalidArchive, ManifestError) as error:
            raise InvalidArchive(str(error)) from error
        except OSError as error:
            raise LoadError(f"cannot read the model {options.url}: {error.strerror or error}") from error
        defaults = self._defaults
        workers = defaults.workers if options.workers is None else options.workers
        timeout_s = options.response_timeout_s
        return ModelSpec(
            name=name,
            version=options.version or (manifest.model.version if manifest else None) or "1",
            path=str(path),
            url=options.url,
            handler=handler,
            owns_path=owned,
            batch_size=max(1, options.batch_size),
            max_batch_delay_ms=max(0, options.max_batch_delay_ms),
            min_workers=workers,
            max_workers=workers,
            queue_size=defaults.queue_size,
            response_timeout_s=defaults.response_timeout_s if timeout_s is None else timeout_s,
            load_timeout_s=defaults.load_timeout_s,
            devices=defaults.devices,
            runtime=options.runtime or (manifest.runtime if manifest else "python"),
            decode_input_request=defaults.decode_input_request,
            at_startup=options.at_startup,
            manifest=manifest.raw if manifest else None,
        )

    def discard(self, spec: ModelSpec) -> None:
        """Delete the folder that was made for this load, if one was."""
        if spec.owns_path:
            shutil.rmtree(spec.path, ignore_errors=True)

    def locate(self, url: str) -> Path:
        """Return where the model is.

        Raises:
            ModelNotFound, Forbidden: as `read`.
        """
        if _REMOTE.match(url):
            raise Forbidden(f"Models are loaded from the model store only, not from {url}")
        if self._store is None:
            raise ModelNotFound("Model store has not been configured.")
        parts = Path(url.lstrip("/")).parts
        if ".." in parts or "\0" in url:
            raise ModelNotFound(f"Relative path is not allowed in url: {url}")
        path = self._store.joinpath(*parts)
        if not parts or not path.exists():
            raise ModelNotFound(f"Model not found in model store: {url}")
        return path

    def all(self) -> list[LoadOptions]:
        """Return every model of the store: archives and folders whose names do not begin with a dot.

        Raises:
            ModelNotFound: there is no store.
        """
        if self._store is None:
            raise ModelNotFound("Model store is not configured.")
        if not self._store.is_dir():
            raise ModelNotFound(f"Model store path is not found: {self._store}")
        found = []
        for entry in sorted(self._store.iterdir()):
            is_archive = entry.suffix in (".mar", ".model") and entry.is_file()
            if not entry.name.startswith(".") and (is_archive or entry.is_dir()):
                found.append(LoadOptions(url=entry.name, at_startup=True))
        return found

    def _identity(self, options: LoadOptions, manifest: Manifest | None, source: Path) -> tuple[str, str]:
        stated = manifest.model if manifest else None
        name = options.name or (stated.name if stated else None)
        if not name and options.at_startup:
            name = _derived_name(source)
        if not name:
            raise InvalidArchive("Model name is not defined.")
        _check_name(name)
        if manifest and manifest.runtime not in _RUNTIMES:
            raise InvalidArchive("Runtime is not defined or invalid.")
        handler = options.handler or (stated.handler if stated else None) or self._defaults.handler
        if not handler:
            raise InvalidArchive("Model handler is not defined.")
        return name, handler

    def _unpack(self, source: Path) -> tuple[Path, bool]:
        if source.is_dir():
            return source.resolve(), False
        target = Path(tempfile.mkdtemp(prefix=f"{source.stem[:40]}-", dir=self._work_dir))
        try:
            archive.extract(source, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        return target.resolve(), True


def startup_models(load_models: str) -> list[LoadOptions]:
    """Read a list as MMS writes it: `[name=]location`, separated by commas; empty items are skipped."""
    found = []
    for item in load_models.split(","):
        name, equals, url = item.strip().rpartition("=")
        if url:
            found.append(LoadOptions(url=url, name=name if equals else None, at_startup=True))
    return found


def _derived_name(source: Path) -> str:
    stem = source.stem if source.suffix in (".mar", ".model") else source.name
    return re.sub(r"\W|^_", "_", stem)


def _check_name(name: str) -> None:
    if len(name) > _MAX_NAME or "/" in name or not name.isprintable():
        raise InvalidRequest(
            f"a model's name has at most {_MAX_NAME} printable characters, none of them a '/'"
        )


def _check_options(options: LoadOptions) -> None:
    if options.runtime is not None and options.runtime not in _RUNTIMES:
        raise InvalidRequest(f"Invalid RuntimeType value: {options.runtime}")
    if not options.url:
        raise InvalidRequest("Parameter url is required.")
    if options.workers is not None and options.workers < 0:
        raise InvalidRequest("initial_workers cannot be negative")
