"""What is served of a repository, by name: load, unload, look again, and an index of what became of all.

Apart from `lifecycle`: here a name's versions belong together, and changes of one name come one by one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from weakref import WeakValueDictionary

from mms_lite.engine.lifecycle import Lifecycle
from mms_lite.engine.model import Model
from mms_lite.engine.registry import Registry, version_order
from mms_lite.engine.repository import Repository, Stamp, check_name
from mms_lite.errors import InvalidRequest, LoadError, ModelNotFound, ServingError
from mms_lite.types import RepositoryEntry, RepositoryState, VersionState

_UNLOADED = "unloaded"  # Triton's word: such a version does not keep the server from being ready
_STATES = {
    VersionState.READY: RepositoryState.READY,
    VersionState.LOADING: RepositoryState.LOADING,
    VersionState.UNLOADING: RepositoryState.UNLOADING,
    VersionState.FAILED: RepositoryState.UNAVAILABLE,
}

_log = logging.getLogger("mms_lite.engine")


class ModelControl:
    """Loads and unloads models of the repository by name.

    With `follows_all`, `rescan` loads models that are new in the repository and unloads deleted ones.
    """

    def __init__(
        self, repository: Repository, registry: Registry, lifecycle: Lifecycle, *, follows_all: bool
    ) -> None:
        self._repository = repository
        self._registry = registry
        self._lifecycle = lifecycle
        self._follows_all = follows_all
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # live while in use
        self._wanted: set[str] = set()  # names that were to be loaded, and not unloaded since
        # The files that were last read of a name; None if it was loaded with others, which are kept.
        self._stamps: dict[str, Stamp | None] = {}
        # Why a version is not served, or not renewed; "" for all of a name.
        self._reasons: dict[str, dict[str, str]] = {}

    @property
    def failed(self) -> bool:
        """Whether something that was to be loaded is not served."""
        return any(
            reason != _UNLOADED and not self._is_served(name, version)
            for name, reasons in self._reasons.items()
            for version, reason in reasons.items()
        )

    async def load(
        self, name: str, *, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Load the versions of a model that its policy serves, or load them anew.

        Raises:
            ModelNotFound: it is not there.
            InvalidRequest: the name or `files` are none.
            LoadError: a version cannot be loaded; what was served still is.
        """
        check_name(name)
        async with self._lock(name):
            self._lifecycle.check_open()
            stamp = None
            if config is None:
                stamp = await self._lifecycle.read(partial(self._repository.stamp, name))
            await self._read_and_serve(name, stamp, config=config, files=files)

    async def unload(self, name: str) -> None:
        """Unload all versions of a model; once more does no harm.

        Raises:
            InvalidRequest: it was never loaded.
        """
        async with self._lock(name):
            models = self._loaded(name)
            if not models and name not in self._reasons:
                raise InvalidRequest("Model to be unloaded has not been served")
            self._take_out(name, models)
        await self._lifecycle.close_all(models)

    def note_unloaded(self, models: Iterable[Model]) -> None:
        """Take note that versions have left the registry."""
        for model in models:
            name = model.spec.name
            self._reasons.setdefault(name, {})[model.spec.version] = _UNLOADED
            if not self._loaded(name):
                self._wanted.discard(name)

    async def rescan(self) -> bool:
        """Look at the repository again and serve what is there now; tell whether that changed anything.

        A model that cannot be loaded is told of in the log and in the index, and stays as it was.
        """
        names = set(self._wanted)
        if self._follows_all:
            try:
                names.update(await self._lifecycle.read(self._repository.names))
            except LoadError as error:  # nobody has deleted what cannot be seen for the moment
                _log.error("%s", error.message)
                return False
        return any(await asyncio.gather(*map(self._follow, sorted(names))))

    def index(self) -> list[RepositoryEntry]:
        """Return the versions that are or were to be loaded, and the names of the other models there."""
        found: dict[tuple[str, str], RepositoryEntry] = {}

        def put(name: str, version: str, state: RepositoryState, reason: str = "") -> None:
            found.setdefault((name, version), RepositoryEntry(name, version, state, reason))

        for model in self._registry.list():
            name, version = model.spec.name, model.spec.version
            status = model.status(is_default=False)
            reasons = self._reasons.get(name, {})
            reason = status.detail or reasons.get(version) or reasons.get("", "")
            put(name, version, _STATES[status.state], "" if reason == _UNLOADED else reason)
        for model in self._lifecycle.incoming:
            put(model.spec.name, model.spec.version, RepositoryState.LOADING)
        for model in self._lifecycle.leaving:
            put(model.spec.name, model.spec.version, RepositoryState.UNLOADING)
        named = {name for name, _ in found}
        for name, reasons in self._reasons.items():
            for version, reason in reasons.items():
                if version or name not in named:
                    put(name, version, RepositoryState.UNAVAILABLE, reason)
        named = {name for name, _ in found}
        entries = [*found.values(), *(RepositoryEntry(name) for name in self._names() if name not in named)]
        return sorted(entries, key=lambda entry: (entry.name, version_order(entry.version)))

    def _names(self) -> list[str]:
        try:
            return self._repository.names()
        except LoadError as error:
            _log.error("%s", error.message)
            return []

    async def _follow(self, name: str) -> bool:
        async with self._lock(name):
            try:
                return await self._renew(name)
            except ServingError as error:
                _log.error("Model %s stays as it was: %s", name, error.message)
            except Exception:  # of one model: the others are looked at
                _log.exception("Model %s stays as it was", name)
            return False

    async def _renew(self, name: str) -> bool:
        """Serve a model as its files are now; tell whether that changed anything."""
        known = self._stamps.get(name, {})
        if known is None:
            return False
        stamp = await self._lifecycle.read(partial(self._repository.stamp, name))
        if stamp is None:
            return await self._remove(name)
        if stamp == known:
            return False
        models = self._loaded(name)
        keep = {model.spec.version for model in models if model.ready and _is_same(model, known, stamp)}
        return await self._read_and_serve(name, stamp, keep=keep)

    async def _remove(self, name: str) -> bool:
        if not self._follows_all:
            return False
        models = self._loaded(name)
        self._take_out(name, models)
        self._stamps.pop(name, None)
        self._lifecycle.background(self._lifecycle.close_all(models))
        return bool(models)

    async def _read_and_serve(
        self,
        name: str,
        stamp: Stamp | None,
        *,
        config: str | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: Iterable[str] = (),
    ) -> bool:
        read = partial(self._repository.versions, name, config=config, files=files)
        try:
            specs = await self._lifecycle.read(read)
        except LoadError as error:
            if config is None:  # else it is the client's configuration that is at fault, and nothing else
                self._note_failure(name, stamp, {"": error.message})
            raise
        before = self._loaded(name)
        kept = {spec.version for spec in specs} & set(keep)
        wanted = [spec for spec in specs if spec.version not in kept]
        try:
            if wanted or len(kept) < len(before):
                await self._lifecycle.serve(name, wanted, kept)
        except ServingError as error:
            versions = [spec.version for spec in wanted]
            reasons = error.details.get("versions") or dict.fromkeys(versions, error.message)
            self._note_failure(name, stamp, reasons)
            raise
        self._wanted.add(name)
        self._stamps[name] = stamp
        now = self._loaded(name)
        left = {model.spec.version for model in before} - {model.spec.version for model in now}
        past = {version: _UNLOADED for version in (*self._reasons.get(name, {}), *left) if version}
        self._reasons[name] = {
            version: reason for version, reason in past.items() if not self._is_served(name, version)
        }
        return bool(wanted or left)

    def _note_failure(self, name: str, stamp: Stamp | None, reasons: Mapping[str, str]) -> None:
        """Remember why a load failed. The same files are not tried again until somebody asks for it."""
        self._wanted.add(name)
        if stamp is not None or name not in self._stamps:
            self._stamps[name] = stamp
        self._reasons.setdefault(name, {}).update(reasons)

    def _take_out(self, name: str, models: Iterable[Model]) -> None:
        reasons = self._reasons.setdefault(name, {})
        for model in models:
            self._registry.remove(model)
            reasons[model.spec.version] = _UNLOADED
        self._reasons[name] = dict.fromkeys((version for version in reasons if version), _UNLOADED)
        self._wanted.discard(name)

    def _loaded(self, name: str) -> list[Model]:
        try:
            return self._registry.versions(name)
        except ModelNotFound:
            return []

    def _is_served(self, name: str, version: str) -> bool:
        return self._registry.has(name, version) if version else bool(self._loaded(name))

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _is_same(model: Model, known: Stamp, stamp: Stamp) -> bool:
    version = model.spec.version
    return all(key in known and known[key] == stamp.get(key) for key in ("", version))
