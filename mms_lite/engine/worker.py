"""The life of one worker as the server sees it: boot, pull, death, restart, time-outs.

A worker that ends fails the jobs it had started and gives the others back to the head of the queue: a job
that may have killed its worker is never tried again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import socket
import time
from typing import TYPE_CHECKING, Any

import psutil

from mms_lite import wire
from mms_lite.engine.batch import BackendLog, Batch, Pace, pack
from mms_lite.engine.batcher import Job
from mms_lite.engine.launcher import Channel, Exit
from mms_lite.errors import (
    BackendMissing,
    DeadlineExceeded,
    InvalidArchive,
    InvalidRequest,
    LoadError,
    OutOfMemory,
    ServingError,
    WorkerDied,
    from_wire,
)
from mms_lite.logs import METRICS, MODEL_METRICS
from mms_lite.transport import Frame, FrameKind, ProtocolError, encode
from mms_lite.types import WorkerState, WorkerStatus
from mms_lite.wire import Outcome

if TYPE_CHECKING:
    from mms_lite.engine.pool import WorkerPool

BOOT_ATTEMPTS = 3
_FOR_GOOD = (InvalidArchive, BackendMissing)  # another attempt would end the same
_BACKOFF_FIRST_S = 0.1
_BACKOFF_LAST_S = 30.0
_MAX_RETURNS = 3  # a job whose workers end before they start it may be what ends them
RETIRE_S = 5.0  # a worker that was told to stop has this long, or what is left of its grace

_log = logging.getLogger("mms_lite.engine")
_metrics_log = logging.getLogger(METRICS)
_model_metrics_log = logging.getLogger(MODEL_METRICS)


def backoff(failures: int) -> float:
    """Return the pause in seconds before the next start after so many failures in a row, with jitter."""
    if failures <= 0:
        return 0.0
    return min(_BACKOFF_LAST_S, _BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 20)) * random.uniform(0.75, 1.25)


class Worker:
    """One place in the pool, filled by one process after another."""

    def __init__(self, pool: WorkerPool, number: int) -> None:
        self.state = WorkerState.STARTING
        self.number = number
        self.restarts = 0
        self.last_exit: str | None = None
        self.failure: ServingError | None = None
        self.settled = asyncio.Event()  # loaded for the first time, or given up
        self._pool = pool
        self._spec = pool.spec
        self._metrics = pool.queue.metrics
        self._backend_log = BackendLog(self.name)
        self._channel: Channel | None = None
        self._started_at = 0.0
        self._batches: dict[int, Batch] = {}
        self._conversations = itertools.count(1)
        self._emptied: asyncio.Future[None] | None = None  # who waits until it holds nothing
        self._loaded: asyncio.Future[dict[str, Any]] | None = None
        self._boots_failed = 0  # in a row
        self._crashes = 0  # in a row, without an answer in between
        self._timer: asyncio.TimerHandle | None = None
        self._pace = Pace()
        self._calls: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The worker's name in logs and in `describe`."""
        return f"W-{self._spec.name[:25]}-{self.number}"

    @property
    def device(self) -> int | None:
        """The GPU this worker is given, None for CPU."""
        devices = self._spec.devices
        return devices[self.number % len(devices)] if devices else None

    @property
    def in_flight(self) -> int:
        """How many jobs the worker holds."""
        return sum(len(batch.jobs) for batch in self._batches.values())

    @property
    def batches(self) -> int:
        """How many batches the worker holds, the one that runs among them."""
        return len(self._batches)

    def start(self) -> None:
        """Begin to live."""
        self._task = asyncio.get_running_loop().create_task(self._live(), name=self.name)

    async def retire(self, *, grace_s: float) -> None:
        """Take no more work, finish what is held within `grace_s`, then end: in what is left, or RETIRE_S."""
        until = time.monotonic() + grace_s
        self.state = WorkerState.STOPPING
        self._pool.queue.withdraw(self._dispatch)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        channel = self._channel
        if channel is not None and channel.ended.done() and self._batches:
            self._clean_up(channel.ended.result())  # it ended in the moment in which it was retired
        elif channel is not None and not channel.ended.done():
            if self._loaded is not None and self._loaded.done():
                await self._finish_held(channel, grace_s)
                channel.send(encode(FrameKind.STOP, 0))
                limit_s = 0.0 if self._batches else max(RETIRE_S, until - time.monotonic())
                await asyncio.wait([channel.ended], timeout=limit_s)
                if limit_s and not channel.ended.done():
                    _log.warning("%s is killed: told to stop, it did not end in %.0f s", self.name, limit_s)
            channel.kill()
            self._clean_up(await channel.ended)
        self.state = WorkerState.STOPPED
        self.settled.set()

    def kill(self) -> None:
        """End the process at once; what it holds is settled when it is gone."""
        if self._channel is not None:
            self._channel.kill()

    def status(self) -> WorkerStatus:
        """Describe the worker as it is now."""
        pid = self._channel.pid if self._channel is not None and not self._channel.ended.done() else None
        memory = 0
        if pid is not None:
            with contextlib.suppress(psutil.Error):
                memory = psutil.Process(pid).memory_info().rss
        return WorkerStatus(
            id=self.name,
            state=self.state,
            pid=pid,
            started_at=self._started_at,
            restarts=self.restarts,
            memory_bytes=memory,
            device=self.device,
            last_exit=self.last_exit,
        )

    async def _live(self) -> None:
        while True:
            self.state = WorkerState.STARTING
            for_good = False
            try:
                error, for_good = await self._boot()
            except Exception as defect:
                _log.exception("%s: a defect while it started", self.name)
                error = LoadError(f"the worker cannot be started: {type(defect).__name__}: {defect}")
                self.kill()
            if error is None:
                self._boots_failed = 0
                self.failure = None
                self.state = WorkerState.READY
                self.settled.set()
                await self._serve()
            else:
                self._boots_failed = BOOT_ATTEMPTS if for_good else self._boots_failed + 1
                self.failure = error
                given_up = self._boots_failed >= BOOT_ATTEMPTS
                _log.warning(
                    "%s did not start%s: %s", self.name, " and is given up" if given_up else "", error.message
                )
                if given_up:
                    self.state = WorkerState.FAILED
                    self.settled.set()
                    self._pool.gave_up()
                    return
            self.restarts += 1
            self._metrics.restarts += 1
            self.state = WorkerState.BACKOFF
            pause_s = backoff(max(self._boots_failed, self._crashes))
            _log.info("Retry worker: %s in %.1f seconds.", self.name, pause_s)
            await asyncio.sleep(pause_s)

    async def _boot(self) -> tuple[ServingError | None, bool]:
        """Start a process and have it load the model; return why it did not, and if that is for good."""
        loop = asyncio.get_running_loop()
        for_good = False
        self._started_at, begin = time.time(), time.monotonic()
        self._loaded = loop.create_future()
        try:
            channel = self._pool.launch(self.name, self._on_frame)
        except LoadError as failure:
            return failure, isinstance(failure, _FOR_GOOD)
        self._channel = channel
        load = wire.encode_load(self._spec, instance=self.number, device=self.device)
        channel.send(encode(FrameKind.LOAD, 0, load))
        waited: list[asyncio.Future[Any]] = [self._loaded, channel.ended]
        await asyncio.wait(waited, timeout=self._spec.load_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._loaded.done():
            reported = self._loaded.result().get("error")
            if reported is None:
                return self._take_loaded(self._loaded.result(), time.monotonic() - begin)
            error: ServingError = from_wire(reported)
            await asyncio.wait([channel.ended], timeout=RETIRE_S)
        elif not channel.ended.done():
            error = LoadError(f"the model did not load within {self._spec.load_timeout_s:g} s")
            for_good = not self.settled.is_set()  # one that has loaded before may do so again
        else:
            error = LoadError("the worker ended while it loaded the model")
        channel.kill()
        ended = await channel.ended
        self.last_exit = ended.text
        if self._loaded.done() and isinstance(error, (LoadError, OutOfMemory)):  # the worker says why
            return error, isinstance(error, _FOR_GOOD)
        lines = [line for line in ended.lines if line.strip()]
        last = f"; last line: {lines[-1]}" if lines else ""
        return LoadError(f"{error.message} ({ended.text}){last}", log=list(ended.lines)), for_good

    def _take_loaded(self, said: dict[str, Any], spent_s: float) -> tuple[ServingError | None, bool]:
        try:
            self._pool.loaded(wire.decode_signature(said), wire.decode_completed(said))
        except ServingError as error:  # the model says of itself what cannot be: it would say it again
            self.kill()
            return error, True
        self._log_load(spent_s)
        return None, False

    def _log_load(self, spent_s: float) -> None:
        """Write MMS's metric of a load: its name is the worker's, its unit milliseconds."""
        where = f"#Level:Host|#hostname:{socket.gethostname()},timestamp:{int(time.time())}"
        _metrics_log.info("%s.ms:%d|%s", self.name, spent_s * 1000, where)

    async def _serve(self) -> None:
        channel = self._channel
        assert channel is not None  # _boot made it
        self._pool.queue.ask(self._dispatch)
        try:
            await asyncio.wait([channel.ended])
        finally:
            self._pool.queue.withdraw(self._dispatch)
        self._crashes += 1
        self._clean_up(channel.ended.result())

    def _dispatch(self, jobs: list[Job]) -> None:
        """Send a batch to the process, as far as a frame holds it. For the queue, which has been asked."""
        channel = self._channel
        assert channel is not None  # who asks has one
        batch, parts, rest = pack(jobs, channel.arena, self._pool.max_frame_bytes)
        if not parts:
            asyncio.get_running_loop().call_soon(self._ask_if_free)
            return
        for job in batch.jobs.values():
            job.on_death = self._cancel
        number = next(self._conversations)
        self._batches[number] = batch
        if len(self._batches) == 1:
            self._take_turn(batch)  # one sent ahead has its turn when the first is done
        self.state = WorkerState.BUSY
        channel.send(encode(FrameKind.BATCH, number, *wire.join_batch(parts)))
        if rest:
            self._pool.queue.put_back(rest)

    def _ask_if_free(self) -> None:
        if self.state is WorkerState.READY and not self._batches:
            self._pool.queue.withdraw(self._dispatch)
            self._pool.queue.ask(self._dispatch)

    def feed_ahead(self) -> None:
        """Send full batches while one runs, as many as its pace allows. For the pool."""
        while self.state is WorkerState.BUSY and 0 < len(self._batches) <= self._pace.ahead:
            jobs = self._pool.queue.take_ahead()
            if not jobs:
                return
            self._dispatch(jobs)

    def _take_turn(self, batch: Batch) -> None:
        """Let a batch be the one that runs, with its full time from now on."""
        batch.turn_at = now = time.monotonic()
        self._arm(batch, now)

    def _arm(self, batch: Batch, now: float) -> None:
        """Give a batch its full time from now on. One timer serves all: it looks again when it came early."""
        batch.due = now + self._spec.response_timeout_s
        if self._timer is None:
            self._look_again(batch.due - now)

    def _look_again(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._check_time)

    def _check_time(self) -> None:
        self._timer = None
        now = time.monotonic()
        for number, batch in self._batches.items():  # the first one runs, or should
            if batch.due > now:
                self._look_again(batch.due - now)
            else:
                self._time_out(number, batch)
            return

    def _time_out(self, number: int, batch: Batch) -> None:
        limit_s = self._spec.response_timeout_s
        _log.warning("%s gave no answer within %g s and is killed", self.name, limit_s)
        if self._begun(number):
            for job in batch.jobs.values():
                job.fail(DeadlineExceeded(f"the model gave no answer within {limit_s:g} s", by="server"))
        self.kill()

    def _begun(self, number: int) -> bool:
        """Tell whether the model has been given this batch, if it has not been answered yet."""
        return self._channel is not None and self._channel.marks.begun >= number

    def _cancel(self, job: Job) -> None:
        for number, batch in self._batches.items():
            if job.id in batch.jobs and self._channel is not None and not self._begun(number):
                self._channel.send(encode(FrameKind.CANCEL, 0, wire.encode_ids([job.id])))
                self._channel.marks.count_cancel()

    def _on_frame(self, frame: Frame) -> None:
        try:
            self._take_frame(frame)
        except ProtocolError as error:
            _log.error("%s broke the protocol and is killed: %s", self.name, error)
            self.kill()
        except Exception:
            _log.exception("%s sent a frame that cannot be taken and is killed", self.name)
            self.kill()

    def _take_frame(self, frame: Frame) -> None:
        if frame.kind is FrameKind.OUTCOME:
            self._take_outcome(frame.conversation, wire.decode_outcome(frame))
        elif frame.kind is FrameKind.STARTED:
            wire.decode_ids(frame)  # which item it is matters to nobody, but it must be one
            batch = self._batches.get(frame.conversation)
            if batch is not None:
                self._arm(batch, time.monotonic())
        elif frame.kind is FrameKind.METRICS:
            lines = wire.decode_lines(frame)
            _model_metrics_log.info("%d metrics of %s", len(lines), self.name, extra={"lines": lines})
        elif frame.kind is FrameKind.LOADED:
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_result(wire.decode_json(frame))
        elif frame.kind is FrameKind.CALL:
            task = asyncio.get_running_loop().create_task(self._call(frame))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
        else:
            raise ProtocolError(f"a worker sent a {frame.kind.name} frame")

    def _take_outcome(self, number: int, outcome: Outcome) -> None:
        batch = self._batches.get(number)
        job = batch.jobs.get(outcome.job_id) if batch is not None else None
        if batch is None or job is None:
            raise ProtocolError(f"an answer for job {outcome.job_id}, which it does not hold")
        job.finish(outcome)
        if not outcome.final:
            return
        if outcome.error is None:
            batch.answered += job.size
        job.on_death = None
        del batch.jobs[outcome.job_id]
        self._pool.queue.count_answer()
        if not batch.jobs:
            self._finish_batch(number, batch)

    def _finish_batch(self, number: int, batch: Batch) -> None:
        del self._batches[number]
        self._crashes = 0
        if self._begun(number):
            spent_s = batch.end(self._metrics)
            self._backend_log.add(spent_s)
            self._pace.observe(spent_s, alone=self._pool.live == 1)
        for following in self._batches.values():
            self._take_turn(following)
            self.feed_ahead()
            return
        if self.state is WorkerState.BUSY:
            self.state = WorkerState.READY
            self._pool.queue.ask(self._dispatch)
        elif self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    async def _call(self, frame: Frame) -> None:
        """Answer a worker that asks another model."""
        try:
            (item,) = wire.decode_batch(frame)
            outcome = await self._pool.call(item)
        except ServingError as error:
            outcome = Outcome(0, error=error.with_traceback(None))  # which would hold the call's body
        except (ProtocolError, ValueError) as error:
            outcome = Outcome(0, error=InvalidRequest(f"malformed call: {error}"))
        except Exception:
            _log.exception("%s: a defect in a call to another model", self.name)
            outcome = Outcome(0, error=ServingError("internal error"))
        meta, buffers = wire.encode_outcome_within(outcome, self._pool.max_frame_bytes)
        if self._channel is not None:
            self._channel.send(encode(FrameKind.RESULT, frame.conversation, meta, buffers))

    async def _finish_held(self, channel: Channel, grace_s: float) -> None:
        if not self._batches:
            return
        self._emptied = asyncio.get_running_loop().create_future()
        waited: list[asyncio.Future[Any]] = [self._emptied, channel.ended]
        await asyncio.wait(waited, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)

    def _clean_up(self, ended: Exit) -> None:
        """Settle what a process that has ended still held."""
        held, self._batches = self._batches, {}
        for task in self._calls:
            task.cancel()
        failed, returned = 0, []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for number, batch in held.items():
            begun = self._begun(number)
            if begun and batch.turn_at:  # else the end of the batch before it was never told
                batch.end(self._metrics)
            for job in batch.jobs.values():
                job.on_death = None
                if begun:
                    job.fail(_death(ended))
                    failed += 1
                    continue
                job.returned += 1
                # Only a batch whose turn it was can have ended the worker; those behind it cannot.
                if not batch.turn_at or job.returned < _MAX_RETURNS:
                    returned.append(job)
                else:
                    job.fail(_death(ended))
                    failed += 1
        self._pool.queue.put_back(returned)
        self.last_exit = ended.text
        _log.log(
            logging.INFO if self.state is WorkerState.STOPPING and not held else logging.WARNING,
            "%s ended: %s; %d of its requests failed, %d went back to the queue",
            self.name,
            ended.text,
            failed,
            len(returned),
        )


def _death(ended: Exit) -> ServingError:
    if ended.out_of_memory:
        return OutOfMemory("the worker ran out of memory")
    return WorkerDied(f"the worker ended with the request in flight: {ended.text}")
