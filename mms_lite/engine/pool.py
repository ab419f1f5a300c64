"""The workers of one version of a model: how many there are, and how they come and go together."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mms_lite.engine.batcher import JobQueue
from mms_lite.engine.launcher import Channel, Launcher
from mms_lite.engine.worker import RETIRE_S, Worker
from mms_lite.errors import ModelNotReady, ServingError
from mms_lite.machine import threads_per_worker
from mms_lite.transport import Frame
from mms_lite.types import ModelSpec, Signature, WorkerState, WorkerStatus
from mms_lite.wire import Item, Outcome

_MARGIN_S = 1.0  # in which a worker that is late is killed by itself

Call = Callable[[Item], Awaitable[Outcome]]


class WorkerPool:
    """The workers of one version of a model."""

    def __init__(
        self,
        spec: ModelSpec,
        queue: JobQueue,
        *,
        launcher: Launcher,
        cores: int,
        call: Call,
    ) -> None:
        self.spec = spec
        self.queue = queue
        self.call = call
        self.signature = Signature()  # what the workers said when they had loaded the model
        self.on_completed: Callable[[Mapping[str, Any]], None] | None = None  # what else they said
        self._launcher = launcher
        self._cores = cores
        self._workers: list[Worker] = []
        self._retiring: dict[asyncio.Task[None], Worker] = {}
        self._stopped = False
        queue.batch_bytes = launcher.max_frame_bytes
        queue.on_backlog = self._feed_ahead

    @property
    def max_frame_bytes(self) -> int:
        """The limit of a frame, to a worker and from it."""
        return self._launcher.max_frame_bytes

    @property
    def in_flight(self) -> int:
        """How many jobs the workers hold."""
        return sum(worker.in_flight for worker in [*self._workers, *self._retiring.values()])

    @property
    def live(self) -> int:
        """How many workers there are that have not given up."""
        return sum(worker.state is not WorkerState.FAILED for worker in self._workers)

    @property
    def has_live(self) -> bool:
        """Whether there is a worker that has not given up."""
        return any(worker.state is not WorkerState.FAILED for worker in self._workers)

    @property
    def ready(self) -> int:
        """How many workers have the model loaded now."""
        return sum(worker.state in (WorkerState.READY, WorkerState.BUSY) for worker in self._workers)

    @property
    def failure(self) -> ServingError | None:
        """Why a worker gave up, when none is left."""
        failures = [w.failure for w in self._workers if w.state is WorkerState.FAILED]
        return failures[-1] if failures and not self.live else None

    def workers(self) -> list[WorkerStatus]:
        """Describe the workers."""
        return [worker.status() for worker in self._workers]

    def launch(self, name: str, on_frame: Callable[[Frame], None]) -> Channel:
        """Start a worker's process, for `Worker`."""
        threads = threads_per_worker(self._cores, len(self._workers))
        return self._launcher.start(self.spec, name, threads, on_frame)

    def loaded(self, signature: Signature, completed: Mapping[str, Any]) -> None:
        """Take note of what a worker says of the model that it has loaded, for `Worker`."""
        self.signature = signature
        if self.on_completed is not None:
            self.on_completed(completed)

    def gave_up(self) -> None:
        """Take note that a worker failed for good, for `Worker`: with none left, nobody waits in vain."""
        failure = self.failure
        if failure is not None:
            self.queue.clear(ModelNotReady("the model's workers cannot be started", no_workers=True))

    def _feed_ahead(self) -> None:
        """Send full batches ahead, first to who holds the fewest: no other can take them from there."""
        workers = self._workers
        if len(workers) > 1:
            workers = sorted(workers, key=lambda worker: worker.batches)
        for worker in workers:
            worker.feed_ahead()

    async def scale(self, min_workers: int, max_workers: int) -> None:
        """Have at least `min_workers` and at most `max_workers`; those over leave when they have answered."""
        if self._stopped:
            return
        self._workers = [w for w in self._workers if w.state is not WorkerState.FAILED]
        count = min(max(len(self._workers), min_workers), max(min_workers, max_workers))
        leaving = self._workers[count:]
        del self._workers[count:]
        taken = {worker.number for worker in self._workers}
        numbers = (n for n in itertools.count() if n not in taken)
        added = [Worker(self, next(numbers)) for _ in range(count - len(self._workers))]
        self._workers.extend(added)
        for worker in added:
            worker.start()
        tasks = self._retire(leaving, self.spec.response_timeout_s)
        if tasks:
            await asyncio.wait(tasks)  # tasks of the pool: they go on when the caller leaves

    async def settled(self) -> None:
        """Wait until each worker has loaded the model or has given up."""
        await asyncio.gather(*(worker.settled.wait() for worker in self._workers))

    async def stop(self, *, grace_s: float) -> None:
        """End all workers, each after what it holds but within `grace_s`, and then in RETIRE_S."""
        self._stopped = True
        leaving, self._workers = self._workers, []
        self._retire(leaving, grace_s)
        tasks = dict(self._retiring)  # also those of a scale-down, with a longer grace
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        for task in late:
            if tasks[task].in_flight:
                tasks[task].kill()
        if not late:
            return
        _, late = await asyncio.wait(late, timeout=RETIRE_S + _MARGIN_S)
        for task in late:  # of a scale-down: its model lets go of things
            tasks[task].kill()
        await asyncio.wait(tasks)

    def _retire(self, workers: list[Worker], grace_s: float) -> list[asyncio.Task[None]]:
        tasks = []
        for worker in workers:
            task = asyncio.get_running_loop().create_task(worker.retire(grace_s=grace_s))
            self._retiring[task] = worker
            task.add_done_callback(self._retired)
            tasks.append(task)
        return tasks

    def _retired(self, task: asyncio.Task[None]) -> None:
        del self._retiring[task]
        if not self._workers and not self._retiring:
            self.queue.clear(ModelNotReady("the model has no workers", no_workers=True))
