"""What is on disk -> ModelSpec. The seam: what the engine asks of a folder of models, whatever its layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mms_lite.errors import InvalidRequest
from mms_lite.types import LoadOptions, ModelSpec

_MAX_NAME = 128

Stamp = Mapping[str, object]  # version -> what changes with its files; "": with what its versions share


class Repository(Protocol):
    """A folder of models. All of its methods block: the engine calls them on a thread.

    With `decides_versions` the folder of a model says which of its versions are served, and the highest one
    that can answer is the default; else users load and unload each by hand.
    """

    @property
    def decides_versions(self) -> bool:
        """Whether the folder of a model says which of its versions are served."""

    def read(self, options: LoadOptions) -> ModelSpec:
        """Read one version of a model; the caller gives it back with `discard`.

        Raises:
            ServingError: it is not there, or cannot be used.
        """

    def versions(
        self, name: str, *, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> list[ModelSpec]:
        """Read the versions of a model that are to be served, in ascending order; never none.

        `config` replaces the model's own configuration, `files` all its files.

        Raises:
            ServingError: it is not there, or cannot be used.
        """

    def names(self) -> list[str]:
        """Return the names of all models that are there.

        Raises:
            LoadError: the repository cannot be read.
        """

    def stamp(self, name: str) -> Stamp | None:
        """Return what changes when a model's files do; None if it is not there.

        Raises:
            LoadError: it cannot be read.
        """

    def discard(self, spec: ModelSpec) -> None:
        """Delete the folder that was made for this load, if one was."""

    def close(self) -> None:
        """Give up what is being read."""


def not_found(name: str) -> str:
    """Return Triton's words for a model that is not there."""
    return f"failed to load '{name}', failed to poll from model repository"


def check_name(name: str) -> None:
    """Refuse a model's name that no path can hold.

    Raises:
        InvalidRequest: it is one.
    """
    if len(name) > _MAX_NAME or "/" in name or not name.isprintable():
        raise InvalidRequest(
            f"a model's name has at most {_MAX_NAME} printable characters, none of them a '/'"
        )
