"""What a `.mar` archive or a model's folder in the model store means: path and manifest -> ModelSpec.

All of it blocks (downloads, extraction, hashing): the engine calls it on a thread. Each load extracts into
a folder of its own, so that two models made from one archive never share one.
"""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mms_lite.engine.repository import Stamp, check_name, not_found
from mms_lite.engine.repository.allow_list import AllowList, is_remote
from mms_lite.engine.repository.download import Downloads
from mms_lite.errors import ConfigError, InvalidArchive, InvalidRequest, LoadError, ModelNotFound
from mms_lite.types import LoadOptions, ModelSpec
from model_archiver import archive
from model_archiver.manifest import DEFAULT_HANDLER, Manifest, ManifestError
from model_archiver.model_files import is_model_file

_MAX_VERSION = 128
_RUNTIMES = ("python", "python2", "python3")
_ITEM = re.compile(r"(?:([^/]*)=)?(.*)", re.DOTALL)  # [name=]location, whose path or query may have a "="


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
    """The model store: a folder of archives and model folders. `work_dir` receives what is extracted.

    Archives at http(s) addresses come by `downloads`; without it there are none. Which versions are loaded is
    up to the users: the store does not say.
    """

    decides_versions = False

    def __init__(
        self, store: Path | None, work_dir: Path, defaults: Defaults, downloads: Downloads | None = None
    ) -> None:
        self._store = store
        self._work_dir = work_dir
        self._defaults = defaults
        self._dealt = itertools.count()
        self._downloads = downloads or Downloads(AllowList(), max_bytes=0, timeout_s=0)

    def close(self) -> None:
        """Give up the downloads that run; their `read` raises ModelNotReady."""
        self._downloads.stop()

    def read(self, options: LoadOptions) -> ModelSpec:
        """Find and unpack a model. The caller gives the folder back with `discard` if it owns it.

        Raises:
            ModelNotFound: it is not in the store, or the url is malformed.
            Forbidden: the url is not one that may be downloaded.
            DownloadFailed: the download failed.
            InvalidArchive: archive or manifest cannot be used, or it has another checksum.
            InvalidRequest: a name, runtime, number or checksum is not one.
        """
        _check_options(options)
        try:
            with self._archive(options) as source:
                _refuse_model_file(source)
                manifest = archive.read_manifest(source)
                name, handler = self._identity(options, manifest, source)
                version = options.version or (manifest.model.version if manifest else None) or "1"
                _check_version(version)
                path, owned = self._unpack(source, manifest.folder if manifest else "")
        except (archive.InvalidArchive, ManifestError) as error:
            raise InvalidArchive(str(error)) from error
        except OSError as error:
            raise LoadError(f"cannot read the model {options.url}: {error.strerror or error}") from error
        defaults = self._defaults
        workers = defaults.workers if options.workers is None else options.workers
        timeout_s = options.response_timeout_s
        return ModelSpec(
            name=name,
            version=version,
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
            devices=self._devices(),
            runtime=options.runtime or (manifest.runtime if manifest else "python"),
            decode_input_request=defaults.decode_input_request,
            at_startup=options.at_startup,
            manifest=manifest.raw if manifest else None,
        )

    def _devices(self) -> tuple[int, ...]:
        """Return the GPUs, for each model another one first: many small models shall not share one."""
        devices = self._defaults.devices
        first = next(self._dealt) % max(1, len(devices))
        return devices[first:] + devices[:first]

    def discard(self, spec: ModelSpec) -> None:
        """Delete the folder that was made for this load, if one was."""
        if spec.owns_path:
            shutil.rmtree(spec.path, ignore_errors=True)

    @contextmanager
    def _archive(self, options: LoadOptions) -> Iterator[Path]:
        """Give the archive or folder of a model, of the checksum that is asked for; a download is deleted."""
        if not is_remote(options.url):
            source = self.locate(options.url)
            if options.sha256 is not None:
                if not source.is_file():
                    raise InvalidRequest(f"{options.url} is no archive, and has no sha256")
                _check_digest(source, options.sha256, archive.digest(source))
            yield source
            return
        with tempfile.TemporaryDirectory(
            prefix="download-", dir=self._work_dir, ignore_cleanup_errors=True
        ) as folder:
            fetched = self._downloads.fetch(options.url, Path(folder))
            if options.sha256 is not None:
                _check_digest(fetched.path, options.sha256, fetched.sha256)
            yield fetched.path

    def locate(self, url: str) -> Path:
        """Return where in the store the model is.

        Raises:
            ModelNotFound: it is not there.
        """
        if self._store is None:
            raise ModelNotFound("Model store has not been configured.")
        parts = Path(url.lstrip("/")).parts
        if ".." in url or "\0" in url:
            raise ModelNotFound(f"Relative path is not allowed in url: {url}")
        path = self._store.joinpath(*parts)
        if not parts or not path.exists():
            raise ModelNotFound(f"Model not found in model store: {url}")
        return path

    def all(self) -> list[LoadOptions]:
        """Return every model of the store: archives and folders whose names do not begin with a dot.

        Raises:
            ModelNotFound: there is no store.
            ConfigError: it cannot be read.
        """
        if self._store is None:
            raise ModelNotFound("Model store is not configured.")
        if not self._store.is_dir():
            raise ModelNotFound(f"Model store path is not found: {self._store}")
        found = []
        try:
            entries = sorted(self._store.iterdir())
        except OSError as error:
            raise ConfigError(f"cannot read the model store {self._store}: {error.strerror}") from error
        for entry in entries:
            is_archive = entry.suffix in (".mar", ".model") and entry.is_file()
            if not entry.name.startswith(".") and (is_archive or entry.is_dir()):
                found.append(LoadOptions(url=entry.name, at_startup=True))
        return found

    def names(self) -> list[str]:
        """Return what the models of the store are called by their files; empty without a store.

        Raises:
            LoadError: it cannot be read.
        """
        return list(self._urls())

    def versions(
        self, name: str, *, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> list[ModelSpec]:
        """Read the archive or folder that is called like this, as the only version.

        Raises:
            InvalidRequest: a configuration or files are given: archives have their own.
            ServingError: as `read`.
        """
        if config is not None or files:
            raise InvalidRequest("a model of the model store takes no other configuration or files")
        url = self._urls().get(name)
        if url is None:
            raise ModelNotFound(not_found(name), name=name)
        return [self.read(LoadOptions(url=url, name=name))]

    def _urls(self) -> dict[str, str]:
        try:
            return {_stem(options.url): options.url for options in self.all()}
        except ModelNotFound:  # there is no store
            return {}
        except ConfigError as error:
            raise LoadError("cannot read the model store") from error

    def stamp(self, name: str) -> Stamp | None:
        """Return nothing that changes: what is loaded stays until a user says otherwise."""
        return {}

    def _identity(self, options: LoadOptions, manifest: Manifest | None, source: Path) -> tuple[str, str]:
        stated = manifest.model if manifest else None
        name = options.name or (stated.name if stated else None)
        if not name and options.at_startup:
            name = _derived_name(source)
        if not name:
            raise InvalidArchive("Model name is not defined.")
        check_name(name)
        if manifest and manifest.runtime not in _RUNTIMES:
            raise InvalidArchive("Runtime is not defined or invalid.")
        bare = DEFAULT_HANDLER if stated and stated.model_files else None
        handler = options.handler or (stated.handler if stated else None) or bare or self._defaults.handler
        if not handler:
            raise InvalidArchive("Model handler is not defined.")
        return name, handler

    def _unpack(self, source: Path, folder: str) -> tuple[Path, bool]:
        if source.is_dir():
            return (source / folder).resolve(), False
        target = Path(tempfile.mkdtemp(prefix=f"{source.stem[:40]}-", dir=self._work_dir))
        try:
            archive.extract(source, target, folder=folder)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        return target.resolve(), True


def startup_models(load_models: str) -> list[LoadOptions]:
    """Read a list as MMS writes it: `[name=]location`, separated by commas; empty items are skipped.

    Beyond MMS: a location may end in `#sha256=` and the checksum of the archive.
    """
    found = []
    for item in load_models.split(","):
        location, mark, digest = item.strip().partition("#sha256=")
        match = _ITEM.fullmatch(location)
        if match and match[2]:
            sha256 = digest if mark else None
            found.append(LoadOptions(url=match[2], sha256=sha256, name=match[1], at_startup=True))
    return found


def _refuse_model_file(source: Path) -> None:
    """Tell how to pack what somebody hoped to load as it is.

    Raises:
        InvalidArchive: it is a model file.
    """
    if source.suffix != ".py" and is_model_file(str(source)):
        name = re.sub(r"\W", "_", source.stem)
        raise InvalidArchive(
            f"{source.name} is a model file, not an archive. Pack it first: "
            f"model-archiver --model-name {name} --model-file {source.name}"
        )


def _derived_name(source: Path) -> str:
    return re.sub(r"\W|^_", "_", _stem(source.name))


def _stem(file: str) -> str:
    return re.sub(r"\.(mar|model)\Z", "", file)


def _check_version(version: str) -> None:
    # A path names it, and a label of each of its metrics.
    if len(version) > _MAX_VERSION or "/" in version or not version.isprintable() or version == "invoke":
        raise InvalidRequest(
            f"a version has at most {_MAX_VERSION} printable characters, none of them a '/', "
            "and is not invoke"
        )


def _check_digest(source: Path, wanted: str, found: str) -> None:
    if wanted.lower() != found:
        raise InvalidArchive(f"{source.name} has the SHA-256 {found}, not {wanted.lower()}.")


def _check_options(options: LoadOptions) -> None:
    if options.runtime is not None and options.runtime not in _RUNTIMES:
        raise InvalidRequest(f"Invalid RuntimeType value: {options.runtime}")
    if not options.url:
        raise InvalidRequest("Parameter url is required.")
    if options.sha256 is not None and not re.fullmatch("[0-9A-Fa-f]{64}", options.sha256):
        raise InvalidRequest(f"Parameter sha256 is not 64 hexadecimal digits: {options.sha256}")
    if options.workers is not None and options.workers < 0:
        raise InvalidRequest("initial_workers cannot be negative")
