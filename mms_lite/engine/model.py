"""A loaded version of a model: a queue of jobs and a pool of workers that empty it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mms_lite.engine.batcher import Job, JobQueue
from mms_lite.engine.launcher import Launcher
from mms_lite.engine.pool import Call, WorkerPool
from mms_lite.engine.repository import model_config
from mms_lite.errors import DeadlineExceeded, LoadError, ModelNotReady, QueueFull, ServingError
from mms_lite.metrics import VersionMetrics
from mms_lite.types import NO_WORKERS, InferRequest, ModelSpec, ModelStatus, Signature, VersionState

_POLL_S = 0.02


class Model:
    """One version of a model. It answers while it is READY, also with workers that are being restarted."""

    def __init__(
        self,
        spec: ModelSpec,
        launcher: Launcher,
        *,
        cores: int,
        call: Call,
        metrics: VersionMetrics | None = None,
    ) -> None:
        self.spec = spec
        self.metrics = VersionMetrics() if metrics is None else metrics
        self.state = VersionState.LOADING
        self.failure: ServingError | None = None
        self._queue = JobQueue(
            spec.queue_size,
            batch_size=spec.batch_size,
            max_batch_delay_ms=spec.max_batch_delay_ms,
            metrics=self.metrics,
        )
        self._pool = WorkerPool(spec, self._queue, launcher=launcher, cores=cores, call=call)
        self._pool.on_completed = self._complete

    @property
    def signature(self) -> Signature:
        """What its workers said when they had loaded it."""
        return self._pool.signature

    @property
    def ready_workers(self) -> int:
        """How many workers have the model loaded now."""
        return self._pool.ready

    @property
    def ready(self) -> bool:
        """Whether it is loaded and has not lost all its workers since."""
        return self.state is VersionState.READY and self._pool.failure is None

    @property
    def can_answer(self) -> bool:
        """Whether it is ready and has workers that have not given up."""
        return self.ready and self._pool.has_live

    async def scale(self, min_workers: int, max_workers: int) -> None:
        """Bring the number of workers between the two and wait until the new ones have loaded or failed.

        Raises:
            LoadError, OutOfMemory: no worker could load the model.
        """
        self.spec = replace(self.spec, min_workers=min_workers, max_workers=max_workers)
        if self.state is VersionState.FAILED:
            self.state = VersionState.LOADING
        await self._pool.scale(min_workers, max_workers)
        await self._pool.settled()
        if self.state is VersionState.UNLOADING:
            raise ModelNotReady(f"model {self.spec.name} is being unloaded")
        self.failure = self._pool.failure
        self.state = VersionState.FAILED if self.failure is not None else VersionState.READY
        if self.failure is not None:
            raise self.failure

    def submit(self, request: InferRequest) -> Job:
        """Queue a request, or refuse at once.

        Raises:
            ModelNotReady, QueueFull: as the queue.
        """
        try:
            self.check()
            job = Job(request, self.spec.version, self.spec.config)
            self._queue.put(job)
        except (ModelNotReady, QueueFull) as error:
            self.metrics.refuse(error)
            raise
        return job

    async def submit_when_room(self, request: InferRequest) -> Job:
        """Queue a request that the server itself makes, waiting for room until its deadline.

        Raises:
            ModelNotReady, DeadlineExceeded: as the queue.
        """
        try:
            self.check()
            job = Job(request, self.spec.version, self.spec.config)
            await self._queue.put_when_room(job)
        except (ModelNotReady, DeadlineExceeded) as error:
            self.metrics.refuse(error)
            raise
        return job

    async def close(self, *, drain_s: float) -> None:
        """Refuse new requests, answer what waits within `drain_s`, then end the workers."""
        self.state = VersionState.UNLOADING
        loop = asyncio.get_running_loop()
        until = loop.time() + drain_s
        # Draining is rare: two counters looked at now and then, rather than an event on every answer's path.
        try:
            while (self._queue.depth or self._pool.in_flight) and self._pool.live and loop.time() < until:
                await asyncio.sleep(_POLL_S)
        except asyncio.CancelledError:
            until = 0.0
            raise
        finally:
            self._queue.close(ModelNotReady(f"model {self.spec.name} is being unloaded"))
            await self._pool.stop(grace_s=max(0.0, until - loop.time()))

    def status(self, *, is_default: bool) -> ModelStatus:
        """Describe the version as it is now."""
        failure = self._pool.failure or self.failure
        state = VersionState.FAILED if failure and self.state is VersionState.READY else self.state
        detail = failure.message if failure is not None else None
        if state is VersionState.READY and not self._pool.has_live:
            detail = NO_WORKERS
        return ModelStatus(
            spec=self.spec,
            state=state,
            is_default=is_default,
            detail=detail,
            workers=tuple(self._pool.workers()),
            queue_depth=self._queue.depth,
            in_flight=self._pool.in_flight,
            answered=sum(self.metrics.requests.values()),
            refused=sum(self.metrics.refusals.values()),
            signature=self.signature,
        )

    def check(self) -> None:
        """Do nothing if it takes requests.

        Raises:
            ModelNotReady: it does not.
        """
        if self.state is VersionState.READY and self._pool.has_live:
            return
        name = self.spec.name
        if self.state is VersionState.LOADING and not self._pool.ready:
            raise ModelNotReady(f"model {name} is loading")
        if self.state is VersionState.UNLOADING:
            raise ModelNotReady(f"model {name} is being unloaded")
        if not self._pool.has_live:
            failure = self._pool.failure or self.failure
            # Why it failed may name files of the server: `describe` tells it, not an answer to a client.
            why = "failed to load" if isinstance(failure, LoadError) else "has no workers"
            raise ModelNotReady(f"model {name} {why}", no_workers=True)

    def _complete(self, said: Mapping[str, Any]) -> None:
        """Take over what the model adds to its configuration: all its workers say the same, the first counts.

        Workers are given the configuration as it was written, each time.

        Raises:
            LoadError: what it says cannot be used.
        """
        config = self.spec.config
        if config is not None and said:
            config = model_config.with_completed(config, said)
            self.spec = replace(self.spec, config=config)
            if config.get("dynamic_batching") is not None:
                self._queue.batch_size = batch_size = model_config.batch_size(config)
                self.spec = replace(self.spec, batch_size=batch_size)
        self._pool.on_completed = None
