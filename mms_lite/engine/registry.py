"""What is loaded: name -> versions -> model, and which version answers when none is named."""

from __future__ import annotations

from collections.abc import Mapping

from mms_lite.engine.model import Model
from mms_lite.errors import InvalidRequest, ModelConflict, ModelNotFound, VersionNotFound


class Registry:
    """The loaded models. Pure bookkeeping: nothing here waits or runs.

    With `highest_is_default` the highest version that can answer is the default. Else it is the first that
    came, until it goes or another is made it; one that goes hands over to the last that can answer.
    """

    def __init__(self, *, highest_is_default: bool = False) -> None:
        self._highest_is_default = highest_is_default
        self._models: dict[str, dict[str, Model]] = {}
        self._defaults: dict[str, str] = {}

    def set_default(self, model: Model) -> None:
        """Let this version, if it is still there, answer when none is named.

        Raises:
            InvalidRequest: it is not for users to say.
        """
        if self._highest_is_default:
            raise InvalidRequest("the highest version of a model that can answer is the default one")
        if self.has(model.spec.name, model.spec.version):
            self._defaults[model.spec.name] = model.spec.version

    def settle_default(self, name: str) -> None:
        """Decide which version of a name is the default; to be called when one may have become ready."""
        versions = self._models.get(name)
        if not versions:
            self._defaults.pop(name, None)
        elif self._highest_is_default or self._defaults.get(name) not in versions:
            able = [each for each, model in versions.items() if model.can_answer]
            candidates = able or list(versions)
            highest = self._highest_is_default
            self._defaults[name] = max(candidates, key=version_order) if highest else candidates[-1]

    def add(self, model: Model) -> None:
        """Add a version; the first of a name becomes the default.

        Raises:
            ModelConflict: this version of this name is there.
        """
        name, version = model.spec.name, model.spec.version
        if version in self._models.get(name, {}):
            raise ModelConflict(f"Model {name} is already registered.", name=name, version=version)
        self._put(model)

    def swap(self, model: Model) -> Model:
        """Put a version in the place of the one with its name and version, which is returned.

        Raises:
            ModelNotFound, VersionNotFound: it is gone.
        """
        old = self.get(model.spec.name, model.spec.version)
        self._put(model)
        return old

    def get(self, name: str, version: str | None = None) -> Model:
        """Return a version, or the default one.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
        """
        versions = self._models.get(name)
        if versions is None:
            raise ModelNotFound(f"Model not found: {name}", name=name)
        if version is None:
            return self._default(name, versions)
        if version not in versions:
            raise VersionNotFound(f"Model not found: {name}, version {version}", name=name, version=version)
        return versions[version]

    def has(self, name: str, version: str) -> bool:
        """Tell whether this version of this name is loaded."""
        return version in self._models.get(name, {})

    def is_default(self, model: Model) -> bool:
        """Tell whether this version answers when none is named."""
        name, version = model.spec.name, model.spec.version
        versions = self._models.get(name)
        return versions is not None and self._default(name, versions).spec.version == version

    def versions(self, name: str) -> list[Model]:
        """Return all versions of a name, in order of loading.

        Raises:
            ModelNotFound: the name is not there.
        """
        self.get(name)
        return list(self._models[name].values())

    def remove(self, model: Model) -> None:
        """Take a version out."""
        name, version = model.spec.name, model.spec.version
        versions = self._models.get(name, {})
        if versions.get(version) is not model:
            return
        del versions[version]
        if not versions:
            del self._models[name]
        self.settle_default(name)

    def list(self) -> list[Model]:
        """Return every version of every model, sorted by name."""
        return [model for name in sorted(self._models) for model in self._models[name].values()]

    def _default(self, name: str, versions: Mapping[str, Model]) -> Model:
        """Return the version that answers when none is named; the highest may have lost all its workers."""
        model = versions[self._defaults[name]]
        if self._highest_is_default and len(versions) > 1 and not model.can_answer:
            self.settle_default(name)
            return versions[self._defaults[name]]
        return model

    def _put(self, model: Model) -> None:
        name, version = model.spec.name, model.spec.version
        self._models.setdefault(name, {})[version] = model
        self.settle_default(name)


def version_order(version: str) -> tuple[int, str]:
    """Return what versions are sorted by: decimal ones as numbers, after all others."""
    return (int(version), "") if version.isdecimal() else (-1, version)
