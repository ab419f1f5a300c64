"""What model-archiver wrote about a model without code: its files, backend, labels and handler config.

Apart from the handlers so that how a config is read and refused exists once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mms_lite.errors import InvalidArchive
from mms_lite.tensors import DTYPES
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import BackendSettings
from mms_lite.worker.context import Context

_T = TypeVar("_T")
_BACKEND_KEYS = ("inputs", "outputs", "batch", "threads", "options")
_MOST_THREADS = 1024
_MOST_ELEMENTS = 2**63


@dataclass(frozen=True, slots=True)
class Package:
    """One unpacked archive, or a version of a model in a Triton repository.

    `files` are the model's, the primary first; `config` is the handler's, `model_config` the repository's.
    `instance` is the number of this worker.
    """

    folder: Path
    backend: str
    files: tuple[Path, ...]
    labels: tuple[str, ...] | None
    config: Mapping[str, Any]
    model: str = "model"
    version: str = "1"
    instance: int = 0
    model_config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, context: Context) -> Package:
        """Read what the manifest says of the model (docs/model-archiver.md).

        Raises:
            InvalidArchive: it does not say it, or names a file that is not there.
        """
        model = (context.manifest or {}).get("model")
        model = model if isinstance(model, Mapping) else {}
        folder = Path(context.system_properties["model_dir"])
        in_repository = context.model_config is not None
        if not model.get("modelFiles") or not model.get("backend"):
            raise InvalidArchive(
                "the manifest names no model file: pack the model with model-archiver --model-file"
            )
        config = model.get("handlerConfig") or {}
        if not isinstance(config, Mapping):
            raise InvalidArchive("the manifest's handlerConfig is not an object")
        labels = model.get("labels")
        return cls(
            folder=folder,
            backend=str(model["backend"]),
            files=tuple(_existing(folder, name, links=in_repository) for name in model["modelFiles"]),
            labels=_read_labels(_existing(folder, labels, links=in_repository)) if labels else None,
            config=config,
            model=context.model_name,
            version=_version(context, folder, model),
            instance=context.instance,
            model_config=context.model_config,
        )

    def file(self, name: str) -> Path:
        """Return the path of another file of the archive.

        Raises:
            InvalidArchive: it is not there.
        """
        return _existing(self.folder, name, links=self.model_config is not None)


def read_settings(cls: type[_T], config: Mapping[str, Any]) -> _T:
    """Make a handler's settings, a dataclass, from its config; its `__post_init__` may raise ValueError.

    Raises:
        InvalidArchive: a key is unknown, or a value is not one.
    """
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"
            raise InvalidArchive(f"the handler config has an unknown key {key!r}{hint}")
    try:
        return cls(**config)
    except (TypeError, ValueError) as error:
        raise InvalidArchive(f"the handler config cannot be used: {error}") from error


def is_whole(value: object, *, least: int = 0) -> bool:
    """Tell whether a value of a config is a whole number of at least this."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Tell whether a value of a config is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def backend_settings(
    package: Package, stated: Mapping[str, Any], *, threads: int, device: int | None
) -> BackendSettings:
    """Return what the backend gets; `stated` is the config's `backend`.

    Its keys: `inputs` and `outputs`, lists of {"name", "datatype", "shape"}; `batch`; `threads`; `options`.

    Raises:
        InvalidArchive: a key or value is not one.
    """
    for key in stated:
        if key not in _BACKEND_KEYS:
            raise InvalidArchive(
                f"the handler config has an unknown key backend.{key}; there are: {', '.join(_BACKEND_KEYS)}"
            )
    threads = stated.get("threads", threads)
    options = stated.get("options", {})
    batch = stated.get("batch")
    if not is_whole(threads, least=1) or threads > _MOST_THREADS:
        raise InvalidArchive(
            f"the handler config's backend.threads is not a number from 1 to {_MOST_THREADS}: {threads!r}"
        )
    if not (batch is None or isinstance(batch, bool)):
        raise InvalidArchive(f"the handler config's backend.batch is neither true nor false: {batch!r}")
    if not isinstance(options, Mapping):
        raise InvalidArchive("the handler config's backend.options is not an object")
    return BackendSettings(
        files=package.files,
        model=package.model,
        version=package.version,
        instance=package.instance,
        threads=threads,
        device=device,
        inputs=_specs(stated, "inputs"),
        outputs=_specs(stated, "outputs"),
        batch=batch,
        options=options,
        config=package.model_config,
    )


def _version(context: Context, folder: Path, model: Mapping[str, Any]) -> str:
    """Return the model's version: in a Triton repository its folder's name."""
    if context.model_config is not None and folder.name.isdecimal():
        return folder.name
    return str(model.get("modelVersion") or "1")


def _specs(stated: Mapping[str, Any], side: str) -> tuple[TensorSpec, ...]:
    try:
        return tuple(
            _spec(**{key: each[key] for key in ("name", "datatype", "shape")})
            for each in stated.get(side, ())
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArchive(
            f"the handler config's backend.{side} is not a list of "
            f'{{"name": ..., "datatype": "FP32", "shape": [-1, 3, 224, 224]}}: {error}'
        ) from error


def _spec(name: object, datatype: object, shape: list[Any]) -> TensorSpec:
    if datatype not in DTYPES:
        raise ValueError(f"{datatype} is none of {', '.join(DTYPES)}")
    lengths = [length for length in shape if is_whole(length, least=-1) and length < _MOST_ELEMENTS]
    if len(lengths) != len(shape):
        raise ValueError(f"{shape} is not a shape")
    return TensorSpec(str(name), str(datatype), tuple(lengths))


def _existing(folder: Path, name: object, *, links: bool) -> Path:
    """Return the path of a file below the folder, which may be a link out of it where `links` may be.

    An archive is a stranger's; a repository is its operator's, whose volumes and caches are made of links.
    """
    place = os.path.normpath if links else os.path.realpath
    path = Path(place(folder / str(name)))
    if not path.is_relative_to(place(folder)) or not path.exists():
        raise InvalidArchive(f"the archive has no file {name}")
    return path


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return tuple(str(label) for label in json.loads(text))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise InvalidArchive(f"the labels in {path.name} cannot be read: {_without_path(error)}") from error
    return tuple(line.rstrip("\r") for line in text.rstrip("\r\n").split("\n"))


def _without_path(error: Exception) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)
