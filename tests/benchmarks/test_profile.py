"""The profile of a request: which part a stack counts for, what the sampler sees, how figures are divided."""

import ctypes
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from types import FrameType

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "profile"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "profile" / "inside"))

import figures
import parts
import sampler
from figures import Measured, Used

ROOT = "/usr/lib/python3/site-packages/mms_lite/"
SERVE = (f"{ROOT}server.py", "serve")


def stack(*modules: str) -> parts.Stack:
    """Return a stack within the package, the innermost first."""
    return (*((f"{ROOT}{module}", "f") for module in modules), SERVE)


@contextmanager
def handled(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("modules", "part"),
    [
        (["frontends/hot.py", "engine/engine.py"], parts.HTTP),
        (["frontends/mms/inference.py", "frontends/hot.py"], parts.API),
        (["engine/batcher.py"], parts.ENGINE),
        (["transport.py", "engine/worker.py"], parts.FRAMES),
        (["wire.py", "worker/loop.py"], parts.FRAMES),
        (["metrics.py", "engine/batcher.py"], parts.LOG),
        (["worker/metrics_store.py", "worker/handler.py"], parts.LOG),
        (["worker/handler.py"], parts.CALL),
        (["types.py", "wire.py"], parts.FRAMES),
        (["something_new.py", "engine/engine.py"], parts.OTHER),
        ([], parts.LOOP),
    ],
)
def test_the_innermost_module_of_the_server_decides(modules: list[str], part: str) -> None:
    library = ("/usr/lib/python3/json/decoder.py", "decode")

    assert parts.part(stack(*modules))[0] == part
    assert parts.part((library, *stack(*modules)))[0] == part


def test_the_models_own_code_is_a_part_and_a_library_outside_of_the_server_is_the_event_loop() -> None:
    work = ("/srv/side_by_side/work.py", "run")

    assert parts.part((work, *stack("worker/handler.py"))) == (parts.MODEL, "work.py:run")
    assert parts.part((("/usr/lib/python3/asyncio/base_events.py", "run_forever"),))[0] == parts.LOOP


def test_a_signal_from_c_code_counts_for_the_caller_of_the_function_that_it_interrupts() -> None:
    """As it comes in an event loop: the C code gets it, and calls a function, in which it is handled."""
    found: list[tuple[str, sampler.Stack]] = []
    raise_signal = getattr(ctypes.CDLL(None), "raise")

    def look(_number: int, frame: FrameType | None) -> None:
        assert frame is not None
        found.append((frame.f_code.co_name, sampler.stack(frame)))

    def callback(_returned: int) -> None:
        pass

    def loop() -> None:
        next(map(callback, iter(partial(raise_signal, signal.SIGUSR1), -1)))

    with handled(signal.SIGUSR1, look):
        loop()
    ((interrupted, seen),) = found
    assert interrupted == "callback"
    assert seen[0] == (__file__, "loop")


def test_a_sampler_writes_where_the_process_used_its_time_and_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "1.json"
    it = sampler.Sampler(file)
    sampled = 0

    def sample(number: int, frame: FrameType | None) -> None:
        nonlocal sampled
        it.sample(number, frame)
        sampled += 1

    with handled(signal.SIGPROF, sample):
        it.begin(0, None)
        it.batches = 3
        while sampled < 3:
            pass
        it.end(0, None)
    first = json.loads(file.read_text())
    it.end(0, None)

    here = [count for count, ((path, _), *_) in first["stacks"] if path == __file__]
    assert sum(here) == sum(count for count, _ in first["stacks"]) >= 3
    assert first["batches"] == 3
    assert json.loads(file.read_text()) == {"stacks": [], "model_ns": 0, "batches": 0}


def cell() -> Measured:
    front = {stack("frontends/hot.py"): 30, stack("engine/engine.py"): 10}
    return Measured(
        "1 KB, 100 connections",
        used={"front": Used(60.0, 30.0, 80.0), "worker": Used(40.0, 10.0, 50.0)},
        kernel={"front": 0.3, "worker": 0.2},
        stacks={"front": front, "worker": {stack("worker/loop.py"): 7}},
        sampled_us=141.4,
        client_us=7000.0,
        means_us={"request": 5000.0, "queue": 4000.0, "inference": 60.0, "model": 1.0},
        requests_per_s=14_000.0,
    )


def test_the_main_threads_time_is_divided_as_its_samples_and_all_parts_add_up() -> None:
    *each, whole, kernel = cell().cpu()

    assert each == [
        (parts.HTTP, 60.0, 0.0, pytest.approx(60 / 140)),
        (parts.ENGINE, 20.0, 0.0, pytest.approx(20 / 140)),
        (parts.CALL, 0.0, 50.0, pytest.approx(50 / 140)),
        (parts.THREADS, 10.0, 0.0, pytest.approx(10 / 140)),
    ]
    assert whole[1:] == (90.0, 50.0, 1.0)
    assert kernel[1:] == (27.0, 10.0, pytest.approx(37 / 140))


def test_the_stretches_of_a_requests_way_add_up_to_what_the_client_sees() -> None:
    *each, whole = (us for _, us, _ in cell().times())

    assert each == [2000.0, 4000.0, 940.0, 59.0, 1.0]
    assert whole == sum(each)


def test_a_page_has_a_table_for_each_cell_and_the_text_its_dearest_functions() -> None:
    page = figures.markdown([cell()], date(2026, 1, 2))

    assert "2026-01-02" in page
    assert "**1 KB, 100 connections**: 14,000 requests/s" in page
    assert "| reading and writing HTTP | 60.0 | - | 43% |" in page
    assert "| in the queue | 4,000 | 57% |" in page
    assert "60.0  frontends/hot.py:f" in figures.text(cell())
    assert "40 and 7 samples; +1.0% CPU while sampling" in figures.text(cell())


def test_all_modules_of_the_server_that_a_request_passes_have_a_part() -> None:
    package = Path(__file__).resolve().parents[2] / "mms_lite"
    passed = ["transport.py", "wire.py", "logs.py", "metrics.py", "server.py"]
    for folder in ("frontends", "engine", "worker"):
        passed += [str(path.relative_to(package)) for path in (package / folder).rglob("*.py")]

    assert "frontends/hot.py" in passed
    assert not [each for each in passed if parts.part(stack(each))[0] == parts.OTHER]
