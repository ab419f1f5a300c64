"""How work waits: the bounded queue of one model, and how jobs are taken from it in batches.

Workers ask for a batch, so nothing balances load. The queue counts live jobs only: a job whose client left
or whose deadline passed leaves at once, and its body with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any

from mms_lite.engine import joining
from mms_lite.errors import DeadlineExceeded, ModelNotReady, QueueFull, ServingError, from_wire
from mms_lite.metrics import VersionMetrics
from mms_lite.types import InferRequest, InferResponse
from mms_lite.wire import Outcome

Take = Callable[["list[Job]"], None]

_ids = itertools.count(1)
_RATE_WINDOW = 64  # answers over which the drain rate is measured
_MAX_STREAM = 1024  # answers of one job that may wait for a slow reader


class Job:
    """A request on its way through one model. Settled once, whoever comes first; read through `answers`."""

    __slots__ = (
        "_bytes",
        "_stream",
        "_waiter",
        "dead",
        "enqueued_at",
        "id",
        "key",
        "metrics",
        "on_death",
        "outcome",
        "queued_s",
        "request",
        "returned",
        "size",
        "version",
    )

    def __init__(
        self, request: InferRequest, version: str = "", config: Mapping[str, Any] | None = None
    ) -> None:
        self.id = next(_ids)
        self.request = request
        self.version = version  # the one that answers
        self.size, self.key = joining.size_and_key(request, config)
        self._bytes = -1  # not counted yet
        self.enqueued_at = 0.0
        self.queued_s = 0.0  # how long it waited for a worker
        self.metrics: VersionMetrics | None = None  # of the queue that it was put into
        self.returned = 0  # how many workers ended before they had started it
        self.dead = False  # nobody waits for it any more
        self.on_death: Callable[[Job], None] | None = None  # set by whoever holds the job: queue, then worker
        self.outcome: Outcome | None = None  # the final one
        self._stream: deque[Outcome] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def bytes(self) -> int:
        """How many bytes of its tensors do not lie in shared memory."""
        if self._bytes < 0:
            self._bytes = joining.data_bytes(self.request)
        return self._bytes

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
                spent_s = time.monotonic() - self.enqueued_at
                failed = outcome.error is not None
                self.metrics.end_job(spent_s, queued_s=self.queued_s, failed=failed)
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
        outcome: Outcome | None = None
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
            # The traceback of an error holds this frame, and it what holds the error and the request's body.
            outcome = None
            del self

    async def answer(self) -> InferResponse:
        """Return the one answer, as `answers` would yield it.

        Raises:
            ServingError: as `answers`; also if the model gave more than one answer.
        """
        outcome: Outcome | None = None
        try:
            outcome = await self._next()
            if not outcome.final:
                raise ServingError("the model streams its answers; this call takes one")
            if outcome.error is not None:
                raise outcome.error
            return self._response(outcome)
        finally:
            if self.outcome is None:
                self.cancel()
            outcome = None  # as in `answers`
            del self

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
        max_batch_delay_ms: float = 0,
        metrics: VersionMetrics | None = None,
    ) -> None:
        self.metrics = VersionMetrics() if metrics is None else metrics
        self._limit = limit
        self.batch_size = batch_size  # rows of a full batch
        self.batch_bytes = sys.maxsize  # that its tensors may have, as far as they cross a socket
        self._delay_s = max_batch_delay_ms / 1000
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._idle: deque[Take] = deque()  # who asked for a batch, in order of asking
        self._collecting_since = 0.0  # when the first of them began to wait for more; 0 where none does
        self._timer: asyncio.TimerHandle | None = None
        self._looking_at = 0.0  # when the timer is to go off
        self._room: deque[asyncio.Future[None]] = deque()
        self._answered: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._closed: ServingError | None = None
        self.on_backlog: Callable[[], None] | None = None  # a job came and nobody has asked for one

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
            ModelNotReady: as `put`.
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
        """Return jobs that a worker held and had not started to their places, in the order of arrival."""
        for job in jobs:
            if job.dead or job.outcome is not None:
                continue
            if self._closed is not None:
                self._refuse(job, self._closed)
                continue
            self._jobs[job.id] = job
            job.on_death = self._drop
        self._jobs = OrderedDict(sorted(self._jobs.items()))
        self._arrived()

    def ask(self, take: Take) -> None:
        """Have `take` called once with the next batch, now if there is one.

        A batch are jobs of the oldest one's key, in order, up to batch_size rows and batch_bytes. With a
        delay set, it waits until it is full, but no longer than that after the oldest job arrived, and never
        past a deadline; meanwhile a full one of another key goes.
        """
        self._idle.append(take)
        self._hand_out()

    def withdraw(self, take: Take) -> None:
        """Take back what was asked for, if it has not been given yet."""
        with contextlib.suppress(ValueError):
            self._idle.remove(take)

    def take_ahead(self) -> list[Job]:
        """Take a full batch for a worker that is still busy; nothing if there is none or a worker is idle."""
        if self._idle or not self._jobs:
            return []
        selected, full = self._select(self._jobs.values())
        return self._take(selected, 0.0) if full else []

    def clear(self, error: ServingError) -> None:
        """Fail the jobs that wait."""
        while self._jobs:
            _, job = self._jobs.popitem(last=False)
            job.on_death = None
            self._refuse(job, error)
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_exception(from_wire(error.to_wire()))

    def close(self, error: ServingError) -> None:
        """Refuse new jobs and fail those that wait with `error`."""
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
        self.clear(error)

    def _admit(self, job: Job) -> None:
        if self._closed is not None:
            raise ModelNotReady(self._closed.message)

    def _append(self, job: Job) -> None:
        job.enqueued_at = time.monotonic()
        job.metrics = self.metrics
        self._jobs[job.id] = job
        job.on_death = self._drop
        self._arrived()

    def _drop(self, job: Job) -> None:
        if self._jobs.pop(job.id, None) is None:
            return
        self._free_room(1)
        if job.outcome is not None and job.outcome.error is not None:
            self.metrics.refuse(job.outcome.error)

    def _refuse(self, job: Job, error: ServingError) -> None:
        self.metrics.refuse(error)
        job.fail(from_wire(error.to_wire()))  # one for each: an error keeps where it was raised

    def _arrived(self) -> None:
        if self._idle:
            self._hand_out()
        elif self.on_backlog is not None:
            self.on_backlog()

    def _free_room(self, places: int) -> None:
        while places > 0 and self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)
                places -= 1

    def _hand_out(self) -> None:
        """Give batches to those who asked, as long as there are any, or look again when one is due."""
        while self._idle and self._jobs:
            selected, full = self._select(self._jobs.values())
            if not selected:
                break
            waited_s = 0.0
            if self._delay_s:
                now = time.monotonic()
                self._collecting_since = self._collecting_since or now
                due = 0.0 if full else self._due(selected)
                if due > now:
                    selected = self._full_batch() if len(selected) < len(self._jobs) else []
                    if not selected:
                        self._look_again(due)
                        return
                waited_s, self._collecting_since = now - self._collecting_since, 0.0
            self._idle.popleft()(self._take(selected, waited_s))
        self._collecting_since = 0.0

    def _due(self, selected: list[Job]) -> float:
        """Return until when this batch may wait for more, on the monotonic clock."""
        limits = [  # half of a client's time for the batch to fill, half for the model
            (j.enqueued_at + j.request.deadline) / 2 for j in selected if j.request.deadline is not None
        ]
        return min([selected[0].enqueued_at + self._delay_s, *limits])

    def _look_again(self, at: float) -> None:
        if self._timer is not None:
            if not self._timer.cancelled() and self._looking_at == at:
                return
            self._timer.cancel()
        self._looking_at = at
        delay_s = max(0.0, at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._hand_out()

    def _full_batch(self) -> list[Job]:
        """Return the first full batch, of whatever key; an empty list if there is none."""
        by_key: dict[Any, list[Job]] = {}
        for job in self._jobs.values():
            by_key.setdefault(job.key, []).append(job)
        for jobs in by_key.values():
            selected, full = self._select(jobs)
            if full:
                return selected
        return []

    def _select(self, jobs: Iterable[Job]) -> tuple[list[Job], bool]:
        """Return what a batch of the first one's key would hold now, and whether nothing can join it.

        A job with more rows or bytes than a batch runs alone. Jobs past their deadline leave the queue unrun.
        """
        selected: list[Job] = []
        expired: list[Job] = []
        room, room_bytes, full = self.batch_size, self.batch_bytes, False
        for job in jobs:
            if job.request.deadline is not None and job.expired:
                expired.append(job)
            elif not selected or job.key == selected[0].key:
                if selected and (job.size > room or job.bytes > room_bytes):
                    full = True
                    break
                selected.append(job)
                room -= job.size
                if room > 0:
                    room_bytes -= job.bytes
                if room <= 0 or room_bytes <= 0:
                    full = True
                    break
        for job in expired:
            job.expire()
        return selected, full

    def _take(self, batch: list[Job], waited_s: float) -> list[Job]:
        now = time.monotonic()
        for job in batch:
            del self._jobs[job.id]
            job.on_death = None
            if not job.queued_s:  # else it has been counted
                job.queued_s = now - job.enqueued_at
                self.metrics.queue_s.observe(job.queued_s)
        self.metrics.batch_wait_s.observe(waited_s)
        self._free_room(len(batch))
        return batch
