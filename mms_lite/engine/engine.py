"""The verbs of the server: what every front end calls, and all that it may call.

Front ends hand in the types of `mms_lite.types` and get them back; they see no queue, worker or file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mms_lite.engine.launcher import Launcher
from mms_lite.engine.model import Model
from mms_lite.engine.registry import Registry
from mms_lite.engine.repository.allow_list import is_remote
from mms_lite.engine.repository.mar import MarRepository
from mms_lite.errors import InvalidRequest, ModelNotFound, ModelNotReady, ServingError
from mms_lite.metrics import Snapshot, VersionMetrics
from mms_lite.types import (
    InferRequest,
    InferResponse,
    LoadOptions,
    ModelSpec,
    ModelStatus,
    Signature,
    VersionState,
)
from mms_lite.wire import Item, Outcome

_MAX_WORKERS = 1024
_READERS = 8  # archives that are unpacked at once, and as many that are downloaded

T = TypeVar("T")

_log = logging.getLogger("mms_lite.engine")


@dataclass(frozen=True, slots=True)
class _Turn:
    """A place in the start-up list: its model is named when those before it have their names, or failed."""

    earlier: Sequence[asyncio.Event]
    taken: asyncio.Event


class Engine:
    """All loaded models behind one set of verbs. Lives on one event loop."""

    def __init__(
        self,
        repository: MarRepository,
        launcher: Launcher,
        *,
        cores: int,
        unload_s: float = 120.0,
        starting: bool = False,
    ) -> None:
        self._repository = repository
        self._launcher = launcher
        self._cores = cores
        self._unload_s = unload_s  # what open requests have when their model goes
        self._registry = Registry()
        self._unknown = VersionMetrics()  # of requests that name no loaded version
        # Threads of their own: slow downloads keep no other work off a thread.
        self._readers = ThreadPoolExecutor(_READERS, "read-model")
        self._fetchers = ThreadPoolExecutor(_READERS, "fetch-model")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._replacements: set[Model] = set()  # that load, and are not in the registry yet
        self._startup_names: set[str] = set()
        self._draining = False
        self._starting = starting

    async def infer(self, request: InferRequest) -> InferResponse:
        """Return a model's one answer. A caller that is cancelled cancels the request.

        Raises:
            ServingError: no such model, no room, no time, or what the model failed with.
        """
        return await self._find(request).submit(request).answer()

    async def stream(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """Yield a model's answers as they come; leaving early cancels the request.

        Raises:
            ServingError: as `infer`.
        """
        async with contextlib.aclosing(self._find(request).submit(request).answers()) as answers:
            async for answer in answers:
                yield answer

    def count(self, model: str, version: str | None, protocol: str, code: int | str) -> None:
        """Count a request that a client has been answered; `code` is the status that was sent.

        `version` is the one that answered; with None, the one that would have. Requests for what is not
        loaded are counted without its name: clients shall not make up series.
        """
        try:
            metrics = self._registry.get(model, version).metrics
        except ModelNotFound:
            metrics = self._unknown
        metrics.count(protocol, str(code))

    def metrics(self) -> Snapshot:
        """Return all that was counted and the state of every version, as they are now."""
        return Snapshot(self.statistics(), self._unknown.requests.copy())

    def interface(self, name: str, version: str | None = None) -> tuple[ModelSpec, Signature]:
        """Return what a version is and what tensors it has; cheap, for every request.

        Raises:
            ModelNotFound, VersionNotFound: it is not there; ModelNotReady: yet.
        """
        model = self._get(name, version)
        return model.spec, model.signature

    def statistics(
        self, name: str = "", version: str | None = None
    ) -> list[tuple[ModelStatus, VersionMetrics]]:
        """Return status and numbers of the versions of a model, or of one of them; of all without a name.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
        """
        if not name:
            models = self._registry.list()
        else:
            models = [self._registry.get(name, version)] if version else self._registry.versions(name)
        return [(self._status(model), model.metrics.copy()) for model in models]

    async def load(self, options: LoadOptions) -> ModelStatus:
        """Load a version of a model and return its status once it is ready (`wait`), else at once.

        A model of the start-up list stays registered when it fails, so that `describe` can say why.

        Raises:
            ServingError: it cannot be found, read or started, or its name and version are taken.
        """
        return await self._to_its_end(self._load(options))

    async def _load(self, options: LoadOptions, turn: _Turn | None = None) -> ModelStatus:
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
            self._background(starting)
        return self._status(model)

    async def _register(self, options: LoadOptions, turn: _Turn | None) -> tuple[Model, bool]:
        """Read a model and enter its name, unless it is to take the place of one that has it; tell which."""
        self._check_open()
        loop = asyncio.get_running_loop()
        readers = self._fetchers if is_remote(options.url) else self._readers
        spec = await loop.run_in_executor(readers, self._repository.read, options)
        try:
            for earlier in turn.earlier if turn is not None else ():
                await earlier.wait()
            self._check_open()
            if spec.min_workers > _MAX_WORKERS:
                raise InvalidRequest(f"a model has at most {_MAX_WORKERS} workers")
            if options.replace and self._registry.has(spec.name, spec.version):
                return self._model(self._with_workers_kept(spec, options)), True
            model = self._model(spec)
            self._registry.add(model)
            if options.at_startup:
                self._startup_names.add(spec.name)
            return model, False
        except BaseException:
            await asyncio.to_thread(self._repository.discard, spec)
            raise

    def _with_workers_kept(self, spec: ModelSpec, options: LoadOptions) -> ModelSpec:
        """Give a replacement as many workers as what it replaces has, unless the user says how many."""
        if options.workers is not None:
            return spec
        before = self._registry.get(spec.name, spec.version).spec
        return replace(spec, min_workers=before.min_workers, max_workers=before.max_workers)

    def set_default(self, name: str, version: str) -> ModelStatus:
        """Let this version answer requests that name none.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
            ModelNotReady: it cannot answer.
        """
        model = self._registry.get(name, version)
        if not model.ready or not model.has_workers:
            raise ModelNotReady(f"version {version} of model {name} is not ready: it has no workers")
        self._registry.set_default(model)
        _log.info("Model %s: version %s is the default now.", name, version)
        return self._status(model)

    async def scale(
        self, name: str, min_workers: int, max_workers: int, *, version: str | None = None, wait: bool = True
    ) -> ModelStatus:
        """Change the number of workers of a version, the default one if none is named.

        Raises:
            InvalidRequest: the numbers make no sense.
            ModelNotFound: there is no such model.
            LoadError: no worker could load the model.
        """
        if max_workers < min_workers:
            raise InvalidRequest("max_worker cannot be less than min_worker.")
        if not 0 <= min_workers <= max_workers <= _MAX_WORKERS:
            raise InvalidRequest(f"a model has between 0 and {_MAX_WORKERS} workers")
        model = self._registry.get(name, version)
        scaling = model.scale(min_workers, max_workers)
        if wait:
            await self._to_its_end(scaling)
        else:
            self._background(self._logged(scaling, name))
        return self._status(model)

    async def unload(self, name: str, version: str | None = None) -> None:
        """Unload one version, or all: new requests find nothing, those that wait are answered first.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
        """
        models = [self._registry.get(name, version)] if version else self._registry.versions(name)
        for model in models:
            self._registry.remove(model)
        await self._to_its_end(self._close_all(models, self._unload_s))

    def describe(self, name: str, version: str | None = None) -> ModelStatus:
        """Describe a version, the default one if none is named.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
        """
        return self._status(self._registry.get(name, version))

    def versions(self, name: str) -> list[ModelStatus]:
        """Describe every version of a model, in order of loading.

        Raises:
            ModelNotFound: it is not there.
        """
        return [self._status(model) for model in self._registry.versions(name)]

    def models(self) -> list[ModelStatus]:
        """Describe every version of every model, sorted by name."""
        return [self._status(model) for model in self._registry.list()]

    def startup_models(self) -> set[str]:
        """Return the names of the models that were loaded at start and still are, in whatever version."""
        return {model.spec.name for model in self._registry.list()} & self._startup_names

    def has_version(self, name: str, version: str) -> bool:
        """Tell whether this version of this model is loaded."""
        return self._registry.has(name, version)

    def health(self) -> tuple[int, int]:
        """Return how many workers there should be and how many have their model loaded."""
        models = self._registry.list()
        return sum(m.spec.min_workers for m in models), sum(m.ready_workers for m in models)

    @property
    def starting(self) -> bool:
        """Whether the start-up models are still being loaded."""
        return self._starting

    def ready(self) -> bool:
        """Tell whether every model is ready and the server takes requests."""
        return not self._draining and all(m.ready for m in self._registry.list())

    async def start(
        self, load_models: list[LoadOptions], told: Callable[[str, ServingError | None], None]
    ) -> int:
        """Load the start-up models side by side; return how many failed.

        Names are given in the order of the list: of two models with one name, the first has it. `told` is
        called with each model as it is ready, or with why it is not. Until all are, an unknown model is "not
        ready" rather than "not found".
        """
        taken = [asyncio.Event() for _ in load_models]
        turns = [_Turn(taken[:number], event) for number, event in enumerate(taken)]

        async def one(options: LoadOptions, turn: _Turn) -> bool:
            error: ServingError | None = None
            name = options.name or options.url
            try:
                name = (await self._to_its_end(self._load(options, turn))).spec.name
            except ServingError as failure:
                error = failure
                name = failure.details.get("model", name)
                _log.warning("Failed to load model: %s: %s", name, failure.message)
            except Exception as failure:
                error = ServingError(f"{type(failure).__name__}: {failure}")
                _log.exception("Failed to load model: %s", options.url)
            told(name, error)
            return error is not None

        self._starting = True
        try:
            return sum(await asyncio.gather(*map(one, load_models, turns)))
        finally:
            self._starting = False

    async def stop_loading(self) -> None:
        """Give up what is being loaded, and load nothing more; what is loaded goes on."""
        self._draining = True
        self._repository.close()  # a download that runs has nobody left to load for
        models = self._registry.list()
        loading = [m for m in models if m.state is VersionState.LOADING and not m.ready_workers]
        await asyncio.gather(*(m.close(drain_s=0.0) for m in [*loading, *self._replacements]))

    async def close(self, *, drain_s: float) -> None:
        """Answer what waits within `drain_s`, then unload everything."""
        await self.stop_loading()
        until = asyncio.get_running_loop().time() + drain_s
        await self._close_all(self._registry.list(), drain_s)
        if self._tasks:  # an unload that is on its way has what is left of the time
            await asyncio.wait(self._tasks, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for threads in (self._readers, self._fetchers):
            threads.shutdown(wait=False)

    def _find(self, request: InferRequest) -> Model:
        return self._get(request.model, request.version)

    def _get(self, name: str, version: str | None) -> Model:
        try:
            return self._registry.get(name, version)
        except ModelNotFound as error:
            if self._starting:
                raise ModelNotReady("the server is still loading its models") from error
            raise

    def _check_open(self) -> None:
        if self._draining:
            raise ModelNotReady("the server is stopping")

    def _model(self, spec: ModelSpec) -> Model:
        name, version = spec.name, spec.version
        # What comes in another's place goes on with its numbers.
        metrics = self._registry.get(name, version).metrics if self._registry.has(name, version) else None
        return Model(spec, self._launcher, cores=self._cores, call=self._call, metrics=metrics)

    async def _replace(self, model: Model, options: LoadOptions) -> None:
        """Load a version beside the one that it replaces, which then answers what it has and goes."""
        spec = model.spec
        self._replacements.add(model)
        try:
            await model.scale(spec.min_workers, spec.max_workers)
            # What it replaces may have been scaled meanwhile.
            while (kept := self._with_workers_kept(model.spec, options)) != model.spec:
                await model.scale(kept.min_workers, kept.max_workers)
            self._check_open()
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
            self._replacements.discard(model)
        if options.set_default:
            self._registry.set_default(model)
        _log.info("Model %s loaded.", spec.name)
        await self._discard(old, self._unload_s)

    async def _start(self, model: Model, *, keep: bool, set_default: bool) -> None:
        spec = model.spec
        try:
            await model.scale(spec.min_workers, spec.max_workers)
            if set_default:
                self._registry.set_default(model)
            _log.info("Model %s loaded.", spec.name)
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

    async def _close_all(self, models: list[Model], drain_s: float) -> None:
        await asyncio.gather(*(self._close(model, drain_s) for model in models))

    async def _close(self, model: Model, drain_s: float) -> None:
        await self._discard(model, drain_s)
        _log.info("Model %s unregistered.", model.spec.name)

    async def _discard(self, model: Model, drain_s: float) -> None:
        try:
            await model.close(drain_s=drain_s)
        finally:
            await asyncio.to_thread(self._repository.discard, model.spec)

    async def _call(self, item: Item) -> Outcome:
        """Infer for a worker that asks another model; it waits for room, as the server's own requests do."""
        model = self._find(item.request)
        answer = await (await model.submit_when_room(item.request)).answer()
        return Outcome(
            item.job_id,
            outputs=answer.outputs,
            status=answer.status,
            reason=answer.reason,
            headers=answer.headers,
            parameters=answer.parameters,
        )

    def _status(self, model: Model) -> ModelStatus:
        return model.status(is_default=self._registry.is_default(model))

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a change of what is loaded; it goes on when the caller leaves, as half of it helps nobody."""
        task = self._background(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # not the caller: the engine has closed
                raise ModelNotReady("the server is stopping") from None
            raise

    def _background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _logged(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except ServingError as error:
            _log.warning("Model %s: %s", name, error.message)
