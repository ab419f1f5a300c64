"""The verbs of the server: what every front end calls, and all that it may call.

Front ends hand in the types of `mms_lite.types` and get them back; they see no queue, worker or file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import PurePosixPath

from mms_lite.engine.control import ModelControl
from mms_lite.engine.launcher import Launcher
from mms_lite.engine.lifecycle import MAX_WORKERS, Lifecycle, Turn
from mms_lite.engine.model import Model
from mms_lite.engine.registry import Registry, version_order
from mms_lite.engine.repository import Repository
from mms_lite.errors import InvalidRequest, LoadError, ModelNotFound, ModelNotReady, ServingError
from mms_lite.metrics import Snapshot, VersionMetrics
from mms_lite.types import (
    InferRequest,
    InferResponse,
    LoadOptions,
    ModelSpec,
    ModelStatus,
    RepositoryEntry,
    Signature,
)
from mms_lite.wire import Item, Outcome

_MOST_LOGGED = 500  # characters of what a request failed with

_log = logging.getLogger("mms_lite.engine")


class Engine:
    """All loaded models behind one set of verbs. Lives on one event loop.

    With `poll_s` it looks at the repository in such intervals, and serves all that is there.
    """

    def __init__(
        self,
        repository: Repository,
        launcher: Launcher,
        *,
        cores: int,
        unload_s: float = 120.0,
        starting: bool = False,
        poll_s: float | None = None,
    ) -> None:
        self._registry = Registry(highest_is_default=repository.decides_versions)
        self._lifecycle = Lifecycle(
            repository, launcher, self._registry, cores=cores, unload_s=unload_s, call=self._call
        )
        self._control = ModelControl(
            repository, self._registry, self._lifecycle, follows_all=poll_s is not None
        )
        self._unknown = VersionMetrics()  # of requests that name no loaded version
        self._poll_s = poll_s
        self._polling: asyncio.Task[None] | None = None
        self._starting = starting

    async def infer(self, request: InferRequest) -> InferResponse:
        """Return a model's one answer. A caller that is cancelled cancels the request.

        Raises:
            ServingError: no such model, no room, no time, or what the model failed with.
        """
        try:
            return await self._find(request).submit(request).answer()
        except ServingError as error:
            _log_failure(request, error)
            raise

    async def stream(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """Yield a model's answers as they come; leaving early cancels the request.

        Raises:
            ServingError: as `infer`.
        """
        try:
            async with contextlib.aclosing(self._find(request).submit(request).answers()) as answers:
                async for answer in answers:
                    yield answer
        except ServingError as error:
            _log_failure(request, error)
            raise

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
        """Return all that was counted and the state of every version, failed ones too, as they are now."""
        failed = [(status, VersionMetrics()) for status in self._control.failed_versions()]
        return Snapshot([*self.statistics(), *failed], self._unknown.requests.copy())

    def interface(
        self, name: str, version: str | None = None, *, asking: bool = False
    ) -> tuple[ModelSpec, Signature]:
        """Return what a version is and what tensors it has; cheap, for every request.

        With `asking` a request is behind it, which counts as refused if the version cannot answer.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
            ModelNotReady: it is loading, failed or going.
        """
        model = self._get(name, version)
        try:
            model.check()  # until it is loaded nobody knows
        except ModelNotReady as error:
            if asking:
                model.metrics.refuse(error)
            raise
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
        return self._status(await self._lifecycle.to_its_end(self._load_by_hand(options)))

    async def load_model(
        self, name: str, *, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Load a model of the repository by name, or load it anew: the versions that it says are served.

        `config` (a Triton ModelConfig as JSON) is in place of its own configuration, and `files`, by
        "<version>/<name>" with or without "file:" before it, in place of its files. Other versions of the
        model are unloaded. What was served goes on until all are ready, also if one cannot be loaded.

        Raises:
            ModelNotFound: the repository has no such model.
            InvalidRequest: the name of the model or of a file is none; files without a configuration.
            LoadError: the configuration cannot be used, or a version cannot be loaded.
        """
        await self._lifecycle.to_its_end(self._load_by_name(name, config, files))

    async def unload_model(self, name: str, *, dependents: bool = False) -> None:
        """Unload all versions of a model; those that wait are answered first. A second time does no harm.

        Nothing depends on other models yet, so `dependents` changes nothing.

        Raises:
            InvalidRequest: it was never loaded.
        """
        await self._lifecycle.to_its_end(self._control.unload(name))

    async def repository_index(self) -> list[RepositoryEntry]:
        """Return the versions that are or were to be loaded, and the names of the other models there."""
        return await self._control.index()

    def version_entries(self) -> list[RepositoryEntry]:
        """Return the index without the models that were never loaded: nothing is read for it."""
        return self._control.entries()

    async def rescan(self) -> bool:
        """Look at the repository again: load, renew and unload what its files say; tell whether any did.

        It concerns models that were loaded by name; with `poll_s` also new and deleted ones.

        Raises:
            LoadError: models cannot be loaded, and stay as they were; the others have been looked at.
        """
        return await self._lifecycle.to_its_end(self._control.rescan())

    def set_default(self, name: str, version: str) -> ModelStatus:
        """Let this version answer requests that name none.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
            ModelNotReady: it cannot answer.
            InvalidRequest: the repository decides about the versions of its models.
        """
        model = self._registry.get(name, version)
        if not model.can_answer:
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
        if not 0 <= min_workers <= max_workers <= MAX_WORKERS:
            raise InvalidRequest(f"a model has between 0 and {MAX_WORKERS} workers")
        model = self._registry.get(name, version)
        scaling = self._scale(model, min_workers, max_workers)
        if wait:
            await self._lifecycle.to_its_end(scaling)
        else:
            self._lifecycle.background(self._logged(scaling, name))
        return self._status(model)

    async def unload(self, name: str, version: str | None = None) -> None:
        """Unload one version, or all: new requests find nothing, those that wait are answered first.

        With all, what is just being loaded by name is given up; one version goes once it is there.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
        """
        models = await self._control.take_out(name, version)
        await self._lifecycle.to_its_end(self._lifecycle.close_all(models))

    def describe(self, name: str, version: str | None = None) -> ModelStatus:
        """Describe a version, the default one if none is named; also one of the repository that failed.

        Raises:
            ModelNotFound, VersionNotFound: it is not there.
        """
        try:
            return self._status(self._registry.get(name, version))
        except ModelNotFound:
            for failed in self._control.failed_versions(name):
                if failed.spec.version == version or (version is None and failed.is_default):
                    return failed
            raise

    def versions(self, name: str) -> list[ModelStatus]:
        """Describe every version of a model, in order of loading, and then those that failed.

        Raises:
            ModelNotFound: it is not there.
        """
        failed = self._control.failed_versions(name)
        try:
            loaded = self._registry.versions(name)
        except ModelNotFound:
            if not failed:
                raise
            loaded = []
        return [*map(self._status, loaded), *failed]

    def ready_versions(self, name: str) -> list[str]:
        """Return the versions of a model that can answer, in ascending order.

        Raises:
            ModelNotFound: it is not there.
        """
        ready = [model.spec.version for model in self._registry.versions(name) if model.can_answer]
        return sorted(ready, key=version_order)

    def models(self) -> list[ModelStatus]:
        """Describe every version of every model, sorted by name; as MMS, no archive that cannot be read."""
        failed = self._control.failed_versions(unread=False)
        found = [*map(self._status, self._registry.list()), *failed]
        return sorted(found, key=lambda status: status.spec.name)

    def startup_models(self) -> set[str]:
        """Return the names of the models that were loaded at start and still are, in whatever version."""
        return {model.spec.name for model in self._registry.list()} & self._lifecycle.startup_names

    def has_version(self, name: str, version: str) -> bool:
        """Tell whether this version of this model is loaded."""
        return self._registry.has(name, version)

    def health(self) -> tuple[int, int]:
        """Return how many workers there should be and how many have their model loaded.

        A model of the repository that failed, and of which nobody knows how many it should have, lacks one.
        """
        models = self._registry.list()
        failed = sum(status.is_default for status in self._control.failed_versions(unread=False))
        return failed + sum(m.spec.min_workers for m in models), sum(m.ready_workers for m in models)

    @property
    def starting(self) -> bool:
        """Whether the start-up models are still being loaded."""
        return self._starting

    def ready(self) -> bool:
        """Tell whether all that is loaded is ready, and of each model that was asked for a version is served.

        A new version that fails beside one that is served keeps nobody waiting, nor does one without workers:
        nobody has asked for any.
        """
        serving = not self._lifecycle.draining and all(m.ready for m in self._registry.list())
        return serving and not self._control.failed

    async def start(
        self,
        load_models: Sequence[LoadOptions | str],
        told: Callable[[str, ServingError | None], None],
    ) -> int:
        """Load the start-up models side by side; return how many failed.

        A name is loaded as by `load_model`. Names are given in the order of the list: of two models with one
        name, the first has it. `told` is called with each model as it is ready, or with why it is not. Until
        all are, an unknown model is "not ready" rather than "not found".
        """
        taken = [asyncio.Event() for _ in load_models]
        turns = [Turn(taken[:number], event) for number, event in enumerate(taken)]

        async def one(entry: LoadOptions | str, turn: Turn) -> bool:
            error: ServingError | None = None
            name = entry if isinstance(entry, str) else entry.name or entry.url
            try:
                name = await self._lifecycle.to_its_end(self._load_at_start(entry, turn))
            except ServingError as failure:
                error = failure
                name = failure.details.get("model", name)
                _log.warning("Failed to load model: %s: %s", name, failure.message)
            except Exception as failure:
                error = ServingError(f"{type(failure).__name__}: {failure}")
                _log.exception("Failed to load model: %s", name)
            told(name, error)
            return error is not None

        self._starting = True
        try:
            return sum(await asyncio.gather(*map(one, load_models, turns)))
        finally:
            self._starting = False
            if self._poll_s is not None and not self._lifecycle.draining:
                self._polling = asyncio.get_running_loop().create_task(self._poll(self._poll_s))

    async def stop_loading(self) -> None:
        """Give up what is being loaded, and load nothing more; what is loaded goes on."""
        if self._polling is not None:
            self._polling.cancel()
        await self._lifecycle.stop_loading()

    async def close(self, *, drain_s: float) -> None:
        """Answer what waits within `drain_s`, then unload everything."""
        await self.stop_loading()
        await self._lifecycle.close(drain_s=drain_s)

    async def _scale(self, model: Model, min_workers: int, max_workers: int) -> None:
        try:
            await model.scale(min_workers, max_workers)
        finally:
            self._registry.settle_default(model.spec.name)

    async def _load_by_hand(self, options: LoadOptions) -> Model:
        model = await self._lifecycle.load(options)
        self._control.note_loaded(model)
        return model

    async def _load_by_name(self, name: str, config: str | None, files: Mapping[str, bytes] | None) -> None:
        try:
            await self._control.load(name, config=config, files=files)
        except LoadError as error:  # told here, as the caller may have left
            _log.warning("Failed to load model: %s: %s", name, error.message)
            raise

    async def _load_at_start(self, entry: LoadOptions | str, turn: Turn) -> str:
        if isinstance(entry, LoadOptions):
            try:
                return (await self._lifecycle.load(entry, turn)).spec.name
            except ServingError as error:
                if all(model.spec.url != entry.url for model in self._registry.list()):
                    name = entry.name or PurePosixPath(entry.url).stem
                    self._control.note_unread(name, entry.url, error.message)
                raise
        self._lifecycle.startup_names.add(entry)
        try:
            await self._control.load(entry, at_start=True)
        finally:
            turn.taken.set()
        return entry

    async def _poll(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._control.poll()
            except Exception:  # the next look may find the repository as it should be
                _log.exception("Looking at the model repository failed")

    def _find(self, request: InferRequest) -> Model:
        return self._get(request.model, request.version)

    def _get(self, name: str, version: str | None) -> Model:
        try:
            return self._registry.get(name, version)
        except ModelNotFound as error:
            if self._starting:
                raise ModelNotReady("the server is still loading its models") from error
            raise

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

    async def _logged(self, work: Awaitable[None], name: str) -> None:
        try:
            await work
        except ServingError as error:
            _log.warning("Model %s: %s", name, error.message)


def _log_failure(request: InferRequest, error: ServingError) -> None:
    """Say which request failed, if the model or the server is at fault: the client knows it by this id."""
    by_client = error.details.get("by") == "client" or isinstance(error, ModelNotReady)
    if error.details.get("status", error.http) >= 500 and not by_client:
        _log.warning("request %s: %s: %s", request.id, request.model, error.message[:_MOST_LOGGED])
