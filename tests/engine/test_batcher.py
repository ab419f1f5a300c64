"""How work waits: bounded, in order, never mixed, and gone as soon as nobody wants it."""

import asyncio
import contextlib
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mms_lite.engine.batcher import Job, JobQueue
from mms_lite.engine.joining import batch_key, rows
from mms_lite.errors import DeadlineExceeded, InvalidRequest, ModelNotReady, QueueFull, ServingError
from mms_lite.shared import Arena
from mms_lite.types import InferRequest, Tensor
from mms_lite.wire import Outcome

GONE = ModelNotReady("gone")


def request(
    size: int = 1, *, name: str = "x", deadline_s: float | None = None, **fields: Any
) -> InferRequest:
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    tensor = Tensor(name, "FP32", (size, 3), bytearray(12 * size))
    return InferRequest(id="r", model="m", inputs=[tensor], deadline=deadline, **fields)


def raw(**fields: Any) -> InferRequest:
    return InferRequest(id="r", model="m", inputs=[Tensor("body", "BYTES", (), bytearray(b"x"))], **fields)


def job(size: int = 1, **fields: Any) -> Job:
    return Job(request(size, **fields))


def next_batch(queue: JobQueue) -> "asyncio.Future[list[Job]]":
    """Ask for a batch, as a worker does."""
    batch: asyncio.Future[list[Job]] = asyncio.get_running_loop().create_future()
    queue.ask(batch.set_result)
    return batch


async def taken(queue: JobQueue, timeout_s: float = 5.0) -> list[Job]:
    return await asyncio.wait_for(next_batch(queue), timeout_s)


class QueueModel(RuleBasedStateMachine):
    """The queue beside plain lists that do the same. Without a delay it hands out at once, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.limit, self.batch_size = 6, 4
        self.queue = JobQueue(self.limit, batch_size=self.batch_size)
        self.queue.batch_bytes = 3 * 12  # of rows that lie in a frame
        self.waiting: list[Job] = []
        self.askers: list[list[list[Job]]] = []  # what each was given: nothing yet
        self.held: list[Job] = []

    @rule(size=st.integers(1, 5), name=st.sampled_from("ab"), expires=st.booleans())
    def put(self, size: int, name: str, expires: bool) -> None:
        new = job(size, name=name, deadline_s=-1.0 if expires else None)
        try:
            self.queue.put(new)
        except QueueFull as refused:
            assert len(self.waiting) >= self.limit
            assert refused.details["depth"] == len(self.waiting)
            assert refused.details["limit"] == self.limit
        else:
            assert len(self.waiting) < self.limit
            self.waiting.append(new)
            self.hand_out()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        gone = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        gone.cancel()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        for each in self.held:
            if data.draw(st.booleans()):
                each.cancel()
        self.queue.put_back(self.held)
        self.waiting = [each for each in self.held if not each.dead] + self.waiting
        self.held = []
        self.hand_out()

    @precondition(lambda self: self.held)
    @rule()
    def answer(self) -> None:
        for each in self.held:
            each.finish(Outcome(each.id))
        self.held = []

    @rule()
    def ask(self) -> None:
        given: list[list[Job]] = []
        self.askers.append(given)
        self.queue.ask(given.append)
        self.hand_out()

    @precondition(lambda self: self.askers)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        given = self.askers.pop(data.draw(st.integers(0, len(self.askers) - 1)))
        self.queue.withdraw(given.append)

    @rule()
    def take_ahead(self) -> None:
        expected, full = ([], False) if self.askers else self.batch()
        taken_ahead = self.queue.take_ahead()
        assert taken_ahead == (expected if full else [])
        self.remove(taken_ahead)

    def batch(self) -> tuple[list[Job], bool]:
        """What one who asked would be given, and whether nothing could join it."""
        live = [each for each in self.waiting if not each.expired]
        batch: list[Job] = []
        for each in live:
            if each.key != live[0].key:
                continue
            if batch and sum(j.size for j in [*batch, each]) > self.batch_size:
                return batch, True
            if batch and sum(j.bytes for j in [*batch, each]) > self.queue.batch_bytes:
                return batch, True
            batch.append(each)
        rows_full = sum(j.size for j in batch) >= self.batch_size
        return batch, rows_full or sum(j.bytes for j in batch) >= self.queue.batch_bytes

    def hand_out(self) -> None:
        while self.askers and (expected := self.batch()[0]):
            assert self.askers.pop(0) == [expected]
            self.remove(expected)
        self.remove([])

    def remove(self, batch: list[Job]) -> None:
        """Of the expired ones, those that were met on the way are gone."""
        self.held += batch
        self.waiting = [
            each
            for each in self.waiting
            if each not in batch and (not each.expired or each.id in self.queue._jobs)
        ]

    @invariant()
    def nobody_is_given_what_is_not_due(self) -> None:
        assert not any(self.askers)

    @invariant()
    def the_depth_is_that_of_the_live_jobs(self) -> None:
        assert self.queue.depth == len(self.waiting)
        assert list(self.queue._jobs.values()) == self.waiting


TestQueueAgainstAList = QueueModel.TestCase
TestQueueAgainstAList.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_raw_parts_count_as_one_row_and_tensors_by_their_first_axis() -> None:
    assert rows(raw()) == 1
    assert rows(request(5)) == 5
    assert rows(InferRequest(id="r", model="m")) == 1


def test_tensors_that_disagree_on_their_rows_count_as_the_most() -> None:
    tensors = [Tensor("a", "FP32", (2,), bytearray(8)), Tensor("b", "FP32", (3,), bytearray(12))]
    assert rows(InferRequest(id="r", model="m", inputs=tensors)) == 3


@pytest.mark.parametrize(
    "other",
    [
        request(name="y"),
        InferRequest(id="r", model="m", inputs=[Tensor("x", "FP64", (1, 3), bytearray(24))]),
        InferRequest(id="r", model="m", inputs=[Tensor("x", "FP32", (1, 4), bytearray(16))]),
        request(outputs=["y"]),
        request(outputs=[]),
        request(parameters={"temperature": 1}),
        raw(),
        raw(parameters={"temperature": 1}),
        raw(outputs=["y"]),
    ],
    ids=[
        "name",
        "datatype",
        "shape",
        "outputs",
        "no outputs",
        "parameters",
        "raw",
        "raw + parameters",
        "raw + outputs",
    ],
)
def test_requests_that_differ_in_what_the_model_sees_do_not_share_a_batch(other: InferRequest) -> None:
    assert batch_key(request()) != batch_key(other)


def test_requests_that_differ_in_rows_ids_and_headers_share_a_batch() -> None:
    one, other = request(1), request(3, headers=[("a", "b")])
    assert batch_key(one) == batch_key(other)
    assert batch_key(raw()) == batch_key(raw(headers=[("a", "b")]))


async def test_a_full_queue_refuses_at_once_and_says_how_full_it_is() -> None:
    queue = JobQueue(2)
    queue.put(job())
    queue.put(job())
    with pytest.raises(QueueFull, match="2 of 2") as refused:
        queue.put(job())
    assert refused.value.details == {"depth": 2, "limit": 2, "answered_per_s": 0.0}


async def test_a_cancelled_job_makes_room_at_once() -> None:
    queue = JobQueue(1)
    first = job()
    queue.put(first)
    first.cancel()
    assert queue.depth == 0
    queue.put(job())


async def test_without_a_delay_a_batch_is_what_is_there() -> None:
    queue = JobQueue(10, batch_size=8)
    jobs = [job() for _ in range(3)]
    for each in jobs:
        queue.put(each)
    began = time.monotonic()
    assert await taken(queue) == jobs
    assert time.monotonic() - began < 0.5


async def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    queue = JobQueue(10, batch_size=4, max_batch_delay_ms=30_000)
    waiting = next_batch(queue)
    jobs = [job(2), job(), job()]
    for each in jobs:
        await asyncio.sleep(0)
        queue.put(each)
    assert await waiting == jobs


async def test_a_batch_that_the_next_request_does_not_fit_into_does_not_wait_for_the_delay() -> None:
    queue = JobQueue(10, batch_size=8, max_batch_delay_ms=30_000)
    waiting, follows = next_batch(queue), next_batch(queue)
    first, second = job(5), job(5)
    queue.put(first)
    assert not waiting.done()
    queue.put(second)
    assert waiting.result() == [first]
    assert not follows.done()  # it has its own time to fill
    queue.put(third := job(3))
    assert follows.result() == [second, third]


async def test_a_batch_that_the_next_request_does_not_fit_into_is_taken_ahead() -> None:
    queue = JobQueue(10, batch_size=8)
    queue.put(first := job(5))
    assert queue.take_ahead() == []
    queue.put(job(5))
    assert queue.take_ahead() == [first]
    assert queue.take_ahead() == []


async def test_a_batch_holds_no_more_bytes_than_a_message_to_a_worker() -> None:
    queue = JobQueue(10, batch_size=8, max_batch_delay_ms=30_000)
    queue.batch_bytes = 5 * 12
    jobs = [job(2) for _ in range(3)]
    asked = next_batch(queue)
    for each in jobs:
        queue.put(each)
    assert asked.result() == jobs[:2]
    queue.put(fourth := job(2))
    assert queue.take_ahead() == []
    queue.put(large := job(6))
    assert queue.take_ahead() == [jobs[2], fourth]
    assert next_batch(queue).result() == [large]  # more than fits: what becomes of it is the worker's matter


async def test_tensors_in_shared_memory_take_nothing_of_a_message_to_a_worker() -> None:
    arena = Arena.create(1 << 20)
    assert arena is not None
    queue = JobQueue(10, batch_size=2, max_batch_delay_ms=30_000)
    queue.batch_bytes = 100
    jobs = []
    for _ in range(2):
        place = arena.take(3 << 10)
        assert place is not None
        jobs.append(Job(InferRequest("r", "m", inputs=[Tensor("x", "FP32", (1, 768), place)])))
    asked = next_batch(queue)
    for each in jobs:
        queue.put(each)
    assert asked.result() == jobs


async def test_a_partial_batch_waits_for_the_delay_counted_from_its_oldest_job() -> None:
    queue = JobQueue(10, batch_size=4, max_batch_delay_ms=200)
    first, second = job(), job()
    queue.put(first)
    waiting = next_batch(queue)
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    queue.put(second)
    assert await waiting == [first, second]
    waited_s = time.monotonic() - first.enqueued_at
    assert 0.19 <= waited_s < 2.0


async def test_a_job_that_waited_longer_than_the_delay_is_taken_at_once() -> None:
    queue = JobQueue(10, batch_size=4, max_batch_delay_ms=10_000)
    old = job()
    queue.put(old)
    old.enqueued_at -= 11
    assert await taken(queue, 1.0) == [old]


async def test_jobs_of_another_key_do_not_fill_a_batch_that_waits() -> None:
    queue = JobQueue(10, batch_size=2, max_batch_delay_ms=100)
    first, other = job(name="a"), job(name="b")
    queue.put(first)
    queue.put(other)
    assert await taken(queue) == [first]
    assert await taken(queue) == [other]


async def test_a_full_batch_of_another_key_goes_while_the_oldest_waits_for_more() -> None:
    queue = JobQueue(20, batch_size=4, max_batch_delay_ms=150)
    queue.put(oldest := job(name="a"))
    asked = [next_batch(queue) for _ in range(3)]
    other = [job(2, name="b"), job(name="c"), job(2, name="b")]
    for each in other:
        queue.put(each)
    assert asked[0].result() == [other[0], other[2]]
    assert not asked[1].done()
    assert await asyncio.wait_for(asked[1], 5) == [oldest]
    assert time.monotonic() - oldest.enqueued_at >= 0.14
    assert await asyncio.wait_for(asked[2], 5) == [other[1]]


async def test_full_batches_of_another_key_do_not_keep_the_oldest_waiting_beyond_its_delay() -> None:
    queue = JobQueue(20, batch_size=2, max_batch_delay_ms=10_000)
    queue.put(oldest := job(name="a"))
    for _ in range(4):
        queue.put(job(name="b"))
    assert [each.key for each in await taken(queue)] == [job(name="b").key] * 2
    oldest.enqueued_at -= 11
    assert await taken(queue, 1.0) == [oldest]


async def test_a_job_whose_deadline_comes_before_the_delay_ends_is_handed_out_in_time() -> None:
    queue = JobQueue(10, batch_size=8, max_batch_delay_ms=60_000)
    hurried = job(deadline_s=0.5)
    queue.put(hurried)
    assert await taken(queue) == [hurried]
    assert not hurried.expired


async def test_an_expired_job_never_reaches_a_worker() -> None:
    queue = JobQueue(10, batch_size=8)
    late, good = job(deadline_s=-1), job()
    queue.put(late)
    queue.put(good)
    assert await taken(queue) == [good]
    assert queue.depth == 0


async def test_a_job_that_dies_while_a_batch_is_collected_is_not_in_it() -> None:
    queue = JobQueue(10, batch_size=4, max_batch_delay_ms=150)
    gone, stays = job(), job()
    queue.put(gone)
    queue.put(stays)
    waiting = next_batch(queue)
    await asyncio.sleep(0)
    gone.cancel()
    assert await waiting == [stays]


async def test_the_only_job_that_dies_while_it_is_collected_leaves_the_collector_waiting() -> None:
    queue = JobQueue(10, batch_size=4, max_batch_delay_ms=50)
    gone, next_one = job(), job()
    queue.put(gone)
    waiting = next_batch(queue)
    await asyncio.sleep(0)
    gone.cancel()
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    queue.put(next_one)
    assert await waiting == [next_one]


async def test_one_collector_at_a_time_in_order_of_asking() -> None:
    queue = JobQueue(10, batch_size=2, max_batch_delay_ms=20)
    asked = [next_batch(queue) for _ in range(3)]
    jobs = [job() for _ in range(6)]
    for each in jobs:
        queue.put(each)
    assert [each.result() for each in asked] == [jobs[0:2], jobs[2:4], jobs[4:6]]


async def test_one_who_withdrew_is_given_nothing_and_the_next_takes_the_turn() -> None:
    queue = JobQueue(10, batch_size=2)
    leaves, stays = next_batch(queue), next_batch(queue)
    queue.withdraw(leaves.set_result)
    queue.withdraw(leaves.set_result)  # once more does no harm
    queue.put(first := job())
    assert stays.result() == [first]
    assert not leaves.done()


async def test_one_who_withdraws_while_a_batch_is_collected_hands_the_turn_to_the_next() -> None:
    queue = JobQueue(10, batch_size=4, max_batch_delay_ms=50)
    queue.put(first := job())
    collects, follows = next_batch(queue), next_batch(queue)
    queue.withdraw(collects.set_result)
    assert await asyncio.wait_for(follows, 5) == [first]
    assert not collects.done()


async def test_what_the_last_one_left_when_it_withdrew_waits_for_who_asks_next() -> None:
    queue = JobQueue(10, batch_size=4, max_batch_delay_ms=50)
    queue.put(first := job())
    collects = next_batch(queue)
    queue.withdraw(collects.set_result)
    await asyncio.wait([collects], timeout=0.1)  # past the time of the batch
    assert (queue.depth, collects.done()) == (1, False)
    assert next_batch(queue).result() == [first]


async def test_a_job_in_more_of_a_hurry_brings_the_batch_forward() -> None:
    queue = JobQueue(10, batch_size=8, max_batch_delay_ms=60_000)
    waiting = next_batch(queue)
    queue.put(patient := job())
    queue.put(hurried := job(deadline_s=0.5))
    assert await asyncio.wait_for(waiting, 5) == [patient, hurried]
    assert not hurried.expired


async def test_a_job_in_a_hurry_that_leaves_lets_the_batch_wait_again() -> None:
    queue = JobQueue(10, batch_size=8, max_batch_delay_ms=60_000)
    waiting = next_batch(queue)
    queue.put(patient := job())
    queue.put(hurried := job(deadline_s=0.05))
    hurried.cancel()
    await asyncio.wait([waiting], timeout=0.1)
    assert not waiting.done()
    for _ in range(7):
        queue.put(job())
    assert waiting.result()[0] is patient


async def test_no_timer_outlives_a_closed_queue() -> None:
    queue = JobQueue(10, batch_size=4, max_batch_delay_ms=50)
    queue.put(job())
    asked = next_batch(queue)
    queue.close(GONE)
    timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    assert [timer for timer in timers if not timer.cancelled()] == []
    await asyncio.wait([asked], timeout=0.1)
    assert not asked.done()


async def test_jobs_put_back_come_first_and_in_their_order() -> None:
    queue = JobQueue(3, batch_size=2)
    jobs = [job() for _ in range(3)]
    for each in jobs:
        queue.put(each)
    batch = await taken(queue)
    queue.put(late := job())
    queue.put(later := job())
    queue.put_back(batch)
    order = [await taken(queue) for _ in range(3)]
    assert order == [jobs[:2], [jobs[2], late], [later]]


async def test_a_job_that_is_older_than_those_put_back_stays_before_them() -> None:
    queue = JobQueue(5, batch_size=2, max_batch_delay_ms=50)
    queue.put(oldest := job(name="y"))
    for each in (others := [job(), job()]):
        queue.put(each)
    assert await taken(queue) == others
    queue.put_back(others[1:])
    assert await taken(queue) == [oldest]


async def test_of_the_jobs_put_back_the_dead_and_the_answered_stay_away() -> None:
    queue = JobQueue(10, batch_size=3)
    dead, answered, live = job(), job(), job()
    for each in (dead, answered, live):
        queue.put(each)
    batch = await taken(queue)
    dead.cancel()
    answered.finish(Outcome(answered.id))
    queue.put_back(batch)
    assert await taken(queue) == [live]
    assert queue.depth == 0


async def test_a_job_put_back_still_leaves_when_its_client_does() -> None:
    queue = JobQueue(10)
    only = job()
    queue.put(only)
    queue.put_back(await taken(queue))
    only.cancel()
    assert queue.depth == 0


async def test_putting_back_wakes_a_waiting_collector() -> None:
    queue = JobQueue(10)
    only = job()
    queue.put(only)
    batch = await taken(queue)
    waiting = next_batch(queue)
    await asyncio.sleep(0)
    queue.put_back(batch)
    assert await waiting == [only]


async def test_closing_fails_those_who_wait_and_refuses_the_rest() -> None:
    queue = JobQueue(10, batch_size=2)
    waiting, held = job(), job()
    queue.put(held)
    batch = await taken(queue)
    queue.put(waiting)
    answer = asyncio.ensure_future(waiting.answer())
    await asyncio.sleep(0)
    queue.close(GONE)
    with pytest.raises(ModelNotReady, match="gone"):
        await answer
    with pytest.raises(ModelNotReady, match="gone"):
        queue.put(job())
    queue.put_back(batch)
    with pytest.raises(ModelNotReady, match="gone"):
        await held.answer()
    assert queue.depth == 0


async def full_queue(limit: int = 1) -> tuple[JobQueue, list[Job]]:
    queue = JobQueue(limit)
    jobs = [job() for _ in range(limit)]
    for each in jobs:
        queue.put(each)
    return queue, jobs


async def waiters(queue: JobQueue, count: int, **fields: Any) -> tuple[list[Job], list[asyncio.Task[None]]]:
    jobs = [job(**fields) for _ in range(count)]
    tasks = [asyncio.ensure_future(queue.put_when_room(each)) for each in jobs]
    await asyncio.sleep(0)
    return jobs, tasks


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("how", ["taken", "cancelled"])
async def test_one_place_that_becomes_free_lets_one_waiter_in(how: str) -> None:
    queue, (first,) = await full_queue()
    (one, _), tasks = await waiters(queue, 2)
    if how == "taken":
        await taken(queue)
    else:
        first.cancel()
    await asyncio.wait(tasks, timeout=0.05)
    assert [task.done() for task in tasks] == [True, False]
    assert queue.depth == 1
    assert await taken(queue) == [one]
    await asyncio.wait_for(tasks[1], 5)


async def test_a_waiter_that_gave_up_does_not_take_the_place_of_the_next() -> None:
    queue, (first,) = await full_queue()
    (_, stays), tasks = await waiters(queue, 2)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    first.cancel()
    await asyncio.wait_for(tasks[1], 1)
    assert await taken(queue) == [stays]


async def test_a_waiter_cancelled_in_the_moment_it_is_woken_passes_its_place_on() -> None:
    queue, (first,) = await full_queue()
    _, tasks = await waiters(queue, 2)
    first.cancel()  # wakes the first waiter, which has not run yet
    tasks[0].cancel()
    await asyncio.wait(tasks, timeout=1)
    assert tasks[1].done()
    await end(tasks)


async def test_a_waiter_whose_deadline_passes_is_told_so_and_leaves_its_place_to_the_next() -> None:
    queue, (first,) = await full_queue()
    _, (hurried,) = await waiters(queue, 1, deadline_s=0.05)
    (patient,), (patient_task,) = await waiters(queue, 1)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(hurried, 5)
    first.cancel()
    await asyncio.wait_for(patient_task, 1)
    assert await taken(queue) == [patient]


async def test_a_waiter_near_its_deadline_leaves_no_stale_place_behind() -> None:
    queue, _ = await full_queue()
    _, tasks = await waiters(queue, 1, deadline_s=0.02)
    await asyncio.wait(tasks, timeout=5)
    assert isinstance(tasks[0].exception(), DeadlineExceeded)
    assert [waiter for waiter in queue._room if not waiter.done()] == []


async def test_closing_refuses_those_who_wait_for_room() -> None:
    queue, _ = await full_queue()
    _, tasks = await waiters(queue, 2)
    queue.close(GONE)
    for task in tasks:
        with pytest.raises(ModelNotReady, match="gone"):
            await asyncio.wait_for(task, 5)


async def test_the_first_final_outcome_counts_and_nothing_after_it() -> None:
    only = job()
    only.finish(Outcome(only.id, reason="first"))
    only.finish(Outcome(only.id, reason="second"))
    only.fail(ServingError("third"))
    only.cancel()
    assert (await only.answer()).reason == "first"
    assert not only.dead


async def test_a_stream_yields_every_answer_in_order_up_to_the_final_one() -> None:
    only = job()

    async def produce() -> None:
        for number in range(5):
            await asyncio.sleep(0)
            only.finish(Outcome(only.id, reason=str(number), seq=number, final=number == 4))

    producer = asyncio.ensure_future(produce())
    assert [answer.reason async for answer in only.answers()] == ["0", "1", "2", "3", "4"]
    await producer


async def test_answers_given_before_an_error_are_yielded_before_it() -> None:
    only = job()
    only.finish(Outcome(only.id, reason="first", final=False))
    only.fail(ServingError("broke"))
    got = []
    with pytest.raises(ServingError, match="broke"):
        async for answer in only.answers():
            got.append(answer.reason)
    assert got == ["first"]


async def test_a_reader_that_is_too_slow_ends_its_stream_with_an_error_and_not_without_bound() -> None:
    only = job()
    for number in range(5000):
        only.finish(Outcome(only.id, seq=number, final=False))
    assert len(only._stream) <= 1025
    with pytest.raises(ServingError, match="too slowly"):
        async for _ in only.answers():
            pass


async def test_one_answer_is_wanted_and_a_stream_comes() -> None:
    only = job()
    only.finish(Outcome(only.id, final=False))
    with pytest.raises(ServingError, match="streams"):
        await only.answer()
    assert only.dead


async def test_leaving_a_stream_early_cancels_the_job() -> None:
    queue = JobQueue(5)
    only = job()
    queue.put(only)
    only.finish(Outcome(only.id, final=False))
    answers = only.answers()
    async for _ in answers:
        break
    await answers.aclose()
    assert only.dead
    assert queue.depth == 0


async def test_a_deadline_ends_the_wait_and_takes_the_job_out_of_the_queue() -> None:
    queue = JobQueue(5)
    only = job(deadline_s=0.05)
    queue.put(only)
    with pytest.raises(DeadlineExceeded) as late:
        await asyncio.wait_for(only.answer(), 5)
    assert late.value.details == {"by": "client"}
    assert queue.depth == 0
    assert only.dead


async def test_a_caller_that_is_cancelled_takes_its_job_along() -> None:
    queue = JobQueue(5)
    only = job()
    queue.put(only)
    caller = asyncio.ensure_future(only.answer())
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    assert (only.dead, queue.depth) == (True, 0)


async def test_the_drain_rate_is_that_of_the_last_answers(wait_until: Callable[..., Any]) -> None:
    queue = JobQueue(5)
    assert queue.answered_per_s == 0
    began = time.monotonic()
    for _ in range(10):
        queue.count_answer()
    await wait_until(lambda: time.monotonic() - began > 0.1)
    assert 10 < queue.answered_per_s <= 100


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_keeps_nothing_of_the_request_that_it_answered(streamed: bool) -> None:
    class Body(bytearray):
        """Can be referred to weakly."""

    def failed(body: Body) -> Job:
        only = Job(InferRequest(id="r", model="m", inputs=[Tensor("body", "BYTES", (), body)]))
        only.fail(InvalidRequest("bad"))
        return only

    async def told(body: Body) -> None:
        if streamed:
            async with contextlib.aclosing(failed(body).answers()) as answers:
                await anext(answers)
        else:
            await failed(body).answer()

    body = Body(b"x")
    kept = weakref.ref(body)
    gc.disable()
    try:
        with contextlib.suppress(InvalidRequest):
            await told(body)
        del body
        assert kept() is None
    finally:
        gc.enable()


async def test_each_job_that_waits_when_the_queue_closes_has_an_error_of_its_own() -> None:
    queue = JobQueue(5)
    waiting = [job(), job()]
    for each in waiting:
        queue.put(each)
    queue.close(ModelNotReady("gone", no_workers=True))
    errors = []
    for each in waiting:
        with pytest.raises(ModelNotReady) as caught:
            await each.answer()
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert [(error.message, error.details) for error in errors] == [("gone", {"no_workers": True})] * 2


def test_requests_for_a_triton_model_are_told_apart_by_their_tensors_alone() -> None:
    config = {"max_batch_size": 8}
    plain = Job(request(), config=config)
    wishing = Job(request(outputs=["y"], parameters={"sequence_id": 7, "lang": "de"}), config=config)
    assert wishing.key == plain.key
    assert Job(request(name="z"), config=config).key != plain.key
    assert Job(raw(), config=config).key != plain.key
