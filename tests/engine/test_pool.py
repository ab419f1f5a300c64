"""How workers live, with workers that the test plays frame by frame."""

import asyncio
import struct
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from asking import begin
from scripted import ScriptedLauncher, ScriptedWorker, broken

from mms_lite import wire
from mms_lite.engine.batch import Batch
from mms_lite.engine.model import Model
from mms_lite.engine.worker import backoff
from mms_lite.errors import (
    BackendMissing,
    DeadlineExceeded,
    HandlerError,
    InvalidArchive,
    InvalidRequest,
    LoadError,
    ModelNotFound,
    ModelNotReady,
    OutOfMemory,
    QueueFull,
    RequestTooLarge,
    ServingError,
    WorkerDied,
)
from mms_lite.transport import Frame, FrameKind
from mms_lite.types import InferRequest, InferResponse, Tensor, VersionState, WorkerState
from mms_lite.wire import Item, Outcome

Make = Callable[..., Model]
Ask = Callable[..., InferRequest]
Wait = Callable[..., Any]
T = TypeVar("T")


Send = Callable[..., "asyncio.Task[InferResponse]"]


async def loaded(
    make_model: Make, launcher: ScriptedLauncher, workers: int = 1, **fields: Any
) -> tuple[Model, list[ScriptedWorker]]:
    model = make_model(launcher, **fields)
    await model.scale(workers, workers)
    return model, [await launcher.worker() for _ in range(workers)]


async def result(task: "asyncio.Task[InferResponse]", timeout_s: float = 3.0) -> bytes:
    return bytes((await asyncio.wait_for(task, timeout_s)).outputs[0].data)


async def refused(
    task: "asyncio.Task[Any]", kind: type[ServingError], match: str | None = None
) -> ServingError:
    with pytest.raises(kind, match=match) as caught:
        await asyncio.wait_for(task, 3)
    return caught.value


async def test_a_request_goes_to_a_worker_and_its_answer_comes_back(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    asked = send(model, b"question", id="abc", headers=[("A", "b")])
    number, (item,) = await worker.hear_batch()
    assert (item.request.id, item.request.headers) == ("abc", [("A", "b")])
    worker.begin(number)
    worker.answer(number, item)
    assert await result(asked) == b"question"


async def test_a_free_worker_takes_the_next_batch_and_a_busy_one_does_not(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    model, workers = await loaded(make_model, launcher, 2)
    first = send(model, b"1")
    busy = await wait_until(lambda: next((w for w in workers if not w.heard_nothing()), None))
    number, (item,) = await busy.hear_batch()
    (other,) = [worker for worker in workers if worker is not busy]
    for body in (b"2", b"3"):
        asked = send(model, body)
        other_number, (other_item,) = await other.hear_batch()
        other.answer(other_number, other_item)
        assert await result(asked) == body
    assert busy.heard_nothing()
    busy.answer(number, item)
    assert await result(first) == b"1"


async def test_the_state_of_a_worker_follows_what_it_does(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    def state() -> WorkerState:
        return model.status(is_default=True).workers[0].state

    launcher.loads = False
    model = make_model(launcher)
    scaling = begin(model.scale(1, 1))
    worker = await launcher.worker()
    assert (state(), model.status(is_default=True).state) == (WorkerState.STARTING, VersionState.LOADING)
    with pytest.raises(ModelNotReady, match="loading"):
        send(model)
    worker.say_loaded(pid=1)
    await scaling
    assert (state(), model.status(is_default=True).state) == (WorkerState.READY, VersionState.READY)
    asked = send(model)
    number, (item,) = await worker.hear_batch()
    assert state() is WorkerState.BUSY
    assert model.status(is_default=True).in_flight == 1
    worker.answer(number, item)
    await asked
    assert state() is WorkerState.READY
    worker.die()
    await wait_until(lambda: state() is WorkerState.BACKOFF)
    assert model.status(is_default=True).workers[0].last_exit == "killed by SIGSEGV"


async def test_several_outcomes_reach_a_stream_in_order(
    make_model: Make, launcher: ScriptedLauncher, ask: Ask
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2)
    job = model.submit(ask("m"))
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    for seq in range(3):
        tensor = Tensor("body", "BYTES", (), b"%d" % seq)
        worker.say_outcome(number, Outcome(item.job_id, outputs=[tensor], seq=seq, final=seq == 2))
    assert [bytes(answer.outputs[0].data) async for answer in job.answers()] == [b"0", b"1", b"2"]
    assert model.status(is_default=True).in_flight == 0


async def test_each_job_of_a_batch_is_answered_as_soon_as_its_own_outcome_is_there(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=10_000)
    one, other = send(model, b"one"), send(model, b"other")
    number, items = await worker.hear_batch()
    worker.begin(number)
    worker.answer(number, items[1])
    assert await result(other) == b"other"
    assert not one.done()
    worker.answer(number, items[0])
    assert await result(one) == b"one"


async def test_a_worker_that_dies_before_it_starts_a_batch_costs_no_request(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=5_000)
    first, second = send(model, b"1"), send(model, b"2")
    await worker.hear_batch()
    third, fourth = send(model, b"3"), send(model, b"4")
    worker.die()
    restarted = await launcher.worker()
    for expected in ([b"1", b"2"], [b"3", b"4"]):  # back at the head, in their order
        number, items = await restarted.hear_batch()
        assert [bytes(item.request.inputs[0].data) for item in items] == expected
        for item in items:
            restarted.answer(number, item)
    assert [await result(task) for task in (first, second, third, fourth)] == [b"1", b"2", b"3", b"4"]


async def test_a_worker_that_dies_after_the_start_fails_what_it_held_once_and_for_all(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=5_000)
    lost = [send(model, b"1"), send(model, b"2")]
    number, items = await worker.hear_batch()
    worker.begin(number)
    waiting = [send(model, b"3"), send(model, b"4")]
    worker.die()
    for task in lost:
        error = await refused(task, WorkerDied, "killed by SIGSEGV")
        assert error.retryable
    restarted = await launcher.worker()
    number, items = await restarted.hear_batch()
    assert [bytes(item.request.inputs[0].data) for item in items] == [b"3", b"4"]
    for item in items:
        restarted.answer(number, item)
    assert [await result(task) for task in waiting] == [b"3", b"4"]


async def test_what_a_worker_answered_before_it_died_stays_answered(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=5_000)
    answered, lost = send(model, b"1"), send(model, b"2")
    number, items = await worker.hear_batch()
    worker.begin(number)
    worker.answer(number, items[0])
    worker.die()
    assert await result(answered) == b"1"
    await refused(lost, WorkerDied)


async def test_a_worker_that_was_killed_for_memory_is_told_apart(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    asked = send(model)
    number, _ = await worker.hear_batch()
    worker.begin(number)
    worker.die("killed by SIGKILL", -9, oom=True)
    await refused(asked, OutOfMemory)


@pytest.mark.time_limit(20)
async def test_a_request_that_no_worker_lives_to_start_is_given_up_after_some_attempts(
    make_model: Make, launcher: ScriptedLauncher, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What kills a worker while it reads the frame (no memory, or over the limit) comes back each time.
    model, _ = await loaded(make_model, launcher, workers=1)
    monkeypatch.setattr("mms_lite.engine.worker._BACKOFF_LAST_S", 0.01)
    asked = send(model)
    for worker in launcher.started:  # grows while it is walked
        await worker.hear_batch()
        worker.die()
        before = len(launcher.started)
        if before > 10:
            break
        waiter = begin(launcher.worker())
        await asyncio.wait([waiter, asked], return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            waiter.cancel()
            break
    assert asked.done(), "the request went back to the queue more than ten times"
    await refused(asked, WorkerDied)


async def test_a_job_cancelled_after_it_was_sent_and_before_it_started_is_called_back(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=5_000)
    leaves, stays = send(model, b"leaves"), send(model, b"stays")
    number, items = await worker.hear_batch()
    leaves.cancel()
    cancel = await worker.hear(FrameKind.CANCEL)
    assert wire.decode_ids(cancel) == [items[0].job_id]
    worker.say_outcome(number, Outcome(items[0].job_id, error=ServingError("cancelled")))
    worker.begin(number)
    worker.answer(number, items[1])
    assert await result(stays) == b"stays"


async def test_a_client_that_leaves_after_the_start_disturbs_nobody(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=50)
    leaves, stays = send(model, b"leaves"), send(model, b"stays")
    number, items = await worker.hear_batch()
    worker.begin(number)
    worker.answer(number, items[1])
    assert await result(stays) == b"stays"
    leaves.cancel()
    await asyncio.wait([leaves])
    worker.answer(number, items[0])
    after = send(model, b"after")
    number, (item,) = await worker.hear_batch()  # and no CANCEL before it
    worker.answer(number, item)
    assert await result(after) == b"after"


async def test_a_batch_over_its_time_is_failed_its_worker_killed_and_replaced(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, response_timeout_s=0.1)
    asked = send(model)
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    error = await refused(asked, DeadlineExceeded)
    assert error.details == {"by": "server"}
    assert worker.killed
    asked = send(model, b"again")
    restarted = await launcher.worker()
    number, (item,) = await restarted.hear_batch()
    restarted.answer(number, item)
    assert await result(asked) == b"again"


async def test_an_item_that_runs_alone_gets_its_own_time(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    limit_s = 0.4
    model, (worker,) = await loaded(
        make_model, launcher, batch_size=3, max_batch_delay_ms=5_000, response_timeout_s=limit_s
    )
    asked = [send(model, body) for body in (b"1", b"2", b"3")]
    number, items = await worker.hear_batch()
    worker.begin(number)
    loop = asyncio.get_running_loop()
    for item in items:
        worker.say_alone(number, item)
        until = loop.time() + 0.6 * limit_s
        await wait_until(lambda until=until: loop.time() > until)
        worker.answer(number, item)
    assert [await result(task) for task in asked] == [b"1", b"2", b"3"]
    assert not worker.killed


async def test_a_client_deadline_does_not_kill_the_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    asked = send(model, deadline=asyncio.get_running_loop().time() + 0.05)
    number, (item,) = await worker.hear_batch()
    assert item.remaining_ms is not None and 0 <= item.remaining_ms <= 50
    worker.begin(number)
    error = await refused(asked, DeadlineExceeded)
    assert error.details == {"by": "client"}
    worker.answer(number, item)
    following = send(model, b"next")
    number, (item,) = await worker.hear_batch()
    worker.answer(number, item)
    assert await result(following) == b"next"
    assert not worker.killed


async def ahead(model: Model, worker: ScriptedWorker, send: Send) -> tuple[list[Any], list[Any]]:
    """Let the worker be quick once, then give it a batch that runs and one that was sent ahead."""
    first = send(model, b"first")
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    worker.answer(number, item)
    await result(first)
    runs = send(model, b"runs")
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    waits = send(model, b"waits")
    next_number, (next_item,) = await worker.hear_batch()
    return [runs, number, item], [waits, next_number, next_item]


async def test_a_batch_sent_ahead_to_a_worker_that_dies_is_served_by_the_next(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    (runs, _, _), (waits, _, _) = await ahead(model, worker, send)
    worker.die()
    await refused(runs, WorkerDied)
    restarted = await launcher.worker()
    number, (item,) = await restarted.hear_batch()
    restarted.answer(number, item)
    assert await result(waits) == b"waits"


async def test_a_worker_that_dies_between_two_batches_keeps_the_first_answer_and_gives_the_other_back(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    (runs, number, item), (waits, _, _) = await ahead(model, worker, send)
    worker.answer(number, item)  # still in the socket when the worker ends
    worker.die()
    assert await result(runs) == b"runs"
    restarted = await launcher.worker()
    number, (item,) = await restarted.hear_batch()
    restarted.answer(number, item)
    assert await result(waits) == b"waits"


async def test_a_worker_that_dies_in_its_next_batch_loses_that_one_only(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    (runs, number, item), (waits, next_number, _) = await ahead(model, worker, send)
    queued = send(model, b"queued")
    await asyncio.sleep(0)
    worker.answer(number, item)  # the server has not read it when the next batch has begun
    worker.begin(next_number)
    worker.die()
    assert await result(runs) == b"runs"
    await refused(waits, WorkerDied)
    restarted = await launcher.worker()
    number, (item,) = await restarted.hear_batch()
    restarted.answer(number, item)
    assert await result(queued) == b"queued"


async def test_what_a_process_had_begun_says_nothing_of_the_next_process(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    lost = send(model, b"lost")
    number, _ = await worker.hear_batch()
    worker.begin(number)
    worker.die()
    await refused(lost, WorkerDied)
    asked = send(model, b"patient")
    second = await launcher.worker()
    await second.hear_batch()
    second.die()
    third = await launcher.worker()
    number, (item,) = await third.hear_batch()
    third.answer(number, item)
    assert await result(asked) == b"patient"


async def test_the_time_of_a_batch_sent_ahead_begins_with_its_turn(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    limit_s = 0.5
    model, (worker,) = await loaded(make_model, launcher, response_timeout_s=limit_s)
    loop = asyncio.get_running_loop()
    for task, number, item in await ahead(model, worker, send):
        worker.begin(number)
        until = loop.time() + 0.65 * limit_s
        await wait_until(lambda until=until: loop.time() > until)
        worker.answer(number, item)
        assert await result(task) == bytes(item.request.inputs[0].data)
    assert not worker.killed


async def test_a_batch_sent_ahead_is_called_back_when_its_client_leaves(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    (runs, number, item), (waits, _, next_item) = await ahead(model, worker, send)
    assert worker.marks.cancels == 0
    waits.cancel()
    assert wire.decode_ids(await worker.hear(FrameKind.CANCEL)) == [next_item.job_id]
    assert worker.marks.cancels == 1  # else the worker would not look for it
    worker.answer(number, item)
    assert await result(runs) == b"runs"


class Took:
    """How long every batch is said to have taken, in seconds."""

    def __init__(self) -> None:
        self.spent_s = 0.0001


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> Took:
    said = Took()
    monkeypatch.setattr(Batch, "end", lambda _batch, _metrics: said.spent_s)
    return said


async def rounds(model: Model, worker: ScriptedWorker, send: Send, count: int = 70) -> None:
    """Have a worker answer requests one by one, until how long they take is its mean."""
    for _ in range(count):
        asked = send(model)
        number, (item,) = await worker.hear_batch()
        worker.begin(number)
        worker.answer(number, item)
        await result(asked)


async def held(worker: ScriptedWorker, count: int) -> list[tuple[int, Item]]:
    """Return the batches of one request that a worker is sent, of which the first begins."""
    batches = []
    for _ in range(count):
        number, (item,) = await worker.hear_batch()
        batches.append((number, item))
    worker.begin(batches[0][0])
    return batches


@pytest.mark.parametrize(("spent_s", "ahead"), [(0.0001, 15), (0.0006, 3), (0.0015, 1), (0.05, 1), (0.2, 0)])
async def test_the_shorter_batches_are_the_more_of_them_wait_at_a_busy_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took, spent_s: float, ahead: int
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    took.spent_s = spent_s
    await rounds(model, worker, send)
    asked = [send(model, b"%d" % n) for n in range(20)]
    batches = await held(worker, 1 + ahead)
    status = model.status(is_default=True)
    assert (status.in_flight, status.queue_depth) == (1 + ahead, 19 - ahead)
    assert worker.heard_nothing()
    worker.answer(*batches[0])
    await result(asked[0])
    _, (item,) = await worker.hear_batch()  # each that is answered makes room for one
    assert bytes(item.request.inputs[0].data) == b"%d" % (1 + ahead)


async def test_one_long_batch_ends_the_sending_of_several_at_once(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    await rounds(model, worker, send)
    took.spent_s = 0.02
    await rounds(model, worker, send, 1)
    asked = [send(model) for _ in range(5)]
    await held(worker, 2)
    assert model.status(is_default=True).queue_depth == len(asked) - 2


async def test_a_queue_is_full_also_where_several_batches_were_sent_ahead(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took
) -> None:
    model, (worker,) = await loaded(make_model, launcher, queue_size=3)
    await rounds(model, worker, send)
    asked = [send(model) for _ in range(16 + 3)]
    with pytest.raises(QueueFull):
        send(model)
    for number, item in await held(worker, 16):
        worker.answer(number, item)
    for number, item in await held(worker, 3):
        worker.answer(number, item)
    assert [await result(each) for each in asked] == [b"hello"] * 19


async def test_each_of_several_batches_sent_ahead_is_called_back_when_its_client_leaves(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    await rounds(model, worker, send)
    asked = [send(model) for _ in range(6)]
    batches = await held(worker, 6)
    worker.begin(batches[1][0])  # the first answer is still on its way
    for place in (5, 2, 1, 0):
        asked[place].cancel()
        await asyncio.wait([asked[place]])
    for place in (5, 2):
        assert wire.decode_ids(await worker.hear(FrameKind.CANCEL)) == [batches[place][1].job_id]
    assert worker.marks.cancels == 2
    for place, (number, item) in enumerate(batches):
        if place in (2, 5):
            worker.say_outcome(number, Outcome(item.job_id, error=ServingError("cancelled")))
        else:
            worker.begin(number)
            worker.answer(number, item)
    assert [await result(asked[place]) for place in (3, 4)] == [b"hello"] * 2
    assert worker.heard_nothing()
    assert not worker.killed


async def test_a_request_whose_deadline_passes_among_those_sent_ahead_is_called_back(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    await rounds(model, worker, send)
    now = asyncio.get_running_loop().time()
    asked = [send(model, deadline=now + 0.05 if n == 2 else None) for n in range(4)]
    batches = await held(worker, 4)
    error = await refused(asked[2], DeadlineExceeded)
    assert error.details == {"by": "client"}
    assert wire.decode_ids(await worker.hear(FrameKind.CANCEL)) == [batches[2][1].job_id]


async def answers_in_order(worker: Any, asked: Any, numbers: range) -> None:
    """Have the worker answer these requests, each of which has its number for a body."""
    for n in numbers:
        number, (item,) = await worker.hear_batch()
        assert bytes(item.request.inputs[0].data) == b"%d" % n
        worker.begin(number)
        worker.answer(number, item)
        assert await result(asked[n]) == b"%d" % n


async def test_several_batches_sent_ahead_go_back_in_their_order_before_those_that_wait(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    await rounds(model, worker, send)
    asked = [send(model, b"%d" % n) for n in range(20)]
    batches = await held(worker, 16)
    worker.answer(*batches[0])
    worker.begin(batches[1][0])
    worker.die()
    assert await result(asked[0]) == b"0"
    await refused(asked[1], WorkerDied)
    restarted = await launcher.worker()
    await answers_in_order(restarted, asked, range(2, 20))


async def test_requests_that_only_waited_behind_those_that_end_workers_are_not_given_up(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    await rounds(model, worker, send)
    asked = [send(model, b"%d" % n) for n in range(8)]
    for n in range(5):  # more often than a request is put back that may be to blame
        number, _ = await worker.hear_batch()
        worker.begin(number)
        worker.die()
        await refused(asked[n], WorkerDied)
        worker = await launcher.worker()
    await answers_in_order(worker, asked, range(5, 8))


async def test_of_several_batches_sent_ahead_one_that_hangs_fails_alone_and_in_its_own_time(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took, wait_until: Wait
) -> None:
    limit_s = 0.4
    model, (worker,) = await loaded(make_model, launcher, response_timeout_s=limit_s)
    await rounds(model, worker, send)
    asked = [send(model, b"%d" % n) for n in range(4)]
    batches = await held(worker, 4)
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.6 * limit_s
    await wait_until(lambda: loop.time() > until)
    worker.answer(*batches[0])
    assert await result(asked[0]) == b"0"
    worker.begin(batches[1][0])
    began = loop.time()
    await refused(asked[1], DeadlineExceeded)
    assert loop.time() - began > 0.9 * limit_s
    restarted = await launcher.worker()
    for n in (2, 3):
        number, (item,) = await restarted.hear_batch()
        restarted.answer(number, item)
        assert await result(asked[n]) == b"%d" % n


async def test_batches_sent_ahead_are_spread_over_the_workers(
    make_model: Make, launcher: ScriptedLauncher, send: Send, took: Took
) -> None:
    model, workers = await loaded(make_model, launcher, 2)
    serving = [begin(worker.serve()) for worker in workers]
    for _ in range(70):
        await asyncio.gather(*(result(send(model)) for _ in workers))
    for task in serving:
        task.cancel()
    await asyncio.wait(serving)
    asked = [send(model, b"%d" % n) for n in range(12)]
    for worker in workers:
        await held(worker, 6)
        assert worker.heard_nothing()
    assert model.status(is_default=True).queue_depth == 0
    for task in asked:
        task.cancel()


SURROGATE = "\ud800"  # what JSON's "\ud800" becomes


@pytest.mark.parametrize(
    "fields",
    [{"id": "a\0b"}, {"id": SURROGATE}, {"headers": [("a", SURROGATE)]}, {"parameters": {"p": {1, 2}}}],
    ids=["NUL", "surrogate id", "surrogate header", "parameter"],
)
async def test_a_request_that_cannot_cross_fails_alone_and_costs_no_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send, fields: dict[str, Any]
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=200)
    bad, good = send(model, b"bad", **fields), send(model, b"good")
    await refused(bad, InvalidRequest)
    number, (item,) = await worker.hear_batch()
    worker.answer(number, item)
    assert await result(good) == b"good"
    assert not worker.killed


async def test_a_batch_of_requests_that_cannot_cross_does_not_lose_its_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, batch_size=2)
    for _ in range(3):
        bad = [send(model, id="a\0b"), send(model, id=SURROGATE)]
        for task in bad:
            await refused(task, InvalidRequest)
    first = send(model, b"first")
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    waits = [send(model, id="a\0b"), send(model, id=SURROGATE)]  # for a worker that is busy
    await asyncio.sleep(0)
    worker.answer(number, item)
    assert await result(first) == b"first"
    for task in waits:
        await refused(task, InvalidRequest)
    good = send(model, b"good")
    number, (item,) = await worker.hear_batch()
    worker.answer(number, item)
    assert await result(good) == b"good"
    assert not worker.killed


async def test_a_request_over_the_limit_of_a_frame_is_refused_alone_and_costs_no_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    launcher.max_frame_bytes = 1000
    model, (worker,) = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=5_000)
    asked = [send(model, body) for body in (b"0", bytes(1000), b"2", b"3")]
    serving = begin(worker.serve())
    error = await refused(asked[1], RequestTooLarge, "max_frame_bytes is 1000")
    assert (error.http, error.grpc) == (413, "RESOURCE_EXHAUSTED")
    assert [await result(asked[place]) for place in (0, 2, 3)] == [b"0", b"2", b"3"]
    assert not worker.killed
    serving.cancel()


async def test_what_finds_no_room_in_a_frame_goes_with_the_next_in_its_order(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    launcher.max_frame_bytes = 1000
    model, (worker,) = await loaded(make_model, launcher, batch_size=4, max_batch_delay_ms=100)
    headers = [("a", "b" * 200)]  # of a frame too, but known only once it is packed
    asked = [send(model, b"%d" % n + bytes(100), headers=headers) for n in range(4)]
    for expected in ((0, 1), (2, 3)):
        number, items = await worker.hear_batch()
        assert [bytes(item.request.inputs[0].data[:1]) for item in items] == [b"%d" % n for n in expected]
        worker.begin(number)
        for item in items:
            worker.answer(number, item)
    assert [(await result(task))[:1] for task in asked] == [b"0", b"1", b"2", b"3"]
    waits = model.metrics.queue_s
    assert sum(waits.counts) == 4  # each was counted once
    assert not worker.killed


async def test_what_finds_no_room_in_a_frame_goes_to_an_idle_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    launcher.max_frame_bytes = 1000
    model, workers = await loaded(make_model, launcher, 2, batch_size=2, max_batch_delay_ms=5_000)
    asked = [send(model, body, headers=[("a", "b" * 500)]) for body in (b"1", b"2", b"3")]
    for place, worker in enumerate(workers):
        number, (item,) = await worker.hear_batch()
        worker.begin(number)
        worker.answer(number, item)
        assert await result(asked[place]) == b"%d" % (place + 1)


def answer_for_a_stranger() -> tuple[FrameKind, bytes]:
    return FrameKind.OUTCOME, wire.encode_outcome(Outcome(2**40))[0]


def error_meta(rare: bytes, job_id: int = 0) -> bytes:
    return struct.pack("!QIBHIIII", job_id, 0, 1, 0, 0, 0, 0, len(rare)) + rare


@pytest.mark.parametrize(
    ("kind", "meta"),
    [
        answer_for_a_stranger(),
        (FrameKind.OUTCOME, b"noise"),
        (FrameKind.OUTCOME, error_meta(b"[]")),
        (FrameKind.OUTCOME, error_meta(b'{"code": "load_failed", "details": {"message": 1}}')),
        (FrameKind.STARTED, b"noise"),
        (FrameKind.STOP, b""),
        (FrameKind.BATCH, b""),
        (FrameKind.RESULT, b""),
    ],
    ids=[
        "stranger's outcome",
        "noise outcome",
        "list for error",
        "odd details",
        "noise started",
        "stop",
        "batch",
        "result",
    ],
)
async def test_a_worker_that_talks_nonsense_is_killed_and_replaced(
    make_model: Make, launcher: ScriptedLauncher, send: Send, kind: FrameKind, meta: bytes
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    asked = send(model)
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    worker.say(kind, number, meta)
    await refused(asked, WorkerDied)
    assert worker.killed
    asked = send(model, b"again")
    restarted = await launcher.worker()
    number, (item,) = await restarted.hear_batch()
    restarted.answer(number, item)
    assert await result(asked) == b"again"


@pytest.mark.time_limit(20)
@pytest.mark.parametrize(
    "report",
    [b"noise", b"[]", b'{"error": 5}', b'{"error": {"code": []}}', b'{"config": [1]}'],
)
async def test_a_worker_that_reports_nonsense_instead_of_loading_is_a_failed_load(
    make_model: Make, launcher: ScriptedLauncher, report: bytes
) -> None:
    launcher.loads = False
    model = make_model(launcher, load_timeout_s=5.0, config={"name": "m", "max_batch_size": 0})
    scaling = begin(model.scale(1, 1))
    for _ in range(3):
        worker = await launcher.worker()
        worker.say(FrameKind.LOADED, 0, report)
        worker.die("exit code 3 (load failed)", 3)
    await refused(scaling, LoadError)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"input": 5}, "input"),
        ({"max_batch_size": -1e99}, "max_batch_size"),
        (
            {"max_batch_size": 4, "dynamic_batching": {"preferred_batch_size": [9]}},
            "^dynamic batching preferred size must be <= max batch size for m$",
        ),
    ],
)
async def test_a_model_that_completes_its_configuration_wrongly_is_told_so_and_not_tried_again(
    make_model: Make,
    launcher: ScriptedLauncher,
    caplog: pytest.LogCaptureFixture,
    said: dict[str, Any],
    why: str,
) -> None:
    launcher.loads = False
    model = make_model(launcher, config={"name": "m", "max_batch_size": 0})
    scaling = begin(model.scale(1, 1))
    worker = await launcher.worker()
    worker.say_loaded(config=said)
    await refused(scaling, LoadError, why)
    assert len(launcher.started) == 1
    assert worker.killed
    assert not [record for record in caplog.records if record.exc_info]


async def test_three_failures_to_load_are_the_end_and_the_reason_is_told(
    make_model: Make, launcher: ScriptedLauncher, wait_until: Wait
) -> None:
    launcher.loads = False
    model = make_model(launcher)
    scaling = begin(model.scale(1, 1))
    for _ in range(3):
        worker = await launcher.worker()
        worker.say_loaded(error=LoadError("ValueError: no weights", traceback=["..."]).to_wire())
        worker.die("exit code 3 (load failed)", 3)
    await refused(scaling, LoadError, "ValueError: no weights")
    status = model.status(is_default=True)
    assert (status.state, status.detail) == (VersionState.FAILED, "ValueError: no weights")
    assert status.workers[0].state is WorkerState.FAILED
    assert len(launcher.started) == 3
    with pytest.raises(ModelNotReady, match="model m failed to load"):
        model.submit(InferRequest(id="1", model="m"))


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (OutOfMemory("the model ran out of memory while it loaded"), 3),
        (BackendMissing("pip install 'mms-lite[onnx]'"), 1),
        (InvalidArchive("the model file is damaged"), 1),
    ],
    ids=lambda case: case.code if isinstance(case, ServingError) else str(case),
)
async def test_the_kind_of_a_load_failure_reaches_the_caller(
    make_model: Make, launcher: ScriptedLauncher, error: ServingError, attempts: int
) -> None:
    launcher.loads = False
    model = make_model(launcher)
    scaling = begin(model.scale(1, 1))
    for _ in range(attempts):
        worker = await launcher.worker()
        worker.say_loaded(error=error.to_wire())
        worker.die("exit code 4 (out of memory)", 4)
    await refused(scaling, type(error), error.message.replace("[", r"\[")[:20])


async def test_a_worker_that_ends_while_it_loads_is_reported_with_its_last_line(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    launcher.loads = False
    model = make_model(launcher)
    scaling = begin(model.scale(1, 1))
    for _ in range(3):
        worker = await launcher.worker()
        worker.die("exit code 127", 127, "first line", "libcuda.so: not found", "")
    error = await refused(scaling, LoadError, r"exit code 127.*libcuda\.so: not found")
    assert error.details["log"][0] == "first line"


async def test_a_load_over_its_time_is_killed_and_not_tried_again(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    launcher.loads = False
    model = make_model(launcher, load_timeout_s=0.05)
    await refused(begin(model.scale(1, 1)), LoadError, "0.05 s")
    (worker,) = launcher.started
    assert worker.killed


async def test_a_worker_that_served_before_and_loads_too_slowly_is_tried_again(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, load_timeout_s=0.3)
    launcher.loads = False
    worker.die()
    slow = await launcher.worker()
    await asyncio.wait([slow.ended], timeout=5)
    assert slow.killed
    launcher.loads = True
    restarted = await launcher.worker()
    asked = send(model)
    number, (item,) = await restarted.hear_batch()
    restarted.answer(number, item)
    assert await result(asked) == b"hello"


async def test_a_launcher_that_fails_is_tried_three_times(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    launcher.failures = [broken(), broken()]
    model, (_worker,) = await loaded(make_model, launcher)
    assert model.ready_workers == 1
    assert launcher.failures == []


@pytest.mark.time_limit(10)
async def test_a_launcher_that_fails_in_an_unforeseen_way_is_a_failed_load_and_no_endless_wait(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    launcher.failures = [OSError(24, "Too many open files") for _ in range(3)]
    model = make_model(launcher)
    with pytest.raises(ServingError):
        await asyncio.wait_for(model.scale(1, 1), 3)


async def test_workers_that_cannot_be_restarted_fail_the_requests_that_wait(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    launcher.failures = [broken("the disk is gone") for _ in range(3)]
    held, waiting = send(model, b"held"), send(model, b"waiting")
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    worker.die()
    await refused(held, WorkerDied)
    await refused(waiting, ModelNotReady, "workers cannot be started")
    assert model.status(is_default=True).state is VersionState.FAILED
    with pytest.raises(ModelNotReady, match="model m failed to load"):
        send(model)
    await model.scale(1, 1)  # a new attempt
    restarted = await launcher.worker()
    asked = send(model)
    number, (item,) = await restarted.hear_batch()
    restarted.answer(number, item)
    assert await result(asked) == b"hello"


@pytest.mark.time_limit(20)
async def test_workers_that_cannot_be_restarted_also_fail_those_who_wait_for_room(
    make_model: Make, launcher: ScriptedLauncher, send: Send, ask: Ask
) -> None:
    model, (worker,) = await loaded(make_model, launcher, queue_size=1)
    launcher.failures = [broken("the disk is gone") for _ in range(3)]
    held = send(model, b"held")
    number, _ = await worker.hear_batch()
    waiting = send(model, b"waiting")

    async def call() -> InferResponse:
        return await (await model.submit_when_room(ask("m", b"for room"))).answer()

    for_room = begin(call())
    await asyncio.sleep(0)
    worker.begin(number)
    worker.die()
    await refused(held, WorkerDied)
    await refused(waiting, ModelNotReady)
    done, _ = await asyncio.wait([for_room], timeout=3)
    for_room.cancel()
    assert done, "the one who waited for room waits for ever"


async def test_of_two_workers_one_that_gave_up_leaves_the_model_ready(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    model, (one, other) = await loaded(make_model, launcher, 2)
    launcher.failures = [broken() for _ in range(3)]
    one.die()
    await wait_until(
        lambda: WorkerState.FAILED in [w.state for w in model.status(is_default=True).workers], "the end"
    )
    assert model.status(is_default=True).state is VersionState.READY
    asked = send(model)
    number, (item,) = await other.hear_batch()
    other.answer(number, item)
    assert await result(asked) == b"hello"


def test_the_pause_between_restarts_grows_and_is_bounded() -> None:
    assert backoff(0) == 0
    for failures in range(1, 2000, 37):
        assert 0.07 <= backoff(failures) <= 37.5
    assert backoff(3) < backoff(6) < backoff(9)


async def test_a_worker_may_ask_another_model_while_it_runs(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    calls: list[Item] = []

    async def call(item: Item) -> Outcome:
        calls.append(item)
        if item.request.model == "unknown":
            raise ModelNotFound("Model not found: unknown")
        return Outcome(item.job_id, outputs=[Tensor("y", "FP32", (1,), bytearray(4))], headers=[("h", "v")])

    model, (worker,) = await loaded(make_model, launcher, call=call)
    asked = send(model)
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    for conversation, name in ((7, "other"), (8, "unknown")):
        question = wire.encode_item(0, None, InferRequest(id="sub", model=name))
        worker.say(FrameKind.CALL, conversation, *wire.join_batch([question]))
        frame = await worker.hear(FrameKind.RESULT)
        assert frame.conversation == conversation
        outcome = wire.decode_outcome(frame)
        if name == "other":
            assert outcome.outputs == [Tensor("y", "FP32", (1,), bytearray(4))]
            assert outcome.headers == [("h", "v")]
        else:
            assert isinstance(outcome.error, ModelNotFound)
    worker.answer(number, item)
    assert await result(asked) == b"hello"
    assert [c.request.id for c in calls] == ["sub", "sub"]


async def test_a_call_that_fails_in_an_unforeseen_way_is_still_answered(
    make_model: Make, launcher: ScriptedLauncher, send: Send, caplog: pytest.LogCaptureFixture
) -> None:
    async def call(item: Item) -> Outcome:
        raise RuntimeError("a defect")

    _model, (worker,) = await loaded(make_model, launcher, call=call)
    question = wire.encode_item(0, None, InferRequest(id="sub", model="m"))
    worker.say(FrameKind.CALL, 7, *wire.join_batch([question]))
    frame: Frame = await asyncio.wait_for(worker.hear(FrameKind.RESULT), 3)
    assert wire.decode_outcome(frame).error is not None


async def test_an_answer_to_a_call_over_the_limit_of_a_frame_is_an_error(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    async def call(item: Item) -> Outcome:
        return Outcome(item.job_id, outputs=[Tensor("y", "UINT8", (2000,), bytearray(2000))])

    launcher.max_frame_bytes = 1000
    _, (worker,) = await loaded(make_model, launcher, call=call)
    question = wire.encode_item(0, None, InferRequest(id="sub", model="m"))
    worker.say(FrameKind.CALL, 7, *wire.join_batch([question]))
    error = wire.decode_outcome(await worker.hear(FrameKind.RESULT)).error
    assert error is not None and "max_frame_bytes is 1000" in error.message


async def test_a_malformed_call_is_answered_with_an_error(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    _, (worker,) = await loaded(make_model, launcher)
    worker.say(FrameKind.CALL, 3, b"noise")
    frame = await worker.hear(FrameKind.RESULT)
    assert isinstance(wire.decode_outcome(frame).error, InvalidRequest)


async def test_a_call_ends_with_the_worker_that_made_it(
    make_model: Make, launcher: ScriptedLauncher, wait_until: Wait
) -> None:
    ended = asyncio.Event()

    async def call(item: Item) -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    _, (worker,) = await loaded(make_model, launcher, call=call)
    question = wire.encode_item(0, None, InferRequest(id="sub", model="m"))
    worker.say(FrameKind.CALL, 7, *wire.join_batch([question]))
    for _ in range(20):
        await asyncio.sleep(0)
    worker.die()
    await asyncio.wait_for(ended.wait(), 5)


async def test_an_error_of_the_handler_keeps_its_kind_and_details(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    asked = send(model)
    number, (item,) = await worker.hear_batch()
    worker.say_outcome(number, Outcome(item.job_id, error=HandlerError("no such customer", status=418)))
    error = await refused(asked, HandlerError, "no such customer")
    assert error.details == {"status": 418}


async def test_a_worker_that_retires_takes_no_more_and_finishes_what_it_holds(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    held = send(model, b"held")
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    closing = begin(model.close(drain_s=10))
    await asyncio.sleep(0)
    with pytest.raises(ModelNotReady, match="unloaded"):
        send(model)
    worker.answer(number, item)
    assert await result(held) == b"held"
    await worker.hear(FrameKind.STOP)
    await asyncio.wait_for(closing, 5)
    assert worker.ended.result().code == 0


@pytest.mark.parametrize("ticks", range(6))
async def test_requests_that_come_while_a_worker_retires_are_answered_and_it_retires_all_the_same(
    make_model: Make, launcher: ScriptedLauncher, send: Send, ticks: int
) -> None:
    model, workers = await loaded(make_model, launcher, 2)
    serving = [begin(worker.serve()) for worker in workers]
    scaling = begin(model.scale(1, 1))
    for _ in range(ticks):
        await asyncio.sleep(0)
    asked = [send(model, b"%d" % n) for n in range(2)]
    assert [await result(task) for task in asked] == [b"0", b"1"]
    await asyncio.wait_for(scaling, 5)
    asked = [send(model, b"%d" % n) for n in range(4)]
    assert [await result(task) for task in asked] == [b"0", b"1", b"2", b"3"]
    stays, leaves = workers
    assert (leaves.ended.result().code, stays.ended.done()) == (0, False)
    for task in serving:
        task.cancel()


async def test_a_worker_that_does_not_finish_in_its_grace_is_killed_and_its_clients_told(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    held, waiting = send(model, b"held"), send(model, b"waiting")
    number, _ = await worker.hear_batch()
    worker.begin(number)
    await asyncio.wait_for(model.close(drain_s=0.05), 5)
    assert worker.killed
    await refused(held, WorkerDied)
    await refused(waiting, ModelNotReady, "unloaded")


async def test_a_worker_that_was_told_to_stop_has_what_is_left_of_the_grace(
    make_model: Make, launcher: ScriptedLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mms_lite.engine.worker.RETIRE_S", 0.05)
    model, (worker,) = await loaded(make_model, launcher)
    worker.deaf = True
    closing = begin(model.close(drain_s=10))
    await worker.hear(FrameKind.STOP)
    done, _ = await asyncio.wait([closing], timeout=0.3)
    assert not (done or worker.killed)
    worker.die("exit code 0", 0)
    await asyncio.wait_for(closing, 5)
    assert worker.ended.result().code == 0


async def test_a_worker_that_does_not_end_when_told_to_is_killed_and_the_log_says_so(
    make_model: Make,
    launcher: ScriptedLauncher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("mms_lite.engine.worker.RETIRE_S", 0.05)
    model, (worker,) = await loaded(make_model, launcher)
    worker.deaf = True
    await asyncio.wait_for(model.close(drain_s=0.1), 5)
    assert worker.killed
    assert "W-m-0 is killed: told to stop, it did not end" in caplog.text


async def test_closing_does_not_wait_for_a_scale_down_whose_worker_does_not_end(
    make_model: Make, launcher: ScriptedLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("worker.RETIRE_S", "pool.RETIRE_S", "pool._MARGIN_S"):
        monkeypatch.setattr(f"mms_lite.engine.{name}", 0.05)
    model, (worker,) = await loaded(make_model, launcher, response_timeout_s=600.0)
    worker.deaf = True
    scaling = begin(model.scale(0, 0))
    await worker.hear(FrameKind.STOP)
    await asyncio.wait_for(model.close(drain_s=0.05), 5)
    assert worker.killed
    await refused(scaling, ModelNotReady)


async def test_a_worker_that_dies_in_the_moment_it_retires_leaves_no_client_waiting(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (one, other) = await loaded(make_model, launcher, 2)
    asked = [send(model, b"1"), send(model, b"2")]
    for worker in (one, other):
        number, _ = await worker.hear_batch()
        worker.begin(number)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    scaling = begin(model.scale(0, 0))
    one.die()
    other.die()
    await asyncio.wait_for(scaling, 10)
    done, waiting = await asyncio.wait(asked, timeout=2)
    for task in waiting:
        task.cancel()
    assert len(done) == 2, "a client waits for a worker that is gone"
    for task in done:
        await refused(task, WorkerDied)


async def test_scaling_gives_each_worker_its_share_of_the_cores(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    await loaded(make_model, launcher, 4, cores=8)
    assert [worker.threads for worker in launcher.started] == [2, 2, 2, 2]


async def test_more_workers_than_cores_have_one_thread_each(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    await loaded(make_model, launcher, 3, cores=2)
    assert [worker.threads for worker in launcher.started] == [1, 1, 1]


async def test_workers_are_dealt_the_devices_in_turn(make_model: Make, launcher: ScriptedLauncher) -> None:
    model, _ = await loaded(make_model, launcher, 3, devices=(0, 1))
    assert [spec["device"] for spec in launcher.specs] == [0, 1, 0]
    assert [worker.device for worker in model.status(is_default=True).workers] == [0, 1, 0]


async def test_a_model_without_workers_refuses_and_one_scaled_up_again_serves(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    scaling = begin(model.scale(0, 0))
    await worker.hear(FrameKind.STOP)
    await asyncio.wait_for(scaling, 10)
    with pytest.raises(ModelNotReady, match="no workers") as caught:
        send(model)
    assert caught.value.details == {"no_workers": True}
    await model.scale(1, 1)
    worker = await launcher.worker()
    asked = send(model)
    number, (item,) = await worker.hear_batch()
    worker.answer(number, item)
    assert await result(asked) == b"hello"


async def test_scaling_to_zero_leaves_no_request_waiting_for_a_worker_that_never_comes(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher)
    held, waiting = send(model, b"held"), send(model, b"waiting")
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    scaling = begin(model.scale(0, 0))
    await asyncio.sleep(0.02)  # it takes no more work now
    worker.answer(number, item)
    assert await result(held) == b"held"
    await worker.hear(FrameKind.STOP)
    await asyncio.wait_for(scaling, 10)
    done, _ = await asyncio.wait([waiting], timeout=2)
    waiting.cancel()
    assert done, "the request waits though the model has no workers"


async def test_scaling_that_races_with_unloading_leaves_no_worker_behind(
    make_model: Make, launcher: ScriptedLauncher
) -> None:
    model, _ = await loaded(make_model, launcher)
    closing = begin(model.close(drain_s=0))
    scaling = begin(model.scale(3, 3))
    await asyncio.wait([closing, scaling], timeout=10)
    with pytest.raises(ModelNotReady):
        await scaling
    alive = [worker for worker in launcher.started if not worker.ended.done()]
    for worker in alive:
        worker.die()
    assert alive == []


async def test_a_scale_down_whose_caller_leaves_still_ends_its_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    # A client that closes its connection cancels the handler of its PUT.
    model, (worker,) = await loaded(make_model, launcher, response_timeout_s=1.0)
    held = send(model, b"held")
    number, (item,) = await worker.hear_batch()
    worker.begin(number)
    scaling = begin(model.scale(0, 0))
    for _ in range(10):
        await asyncio.sleep(0)
    scaling.cancel()
    await asyncio.wait([scaling])
    worker.answer(number, item)
    await result(held)
    try:
        await wait_until(worker.ended.done, "the worker to end", timeout_s=8)
    finally:
        worker.die()


async def test_closing_keeps_its_time_while_a_scale_down_waits_for_a_hung_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, (worker,) = await loaded(make_model, launcher, response_timeout_s=5.0)
    held = send(model)
    number, _ = await worker.hear_batch()
    worker.begin(number)
    scaling = begin(model.scale(0, 0))
    await asyncio.sleep(0.02)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await model.close(drain_s=0.1)
    took_s = loop.time() - began
    await asyncio.wait([scaling, held])
    assert took_s < 2


async def test_the_queue_is_bounded_while_workers_restart(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    model, (worker,) = await loaded(make_model, launcher, queue_size=2)
    launcher.loads = False
    worker.die()
    restarted = await launcher.worker()
    asked = [send(model, b"1"), send(model, b"2")]
    with pytest.raises(QueueFull):
        send(model, b"3")
    restarted.say_loaded(pid=1)
    for task, body in zip(asked, (b"1", b"2"), strict=True):
        number, (item,) = await restarted.hear_batch()
        restarted.answer(number, item)
        assert await result(task) == body
