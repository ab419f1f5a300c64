"""What the queue, the workers and the engine count: once each, and where it happened."""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from asking import begin, body
from scripted import ScriptedLauncher, ScriptedWorker

from mms_lite.engine.model import Model
from mms_lite.errors import (
    DeadlineExceeded,
    HandlerError,
    LoadError,
    ModelNotReady,
    QueueFull,
    WorkerDied,
)
from mms_lite.logs import METRICS
from mms_lite.metrics import REASONS, Histogram, VersionMetrics
from mms_lite.transport import FrameKind
from mms_lite.types import InferRequest, InferResponse, LoadOptions, Tensor, WorkerState
from mms_lite.wire import Item, Outcome

Make = Callable[..., Model]
Ask = Callable[..., InferRequest]
Wait = Callable[..., Any]
Bench = Any
Send = Callable[..., "asyncio.Task[InferResponse]"]


async def loaded(make_model: Make, launcher: ScriptedLauncher, **fields: Any) -> tuple[Model, ScriptedWorker]:
    model = make_model(launcher, **fields)
    await model.scale(1, 1)
    return model, await launcher.worker()


def counts(metrics: VersionMetrics) -> dict[str, int]:
    """How many values each histogram has."""
    names = ("queue_s", "batch_wait_s", "batch_rows", "inference_s", "total_s")
    return {name: sum(getattr(metrics, name).counts) for name in names}


def refusals(metrics: VersionMetrics) -> dict[str, int]:
    return {reason: count for reason, count in metrics.refusals.items() if count}


def run(worker: ScriptedWorker, number: int, items: list[Item]) -> None:
    worker.begin(number)
    for item in items:
        worker.answer(number, item)


def mean(histogram: Histogram) -> float:
    return histogram.sum / sum(histogram.counts)


async def test_a_batch_is_counted_once_and_its_requests_once_each(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, worker = await loaded(make_model, launcher, batch_size=4, max_batch_delay_ms=30)
    asked = [send(model, each) for each in (b"1", b"2", b"3")]
    run(worker, *await worker.hear_batch())
    await asyncio.gather(*asked)
    assert counts(model.metrics) == {
        "queue_s": 3,
        "batch_wait_s": 1,
        "batch_rows": 1,
        "inference_s": 1,
        "total_s": 3,
    }
    assert model.metrics.batch_rows.sum == 3
    assert (refusals(model.metrics), model.metrics.cancelled, model.metrics.restarts) == ({}, 0, 0)


async def test_times_are_those_that_passed(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    """The worker takes 0.05 s for the first batch; the second waits for it, as none is sent ahead."""
    model, worker = await loaded(make_model, launcher)
    begun = time.monotonic()
    first = send(model, b"1")
    number, items = await worker.hear_batch()
    second = send(model, b"2")
    worker.begin(number)
    started = time.monotonic()
    await wait_until(lambda: time.monotonic() - started > 0.05)
    worker.answer(number, items[0])
    await first
    assert 0.03 < model.metrics.inference_s.sum < time.monotonic() - begun
    run(worker, *await worker.hear_batch())
    await second
    spent = time.monotonic() - begun
    assert 0.04 < model.metrics.queue_s.sum < spent  # of the second
    assert 0.09 < model.metrics.total_s.sum < 2 * spent
    assert model.metrics.batch_wait_s.sum == 0  # there is no delay


async def test_the_wait_for_a_fuller_batch_is_told_apart_from_the_wait_for_a_worker(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, worker = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=60)
    asked = send(model)
    run(worker, *await worker.hear_batch())
    await asked
    metrics = model.metrics
    assert 0.05 < metrics.batch_wait_s.sum <= metrics.queue_s.sum < metrics.total_s.sum
    full = [send(model), send(model)]
    before = metrics.batch_wait_s.sum
    run(worker, *await worker.hear_batch())
    await asyncio.gather(*full)
    assert metrics.batch_wait_s.sum - before < 0.05


async def test_rows_are_counted_not_requests(make_model: Make, launcher: ScriptedLauncher, ask: Ask) -> None:
    model, worker = await loaded(make_model, launcher, batch_size=8)
    inputs = [Tensor("x", "FP32", (5, 1), bytes(20))]
    asked = begin(model.submit(InferRequest("id", "m", inputs=inputs)).answer())
    run(worker, *await worker.hear_batch())
    await asked
    assert model.metrics.batch_rows.sum == 5


async def test_a_full_queue(make_model: Make, launcher: ScriptedLauncher, send: Send) -> None:
    model, worker = await loaded(make_model, launcher, queue_size=1)
    send(model)
    await worker.hear_batch()
    send(model)
    for _ in range(3):
        with pytest.raises(QueueFull):
            send(model)
    assert refusals(model.metrics) == {"queue_full": 3}
    assert counts(model.metrics)["total_s"] == 0


async def test_a_model_that_loads_has_no_workers_or_is_going(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    launcher.loads = False
    model = make_model(launcher)
    scaling = begin(model.scale(1, 1))
    worker = await launcher.worker()
    with pytest.raises(ModelNotReady):
        send(model)
    worker.say_loaded(pid=1)
    await scaling
    assert refusals(model.metrics) == {"model_not_ready": 1}
    await model.scale(0, 0)
    with pytest.raises(ModelNotReady):
        send(model)
    assert refusals(model.metrics) == {"model_not_ready": 1, "no_workers": 1}
    await model.close(drain_s=0)
    with pytest.raises(ModelNotReady):
        send(model)
    assert refusals(model.metrics) == {"model_not_ready": 2, "no_workers": 1}


async def test_what_still_waits_when_the_model_goes_is_refused_once(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, worker = await loaded(make_model, launcher)
    running = send(model)
    number, _ = await worker.hear_batch()
    worker.begin(number)
    waiting = [send(model), send(model)]
    await model.close(drain_s=0)
    for asked in waiting:
        with pytest.raises(ModelNotReady):
            await asked
    with pytest.raises(WorkerDied):
        await running
    assert refusals(model.metrics) == {"model_not_ready": 2}
    assert counts(model.metrics)["total_s"] == 3


@pytest.mark.parametrize("delay_ms", [0, 500])
async def test_a_deadline_that_passes_in_the_queue_is_one_refusal(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait, delay_ms: int
) -> None:
    model, worker = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=delay_ms)
    busy = [send(model), send(model)]
    number, items = await worker.hear_batch()
    late = send(model, deadline=time.monotonic() + 0.02)
    with pytest.raises(DeadlineExceeded):
        await late
    run(worker, number, items)
    serving = begin(worker.serve())  # without a delay the two did not wait for each other
    await asyncio.gather(*busy)
    serving.cancel()
    assert refusals(model.metrics) == {"deadline_exceeded": 1}
    assert counts(model.metrics)["queue_s"] == 2
    assert counts(model.metrics)["total_s"] == 3


async def test_a_deadline_that_a_worker_finds_passed_is_one_refusal_too(
    make_model: Make, launcher: ScriptedLauncher, send: Send, ask: Ask
) -> None:
    """Nobody reads the answer yet, so that no timer is first."""
    model, worker = await loaded(make_model, launcher)
    busy = send(model)
    number, items = await worker.hear_batch()
    job = model.submit(ask("m", deadline=time.monotonic() + 0.01))
    while not job.expired:
        pass
    run(worker, number, items)
    await busy
    assert refusals(model.metrics) == {"deadline_exceeded": 1}
    with pytest.raises(DeadlineExceeded):
        await job.answer()
    assert worker.heard_nothing()
    assert refusals(model.metrics) == {"deadline_exceeded": 1}
    assert counts(model.metrics)["total_s"] == 2
    assert model.metrics.cancelled == 0


async def test_a_deadline_that_passes_in_the_model_is_an_answer_and_no_refusal(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    model, worker = await loaded(make_model, launcher)
    asked = send(model, deadline=time.monotonic() + 0.5)
    number, items = await worker.hear_batch()
    worker.begin(number)
    with pytest.raises(DeadlineExceeded):
        await asked
    worker.answer(number, items[0])  # nobody waits any more
    await wait_until(lambda: counts(model.metrics)["inference_s"] == 1)
    assert refusals(model.metrics) == {}
    assert counts(model.metrics)["total_s"] == 1
    assert model.metrics.cancelled == 0


async def test_a_client_that_leaves_is_counted_once_wherever_its_request_is(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    model, worker = await loaded(make_model, launcher)
    running, waiting = send(model, b"1"), send(model, b"2")
    number, items = await worker.hear_batch()
    worker.begin(number)
    waiting.cancel()
    running.cancel()
    await asyncio.wait([running, waiting])
    assert model.metrics.cancelled == 2
    worker.answer(number, items[0])
    await wait_until(lambda: counts(model.metrics)["inference_s"] == 1)
    assert counts(model.metrics)["queue_s"] == 1
    assert counts(model.metrics)["total_s"] == 0
    assert (model.metrics.cancelled, refusals(model.metrics)) == (2, {})


async def test_a_worker_that_dies_restarts_once_and_what_it_gives_back_is_counted_once(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, worker = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=1000)
    asked = [send(model, b"1"), send(model, b"2")]
    await worker.hear_batch()  # and does not begin with it
    worker.die()
    following = await launcher.worker()
    run(following, *await following.hear_batch())
    await asyncio.gather(*asked)
    assert model.metrics.restarts == 1
    assert counts(model.metrics) == {
        "queue_s": 2,
        "batch_wait_s": 2,
        "batch_rows": 1,
        "inference_s": 1,
        "total_s": 2,
    }
    assert model.metrics.batch_rows.sum == 2
    assert refusals(model.metrics) == {}


async def test_a_batch_that_ends_with_its_worker_is_counted_with_what_it_took(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, worker = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=1000)
    asked = [send(model, b"1"), send(model, b"2")]
    number, _ = await worker.hear_batch()
    worker.begin(number)
    worker.die()
    for task in asked:
        with pytest.raises(WorkerDied):
            await task
    assert counts(model.metrics)["batch_rows"] == counts(model.metrics)["inference_s"] == 1
    assert counts(model.metrics)["total_s"] == model.metrics.batch_rows.sum == 2


async def test_no_time_is_made_up_for_a_batch_whose_turn_was_never_seen(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    """The worker says noise instead of the first answer, and had begun the next batch."""
    model, worker = await loaded(make_model, launcher)
    begun = time.monotonic()
    first = send(model, b"1")
    run(worker, *await worker.hear_batch())
    await first
    both = [send(model, b"2"), send(model, b"3")]
    number, _ = await worker.hear_batch()
    ahead, _ = await worker.hear_batch()
    worker.say(FrameKind.OUTCOME, number, b"noise")
    worker.begin(ahead)
    for task in both:
        with pytest.raises(WorkerDied):
            await task
    assert model.metrics.inference_s.sum <= time.monotonic() - begun


async def test_a_batch_that_is_taken_apart_is_one_batch_from_its_first_beginning(
    make_model: Make, launcher: ScriptedLauncher, send: Send, wait_until: Wait
) -> None:
    model, worker = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=1000)
    asked = [send(model, b"1"), send(model, b"2")]
    number, items = await worker.hear_batch()
    worker.begin(number)
    begun = time.monotonic()
    await wait_until(lambda: time.monotonic() - begun > 0.03)
    for item in items:
        worker.say_alone(number, item)
        worker.say_outcome(number, Outcome(item.job_id, error=HandlerError("bad")))
    for task in asked:
        with pytest.raises(HandlerError):
            await task
    assert counts(model.metrics)["batch_rows"] == counts(model.metrics)["inference_s"] == 1
    assert model.metrics.batch_rows.sum == 2
    assert model.metrics.inference_s.sum > 0.03


async def test_a_request_of_the_server_that_finds_no_room_in_time_is_refused(
    make_model: Make, launcher: ScriptedLauncher, send: Send, ask: Ask
) -> None:
    model, worker = await loaded(make_model, launcher, queue_size=1)
    send(model)
    await worker.hear_batch()
    send(model)
    with pytest.raises(DeadlineExceeded):
        await model.submit_when_room(ask("m", deadline=time.monotonic() + 0.02))
    assert refusals(model.metrics) == {"deadline_exceeded": 1}


async def test_the_lines_that_users_of_mms_grep(
    make_model: Make,
    launcher: ScriptedLauncher,
    send: Send,
    wait_until: Wait,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "mms_lite")
    model, worker = await loaded(make_model, launcher)

    def said(pattern: str) -> list[logging.LogRecord]:
        return [record for record in caplog.records if re.fullmatch(pattern, record.getMessage())]

    (load,) = said(r"W-m-0\.ms:\d+\|#Level:Host\|#hostname:[^|,]+,timestamp:\d{10}")
    assert (load.name, load.levelname) == (METRICS, "INFO")
    for _ in range(2):
        asked = send(model)
        number, items = await worker.hear_batch()
        worker.begin(number)
        begun = time.monotonic()
        await wait_until(lambda since=begun: time.monotonic() - since > 0.02)
        worker.answer(number, items[0])
        await asked
    await wait_until(lambda: said(r"\d batches of W-m-0"))  # they are gathered for a moment
    (told,) = said("2 batches of W-m-0")
    spent = [int(line.removeprefix("Backend response time: ")) for line in told.lines]
    assert [15 < ms < 2000 for ms in spent] == [True, True]
    assert told.levelname == "INFO"
    assert {line.levelname for line in said(r"Waiting time: \d+, Backend time: \d+")} == {"DEBUG"}
    worker.die()
    await launcher.worker()
    assert len(said(r"Retry worker: W-m-0 in \d+\.\d seconds\.")) == 1


# The engine


def seen(bench: Bench) -> dict[tuple[str, str], VersionMetrics]:
    return {(s.spec.name, s.spec.version): metrics for s, metrics in bench.engine.metrics().versions}


async def test_counts_of_real_traffic(inline: Bench, ask: Ask) -> None:
    await inline.load("echo", batch_size=4, max_batch_delay_ms=5, workers=2)
    begun = time.monotonic()
    await asyncio.gather(*(inline.engine.infer(ask("echo")) for _ in range(60)))
    spent = time.monotonic() - begun
    metrics = seen(inline)["echo", "1"]
    found = counts(metrics)
    assert (found["queue_s"], found["total_s"], metrics.batch_rows.sum) == (60, 60, 60)
    assert 15 <= found["batch_rows"] == found["inference_s"] == found["batch_wait_s"] <= 60
    assert 0 < mean(metrics.queue_s) <= mean(metrics.total_s) < spent
    assert 0 < mean(metrics.inference_s) < spent
    assert (refusals(metrics), metrics.cancelled, metrics.restarts) == ({}, 0, 0)


async def test_a_request_without_a_version_counts_for_the_default_one(inline: Bench) -> None:
    await inline.load("echo", version="1")
    await inline.load("echo", version="2", set_default=True)
    for version in (None, "1", "2"):
        inline.engine.count("echo", version, "mms", 200)
    assert seen(inline)["echo", "1"].requests == {("mms", "200"): 1}
    assert seen(inline)["echo", "2"].requests == {("mms", "200"): 2}


async def test_clients_cannot_make_up_series(inline: Bench) -> None:
    await inline.load("echo")
    for number in range(100):
        inline.engine.count(f"made-up-{number}", None, "mms", 404)
        inline.engine.count("echo", f"made-up-{number}", "mms", 404)
    assert list(seen(inline)) == [("echo", "1")]
    assert seen(inline)["echo", "1"].requests == {}
    assert inline.engine.metrics().unknown == {("mms", "404"): 200}


async def test_an_unloaded_version_is_gone_and_comes_back_at_zero(inline: Bench, ask: Ask) -> None:
    for version in ("1", "2"):
        await inline.load("echo", version=version)
        await inline.engine.infer(ask("echo", version=version))
    await inline.engine.unload("echo", "1")
    assert list(seen(inline)) == [("echo", "2")]
    inline.engine.count("echo", "1", "mms", 200)  # answered while it drained
    assert inline.engine.metrics().unknown == {("mms", "200"): 1}
    await inline.load("echo", version="1")
    assert counts(seen(inline)["echo", "1"])["total_s"] == 0
    assert counts(seen(inline)["echo", "2"])["total_s"] == 1


async def test_a_replaced_version_goes_on_counting(inline: Bench, ask: Ask) -> None:
    await inline.load("echo")
    await inline.engine.infer(ask("echo"))
    inline.engine.count("echo", "1", "mms", 200)
    await inline.load("echo", replace=True)
    await inline.engine.infer(ask("echo"))
    inline.engine.count("echo", "1", "mms", 200)
    assert seen(inline)["echo", "1"].requests == {("mms", "200"): 2}
    assert counts(seen(inline)["echo", "1"])["total_s"] == 2


async def test_a_version_that_fails_to_replace_another_leaves_its_numbers(inline: Bench, ask: Ask) -> None:
    await inline.load("echo")
    await inline.engine.infer(ask("echo"))
    inline.store.add("bad_init")
    options = LoadOptions(url="bad_init", name="echo", handler="service:handle", replace=True)
    with pytest.raises(LoadError):
        await inline.engine.load(options)
    assert list(seen(inline)) == [("echo", "1")]
    assert counts(seen(inline)["echo", "1"])["total_s"] == 1


async def test_a_snapshot_stands_still(inline: Bench, ask: Ask) -> None:
    await inline.load("echo")
    snapshot = inline.engine.metrics()
    await inline.engine.infer(ask("echo"))
    inline.engine.count("echo", None, "mms", 200)
    inline.engine.count("other", None, "mms", 404)
    ((_, metrics),) = snapshot.versions
    assert (counts(metrics)["total_s"], metrics.requests, snapshot.unknown) == (0, {}, {})


async def test_a_process_that_is_killed_is_one_restart_and_its_memory_is_known(
    processes: Bench, ask: Ask, wait_until: Wait
) -> None:
    await processes.load("crash")
    ((status, metrics),) = processes.engine.metrics().versions
    assert status.workers[0].memory_bytes > 1_000_000
    assert metrics.restarts == 0
    with pytest.raises(WorkerDied):
        await processes.engine.infer(ask("crash", b"kill"))
    answer = await processes.engine.infer(ask("crash", b"good"))
    assert body(answer) == b"good"
    ((status, metrics),) = processes.engine.metrics().versions
    assert metrics.restarts == 1
    assert status.workers[0].state in (WorkerState.READY, WorkerState.BUSY)
    assert counts(metrics)["total_s"] == counts(metrics)["inference_s"] == 2
    assert set(metrics.refusals) == set(REASONS)
    assert refusals(metrics) == {}


def rows_of(count: int) -> InferRequest:
    tensor = Tensor("x", "FP32", (count,), bytearray(4 * count))
    return InferRequest("r", "m", inputs=[tensor])


@pytest.mark.parametrize(("most", "size"), [(0, 1), (8, 5)])
async def test_the_first_axis_is_that_of_a_batch_only_where_the_configuration_says_so(
    make_model: Make, launcher: ScriptedLauncher, most: int, size: int
) -> None:
    model, worker = await loaded(make_model, launcher, config={"max_batch_size": most})
    asked = begin(model.submit(rows_of(5)).answer())
    run(worker, *await worker.hear_batch())
    await asked
    assert list(model.metrics.batches) == [size]


async def test_failed_requests_are_no_inferences_and_their_waiting_is_not_that_of_the_others(
    make_model: Make, launcher: ScriptedLauncher, send: Send
) -> None:
    model, worker = await loaded(make_model, launcher, batch_size=2, max_batch_delay_ms=5_000)
    for failing in (1, 2):
        asked = [send(model), send(model)]
        number, items = await worker.hear_batch()
        worker.begin(number)
        for item in items[:failing]:
            worker.say_outcome(number, Outcome(item.job_id, error=HandlerError("no")))
        for item in items[failing:]:
            worker.answer(number, item)
        await asyncio.gather(*asked, return_exceptions=True)
    metrics = model.metrics
    assert {rows: count for rows, (count, _) in metrics.batches.items()} == {2: 1}
    assert (metrics.answered_rows, metrics.failed) == (1, 3)
    assert 0 < metrics.answered_queue_s < metrics.queue_s.sum
