"""The engine's verbs, with the worker's loop on threads."""

import asyncio
import json
import random
import re
import shutil
import struct
import textwrap
import threading
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asking import begin, body

from mms_lite.engine.repository.mar import MarRepository
from mms_lite.errors import (
    BadTensor,
    DeadlineExceeded,
    Forbidden,
    HandlerError,
    InvalidArchive,
    InvalidRequest,
    LoadError,
    ModelConflict,
    ModelNotFound,
    ModelNotReady,
    OutOfMemory,
    QueueFull,
    ServingError,
    VersionNotFound,
)
from mms_lite.types import (
    InferRequest,
    InferResponse,
    LoadOptions,
    ModelSpec,
    Tensor,
    VersionState,
    WorkerState,
)

Ask = Callable[..., InferRequest]
Wait = Callable[..., Any]
Bench = Any


def outcomes(results: list[Any]) -> list[Any]:
    """Bodies of answers; errors as they are."""
    return [body(each) if isinstance(each, InferResponse) else each for each in results]


async def all_of(bench: Bench, ask: Ask, model: str, bodies: list[bytes]) -> list[Any]:
    """Ask for all at once and return bodies or errors, in order."""
    asked = (bench.engine.infer(ask(model, each)) for each in bodies)
    return outcomes(await asyncio.gather(*asked, return_exceptions=True))


async def test_a_model_answers_with_what_it_was_asked(inline: Bench, ask: Ask) -> None:
    status = await inline.load("echo")
    assert (status.state, status.is_default, status.spec.version) == (VersionState.READY, True, "1")
    answer = await inline.engine.infer(ask("echo", b"hello", id="abc"))
    assert (answer.id, answer.model, answer.version, answer.status) == ("abc", "echo", "1", 200)
    assert answer.outputs == [Tensor("body", "BYTES", (), b"hello", "application/octet-stream")]


async def test_a_hundred_clients_get_their_own_answers_through_batches_of_eight(
    inline: Bench, ask: Ask
) -> None:
    await inline.load("echo", batch_size=8, max_batch_delay_ms=5, workers=2)
    source = random.Random(7)
    bodies = [b"%d:" % n + source.randbytes(source.choice([0, 1, 100, 70_000])) for n in range(100)]

    async def client(own: bytes) -> bool:
        answer = await inline.engine.infer(ask("echo", own, id=own.split(b":")[0].decode()))
        return body(answer) == own and answer.id == own.split(b":")[0].decode()

    assert all(await asyncio.gather(*map(client, bodies)))


async def test_requests_that_wait_together_run_together(inline: Bench, ask: Ask) -> None:
    await inline.load("counts", batch_size=8, max_batch_delay_ms=5_000)
    answers = [json.loads(each) for each in await all_of(inline, ask, "counts", [b""] * 24)]
    assert Counter(each["batch"] for each in answers) == {1: 8, 2: 8, 3: 8}
    assert {each["size"] for each in answers} == {8}


async def test_with_no_delay_set_the_first_request_runs_at_once_and_those_that_waited_for_it_fill_batches(
    inline: Bench, ask: Ask
) -> None:
    await inline.load("counts", batch_size=8)
    answers = [json.loads(each) for each in await all_of(inline, ask, "counts", [b""] * 24)]
    assert Counter(each["batch"] for each in answers) == {1: 1, 2: 8, 3: 8, 4: 7}


async def test_one_poison_item_in_a_batch_of_eight_fails_alone(inline: Bench, ask: Ask) -> None:
    await inline.load("poison", batch_size=8, max_batch_delay_ms=5_000)
    bodies = [b"%d" % n for n in range(8)]
    bodies[3] = b"poison"
    answers = await all_of(inline, ask, "poison", bodies)
    assert isinstance(answers[3], HandlerError)
    assert answers[3].message == "Prediction failed"
    good = [json.loads(each) for n, each in enumerate(answers) if n != 3]
    assert [each["body"] for each in good] == [b.decode() for b in bodies if b != b"poison"]
    assert {each["size"] for each in good} == {1}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("short", "number of batch response mismatched"),
        ("long", "number of batch response mismatched"),
        ("tuple", "Invalid model predict output"),
        ("none", "Invalid model predict output"),
    ],
)
async def test_an_answer_of_the_wrong_shape_fails_the_item_that_caused_it(
    inline: Bench, ask: Ask, word: str, message: str
) -> None:
    await inline.load("wrong_length", batch_size=4, max_batch_delay_ms=5_000)
    answers = await all_of(inline, ask, "wrong_length", [b"a", b"b", word.encode(), b"c"])
    assert isinstance(answers[2], HandlerError) and answers[2].message == message
    assert [answers[n] for n in (0, 1, 3)] == [b"a", b"b", b"c"]


@pytest.mark.parametrize("word", [b"bad", b"circular"])
async def test_an_answer_that_cannot_be_written_fails_alone(inline: Bench, ask: Ask, word: bytes) -> None:
    await inline.load("unserialisable", batch_size=4, max_batch_delay_ms=5_000)
    answers = await all_of(inline, ask, "unserialisable", [b"a", word, b"b", b"c"])
    assert isinstance(answers[1], HandlerError)
    assert answers[1].message == "Unsupported model output data type."
    assert [answers[n] for n in (0, 2, 3)] == [b"a", b"b", b"c"]


async def test_out_of_memory_fails_the_batch_and_is_not_tried_again(inline: Bench, ask: Ask) -> None:
    await inline.load("oom", batch_size=2, max_batch_delay_ms=5_000)
    answers = await all_of(inline, ask, "oom", [b"raise", b"mate"])
    assert [type(each) for each in answers] == [OutOfMemory, OutOfMemory]
    assert await all_of(inline, ask, "oom", [b"a", b"b"]) == [b"a", b"b"]


async def test_a_handler_chooses_status_reason_headers_and_type(inline: Bench, ask: Ask) -> None:
    await inline.load("statusful", batch_size=3, max_batch_delay_ms=5_000)
    words = [b"teapot", b"csv", b"plain"]
    teapot, csv, plain = await asyncio.gather(*(inline.engine.infer(ask("statusful", w)) for w in words))
    assert (teapot.status, teapot.reason, csv.status, plain.status) == (418, "I am a teapot", 200, 200)
    assert [dict(each.headers)["x-word"] for each in (teapot, csv, plain)] == ["teapot", "csv", "plain"]
    assert [each.outputs[0].content_type for each in (csv, plain)] == ["text/csv", "application/json"]


async def test_a_status_beyond_599_does_not_become_a_success(inline: Bench, ask: Ask) -> None:
    await inline.load("statusful")
    with pytest.raises(HandlerError):
        await inline.engine.infer(ask("statusful", b"unusual"))


@pytest.mark.parametrize("word", [b"split", b"surrogate"])
async def test_a_header_that_cannot_be_sent_fails_its_own_request_only(
    inline: Bench, ask: Ask, word: bytes
) -> None:
    await inline.load("statusful", batch_size=3, max_batch_delay_ms=5_000)
    words = [b"one", word, b"two"]
    asked = (inline.engine.infer(ask("statusful", each)) for each in words)
    one, bad, two = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(bad, HandlerError)
    assert (one.status, two.status) == (200, 200)


@pytest.mark.parametrize("status", [404, 503])
async def test_a_prediction_exception_carries_its_own_status(inline: Bench, ask: Ask, status: int) -> None:
    await inline.load("prediction_error")
    with pytest.raises(HandlerError, match="no such customer") as caught:
        await inline.engine.infer(ask("prediction_error", b"%d" % status))
    assert caught.value.details == {"status": status}


async def test_the_log_names_a_request_with_which_the_model_failed_and_none_that_it_refused(
    inline: Bench, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    await inline.load("prediction_error")
    for status in (404, 503):
        with pytest.raises(HandlerError):
            await inline.engine.infer(replace(ask("prediction_error", b"%d" % status), id=f"id-{status}"))
    with pytest.raises(ModelNotFound):
        await inline.engine.infer(ask("nobody", b""))
    told = [message for message in caplog.messages if message.startswith("request")]
    assert told == ["request id-503: prediction_error: no such customer"]


async def test_a_class_with_initialize_and_handle_is_a_handler(inline: Bench, ask: Ask) -> None:
    await inline.load("classy")
    assert body(await inline.engine.infer(ask("classy", b"x"))) == b"classy:x"


@pytest.mark.parametrize(
    ("data", "content_type", "expected"),
    [
        (b'{"a": [1]}', "application/json", b'{\n  "a": [\n    1\n  ]\n}'),
        ("zoë".encode(), "text/plain", "zoë".encode()),
        (b"\xff", "image/jpeg", b"\xff"),
    ],
)
async def test_a_body_is_decoded_by_its_content_type(
    inline: Bench, ask: Ask, data: bytes, content_type: str, expected: bytes
) -> None:
    await inline.load("echo")
    assert body(await inline.engine.infer(ask("echo", data, content_type=content_type))) == expected


@pytest.mark.parametrize(
    ("data", "content_type"),
    [(b"{", "application/json"), (b"\xff", "text/plain"), (b"[" * 100_000, "application/json")],
)
async def test_a_body_that_is_not_what_it_says_fails_alone(
    inline: Bench, ask: Ask, data: bytes, content_type: str
) -> None:
    await inline.load("echo", batch_size=2, max_batch_delay_ms=5_000)
    asked = [ask("echo", data, content_type=content_type), ask("echo", b"good")]
    bad, good = await asyncio.gather(*map(inline.engine.infer, asked), return_exceptions=True)
    assert isinstance(bad, InvalidRequest)
    assert body(good) == b"good"


async def test_tensors_reach_a_handler_as_arrays_and_come_back(inline: Bench) -> None:
    await inline.load("double")
    tensor = Tensor("x", "FP32", (1, 2), bytearray(struct.pack("=2f", 1.5, -2)))
    answer = await inline.engine.infer(InferRequest(id="1", model="double", inputs=[tensor]))
    (output,) = answer.outputs
    assert (output.name, output.datatype, output.shape) == ("x", "FP32", (1, 2))
    assert struct.unpack("=2f", output.data) == (3, -4)


async def test_a_tensor_with_too_few_bytes_is_the_clients_error(inline: Bench) -> None:
    await inline.load("double")
    tensor = Tensor("x", "FP32", (1, 2), bytearray(7))
    with pytest.raises(BadTensor, match="which is 8 bytes, and has 7"):
        await inline.engine.infer(InferRequest(id="1", model="double", inputs=[tensor]))


async def test_unknown_models_and_versions_are_not_found(inline: Bench, ask: Ask) -> None:
    await inline.load("echo")
    with pytest.raises(ModelNotFound):
        await inline.engine.infer(ask("unknown"))
    with pytest.raises(VersionNotFound):
        await inline.engine.infer(ask("echo", version="7"))
    with pytest.raises(ModelNotFound):
        await inline.engine.unload("unknown")
    with pytest.raises(ModelNotFound):
        await inline.engine.scale("unknown", 1, 1)


async def test_versions_live_side_by_side_and_the_first_answers_by_default(inline: Bench, ask: Ask) -> None:
    await inline.load("echo", version="1")
    await inline.load("echo", version="2")
    answers = [await inline.engine.infer(ask("echo", version=v)) for v in (None, "1", "2")]
    assert [each.version for each in answers] == ["1", "1", "2"]
    await inline.load("echo", version="3", set_default=True)
    assert (await inline.engine.infer(ask("echo"))).version == "3"


async def test_the_same_version_twice_is_a_conflict(inline: Bench, ask: Ask) -> None:
    await inline.load("echo")
    with pytest.raises(ModelConflict):
        await inline.load("echo")
    assert body(await inline.engine.infer(ask("echo"))) == b"hello"


async def test_a_replacement_is_loaded_before_the_old_one_is_drained(
    inline: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, live_workers: Any
) -> None:
    await inline.load("gate", "m")
    gate = tmp_path / "gate"
    held = begin(inline.engine.infer(ask("m", str(gate))))
    await wait_until(gate.with_suffix(".started").exists, "the request to run")
    shutil.copy(inline.store.add("classy") / "service.py", inline.store.folder / "m" / "service.py")
    replacing = begin(inline.engine.load(LoadOptions(url="m", name="m", handler="service", replace=True)))

    async def answered() -> bytes:
        return body(await inline.engine.infer(ask("m", b"x")))

    deadline = asyncio.get_running_loop().time() + 10
    while await asyncio.wait_for(begin(probe(inline, ask)), 10) != b"m:x":
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)
    assert not held.done() and not replacing.done()
    gate.touch()
    assert body(await asyncio.wait_for(held, 10)) == str(gate).encode()
    assert (await asyncio.wait_for(replacing, 10)).state is VersionState.READY
    assert await answered() == b"m:x"
    await wait_until(lambda: len(live_workers("m")) == 1, "the old worker to end")


async def probe(bench: Bench, ask: Ask) -> bytes | None:
    """Ask `m` for x; None while the old version is busy."""
    try:
        loop = asyncio.get_running_loop()
        return body(await bench.engine.infer(ask("m", b"x", deadline=loop.time() + 0.2)))
    except DeadlineExceeded:
        return None


async def test_a_replacement_that_fails_leaves_the_old_one_in_place(inline: Bench, ask: Ask) -> None:
    await inline.load("echo", "m")
    shutil.copy(inline.store.add("bad_init") / "service.py", inline.store.folder / "m" / "service.py")
    with pytest.raises(LoadError, match="the weights are missing"):
        await inline.load("echo", "m", replace=True)
    assert inline.engine.describe("m").state is VersionState.READY
    assert body(await inline.engine.infer(ask("m", b"still"))) == b"still"


async def test_unloading_one_version_leaves_the_others(inline: Bench, ask: Ask) -> None:
    for version in ("1", "2", "3"):
        await inline.load("echo", version=version)
    await inline.engine.unload("echo", "1")
    assert (await inline.engine.infer(ask("echo"))).version == "3"
    with pytest.raises(VersionNotFound):
        await inline.engine.infer(ask("echo", version="1"))
    await inline.engine.unload("echo")
    assert inline.engine.models() == []
    with pytest.raises(ModelNotFound):
        await inline.engine.infer(ask("echo"))


async def test_unloading_answers_what_waits(
    inline: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, live_workers: Any
) -> None:
    await inline.load("gate")
    gate = tmp_path / "gate"
    held = begin(inline.engine.infer(ask("gate", str(gate))))
    waiting = [begin(inline.engine.infer(ask("gate", b"%d" % n))) for n in range(5)]
    await wait_until(gate.with_suffix(".started").exists, "the request to run")
    unloading = begin(inline.engine.unload("gate"))
    await asyncio.sleep(0)
    with pytest.raises(ModelNotFound):
        await inline.engine.infer(ask("gate", b"new"))
    gate.touch()
    assert body(await asyncio.wait_for(held, 10)) == str(gate).encode()
    assert [body(await asyncio.wait_for(each, 10)) for each in waiting] == [b"%d" % n for n in range(5)]
    await asyncio.wait_for(unloading, 10)
    await wait_until(lambda: not live_workers("gate"), "the worker to end")


async def test_a_failed_load_names_the_last_line_and_leaves_nothing(
    inline: Bench, ask: Ask, live_workers: Any, wait_until: Wait
) -> None:
    with pytest.raises(LoadError) as caught:
        await inline.load("bad_init")
    assert caught.value.message == "RuntimeError: the weights are missing"
    assert (inline.store.folder / "bad_init" / "attempts").read_text() == "xxx"
    assert inline.engine.models() == []
    await wait_until(lambda: not live_workers("bad_init"))


async def test_a_class_that_fails_to_initialize_is_a_failed_load(inline: Bench) -> None:
    with pytest.raises(LoadError, match=r"^RuntimeError: the labels are missing$"):
        await inline.load("bad_init_class")


async def test_no_memory_to_load_is_told_as_such(inline: Bench) -> None:
    with pytest.raises(OutOfMemory):
        await inline.load("oom_at_load")


async def test_a_startup_model_that_fails_stays_to_be_described(inline: Bench, ask: Ask) -> None:
    told: dict[str, ServingError | None] = {}
    names = ("bad_init", "echo")
    failed = await inline.engine.start([inline.options(n, at_startup=True) for n in names], told.__setitem__)
    assert failed == 1
    assert isinstance(told["bad_init"], LoadError) and told["echo"] is None
    status = inline.engine.describe("bad_init")
    assert (status.state, status.detail) == (VersionState.FAILED, "RuntimeError: the weights are missing")
    assert [worker.state for worker in status.workers] == [WorkerState.FAILED]
    assert inline.engine.ready() is False
    assert body(await inline.engine.infer(ask("echo"))) == b"hello"
    with pytest.raises(ModelNotReady, match="model bad_init failed to load"):
        await inline.engine.infer(ask("bad_init"))


async def test_of_two_startup_models_with_one_name_the_first_has_it_however_slowly_it_is_read(
    inline: Bench, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, other_is_read = MarRepository.read, threading.Event()

    def slowly(self: MarRepository, options: LoadOptions) -> ModelSpec:
        if options.url == "echo":
            assert other_is_read.wait(5)
        spec = read(self, options)
        if options.url == "counts":
            other_is_read.set()
        return spec

    monkeypatch.setattr(MarRepository, "read", slowly)
    told: list[tuple[str, ServingError | None]] = []
    named = [replace(inline.options(url, at_startup=True), name="m") for url in ("echo", "counts")]
    missing = LoadOptions(url="none", name="m", at_startup=True)
    assert await inline.engine.start([missing, *named], lambda *each: told.append(each)) == 2
    assert body(await inline.engine.infer(ask("m"))) == b"hello"
    assert {type(error) for _, error in told} == {ModelNotFound, ModelConflict, type(None)}
    (conflict,) = (error for _, error in told if isinstance(error, ModelConflict))
    assert conflict.message == (
        "Model m is already registered. Give this one another name in load_models (--models): NAME=counts"
    )


async def test_a_model_loads_in_the_background_and_says_so(inline: Bench, ask: Ask, wait_until: Wait) -> None:
    status = await inline.load("echo", wait=False)
    assert status.state is VersionState.LOADING
    await wait_until(lambda: inline.engine.describe("echo").state is VersionState.READY)
    assert body(await inline.engine.infer(ask("echo"))) == b"hello"


async def test_a_new_default_that_is_loading_does_not_silence_the_old_one(
    inline: Bench, ask: Ask, wait_until: Wait
) -> None:
    await inline.load("echo", "m", version="1")
    shutil.copy(inline.store.add("slow_load") / "service.py", inline.store.folder / "m" / "service.py")
    loading = begin(inline.load("echo", "m", version="2", set_default=True))
    await wait_until((inline.store.folder / "m" / "loading").exists, "version 2 to load")
    try:
        assert (await inline.engine.infer(ask("m"))).version == "1"
    finally:
        (inline.store.folder / "m" / "go").touch()
    await asyncio.wait_for(loading, 10)
    assert (await inline.engine.infer(ask("m"))).version == "2"


async def test_a_new_default_that_fails_to_load_gives_the_place_back(inline: Bench, ask: Ask) -> None:
    await inline.load("echo", "m", version="1")
    await inline.load("echo", "m", version="2")
    shutil.copy(inline.store.add("bad_init") / "service.py", inline.store.folder / "m" / "service.py")
    with pytest.raises(LoadError):
        await inline.load("echo", "m", version="3", set_default=True)
    assert (await inline.engine.infer(ask("m"))).version == "1"


async def test_scaling_up_down_to_zero_and_up_again(
    inline: Bench, ask: Ask, wait_until: Wait, live_workers: Any
) -> None:
    await inline.load("echo")
    for count in (3, 1, 0, 2):
        status = await inline.engine.scale("echo", count, count)
        assert len(status.workers) == count
        assert (status.spec.min_workers, status.spec.max_workers) == (count, count)
        await wait_until(lambda count=count: len(live_workers("echo")) == count)
        if count:
            assert body(await inline.engine.infer(ask("echo"))) == b"hello"
        else:
            with pytest.raises(ModelNotReady, match="no workers"):
                await inline.engine.infer(ask("echo"))
    assert inline.engine.health() == (2, 2)


@pytest.mark.parametrize(("low", "high"), [(2, 1), (-1, 1), (0, 5000), (5000, 5000)])
async def test_numbers_of_workers_that_make_no_sense_are_refused(inline: Bench, low: int, high: int) -> None:
    await inline.load("echo")
    with pytest.raises(InvalidRequest):
        await inline.engine.scale("echo", low, high)
    assert len(inline.engine.describe("echo").workers) == 1


async def test_scaling_within_the_bounds_changes_nothing(inline: Bench) -> None:
    await inline.load("echo", workers=2)
    before = [worker.id for worker in inline.engine.describe("echo").workers]
    status = await inline.engine.scale("echo", 1, 4)
    assert [worker.id for worker in status.workers] == before


async def test_a_queue_at_its_bound_refuses_at_once(
    inline: Bench, ask: Ask, tmp_path: Path, wait_until: Wait
) -> None:
    inline.defaults["queue_size"] = 2
    await inline.load("gate")
    gate = tmp_path / "gate"
    held = begin(inline.engine.infer(ask("gate", str(gate))))
    await wait_until(gate.with_suffix(".started").exists)
    waiting = [begin(inline.engine.infer(ask("gate", b"waits"))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await asyncio.wait_for(inline.engine.infer(ask("gate")), 1)
    status = inline.engine.describe("gate")
    assert (status.queue_depth, status.in_flight) == (2, 1)
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert inline.engine.describe("gate").queue_depth == 1
    gate.touch()
    await asyncio.wait_for(asyncio.gather(held, waiting[1]), 10)


async def test_a_client_that_leaves_mid_batch_does_not_disturb_its_mates(
    inline: Bench, ask: Ask, tmp_path: Path, wait_until: Wait
) -> None:
    await inline.load("gate", batch_size=3, max_batch_delay_ms=5_000)
    gate = tmp_path / "gate"
    leaves, *stay = [begin(inline.engine.infer(ask("gate", each))) for each in (str(gate), "a", "b")]
    await wait_until(gate.with_suffix(".started").exists)
    leaves.cancel()
    await asyncio.wait([leaves])
    gate.touch()
    assert [body(await asyncio.wait_for(each, 10)) for each in stay] == [b"a", b"b"]


async def test_a_deadline_that_passes_in_the_queue_is_told_and_the_request_never_runs(
    inline: Bench, ask: Ask, tmp_path: Path, wait_until: Wait
) -> None:
    await inline.load("gate")
    gate, late = tmp_path / "gate", tmp_path / "late"
    held = begin(inline.engine.infer(ask("gate", str(gate))))
    await wait_until(gate.with_suffix(".started").exists)
    loop = asyncio.get_running_loop()
    with pytest.raises(DeadlineExceeded):
        await inline.engine.infer(ask("gate", str(late), deadline=loop.time() + 0.05))
    gate.touch()
    await asyncio.wait_for(held, 10)
    assert body(await inline.engine.infer(ask("gate", b"next"))) == b"next"
    assert not late.with_suffix(".started").exists()


async def test_closing_answers_what_is_held_and_refuses_the_rest(
    inline: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, live_workers: Any
) -> None:
    await inline.load("gate")
    gate = tmp_path / "gate"
    held = [begin(inline.engine.infer(ask("gate", each))) for each in (str(gate), "waits")]
    await wait_until(gate.with_suffix(".started").exists)
    closing = begin(inline.close())
    await asyncio.sleep(0.02)
    assert inline.engine.ready() is False
    with pytest.raises(ModelNotReady):
        await inline.engine.infer(ask("gate", b"new"))
    gate.touch()
    assert [body(await asyncio.wait_for(each, 10)) for each in held] == [str(gate).encode(), b"waits"]
    await asyncio.wait_for(closing, 10)
    await wait_until(lambda: not live_workers("gate"))


async def test_a_model_loaded_while_the_engine_closes_leaves_no_worker(
    inline: Bench, wait_until: Wait, live_workers: Any
) -> None:
    await inline.load("echo")
    loading = begin(inline.load("echo", "late"))
    await asyncio.sleep(0)  # it reads the archive on a thread
    await inline.close()
    await asyncio.wait([loading], timeout=10)
    await wait_until(lambda: not live_workers("late"), "the worker of the late model to end", timeout_s=3)


async def test_a_model_cannot_be_loaded_into_a_closed_engine(inline: Bench, live_workers: Any) -> None:
    await inline.load("echo")
    await inline.close()
    with pytest.raises(ServingError):
        await inline.load("echo", "late")
    assert live_workers("late") == []


async def test_a_load_whose_caller_leaves_ends_in_a_known_state(
    inline: Bench, ask: Ask, wait_until: Wait, live_workers: Any
) -> None:
    # A client that closes its connection cancels the handler of its POST.
    folder = inline.store.add("slow_load", "m")
    loading = begin(inline.load("slow_load", "m"))
    await wait_until((folder / "loading").exists)
    loading.cancel()
    await asyncio.wait([loading])
    (folder / "go").touch()

    def known() -> bool:
        if not inline.engine.has_version("m", "1"):
            return not live_workers("m")
        return bool(inline.engine.describe("m").state is VersionState.READY)

    await wait_until(known, "the model to be ready, or gone with its worker", timeout_s=5)


async def test_an_unload_whose_caller_leaves_still_ends_the_workers(
    inline: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, live_workers: Any
) -> None:
    await inline.load("gate")
    gate = tmp_path / "gate"
    held = begin(inline.engine.infer(ask("gate", str(gate))))
    await wait_until(gate.with_suffix(".started").exists)
    unloading = begin(inline.engine.unload("gate"))
    await asyncio.sleep(0.05)
    unloading.cancel()
    await asyncio.wait([unloading])
    gate.touch()
    await asyncio.wait_for(held, 10)
    await wait_until(lambda: not live_workers("gate"), "the worker to end", timeout_s=5)


async def test_a_replacement_whose_caller_leaves_keeps_the_files_of_the_new_version(
    inline: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, live_workers: Any
) -> None:
    pack(inline.store.folder / "m.mar", inline.store.add("gate") / "service.py")
    options = LoadOptions(url="m.mar", name="m", handler="service:handle", replace=True)
    await inline.engine.load(options)
    gate = tmp_path / "gate"
    held = begin(inline.engine.infer(ask("m", str(gate))))
    await wait_until(gate.with_suffix(".started").exists)
    old = inline.engine.describe("m").spec.path
    replacing = begin(inline.engine.load(options))
    await wait_until(lambda: inline.engine.describe("m").spec.path != old, "the swap")
    replacing.cancel()
    await asyncio.wait([replacing])
    gate.touch()
    await asyncio.wait_for(held, 10)
    new = Path(inline.engine.describe("m").spec.path)
    assert (new / "service.py").exists(), "the folder of the loaded version was deleted"
    await wait_until(lambda: len(live_workers("m")) == 1, "the old worker to end", timeout_s=5)


def pack(archive: Path, handler: Path) -> None:
    manifest = {"runtime": "python", "model": {"modelName": "m", "handler": "service:handle"}}
    with zipfile.ZipFile(archive, "w") as file:
        file.write(handler, "service.py")
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))


async def test_the_folder_of_an_archive_lives_as_long_as_its_version(inline: Bench, ask: Ask) -> None:
    pack(inline.store.folder / "m.mar", inline.store.add("echo") / "service.py")
    status = await inline.engine.load(LoadOptions(url="m.mar"))
    folder = Path(status.spec.path)
    assert folder in inline.work.iterdir()
    assert body(await inline.engine.infer(ask("m"))) == b"hello"
    await inline.engine.unload("m")
    assert folder not in inline.work.iterdir()
    assert (inline.store.folder / "m.mar").exists()


async def test_each_model_begins_with_another_gpu(inline: Bench) -> None:
    inline.defaults["devices"] = (0, 1, 2)
    dealt = [(await inline.load("echo", f"m{n}", workers=0)).spec.devices for n in range(4)]
    assert dealt == [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 1, 2)]


@pytest.mark.parametrize("version", ["a/b", "a\nb", "x" * 129, "invoke", "\ud800"])
async def test_a_version_that_no_path_can_name_is_refused(inline: Bench, version: str) -> None:
    with pytest.raises(InvalidRequest, match="a version has at most 128 printable characters"):
        await inline.load("echo", version=version)


@pytest.fixture
async def replacing(inline: Bench, tmp_path: Path, wait_until: Wait) -> AsyncIterator[Any]:
    """The model m, and another in its place that loads until `open` is called and its answer is awaited."""
    gate = tmp_path / "gate"
    slow = f"""
        import os, time

        def handle(data, context):
            while not os.path.exists({str(gate)!r}):
                time.sleep(0.005)
            return data and ["new"] * len(data)
    """
    folder = inline.store.folder / "slow"
    folder.mkdir()
    (folder / "service.py").write_text(textwrap.dedent(slow))
    await inline.load("echo", "m")
    options = LoadOptions(url="slow", name="m", handler="service:handle", replace=True)
    task = begin(inline.engine.load(options))
    await wait_until(lambda: inline.engine._lifecycle.incoming)
    yield SimpleNamespace(task=task, open=gate.touch)
    gate.touch()


async def test_a_model_that_is_unloaded_while_its_replacement_loads_stays_unloaded(
    inline: Bench, replacing: Any
) -> None:
    await inline.engine.unload("m")
    replacing.open()
    with pytest.raises(ModelNotFound):
        await replacing.task
    assert inline.engine.models() == []


async def test_a_replacement_has_the_workers_that_its_predecessor_got_meanwhile(
    inline: Bench, ask: Ask, replacing: Any
) -> None:
    await inline.engine.scale("m", 3, 3)
    replacing.open()
    await replacing.task
    assert len(inline.engine.describe("m").workers) == 3
    assert body(await inline.engine.infer(ask("m"))) == b"new"


async def test_a_replacement_that_fails_in_the_background_is_logged_once(
    inline: Bench, ask: Ask, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    await inline.load("echo", "m")
    inline.store.add("bad_init")
    options = LoadOptions(url="bad_init", name="m", handler="service:handle", replace=True, wait=False)
    await inline.engine.load(options)
    await wait_until(lambda: not inline.engine._lifecycle.tasks)
    told = [
        record.getMessage() for record in caplog.records if "the weights are missing" in record.getMessage()
    ]
    assert [line for line in told if line.startswith(("Model ", "Failed "))] == [
        "Failed to load model: m: RuntimeError: the weights are missing"
    ]
    assert body(await inline.engine.infer(ask("m"))) == b"hello"


async def test_closing_does_not_wait_for_a_replacement_that_loads(inline: Bench, replacing: Any) -> None:
    begun = time.monotonic()
    await inline.engine.close(drain_s=20)
    assert time.monotonic() - begun < 10
    with pytest.raises(ModelNotReady):
        await replacing.task


async def test_a_start_up_model_stays_one_through_an_update(inline: Bench) -> None:
    await inline.engine.start([inline.options("echo", at_startup=True)], lambda name, error: None)
    await inline.load("echo", version="2", set_default=True)
    await inline.engine.unload("echo", "1")
    assert inline.engine.startup_models() == {"echo"}
    await inline.load("echo", version="2", replace=True)
    assert inline.engine.startup_models() == {"echo"}
    await inline.engine.unload("echo")
    assert inline.engine.startup_models() == set()


async def test_the_default_goes_to_a_version_that_can_answer(inline: Bench) -> None:
    for version, workers in (("1", 1), ("2", 1), ("3", 0)):
        await inline.load("echo", version=version, workers=workers)
    await inline.engine.unload("echo", "1")
    assert inline.engine.describe("echo").spec.version == "2"


async def test_slow_downloads_keep_no_model_of_the_store_waiting(
    inline: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, over = MarRepository.read, threading.Event()

    def slowly(self: MarRepository, options: LoadOptions) -> ModelSpec:
        if "://" in options.url:
            over.wait(10)
        return read(self, options)

    monkeypatch.setattr(MarRepository, "read", slowly)
    slow = [begin(inline.engine.load(LoadOptions(url=f"http://h/{n}.mar"))) for n in range(20)]
    assert (await inline.load("echo")).state is VersionState.READY
    over.set()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_a_folder_of_the_store_is_never_deleted(inline: Bench) -> None:
    await inline.load("echo")
    await inline.engine.unload("echo")
    assert (inline.store.folder / "echo" / "service.py").exists()


async def test_a_refused_load_of_an_archive_leaves_no_folder_behind(inline: Bench) -> None:
    pack(inline.store.folder / "m.mar", inline.store.add("echo") / "service.py")
    await inline.engine.load(LoadOptions(url="m.mar"))
    before = sorted(inline.work.iterdir())
    with pytest.raises(ModelConflict):
        await inline.engine.load(LoadOptions(url="m.mar"))
    with pytest.raises(InvalidRequest):
        await inline.engine.load(LoadOptions(url="m.mar", name="many", workers=100_000))
    assert sorted(inline.work.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (LoadOptions(url="missing.mar"), ModelNotFound),
        (LoadOptions(url="../store/echo"), ModelNotFound),
        (LoadOptions(url="https://example.com/m.mar"), Forbidden),
        (LoadOptions(url=""), InvalidRequest),
        (LoadOptions(url="echo"), InvalidArchive),
        (LoadOptions(url="echo", name="a/b", handler="service:handle"), InvalidRequest),
        (LoadOptions(url="echo", name="x" * 129, handler="service:handle"), InvalidRequest),
        (LoadOptions(url="echo", name="a\nb", handler="service:handle"), InvalidRequest),
        (LoadOptions(url="echo", name="m", handler="service:handle", runtime="perl"), InvalidRequest),
        (LoadOptions(url="echo", name="m", handler="service:absent"), LoadError),
        (LoadOptions(url="echo", name="m", handler="no_such_module:handle"), LoadError),
    ],
)
async def test_what_cannot_be_loaded_is_refused_with_its_own_error(
    inline: Bench, options: LoadOptions, kind: type[ServingError]
) -> None:
    inline.store.add("echo")
    with pytest.raises(ServingError) as caught:
        await inline.engine.load(options)
    assert type(caught.value) is kind
    assert inline.engine.models() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_whose_only_model_lost_its_workers_is_not_ready(
    inline: Bench, ask: Ask, wait_until: Wait
) -> None:
    folder = inline.store.folder / "m"
    await inline.load("suicidal", "m")
    assert inline.engine.ready() is True
    shutil.copy(inline.store.add("bad_init") / "service.py", folder / "service.py")
    with pytest.raises(ServingError):
        await inline.engine.infer(ask("m", b"die"))
    await wait_until(
        lambda: inline.engine.describe("m").state is VersionState.FAILED, "the workers to give up"
    )
    assert inline.engine.ready() is False


@pytest.mark.parametrize(
    ("file", "name"), [("net-1.1.onnx", "net_1_1"), ("frozen.pb", "frozen"), ("m-symbol.json", "m_symbol")]
)
async def test_a_bare_model_file_is_answered_with_how_to_pack_it(inline: Bench, file: str, name: str) -> None:
    (inline.store.folder / file).write_bytes(b"\x08\x08")
    with pytest.raises(
        InvalidArchive,
        match=f"{re.escape(file)} is a model file.*--model-name {name} --model-file {re.escape(file)}",
    ):
        await inline.load(file)


async def test_a_manifest_with_model_files_and_no_handler_is_served_by_the_tensor_handler(
    inline: Bench,
) -> None:
    manifest = {"model": {"modelName": "m", "backend": "onnxruntime", "modelFiles": ["nothing.onnx"]}}
    inline.store.put("m", {"MAR-INF/MANIFEST.json": json.dumps(manifest)})
    with pytest.raises(InvalidArchive, match=r"the archive has no file nothing\.onnx"):
        await inline.engine.load(LoadOptions(url="m"))
