"""How work waits: the bounded queue of one model, and how jobs are taken from it in batches.

Workers ask for a batch, so nothing balances load. The queue counts live jobs only: a job whose client left
or whose deadline passed leaves at once, and its body with it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

from mms_lite.errors import DeadlineExceeded, InvalidRequest, ModelNotReady, QueueFull, ServingError
from mms_lite.metrics import VersionMetrics
from mms_lite.types import BYTES, InferRequest, InferResponse
from mms_lite.wire import Outcome

_ids = itertools.count(1)
_RATE_WINDOW = 64  # answers over which the drain rate is measured
_MAX_STREAM = 1024  # answers of one job that may wait for a slow reader


def rows(request: InferRequest) -> int:
    """Return how many rows of a batch the request fills: its tensors' first axis, 1 for raw parts.

    Raises:
        InvalidRequest: tensors disagree on their first axis.
    """
    counts = {t.shape[0] for t in request.inputs if t.shape}
    if len(counts) > 1:
        raise InvalidRequest(f"inputs disagree on the number of rows: {sorted(counts)}")
    return max(1, counts.pop()) if counts else 1


def batch_key(request: InferRequest) -> Any:
    """Return what two requests must share to run in one batch: None for raw parts without options."""
    tensors = tuple((t.name, t.datatype, t.shape[1:]) for t in request.inputs if t.shape)
    if not tensors and not request.parameters and request.outputs is None:
        return None
    options = json.dumps(request.parameters, sort_keys=True, default=str) if request.parameters else ""
    raw = any(t.datatype == BYTES and not t.shape for t in request.inputs)
    return tensors, raw, tuple(request.outputs) if request.outputs is not None else None, options


class Job:
    """A request on its way through one model. Settled once, whoever comes first; read through `answers`."""

    __slots__ = (
        "_stream",
        "_waiter",
        "dead",
        "enqueued_at",
        "id",
        "key",
        "metrics",
        "on_death",
        "outcome",
        "request",
        "returned",
        "size",
        "version",
    )

    def __init__(self, request: InferRequest, version: str = "") -> None:
        self.id = next(_ids)
        self.request = request
        self.version = version  # the one that answers
        self.size = rows(request)
        self.key = batch_key(request)
        self.enqueued_at = 0.0
        self.metrics: VersionMetrics | None = None  # of the queue that it was put into
        self.returned = 0  # how many workers ended before they had started it
        self.dead = False  # nobody waits for it any more
        self.on_death: Callable[[Job], None] | None = None  # set by whoever holds the job: queue, then worker
        self.outcome: Outcome | None = None  # the final one
        self._stream: deque[Outcome] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def remaining_ms(self) -> int | None:
        """Milliseconds left to the client's deadline, at least 0; None without one."""
        deadline = self.request.deadline
        return None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000))

    @property
    def expired(self) -> bool:
        """Whether the client's deadline has passed."""
        deadline = self.request.deadline
        return deadline is not None and deadline <= time.monotonic()

    def finish(self, outcome: Outcome) -> None:
        """Give the job an answer. Nothing is added after the final one, or once nobody waits."""
        if self.outcome is not None or self.dead:
            return
        if not outcome.final and len(self._stream) >= _MAX_STREAM:
            outcome = Outcome(self.id, error=ServingError("the client reads its answers too slowly"))
        if outcome.final:
            self.outcome = outcome
            if self.metrics is not None:
                self.metrics.total_s.observe(time.monotonic() - self.enqueued_at)
        self._stream.append(outcome)
        self._wake()

    def fail(self, error: ServingError) -> None:
        """Settle the job with an error."""
        self.finish(Outcome(self.id, error=error))

    def cancel(self) -> None:
        """Mark a job without a final answer as wanted by nobody, and tell whoever holds it."""
        if self.outcome is None and not self.dead:
            if self.metrics is not None:
                self.metrics.cancelled += 1
            self._die()

    def expire(self) -> None:
        """Fail the job because its deadline has passed, and tell whoever holds it."""
        self.fail(DeadlineExceeded("the request's deadline passed", by="client"))
        self._die()

    async def answers(self) -> AsyncGenerator[InferResponse, None]:
        """Yield the answers up to the final one; leaving early, or past the deadline, cancels the job.

        Raises:
            ServingError: what the job failed with; DeadlineExceeded (by="client") past the deadline.
        """
        try:
            final = False
            while not final:
                outcome = await self._next()
                final = outcome.final
                if outcome.error is not None:
                    raise outcome.error
                yield self._response(outcome)
        finally:
            self.cancel()

    async def answer(self) -> InferResponse:
        """Return the one answer, as `answers` would yield it.

        Raises:
            ServingError: as `answers`; also if the model gave more than one answer.
        """
        try:
            outcome = await self._next()
            if not outcome.final:
                raise ServingError("the model streams its answers; this call takes one")
            if outcome.error is not None:
                raise outcome.error
            return self._response(outcome)
        finally:
            self.cancel()

    async def _next(self) -> Outcome:
        while not self._stream:
            self._waiter = asyncio.get_running_loop().create_future()
            timer = None
            if self.request.deadline is not None:
                delay = max(0.0, self.request.deadline - time.monotonic())
                timer = asyncio.get_running_loop().call_later(delay, self.expire)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        return self._stream.popleft()

    def _die(self) -> None:
        if self.dead:
            return
        self.dead = True
        if self.on_death is not None:
            self.on_death(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _response(self, outcome: Outcome) -> InferResponse:
        return InferResponse(
            id=self.request.id,
            model=self.request.model,
            version=self.version,
            outputs=outcome.outputs,
            parameters=outcome.parameters,
            headers=outcome.headers,
            status=outcome.status,
            reason=outcome.reason,
        )


class JobQueue:
    """The jobs of one model that no worker has yet."""

    def __init__(
        self,
        limit: int,
        *,
        batch_size: int = 1,
        max_batch_delay_ms: int = 0,
        metrics: VersionMetrics | None = None,
    ) -> None:
        self.metrics = VersionMetrics() if metrics is None else metrics
        self._limit = limit
        self._batch_size = batch_size
        self._delay_s = max_batch_delay_ms / 1000
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._collecting = asyncio.Lock()  # one worker collects at a time, in order of asking
        self._arrival: asyncio.Future[None] | None = None
        self._room: deque[asyncio.Future[None]] = deque()
        self._answered: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._closed: ServingError | None = None
        self.on_backlog: Callable[[], None] | None = None  # a job came and no worker is waiting for one

    @property
    def depth(self) -> int:
        """How many live jobs wait."""
        return len(self._jobs)

    @property
    def answered_per_s(self) -> float:
        """How many jobs per second were answered of late."""
        if len(self._answered) < 2:
            return 0.0
        return len(self._answered) / max(1e-3, time.monotonic() - self._answered[0])

    def count_answer(self) -> None:
        """Take note that a job was answered, for the drain rate."""
        self._answered.append(time.monotonic())

    def put(self, job: Job) -> None:
        """Add a job, or refuse at once.

        Raises:
            QueueFull: as many jobs wait as may.
            InvalidRequest: the job alone is larger than a batch.
            ModelNotReady: the queue is closed.
        """
        self._admit(job)
        if len(self._jobs) >= self._limit:
            raise QueueFull(
                f"the queue is full: {len(self._jobs)} of {self._limit} places taken",
                depth=len(self._jobs),
                limit=self._limit,
                answered_per_s=round(self.answered_per_s, 1),
            )
        self._append(job)

    async def put_when_room(self, job: Job) -> None:
        """Add a job, waiting for room until its deadline. For jobs that the server makes, never a client's.

        Raises:
            DeadlineExceeded: no room in time.
            InvalidRequest, ModelNotReady: as `put`.
        """
        self._admit(job)
        while len(self._jobs) >= self._limit:
            await self._wait_for_room(job.request.deadline)
            self._admit(job)
        self._append(job)

    async def _wait_for_room(self, deadline: float | None) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room.append(waiter)
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait([waiter], timeout=left_s)
            if deadline is not None and deadline <= time.monotonic():
                raise DeadlineExceeded("the request's deadline passed", by="client")
        except BaseException:
            if waiter.done() and waiter.exception() is None:
                self._free_room(1)  # the place that this one was given goes to the next
            raise
        finally:
            if not waiter.done():
                waiter.cancel()
                self._room.remove(waiter)
        if waiter.done() and not waiter.cancelled():
            waiter.result()

    def put_back(self, jobs: list[Job]) -> None:
        """Return jobs that a worker held and had not started to the head of the queue, in their order."""
        for job in reversed(jobs):
            if job.dead or job.outcome is not None:
                continue
            if self._closed is not None:
                self._refuse(job, self._closed)
                continue
            self._jobs[job.id] = job
            self._jobs.move_to_end(job.id, last=False)
            job.on_death = self._drop
        self._signal()

    async def next_batch(self) -> list[Job]:
        """Wait for work and take a batch: jobs of the oldest one's key, in order, up to batch_size rows.

        With a delay set, waits for a full batch, but no longer than that after the oldest job arrived, and
        never past a deadline.
        """
        async with self._collecting:
            while True:
                while not self._jobs:
                    await self._wait_for_arrival()
                waited_s = await self._wait_for_more()
                batch = self._select()
                if batch:
                    return self._take(batch, waited_s)

    def take_ahead(self) -> list[Job]:
        """Take a full batch for a worker that is still busy; nothing if there is none or a worker is idle."""
        if self._collecting.locked():
            return []
        selected = self._select()
        return self._take(selected, 0.0) if sum(job.size for job in selected) >= self._batch_size else []

    def clear(self, error: ServingError) -> None:
        """Fail the jobs that wait."""
        while self._jobs:
            _, job = self._jobs.popitem(last=False)
            job.on_death = None
            self._refuse(job, error)
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_exception(error)

    def close(self, error: ServingError) -> None:
        """Refuse new jobs and fail those that wait with `error`."""
        self._closed = error
        self.clear(error)

    def _admit(self, job: Job) -> None:
        if self._closed is not None:
            raise ModelNotReady(self._closed.message)
        if job.size > self._batch_size:
            raise InvalidRequest(
                f"the request has {job.size} rows, a batch of this model at most {self._batch_size}"
            )

    def _append(self, job: Job) -> None:
        job.enqueued_at = time.monotonic()
        job.metrics = self.metrics
        self._jobs[job.id] = job
        job.on_death = self._drop
        self._signal()

    def _drop(self, job: Job) -> None:
        if self._jobs.pop(job.id, None) is None:
            return
        self._free_room(1)
        if job.outcome is not None and job.outcome.error is not None:
            self.metrics.refuse(job.outcome.error)

    def _refuse(self, job: Job, error: ServingError) -> None:
        self.metrics.refuse(error)
        job.fail(error)

    def _signal(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
        if self.on_backlog is not None and not self._collecting.locked():
            self.on_backlog()

    def _free_room(self, places: int) -> None:
        while places > 0 and self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)
                places -= 1

    async def _wait_for_arrival(self, timeout_s: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._arrival = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._signal)
        try:
            await self._arrival
        finally:
            self._arrival = None
            if timer is not None:
                timer.cancel()

    async def _wait_for_more(self) -> float:
        """Wait for the batch to fill, as long as the delay and deadlines allow; return for how long."""
        if not self._delay_s:
            return 0.0
        begin = time.monotonic()
        while True:
            selected = self._select()
            if not selected or sum(job.size for job in selected) >= self._batch_size:
                break
            limits = [  # half of a client's time for the batch to fill, half for the model
                (j.enqueued_at + j.request.deadline) / 2 for j in selected if j.request.deadline is not None
            ]
            left_s = min([selected[0].enqueued_at + self._delay_s, *limits]) - time.monotonic()
            if left_s <= 0:
                break
            await self._wait_for_arrival(left_s)
        return time.monotonic() - begin

    def _select(self) -> list[Job]:
        """Return what a batch taken now would hold; jobs past their deadline leave the queue unrun."""
        selected: list[Job] = []
        expired: list[Job] = []
        room = self._batch_size
        for job in self._jobs.values():
            if job.expired:
                expired.append(job)
            elif not selected or job.key == selected[0].key:
                if job.size > room:
                    break
                selected.append(job)
                room -= job.size
                if room == 0:
                    break
        for job in expired:
            job.expire()
        return selected

    def _take(self, batch: list[Job], waited_s: float) -> list[Job]:
        now = time.monotonic()
        for job in batch:
            del self._jobs[job.id]
            job.on_death = None
            if not job.returned:  # else it has been counted
                self.metrics.queue_s.observe(now - job.enqueued_at)
        self.metrics.batch_wait_s.observe(waited_s)
        self._free_room(len(batch))
        return batch
