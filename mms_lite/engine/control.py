"""What is served of a repository, by name: load, unload, look again, and an index of what became of all.

Apart from `lifecycle`: here a name's versions belong together, and changes of one name come one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakValueDictionary

from mms_lite.engine.lifecycle import Lifecycle
from mms_lite.engine.model import Model
from mms_lite.engine.registry import Registry, version_order
from mms_lite.engine.repository import Repository, Stamp, check_name
from mms_lite.errors import InvalidRequest, LoadError, ModelNotFound, ServingError
from mms_lite.types import (
    NO_WORKERS,
    UNLOADED,
    ModelSpec,
    ModelStatus,
    RepositoryEntry,
    RepositoryState,
    VersionState,
)

_MOST_UNLOADED = 1000  # versions that are gone and remembered
_STATES = {
    VersionState.READY: RepositoryState.READY,
    VersionState.LOADING: RepositoryState.LOADING,
    VersionState.UNLOADING: RepositoryState.UNLOADING,
    VersionState.FAILED: RepositoryState.UNAVAILABLE,
}

_log = logging.getLogger("mms_lite.engine")


@dataclass(slots=True)
class _Record:
    """What is known of a name that was to be loaded, or that was looked at.

    `source` are the files that its versions were loaded from; None if a client sent others, which are kept.
    `tried` are those that were read last, whatever became of it, `seen` those of the last look. `failures`
    say why versions are not served, or not renewed; "" is for all of the name.
    """

    wanted: bool = False  # it was to be loaded, and not unloaded since
    source: Stamp | None = field(default_factory=dict)
    tried: Stamp | None = None
    seen: Stamp | None = None
    failures: dict[str, str] = field(default_factory=dict)
    url: str = ""  # of an archive that could not be read at start


class ModelControl:
    """Loads and unloads models of the repository by name.

    With `follows_all`, a look loads models that are new in the repository and unloads deleted ones.
    """

    def __init__(
        self, repository: Repository, registry: Registry, lifecycle: Lifecycle, *, follows_all: bool
    ) -> None:
        self._repository = repository
        self._registry = registry
        self._lifecycle = lifecycle
        self._follows_all = follows_all
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # live while in use
        self._unloads: Counter[str] = Counter()  # unloads that wait for the lock of a name
        self._records: dict[str, _Record] = {}
        self._unloaded: dict[tuple[str, str], None] = {}  # names and versions, the latest last
        self._unreadable = ""  # why the last look of a poll saw no repository

    @property
    def failed(self) -> bool:
        """Whether a model that was to be loaded is not served in any version."""
        return any(record.failures and not self._loaded(name) for name, record in self._records.items())

    async def load(
        self,
        name: str,
        *,
        config: str | None = None,
        files: Mapping[str, bytes] | None = None,
        at_start: bool = False,
    ) -> None:
        """Load the versions of a model that its policy serves, or load them anew.

        What is not there is remembered if it was to be loaded `at_start`: clients shall not make up names.

        Raises:
            ModelNotFound: it is not there.
            InvalidRequest: the name or `files` are none.
            LoadError: a version cannot be loaded; what was served still is.
        """
        check_name(name)
        async with self._lock(name):
            self._lifecycle.check_open()
            stamp = None if config is not None else await self._stamp(name, asked=True)
            try:
                await self._read_and_serve(name, stamp, config=config, files=files)
            except ModelNotFound as error:
                if at_start:
                    self._note_failure(name, {}, {"": error.message})
                raise

    async def unload(self, name: str) -> None:
        """Unload all versions of a model, also those that are just being loaded; once more does no harm.

        Raises:
            InvalidRequest: it was never loaded.
        """
        async with self._lock_to_unload(name):
            models = self._loaded(name)
            failed = name in self._records and self._records[name].failures
            if not models and not failed and not any(name == gone for gone, _ in self._unloaded):
                raise InvalidRequest("Model to be unloaded has not been served")
            self._take_out(name, models)
        await self._lifecycle.close_all(models)

    async def take_out(self, name: str, version: str | None) -> list[Model]:
        """Take a version or all of a name out of the registry; the caller closes them.

        With all, what is just being loaded is given up. One version is taken out after such a load.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
        """
        known = version is None and bool(self._loading(name) or self.failed_versions(name))
        async with self._lock(name) if version else self._lock_to_unload(name):
            models = [self._registry.get(name, version)] if version else self._loaded(name)
            if not models and not known:
                raise ModelNotFound(f"Model not found: {name}", name=name)
            if len(models) == len(self._loaded(name)):
                self._take_out(name, models)
            else:
                self._registry.remove(models[0])
                self._note_unloaded(name, models[0].spec.version)
        return models

    async def rescan(self) -> bool:
        """Look at the repository again and serve what is there now; tell whether that changed anything.

        Raises:
            LoadError: it cannot be read, or models of it cannot be loaded, which stay as they were. The
                others have been looked at. Details: models, their names.
        """
        names = await self._followed()
        looks = await asyncio.gather(*(self._look(name, polling=False) for name in names))
        failed = {
            name: look for name, look in zip(names, looks, strict=True) if isinstance(look, ServingError)
        }
        if failed:
            told = "; ".join(f"{name}: {error.message}" for name, error in failed.items())
            raise LoadError(told, models=list(failed))
        return any(look is True for look in looks)

    async def poll(self) -> None:
        """Look at the repository as `rescan` does, but wait for no model: the loads go on by themselves.

        A model that is being changed is left to the next look. Files count once they were the same in two
        looks: what is still being copied is no model yet. Failures are logged once.
        """
        try:
            names = await self._followed()
        except LoadError as error:  # nobody has deleted what cannot be seen for the moment
            if error.message != self._unreadable:
                _log.error("%s", error.message)
            self._unreadable = error.message
            return
        self._unreadable = ""
        for name in names:
            if not self._lock(name).locked():
                self._lifecycle.background(self._look(name, polling=True))

    async def index(self) -> list[RepositoryEntry]:
        """Return the versions that are or were to be loaded, and the names of the other models there."""
        try:
            names = await asyncio.to_thread(self._repository.names)
        except LoadError as error:
            _log.error("%s", error.message)
            names = []
        entries = self.entries()
        named = {entry.name for entry in entries}
        return _sorted([*entries, *(RepositoryEntry(name) for name in names if name not in named)])

    def entries(self) -> list[RepositoryEntry]:
        """Return the versions that are or were to be loaded; reads no files."""
        found: dict[tuple[str, str], RepositoryEntry] = {}

        def put(name: str, version: str, state: RepositoryState, reason: str = "") -> None:
            found.setdefault((name, version), RepositoryEntry(name, version, state, reason))

        for model in self._registry.list():
            name, version = model.spec.name, model.spec.version
            status = model.status(is_default=False)
            failures = self._records[name].failures if name in self._records else {}
            idle = status.detail == NO_WORKERS
            state = RepositoryState.UNAVAILABLE if idle else _STATES[status.state]
            put(name, version, state, status.detail or failures.get(version) or failures.get("", ""))
        for model in self._lifecycle.incoming:
            put(model.spec.name, model.spec.version, RepositoryState.LOADING)
        for model in self._lifecycle.leaving:
            put(model.spec.name, model.spec.version, RepositoryState.UNLOADING)
        named = {name for name, _ in found}
        for name, version, reason in self._failures():
            if version or name not in named:
                put(name, version, RepositoryState.UNAVAILABLE, reason)
        for name, version in self._unloaded:
            if version:
                put(name, version, RepositoryState.UNAVAILABLE, UNLOADED)
        return _sorted(found.values())

    def failed_versions(self, name: str | None = None, *, unread: bool = True) -> list[ModelStatus]:
        """Describe the versions of a name, or of all, that failed and are not there; version "" is all of it.

        Where no version of a name is there, the highest that failed stands for it as the default. `unread`
        are the archives that have no name of their own.
        """
        found: dict[str, list[ModelStatus]] = {}
        for each, version, reason in sorted(self._failures(), key=lambda one: version_order(one[1])):
            if name in (None, each) and (unread or not self._records[each].url):
                found.setdefault(each, []).append(self._failed(each, version, reason))
        for each, failed in found.items():
            if not self._loaded(each):
                failed[-1] = replace(failed[-1], is_default=True)
        return [status for each in sorted(found) for status in found[each]]

    def note_unread(self, name: str, url: str, reason: str) -> None:
        """Remember an archive that could not be read at start, and so has no name of its own."""
        record = self._record(name)
        record.failures, record.url = {"": reason}, url

    def note_loaded(self, model: Model) -> None:
        """Forget why a version, or its archive, had failed that somebody has now loaded by hand."""
        for name, unread in list(self._records.items()):
            if unread.url and unread.url == model.spec.url:
                del self._records[name]
        record = self._records.get(model.spec.name)
        if record is not None:
            gone = ("", model.spec.version)
            record.failures = {key: why for key, why in record.failures.items() if key not in gone}

    def _failures(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, version and reason of what failed and is not there; "" is all of a name."""
        for name, record in self._records.items():
            loaded = {model.spec.version for model in self._loaded(name)}
            for version, reason in record.failures.items():
                if version not in loaded and (version or not loaded):
                    yield name, version, reason

    def _failed(self, name: str, version: str, reason: str) -> ModelStatus:
        url = self._records[name].url
        at_startup = bool(url) or name in self._lifecycle.startup_names
        return ModelStatus(
            spec=ModelSpec(name, version, path="", url=url or name, at_startup=at_startup),
            state=VersionState.FAILED,
            is_default=False,
            detail=reason,
            workers=(),
            queue_depth=0,
            in_flight=0,
            answered=0,
            refused=0,
        )

    async def _followed(self) -> list[str]:
        """Return the names to look at."""
        if not self._follows_all:
            return sorted(name for name, record in self._records.items() if record.wanted)
        return sorted({*self._records, *await self._lifecycle.read(self._repository.names)})

    async def _look(self, name: str, *, polling: bool) -> bool | ServingError:
        """Serve a model as its files are now; tell whether that changed anything, or why it did not."""
        async with self._lock(name):
            try:
                return await self._renew(name, polling=polling)
            except ServingError as error:
                failure = error
            except Exception:  # of one model: the others are looked at
                _log.exception("Model %s %s", name, self._what_it_is(name))
                return ServingError("internal error")
        if not self._lifecycle.draining:
            _log.error("Model %s %s: %s", name, self._what_it_is(name), failure.message)
        return failure

    def _what_it_is(self, name: str) -> str:
        """Tell what a load that failed has left."""
        return "stays as it was" if self._loaded(name) else "is not served"

    async def _renew(self, name: str, *, polling: bool) -> bool:
        record = self._record(name) if self._follows_all else self._records.get(name)
        if record is None or record.source is None:  # unloaded since, or from a client
            return False
        before = record.failures
        try:
            stamp = await self._stamp(name, asked=False)
        except LoadError:
            if polling and before == record.failures:  # it has been told
                return False
            raise
        steady, record.seen = stamp == record.seen, stamp
        if polling and not steady:
            return False
        if stamp is None:
            return self._remove(name)
        failed = bool(record.failures) or not all(model.ready for model in self._loaded(name))
        if stamp == record.tried and (polling or not failed):
            return False
        source = record.source
        keep = {m.spec.version for m in self._loaded(name) if m.ready and _is_same(m, source, stamp)}
        return await self._read_and_serve(name, stamp, keep=keep)

    async def _stamp(self, name: str, *, asked: bool) -> Stamp | None:
        try:
            return await self._lifecycle.read(partial(self._repository.stamp, name))
        except LoadError as error:
            record = self._record(name)
            if asked or record.wanted or record.tried is None:  # else it was unloaded
                record.wanted, record.tried, record.failures = True, None, {"": error.message}
            raise

    def _remove(self, name: str) -> bool:
        if not self._follows_all:
            return False
        models = self._loaded(name)
        self._take_out(name, models)
        self._records.pop(name, None)
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
                if self._unloads[name]:
                    for spec in wanted:
                        await asyncio.to_thread(self._repository.discard, spec)
                    raise LoadError(f"failed to load '{name}', model {name} is being unloaded")
                await self._lifecycle.serve(name, wanted, kept)
        except ServingError as error:
            if config is not None and not self._unloads[name] and await self._is_nowhere(name):
                self._records.pop(name, None)
                raise
            versions = [spec.version for spec in wanted]
            reasons = error.details.get("versions") or dict.fromkeys(versions, error.message)
            self._note_failure(name, stamp, reasons)
            raise
        left = {model.spec.version for model in before} - {model.spec.version for model in self._loaded(name)}
        self._note_served(name, left)
        record = self._record(name)
        record.source = (stamp or {}) if config is None else None
        record.tried = record.seen = stamp
        return bool(wanted or left)

    def _note_served(self, name: str, left: Iterable[str]) -> None:
        """Take note of a load that succeeded; versions that were served or had failed before are gone."""
        record = self._record(name)
        for version in (*record.failures, *left):
            if version and not self._registry.has(name, version):
                self._note_unloaded(name, version)
        for model in self._loaded(name):
            self._unloaded.pop((name, model.spec.version), None)
        record.wanted, record.failures, record.url = True, {}, ""

    def _note_failure(self, name: str, stamp: Stamp | None, reasons: Mapping[str, str]) -> None:
        """Remember why a load failed. Polling does not try the same files again."""
        record = self._record(name)
        record.failures = dict(reasons)
        if stamp is not None:  # not a client's
            record.wanted, record.tried = True, stamp
            record.source = record.source or {}

    def _note_unloaded(self, name: str, version: str) -> None:
        self._unloaded.pop((name, version), None)
        self._unloaded[name, version] = None
        if len(self._unloaded) > _MOST_UNLOADED:
            del self._unloaded[next(iter(self._unloaded))]

    def _take_out(self, name: str, models: Iterable[Model]) -> None:
        """Take all versions of a name out of the registry, and forget that it was to be loaded."""
        gone = [model.spec.version for model in models]
        for model in models:
            self._registry.remove(model)
        if name in self._records:
            record = self._records[name]
            gone += record.failures
            record.wanted, record.failures = False, {}
            if not self._follows_all:  # else its files would be taken for new ones
                del self._records[name]
        for version in gone:
            self._note_unloaded(name, version)

    async def _is_nowhere(self, name: str) -> bool:
        """Tell whether a name is neither served nor in the repository: a client has made it up."""
        with contextlib.suppress(LoadError):
            return (
                not self._loaded(name)
                and await self._lifecycle.read(partial(self._repository.stamp, name)) is None
            )
        return False

    def _record(self, name: str) -> _Record:
        return self._records.setdefault(name, _Record())

    def _loaded(self, name: str) -> list[Model]:
        try:
            return self._registry.versions(name)
        except ModelNotFound:
            return []

    @contextlib.asynccontextmanager
    async def _lock_to_unload(self, name: str) -> AsyncIterator[None]:
        """Hold the lock of a name, for which loads that came before are given up."""
        lock = self._lock(name)
        self._unloads[name] += 1
        try:
            for model in self._loading(name):
                self._lifecycle.background(model.close(drain_s=0.0))
            await lock.acquire()
        finally:
            self._unloads[name] -= 1
            if not self._unloads[name]:
                del self._unloads[name]
        try:
            yield
        finally:
            lock.release()

    def _loading(self, name: str) -> list[Model]:
        """Return what a load by name is starting, which holds the lock."""
        incoming = self._lifecycle.incoming if self._lock(name).locked() else ()
        return [model for model in incoming if model.spec.name == name]

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _sorted(entries: Iterable[RepositoryEntry]) -> list[RepositoryEntry]:
    return sorted(entries, key=lambda entry: (entry.name, version_order(entry.version)))


def _is_same(model: Model, known: Stamp, stamp: Stamp) -> bool:
    version = model.spec.version
    return all(key in known and known[key] == stamp.get(key) for key in ("", version))
