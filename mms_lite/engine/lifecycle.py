"""How versions of models come and go: read, started, put in each other's place, drained, discarded.

Apart from the verbs of `engine`, which say what is to happen, and from `control`, which does it by name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mms_lite.engine.launcher import Launcher
from mms_lite.engine.model import Model
from mms_lite.engine.pool import Call
from mms_lite.engine.registry import Registry
from mms_lite.engine.repository import Repository
from mms_lite.engine.repository.allow_list import is_remote
from mms_lite.errors import InvalidRequest, LoadError, ModelConflict, ModelNotReady, ServingError
from mms_lite.types import LoadOptions, ModelSpec, VersionState

MAX_WORKERS = 1024
_READERS = 8  # archives that are unpacked at once, and as many that are downloaded

T = TypeVar("T")

_log = logging.getLogger("mms_lite.engine")


@dataclass(frozen=True, slots=True)
class Turn:
    """A place in the start-up list: its model is named when those before it have their names, or failed."""

    earlier: Sequence[asyncio.Event]
    taken: asyncio.Event


class Lifecycle:
    """Changes what the registry holds. `incoming` load and are not in it yet, `leaving` are not any more."""

    def __init__(
        self,
        repository: Repository,
        launcher: Launcher,
        registry: Registry,
        *,
        cores: int,
        unload_s: float,
        call: Call,
    ) -> None:
        self.incoming: set[Model] = set()
        self.leaving: set[Model] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.startup_names: set[str] = set()  # of models that were entered at start
        self._repository = repository
        self._launcher = launcher
        self._registry = registry
        self._cores = cores
        self._unload_s = unload_s  # what open requests have when their model goes
        self._call = call
        # Threads of their own: slow downloads keep no other work off a thread.
        self._readers = ThreadPoolExecutor(_READERS, "read-model")
        self._fetchers = ThreadPoolExecutor(_READERS, "fetch-model")
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether nothing is loaded any more."""
        return self._draining

    def check_open(self) -> None:
        """Refuse to load once the server stops.

        Raises:
            ModelNotReady: it does.
        """
        if self._draining:
            raise ModelNotReady("the server is stopping")

    async def read(self, function: Callable[[], T]) -> T:
        """Return what a function of the repository returns, which blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function)

    async def load(self, options: LoadOptions, turn: Turn | None = None) -> Model:
        """Load a version of a model and return it once it is ready (`wait`), else at once.

        Raises:
            ServingError: it cannot be found, read or started, or its name and version are taken.
        """
        try:
            model, replaced = await self._register(options, turn)
        finally:
            if turn is not None:
                turn.taken.set()
        if replaced:
            starting = self._replace(model, options)
        else:
            keep = options.at_startup or not options.wait
            starting = self._start(model, keep=keep, set_default=options.set_default)
        if options.wait:
            await starting
        else:
            self.background(starting)
        return model

    async def serve(self, name: str, specs: Sequence[ModelSpec], keep: Collection[str] = ()) -> None:
        """Load versions of a name, in place of what they replace; `keep` are versions that stay as they are.

        All are ready before the first of them answers; where one fails, nothing changes. Other versions go,
        if it is the repository that decides about them.

        Raises:
            LoadError: a version cannot be loaded. Details: versions, why by version.
        """
        at_startup = name in self.startup_names  # renewed, it still is what was loaded then
        models = [self._model(replace(self._as_before(spec), at_startup=at_startup)) for spec in specs]
        self.incoming.update(models)
        try:
            for model in models:
                _check_workers(model.spec)
            self.check_open()
            loads = (model.scale(model.spec.min_workers, model.spec.max_workers) for model in models)
            outcomes = await asyncio.gather(*loads, return_exceptions=True)
            self.check_open()  # else what is cut off would look like a failure
            _raise_failure(name, models, outcomes)
        except BaseException:
            await asyncio.gather(*(self._discard(model, 0.0) for model in models))
            raise
        finally:
            self.incoming.difference_update(models)
        self._enter(name, models, keep)

    def _enter(self, name: str, models: Sequence[Model], keep: Collection[str]) -> None:
        staying = {*keep, *(model.spec.version for model in models)}
        for model in models:
            if self._registry.has(name, model.spec.version):
                self.background(self._discard(self._registry.swap(model), self._unload_s))
            else:
                self._registry.add(model)
            _log.info("Model %s version %s loaded.", name, model.spec.version)
        if self._repository.decides_versions:
            gone = [old for old in self._registry.versions(name) if old.spec.version not in staying]
            for old in gone:
                self._registry.remove(old)
            self.background(self.close_all(gone))
        self._registry.settle_default(name)

    async def stop_loading(self) -> None:
        """Give up what is being loaded, and load nothing more; what is loaded goes on."""
        self._draining = True
        self._repository.close()  # a download that runs has nobody left to load for
        models = self._registry.list()
        loading = [m for m in models if m.state is VersionState.LOADING and not m.ready_workers]
        await asyncio.gather(*(m.close(drain_s=0.0) for m in [*loading, *self.incoming]))

    async def close(self, *, drain_s: float) -> None:
        """Answer what waits within `drain_s`, then unload everything."""
        await self.stop_loading()
        until = asyncio.get_running_loop().time() + drain_s
        await self.close_all(self._registry.list(), drain_s)
        if self.tasks:  # an unload that is on its way has what is left of the time
            await asyncio.wait(self.tasks, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for threads in (self._readers, self._fetchers):
            threads.shutdown(wait=False)

    async def close_all(self, models: Sequence[Model], drain_s: float | None = None) -> None:
        """Close versions that have left the registry, side by side: those that wait are answered first."""
        await asyncio.gather(*(self._close(model, drain_s) for model in models))

    async def to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a change of what is loaded; it goes on when the caller leaves, as half of it helps nobody."""
        task = self.background(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # not the caller: the engine has closed
                raise ModelNotReady("the server is stopping") from None
            raise

    def background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Let work go on by itself; closing waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _register(self, options: LoadOptions, turn: Turn | None) -> tuple[Model, bool]:
        """Read a model and enter its name, unless it is to take the place of one that has it; tell which."""
        self.check_open()
        loop = asyncio.get_running_loop()
        readers = self._fetchers if is_remote(options.url) else self._readers
        spec = await loop.run_in_executor(readers, self._repository.read, options)
        try:
            for earlier in turn.earlier if turn is not None else ():
                await earlier.wait()
            self.check_open()
            _check_workers(spec)
            if options.replace and self._registry.has(spec.name, spec.version):
                return self._model(self._with_workers_kept(spec, options)), True
            model = self._model(spec)
            self._add(model, options)
            if options.at_startup:
                self.startup_names.add(spec.name)
            return model, False
        except BaseException:
            await asyncio.to_thread(self._repository.discard, spec)
            raise

    def _add(self, model: Model, options: LoadOptions) -> None:
        try:
            self._registry.add(model)
        except ModelConflict as error:
            if not options.at_startup:
                raise
            advice = f"Give this one another name in load_models (--models): NAME={options.url}"
            raise ModelConflict(f"{error.message} {advice}", **error.details) from error

    def _with_workers_kept(self, spec: ModelSpec, options: LoadOptions) -> ModelSpec:
        """Give a replacement as many workers as what it replaces has, unless the user says how many."""
        if options.workers is not None:
            return spec
        before = self._registry.get(spec.name, spec.version).spec
        return replace(spec, min_workers=before.min_workers, max_workers=before.max_workers)

    def _as_before(self, spec: ModelSpec) -> ModelSpec:
        """Give an archive what users said of what it replaces; the files of other models say it."""
        if self._repository.decides_versions or not self._registry.has(spec.name, spec.version):
            return spec
        before = self._registry.get(spec.name, spec.version).spec
        return replace(
            spec,
            handler=_chosen_handler(before, spec),
            batch_size=before.batch_size,
            max_batch_delay_ms=before.max_batch_delay_ms,
            min_workers=before.min_workers,
            max_workers=before.max_workers,
            response_timeout_s=before.response_timeout_s,
        )

    def _model(self, spec: ModelSpec) -> Model:
        name, version = spec.name, spec.version
        # What comes in another's place goes on with its numbers.
        metrics = self._registry.get(name, version).metrics if self._registry.has(name, version) else None
        return Model(spec, self._launcher, cores=self._cores, call=self._call, metrics=metrics)

    async def _replace(self, model: Model, options: LoadOptions) -> None:
        """Load a version beside the one that it replaces, which then answers what it has and goes."""
        spec = model.spec
        self.incoming.add(model)
        try:
            await model.scale(spec.min_workers, spec.max_workers)
            # What it replaces may have been scaled meanwhile.
            while (kept := self._with_workers_kept(model.spec, options)) != model.spec:
                await model.scale(kept.min_workers, kept.max_workers)
            self.check_open()
            old = self._registry.swap(model)
        except BaseException as error:
            await self._discard(model, 0.0)
            if not isinstance(error, ServingError):
                raise
            _log.warning("Failed to load model: %s: %s", spec.name, error.message)
            if options.wait:
                raise
            return
        finally:
            self.incoming.discard(model)
        self._settle(model, set_default=options.set_default)
        await self._discard(old, self._unload_s)

    async def _start(self, model: Model, *, keep: bool, set_default: bool) -> None:
        spec = model.spec
        try:
            await model.scale(spec.min_workers, spec.max_workers)
            self._settle(model, set_default=set_default)
        except ServingError as error:
            error.details.setdefault("model", spec.name)
            if not spec.at_startup:  # `start` tells of those
                _log.warning("Failed to load model: %s: %s", spec.name, error.message)
            if not keep:
                self._registry.remove(model)
                await self._close(model, 0.0)
                raise
            if spec.at_startup:
                raise

    def _settle(self, model: Model, *, set_default: bool) -> None:
        self._registry.settle_default(model.spec.name)
        if set_default:
            self._registry.set_default(model)
        _log.info("Model %s loaded.", model.spec.name)

    async def _close(self, model: Model, drain_s: float | None) -> None:
        self.leaving.add(model)
        try:
            await self._discard(model, self._unload_s if drain_s is None else drain_s)
        finally:
            self.leaving.discard(model)
        name, others = model.spec.name, (each for each in self._registry.list() if each is not model)
        which = f" version {model.spec.version}" if any(each.spec.name == name for each in others) else ""
        _log.info("Model %s%s unregistered.", name, which)

    async def _discard(self, model: Model, drain_s: float) -> None:
        try:
            await model.close(drain_s=drain_s)
        finally:
            await asyncio.to_thread(self._repository.discard, model.spec)


def _chosen_handler(before: ModelSpec, spec: ModelSpec) -> str:
    """Return the handler that a user chose for the version before; without one, that of the new archive."""
    stated, states = ((each.manifest or {}).get("model", {}).get("handler") for each in (before, spec))
    chosen = before.handler != stated if stated else not states
    return before.handler if chosen else spec.handler


def _check_workers(spec: ModelSpec) -> None:
    if spec.min_workers > MAX_WORKERS:
        raise InvalidRequest(f"a model has at most {MAX_WORKERS} workers")


def _raise_failure(name: str, models: Sequence[Model], outcomes: Sequence[BaseException | None]) -> None:
    """Raise one error for the versions that could not be loaded, in Triton's words.

    Raises:
        LoadError: there are some.
    """
    failed: dict[str, ServingError] = {}
    for model, outcome in zip(models, outcomes, strict=True):
        if isinstance(outcome, ServingError):
            failed[model.spec.version] = outcome
        elif outcome is not None:
            raise outcome
    if failed:
        told = "".join(
            f"version {version} is at UNAVAILABLE state: {error.message};"
            for version, error in failed.items()
        )
        reasons = {version: error.message for version, error in failed.items()}
        raise LoadError(f"failed to load '{name}', {told}", versions=reasons) from next(iter(failed.values()))
