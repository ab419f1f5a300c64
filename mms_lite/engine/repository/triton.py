"""What a Triton model repository means: folders of models with a config.pbtxt and numbered versions.

All of it blocks: the engine calls it on a thread. Models are served from where they are; only files that a
client sends are written, into folders of our own. What a configuration means is in `model_config`.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mms_lite.engine.repository import Stamp, advice, model_config, not_found
from mms_lite.engine.repository.mar import Defaults
from mms_lite.engine.repository.model_config import BACKENDS, MODEL_FILES, ModelConfig, Values
from mms_lite.errors import InvalidRequest, LoadError, ModelNotFound, VersionNotFound
from mms_lite.types import LoadOptions, ModelSpec

_CONFIG = "config.pbtxt"
_VERSION = re.compile("[1-9][0-9]{0,17}")
_HANDLER = "tensor"

_log = logging.getLogger("mms_lite.engine")


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the versions of a model are: the folder of the model for each. They may be ours to delete."""

    folders: Mapping[int, Path]
    owned: bool = False

    def discard(self, versions: Iterable[int]) -> None:
        if self.owned:
            for version in versions:
                shutil.rmtree(self.folders[version], ignore_errors=True)


class TritonRepository:
    """A Triton model repository. `work_dir` is for what clients send with a load, and what models write."""

    decides_versions = True

    def __init__(self, folder: Path, work_dir: Path, defaults: Defaults) -> None:
        self._folder = folder
        self._work_dir = work_dir
        self._defaults = defaults
        self._dealt = itertools.count()
        self._scratches = itertools.count()

    def close(self) -> None:
        """Do nothing: nothing that is read takes long."""

    def discard(self, spec: ModelSpec) -> None:
        """Delete the folders that were made for this load."""
        if spec.scratch is not None:
            shutil.rmtree(spec.scratch, ignore_errors=True)
        if spec.owns_path:
            shutil.rmtree(Path(spec.path).parent, ignore_errors=True)

    def names(self) -> list[str]:
        """Return the names of all models: the folders whose names do not begin with a dot.

        Raises:
            LoadError: the repository cannot be read.
        """
        with _reading("the model repository"):
            entries = sorted(entry.name for entry in self._folder.iterdir() if entry.is_dir())
        return [name for name in entries if not name.startswith(".")]

    def stamp(self, name: str) -> Stamp | None:
        """Return sizes and times of change of a model's files; None if it is not there.

        Raises:
            LoadError: they cannot be read.
        """
        with _reading(f"the model '{name}'"):
            folder = self._find(name)
            if folder is None:
                return None
            versions = [str(version) for version in _versions(folder)]
            stamp: dict[str, object] = {"": _states(_files(folder, without=versions))}
            for version in versions:
                stamp[version] = _states(_files(folder / version))
        return stamp

    def read(self, options: LoadOptions) -> ModelSpec:
        """Read one version of a model by its url, `name` or `name/version`; without one, the highest.

        Raises:
            ModelNotFound, VersionNotFound: it is not there, or its policy does not serve this version.
            InvalidRequest: another name is asked for than that of its folder, or what its files decide.
            LoadError: it cannot be used.
        """
        _check_options(options)
        name, _, version = options.url.strip("/").partition("/")
        if options.name not in (None, name):
            raise InvalidRequest(f"a model of the repository has the name of its folder: {name}")
        found = {spec.version: spec for spec in self.versions(name)}
        wanted = options.version or version or list(found)[-1]
        if wanted not in found:
            raise VersionNotFound(f"Model not found: {name}, version {wanted}", name=name, version=wanted)
        spec = found[wanted]
        workers = spec.min_workers if options.workers is None else options.workers
        timeout_s = options.response_timeout_s
        return replace(
            spec,
            min_workers=workers,
            max_workers=workers,
            response_timeout_s=spec.response_timeout_s if timeout_s is None else timeout_s,
            at_startup=options.at_startup,
        )

    def versions(
        self, name: str, *, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> list[ModelSpec]:
        """Read the versions of a model that its policy serves, in ascending order.

        `config`, a ModelConfig as JSON, is in place of config.pbtxt. `files`, by "<version>/<name>", are
        in place of all files, and only with a `config`.

        Raises:
            ModelNotFound: it is not there.
            InvalidRequest: the name of a file is none, or there is no `config` with them.
            LoadError: it cannot be used.
        """
        if not _is_folder(name):
            raise ModelNotFound(not_found(name), name=name)
        if files:
            if config is None:
                raise InvalidRequest(
                    f"failed to load '{name}', files are taken only together with a model configuration"
                )
            stated = model_config.parse_json(name, config)
            places = self._written(name, files, stated)
        else:
            with _reading(f"the model '{name}'"):
                folder = self._find(name)
                if folder is None:
                    raise ModelNotFound(not_found(name), name=name)
                places = _Places(dict.fromkeys(_versions(folder), folder))
                if config is None:
                    stated = _read_config(name, folder)
                else:
                    stated = model_config.parse_json(name, config)
        try:
            return self._specs(name, stated, places)
        except BaseException:
            places.discard(places.folders)
            raise

    def _find(self, name: str) -> Path | None:
        """Return the folder of a model, if it is there."""
        folder = self._folder / name
        return folder if _is_folder(name) and folder.is_dir() else None

    def _written(self, name: str, files: Mapping[str, bytes], stated: ModelConfig) -> _Places:
        """Write what a client sends: each version that is served gets a folder, to be deleted with it.

        What versions share is one file in all of their folders.
        """
        named = {_relative(file): content for file, content in files.items()}
        firsts = {file.parts[0] for file in named if len(file.parts) > 1}
        versions = {first for first in firsts if _VERSION.fullmatch(first)}
        folders: dict[int, Path] = {}
        places = _Places(folders, owned=True)
        try:
            with _reading("the files of the request"):
                for version in model_config.versions(stated.values, set(map(int, versions)))[0]:
                    folders[version] = Path(tempfile.mkdtemp(prefix=f"{name[:40]}-", dir=self._work_dir))
                for file, content in named.items():
                    written: Path | None = None
                    for number, folder in folders.items():
                        if file.parts[0] in versions - {str(number)}:  # another version's
                            continue
                        (folder / file).parent.mkdir(parents=True, exist_ok=True)
                        if written is not None:
                            os.link(written, folder / file)
                        else:
                            (folder / file).write_bytes(content)
                            written = folder / file
        except BaseException:
            places.discard(folders)
            raise
        return places

    def _specs(self, name: str, stated: ModelConfig, places: _Places) -> list[ModelSpec]:
        values = stated.values
        none_served = f"at least one version must be available under the version policy of model '{name}'"
        if not places.folders:
            with _reading(f"the model '{name}'"):
                why = "" if places.owned else f": {advice.no_version(self._folder, name, MODEL_FILES)}"
            raise LoadError(none_served + why)
        files = {version: _entries(folder / str(version)) for version, folder in places.folders.items()}
        model_config.complete(values, name, files, gpus=len(self._defaults.devices))
        _warn(name, stated)
        served, missing = model_config.versions(values, places.folders)
        for version in missing:
            _log.error("Model %s: the policy names version %d, which is not there", name, version)
        if not served:
            raise LoadError(none_served)
        workers, devices = self._placement(name, values)
        specs = [self._spec(values, version, places, workers=workers, devices=devices) for version in served]
        places.discard(places.folders.keys() - served)
        return specs

    def _spec(
        self,
        values: Values,
        version: int,
        places: _Places,
        *,
        workers: int,
        devices: tuple[int | None, ...],
    ) -> ModelSpec:
        folder, defaults = places.folders[version], self._defaults
        batching = values.get("dynamic_batching") or {}
        queue = batching.get("default_queue_policy") or {}
        name = str(values["name"])
        return ModelSpec(
            name=name,
            version=str(version),
            path=os.path.abspath(folder / str(version)),
            url=f"{name}/{version}",
            handler=_HANDLER,
            owns_path=places.owned,
            batch_size=model_config.batch_size(values),
            max_batch_delay_ms=model_config.batch_delay_ms(values),
            min_workers=workers,
            max_workers=workers,
            queue_size=queue.get("max_queue_size") or defaults.queue_size,
            response_timeout_s=defaults.response_timeout_s,
            load_timeout_s=defaults.load_timeout_s,
            devices=devices,
            isolate_failures=values["backend"] != "python",
            manifest=_manifest(values, folder, version),
            config=values,
            scratch=os.path.abspath(self._work_dir / f"scratch-{next(self._scratches)}"),
        )

    def _placement(self, name: str, values: Values) -> tuple[int, tuple[int | None, ...]]:
        """Return how many workers there are, and the GPU of each, None for the CPU; none if all are there."""
        have = self._defaults.devices
        placed: list[int | None] = []
        for group in values["instance_group"]:
            if group["kind"] == "KIND_GPU" and not have:
                _log.warning("Model %s: instance group %s runs on CPUs: no GPU", name, group["name"])
                group["kind"], group["gpus"] = "KIND_CPU", []
            if group["kind"] == "KIND_CPU":
                placed += [None] * group["count"]
                continue
            absent = [str(gpu) for gpu in group["gpus"] if gpu not in have]
            if absent:
                _log.warning(
                    "Model %s: instance group %s: there is no GPU %s", name, group["name"], ", ".join(absent)
                )
            first = next(self._dealt) % max(1, len(have))  # many small models shall not share one
            chosen = [gpu for gpu in group["gpus"] if gpu in have] or [*have[first:], *have[:first]]
            placed += (chosen or [None]) * group["count"]
        return len(placed), tuple(placed) if set(placed) != {None} else ()


def startup_names(repository: TritonRepository, mode: str, load_models: str) -> list[str]:
    """Return the names of the models to load at start: all, but in mode explicit only those of the list.

    In the list, `*` and `ALL` stand for all models.

    Raises:
        LoadError: the repository cannot be read.
    """
    listed = [name.strip() for name in load_models.split(",") if name.strip()]
    if mode != "explicit" or any(name in ("*", "ALL") for name in listed):
        return repository.names()
    return list(dict.fromkeys(listed))


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn failures of the file system, and names that it cannot have, into errors that name no path."""
    try:
        yield
    except OSError as error:
        raise LoadError(f"cannot read {what}: {error.strerror or type(error).__name__}") from error
    except ValueError as error:
        raise LoadError(f"cannot read {what}: {error}") from error


def _read_config(name: str, folder: Path) -> ModelConfig:
    try:
        text = (folder / _CONFIG).read_bytes()
    except FileNotFoundError:
        return model_config.unstated()
    return model_config.parse_text(name, text)


def _versions(folder: Path) -> list[int]:
    """Return the version folders: numbers that do not begin with 0; others are not Triton's."""
    found = [entry for entry in folder.iterdir() if _VERSION.fullmatch(entry.name) and entry.is_dir()]
    return sorted(int(entry.name) for entry in found)


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _files(folder: Path, *, without: Iterable[str] = ()) -> Iterator[Path]:
    """Yield the files below a folder, without what Python makes of code and without some of its folders."""
    for parent, folders, names in os.walk(folder):
        left_out = {"__pycache__", *(without if parent == str(folder) else ())}
        folders[:] = [name for name in folders if name not in left_out]
        yield from (Path(parent, name) for name in names)


def _states(files: Iterable[Path]) -> object:
    states = []
    for file in files:
        with suppress(FileNotFoundError):  # gone since, or a link to nowhere
            stat = file.stat()
            states.append((str(file), stat.st_mtime_ns, stat.st_size))
    return tuple(sorted(states))


def _is_folder(name: str) -> bool:
    """Tell whether a model's folder can have this name."""
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name


def _check_options(options: LoadOptions) -> None:
    """Refuse what only archives can be told.

    Raises:
        InvalidRequest: something of it is said.
    """
    said = {
        "batch_size": options.batch_size != 1,
        "max_batch_delay": options.max_batch_delay_ms != 0,
        "handler": options.handler is not None,
        "runtime": options.runtime is not None,
        "sha256": options.sha256 is not None,
        "set_default": options.set_default,
    }
    refused = [name for name, is_said in said.items() if is_said]
    if refused:
        raise InvalidRequest(
            f"a model of the repository is as its files decide: {', '.join(refused)} cannot be given"
        )
    if options.workers is not None and options.workers < 0:
        raise InvalidRequest("initial_workers cannot be negative")


def _warn(name: str, stated: ModelConfig) -> None:
    """Name in the log what is set and has no effect."""
    values = stated.values
    if stated.ignored:
        _log.warning("Model %s: has no effect here: %s", name, ", ".join(stated.ignored))
    _, ignored = model_config.parameters(values)
    if ignored:
        _log.warning("Model %s: parameters that have no effect here: %s", name, ", ".join(ignored))
    optional = [each["name"] for each in values["input"] if each["optional"]]
    if optional and values["backend"] != "python":
        told = "Model %s: only python models can do without an input: %s is not optional"
        _log.warning(told, name, ", ".join(optional))


def _relative(file: str) -> PurePosixPath:
    """Return where a file that a client sends belongs below the model's folder.

    Raises:
        InvalidRequest: it belongs elsewhere.
    """
    path = PurePosixPath(file.removeprefix("file:"))
    if not path.parts or path.is_absolute() or ".." in path.parts or not str(path).isprintable():
        raise InvalidRequest(f"{file[:80]!r} is not the name of a file in a model's folder")
    return path


def _manifest(values: Values, folder: Path, version: int) -> Mapping[str, Any]:
    """Return what model-archiver would have written for this version."""
    name, backend = values["name"], BACKENDS[values["backend"]]
    settings: dict[str, Any] = {
        "inputs": model_config.tensors(values, "input"),
        "outputs": model_config.tensors(values, "output"),
        "batch": values["max_batch_size"] > 0,
        **model_config.parameters(values)[0],
    }
    model = {
        "modelName": name,
        "modelVersion": str(version),
        "handler": _HANDLER,
        "backend": backend.name,
        "modelFiles": _model_files(values["default_model_filename"], folder / str(version), name),
        "handlerConfig": {"backend": settings, "allow_nan": True},
        "labelsByOutput": {
            output["name"]: _labels(folder, output["label_filename"], name)
            for output in values["output"]
            if output["label_filename"]
        },
    }
    return {"model": model}


def _model_files(file: str, folder: Path, name: str) -> list[str]:
    """Return the model's file, and the weights of an OpenVINO model; a folder may hold the file.

    Raises:
        LoadError: it is not there.
    """
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not (folder / path).exists():
        told = f"unable to find '{file}' in version {folder.name} of model '{name}'"
        found = _entries(folder) if path.name == file else []
        other = advice.other_file(folder.name, found, [file], fields="'default_model_filename'")
        raise LoadError(f"{told}: {other}" if other else told)
    if (folder / path / path.name).is_file():
        path = path / path.name
    weights = path.with_suffix(".bin")
    if path.suffix == ".xml" and (folder / weights).is_file():
        return [str(path), str(weights)]
    return [str(path)]


def _labels(folder: Path, file: str, name: str) -> list[str]:
    """Return the labels of an output, one a line. The file may be a link to somewhere else.

    Raises:
        LoadError: they cannot be read.
    """
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise LoadError(f"the label_filename '{file}' of model '{name}' is not below its folder")
    with _reading(f"the label_filename '{file}' of model '{name}'"):
        text = (folder / path).read_bytes().decode("utf-8-sig", "replace")
    return [line.rstrip("\r") for line in text.rstrip("\r\n").split("\n")]
