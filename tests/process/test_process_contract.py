"""The process contract: what must hold when workers crash, hang, leave or are left, with real processes.

Each test ends with the same two assertions (`still_serves`): a good request succeeds, and no child is left.
"""

import asyncio
import contextlib
import errno
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import begin, body

from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.errors import (
    DeadlineExceeded,
    HandlerError,
    LoadError,
    OutOfMemory,
    QueueFull,
    RequestTooLarge,
    WorkerDied,
)
from mms_lite.types import InferRequest, VersionState

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups and /proc as on Linux")

Ask = Callable[..., InferRequest]
Wait = Callable[..., Any]
Check = Callable[..., Any]
Bench = Any


def pid_of(bench: Bench, model: str) -> int | None:
    (worker,) = bench.engine.describe(model).workers
    pid: int | None = worker.pid
    return pid


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_worker_killed_mid_batch_fails_that_batch_and_no_other(
    processes: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, still_serves: Check
) -> None:
    await processes.load("gate", batch_size=2, max_batch_delay_ms=200)
    gate = tmp_path / "gate"
    lost = [begin(processes.engine.infer(ask("gate", each))) for each in (str(gate), "mate")]
    await wait_until(gate.with_suffix(".started").exists, "the batch to run")
    waiting = [begin(processes.engine.infer(ask("gate", b"%d" % n))) for n in range(5)]
    await asyncio.sleep(0)
    pid = pid_of(processes, "gate")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for each in lost:
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await asyncio.wait_for(each, 10)
    assert [body(await asyncio.wait_for(each, 10)) for each in waiting] == [b"%d" % n for n in range(5)]
    (worker,) = processes.engine.describe("gate").workers
    assert (worker.restarts, worker.last_exit) == (1, "killed by SIGKILL")
    assert worker.pid != pid
    await still_serves(processes, "gate")


async def test_a_worker_killed_mid_batch_had_not_begun_the_one_sent_ahead_which_the_next_one_answers(
    processes: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, still_serves: Check
) -> None:
    await processes.load("gate")
    for _ in range(3):
        await processes.engine.infer(ask("gate", "quick"))  # so that batches are sent ahead
    gate = tmp_path / "gate"
    lost = begin(processes.engine.infer(ask("gate", str(gate))))
    await wait_until(gate.with_suffix(".started").exists, "the batch to run")
    ahead, queued = [begin(processes.engine.infer(ask("gate", each))) for each in ("ahead", "queued")]
    await asyncio.sleep(0)
    status = processes.engine.describe("gate")
    assert (status.in_flight, status.queue_depth) == (2, 1)
    pid = pid_of(processes, "gate")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        await asyncio.wait_for(lost, 10)
    assert body(await asyncio.wait_for(ahead, 10)) == b"ahead"
    assert body(await asyncio.wait_for(queued, 10)) == b"queued"
    await still_serves(processes, "gate")


async def test_a_batch_that_was_answered_before_the_worker_died_in_the_next_stays_answered(
    processes: Bench, ask: Ask, still_serves: Check
) -> None:
    await processes.load("crash")
    for _ in range(3):
        await processes.engine.infer(ask("crash", b"quick"))  # so that batches are sent ahead
    words = (b"answered", b"kill", b"queued")
    answered, lost, queued = [begin(processes.engine.infer(ask("crash", word))) for word in words]
    await asyncio.sleep(0)
    status = processes.engine.describe("crash")
    assert (status.in_flight, status.queue_depth) == (2, 1)
    pid = pid_of(processes, "crash")
    assert pid is not None
    while not gone(pid):  # the server reads nothing meanwhile: the first answer is still in the socket
        pass
    assert body(await asyncio.wait_for(answered, 10)) == b"answered"
    with pytest.raises(WorkerDied, match="SIGKILL"):
        await asyncio.wait_for(lost, 10)
    assert body(await asyncio.wait_for(queued, 10)) == b"queued"
    await still_serves(processes, "crash")


@pytest.mark.parametrize(
    ("word", "kind", "text"),
    [
        (b"kill", WorkerDied, "killed by SIGKILL"),
        (b"exit:7", WorkerDied, "exit code 7"),
        (b"leave:0", WorkerDied, "exit code 0"),
        (b"exit:137", WorkerDied, "exit code 137"),
        (b"exit:4", OutOfMemory, "out of memory"),
    ],
)
async def test_a_handler_that_ends_its_process_is_told_how_and_restarted(
    processes: Bench, ask: Ask, still_serves: Check, word: bytes, kind: type, text: str
) -> None:
    await processes.load("crash")
    with pytest.raises(kind, match=text):
        await asyncio.wait_for(processes.engine.infer(ask("crash", word)), 10)
    await still_serves(processes, "crash")


async def test_a_hang_past_the_response_timeout_ends_the_process_and_its_children(
    processes: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, still_serves: Check
) -> None:
    await processes.load("hang", response_timeout_s=0.5)
    pid = pid_of(processes, "hang")
    file = tmp_path / "grandchild"
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded) as late:
        await asyncio.wait_for(processes.engine.infer(ask("hang", f"hang {file}")), 10)
    assert late.value.details == {"by": "server"}
    assert 0.4 < time.monotonic() - began < 5
    await wait_until(lambda: gone(pid), "the worker to be gone")
    await wait_until(lambda: gone(int(file.read_text())), "the grandchild to be gone")
    await still_serves(processes, "hang")


async def test_a_worker_that_is_stopped_by_a_signal_is_killed_like_one_that_hangs(
    processes: Bench, ask: Ask, wait_until: Wait, still_serves: Check
) -> None:
    # It never starts the batch, so the client waits for the next worker and loses nothing.
    await processes.load("echo", response_timeout_s=0.5)
    pid = pid_of(processes, "echo")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert body(await asyncio.wait_for(processes.engine.infer(ask("echo", b"patient")), 10)) == b"patient"
    await wait_until(lambda: gone(pid))
    (worker,) = processes.engine.describe("echo").workers
    assert worker.last_exit == "killed by SIGKILL"
    await still_serves(processes, "echo")


async def test_a_crash_at_boot_is_tried_three_times_and_told_with_its_last_line(
    processes: Bench, children: Any, still_serves: Check
) -> None:
    await processes.load("echo")
    with pytest.raises(LoadError, match=r"exit code 9.*cannot find libmodel\.so") as caught:
        await processes.load("crash_at_load")
    assert "cannot find libmodel.so" in caught.value.details["log"]
    assert (processes.store.folder / "crash_at_load" / "attempts").read_text() == "xxx"
    assert len(children()) == 1
    await still_serves(processes, "echo")


async def test_an_exception_at_load_is_told_with_its_last_line(processes: Bench, still_serves: Check) -> None:
    await processes.load("echo")
    with pytest.raises(LoadError, match=r"^RuntimeError: the weights are missing$"):
        await processes.load("bad_init")
    await still_serves(processes, "echo")


async def test_a_load_that_hangs_is_ended(processes: Bench, children: Any, still_serves: Check) -> None:
    processes.defaults["load_timeout_s"] = 0.4
    with pytest.raises(LoadError, match=r"did not load within 0\.4 s"):
        await processes.load("hang_at_load")
    assert children() == []


async def test_a_client_that_leaves_mid_batch_does_not_disturb_its_mates(
    processes: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, still_serves: Check
) -> None:
    await processes.load("gate", batch_size=3, max_batch_delay_ms=1_000)
    gate = tmp_path / "gate"
    leaves, *stay = [begin(processes.engine.infer(ask("gate", each))) for each in (str(gate), "a", "b")]
    await wait_until(gate.with_suffix(".started").exists)
    pid = pid_of(processes, "gate")
    leaves.cancel()
    await asyncio.wait([leaves])
    gate.touch()
    assert [body(await asyncio.wait_for(each, 10)) for each in stay] == [b"a", b"b"]
    assert pid_of(processes, "gate") == pid
    await still_serves(processes, "gate")


async def test_a_full_queue_refuses_at_once(
    processes: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, still_serves: Check
) -> None:
    processes.defaults["queue_size"] = 3
    await processes.load("gate")
    gate = tmp_path / "gate"
    held = begin(processes.engine.infer(ask("gate", str(gate))))
    await wait_until(gate.with_suffix(".started").exists)
    waiting = [begin(processes.engine.infer(ask("gate", b"waits"))) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await asyncio.wait_for(processes.engine.infer(ask("gate")), 1)
    gate.touch()
    await asyncio.wait_for(asyncio.gather(held, *waiting), 10)
    await still_serves(processes, "gate")


async def test_one_bad_item_in_a_batch_of_eight_fails_alone(
    processes: Bench, ask: Ask, still_serves: Check
) -> None:
    await processes.load("poison", batch_size=8, max_batch_delay_ms=1_000)
    pid = pid_of(processes, "poison")
    bodies = [b"poison" if n == 5 else b"%d" % n for n in range(8)]
    asked = (processes.engine.infer(ask("poison", each)) for each in bodies)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(answers[5], HandlerError)
    good = [json.loads(body(each))["body"] for n, each in enumerate(answers) if n != 5]
    assert good == ["0", "1", "2", "3", "4", "6", "7"]
    assert pid_of(processes, "poison") == pid
    await still_serves(processes, "poison")


async def test_scaling_under_load_loses_no_request(
    processes: Bench, ask: Ask, wait_until: Wait, children: Any, still_serves: Check
) -> None:
    await processes.load("slow", workers=3)
    stop = asyncio.Event()

    async def client() -> int:
        served = 0
        while not stop.is_set():
            await processes.engine.infer(ask("slow", b"0.005"))
            served += 1
        return served

    clients = [begin(client()) for _ in range(8)]
    for count in (1, 3, 2, 1):
        await processes.engine.scale("slow", count, count)
        await wait_until(lambda count=count: len(children()) == count)
    stop.set()
    assert all(await asyncio.wait_for(asyncio.gather(*clients), 20))
    await still_serves(processes, "slow", b"0")


async def test_closing_answers_everything_that_is_held(processes: Bench, ask: Ask, children: Any) -> None:
    await processes.load("slow", workers=2)
    asked = [begin(processes.engine.infer(ask("slow", b"0.05"))) for _ in range(10)]
    await asyncio.sleep(0.05)
    await processes.close()
    assert [body(await each) for each in asked] == [b"0.05"] * 10
    assert children() == []


async def test_closing_does_not_wait_for_a_hung_worker_beyond_its_time(
    processes: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, children: Any
) -> None:
    processes.drain_s = 0.3
    await processes.load("hang")
    file = tmp_path / "grandchild"
    held = begin(processes.engine.infer(ask("hang", f"hang {file}")))
    await wait_until(file.exists)
    began = time.monotonic()
    await processes.close()
    assert time.monotonic() - began < 4
    with pytest.raises(WorkerDied):
        await held
    await wait_until(lambda: not children())


async def test_unloading_ends_a_worker_that_does_not_end_in_its_time(
    processes: Bench, ask: Ask, tmp_path: Path, wait_until: Wait, still_serves: Check
) -> None:
    processes.drain_s = 0.3  # unregister_model_timeout
    await processes.load("hang")
    await processes.load("echo")
    file = tmp_path / "grandchild"
    held = begin(processes.engine.infer(ask("hang", f"hang {file}")))
    await wait_until(file.exists)
    began = time.monotonic()
    await processes.engine.unload("hang")
    assert time.monotonic() - began < 4
    with pytest.raises(WorkerDied):
        await held
    assert not processes.engine.has_version("hang", "1")
    await still_serves(processes, "echo")


async def test_a_grandchild_that_outlives_the_worker_delays_nothing_and_is_killed(
    processes: Bench, ask: Ask, wait_until: Wait, still_serves: Check
) -> None:
    await processes.load("grandchild")
    grandchild = int(body(await processes.engine.infer(ask("grandchild"))))
    assert psutil.pid_exists(grandchild)
    pid = pid_of(processes, "grandchild")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: gone(grandchild))
    await still_serves(processes, "grandchild")


async def test_what_a_handler_prints_is_logged_whole_and_never_blocks_it(
    processes: Bench, ask: Ask, caplog: pytest.LogCaptureFixture, wait_until: Wait, still_serves: Check
) -> None:
    caplog.set_level(logging.INFO, "mms_lite.model")
    await processes.load("loud")
    await asyncio.wait_for(processes.engine.infer(ask("loud", b"3000")), 20)

    def texts(level: int) -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "mms_lite.model" and r.levelno == level]

    await wait_until(lambda: any(text.startswith("y" * 10_000) for text in texts(logging.INFO)))
    lines = [text for text in texts(logging.INFO) if text.startswith("line ")]
    assert lines == [f"line {n} " + "x" * 80 for n in range(3000)]
    await wait_until(lambda: texts(logging.WARNING) == [f"error {n}" for n in range(3000)])
    streams = {record.thread_name for record in caplog.records if record.name == "mms_lite.model"}
    assert streams == {"W-loud-0-stdout", "W-loud-0-stderr"}
    await still_serves(processes, "loud", b"0")


async def test_modules_beside_the_handler_do_not_break_the_start(
    processes: Bench, ask: Ask, still_serves: Check
) -> None:
    await processes.load("shadows")
    answer = json.loads(body(await processes.engine.infer(ask("shadows"))))
    assert answer == {"queue": "the queue of the model", "json": '{"a": 1}', "body": "hello"}
    await still_serves(processes, "shadows")


async def facts(bench: Bench, ask: Ask, **options: Any) -> dict[str, Any]:
    await bench.load("facts", **options)
    answer: dict[str, Any] = json.loads(body(await bench.engine.infer(ask("facts"))))
    return answer


async def test_a_worker_runs_in_its_models_folder_with_the_folder_on_its_path(
    processes: Bench, ask: Ask, still_serves: Check
) -> None:
    told = await facts(processes, ask)
    folder = str((processes.store.folder / "facts").resolve())
    assert told["cwd"] == folder
    assert told["path"][0] == folder
    assert not any(path.endswith("mms_lite/worker") for path in told["path"])
    assert told["pid"] == pid_of(processes, "facts")
    assert told["python"] == sys.executable
    assert told["gpu"] is None
    await still_serves(processes, "facts")


@pytest.mark.parametrize(("cores", "workers", "threads"), [(8, 2, "4"), (2, 4, "1")])
async def test_the_cores_are_shared_among_the_workers(
    processes: Bench, ask: Ask, cores: int, workers: int, threads: str
) -> None:
    processes.cores = cores
    processes.launcher = launcher_with({k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"})
    told = await facts(processes, ask, workers=workers)
    assert told["environ"]["OMP_NUM_THREADS"] == threads


async def test_a_number_of_threads_that_the_user_set_stays(processes: Bench, ask: Ask) -> None:
    processes.launcher = launcher_with({**os.environ, "OMP_NUM_THREADS": "7"})
    told = await facts(processes, ask)
    assert told["environ"]["OMP_NUM_THREADS"] == "7"


def launcher_with(environ: dict[str, str]) -> ProcessLauncher:
    return ProcessLauncher(max_frame_bytes=1 << 20, environ=environ)


async def test_a_worker_starts_in_a_bare_interpreter_with_the_standard_library_alone(
    store: Any, tmp_path: Path, make_model: Any, ask: Ask
) -> None:
    bare = tmp_path / "bare"
    create = await asyncio.create_subprocess_exec(sys.executable, "-m", "venv", "--without-pip", str(bare))
    assert await create.wait() == 0
    python = str(bare / "bin" / "python")
    launcher = launcher_with({"PATH": os.environ["PATH"]})
    model = make_model(launcher, path=str(store.add("facts")), python=python)
    await model.scale(1, 1)
    told = json.loads(body(await model.submit(ask("m")).answer()))
    assert told["python"] == python
    loaded = {name.partition(".")[0] for name in told["modules"]}
    own = {"mms_lite", "service", "__main__", "sitecustomize"}  # the last is a distribution's
    outside = {n for n in loaded - own if n not in sys.stdlib_module_names and not n.startswith("_")}
    assert outside == set()
    assert loaded & {"numpy", "aiohttp", "orjson", "psutil", "asyncio", "uvloop", "model_archiver"} == set()
    inside = {name for name in told["modules"] if name.startswith("mms_lite.")}
    assert {n.split(".")[1] for n in inside} <= {
        "errors",
        "memory",
        "shared",
        "types",
        "transport",
        "wire",
        "worker",
    }


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"python": "/no/such/python"}, "interpreter"), ({"runtime": "no-such-python2"}, "no-such-python2")],
    ids=["interpreter", "runtime"],
)
async def test_a_python_that_is_not_there_is_a_load_error_and_leaks_no_descriptor(
    store: Any, make_model: Any, fields: dict[str, Any], match: str
) -> None:
    model = make_model(launcher_with({"PATH": "/no/such/folder"}), path=str(store.add("echo")), **fields)
    before = open_files()
    with pytest.raises(LoadError, match=match):
        await model.scale(1, 1)
    assert open_files() == before


@pytest.mark.parametrize(("module", "name"), [(socket, "socketpair"), (os, "truncate"), (mmap, "mmap")])
async def test_a_worker_that_cannot_be_started_for_want_of_a_resource_leaks_no_descriptor(
    store: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    def refuse(*_args: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    model = make_model(launcher_with(dict(os.environ)), path=str(store.add("echo")))
    before = open_files()
    with monkeypatch.context() as short:
        short.setattr(module, name, refuse)
        with pytest.raises(LoadError, match="Too many open files"):
            await model.scale(1, 1)
    assert open_files() == before


async def test_restarts_and_reloads_leak_no_descriptor(
    processes: Bench, ask: Ask, still_serves: Check, wait_until: Wait
) -> None:
    await processes.load("crash")

    async def crash_and_reload() -> None:
        with pytest.raises(WorkerDied):
            await processes.engine.infer(ask("crash", b"kill"))
        await processes.engine.infer(ask("crash", b"good"))
        await processes.engine.scale("crash", 2, 2)
        await processes.engine.scale("crash", 1, 1)

    await crash_and_reload()
    before = open_files()
    for _ in range(3):
        await crash_and_reload()
    await wait_until(lambda: open_files() <= before, "the descriptors to be closed")
    await still_serves(processes, "crash")


@pytest.mark.time_limit(20)
async def test_requests_that_one_frame_cannot_hold_are_answered_and_one_over_its_limit_is_refused(
    processes: Bench, ask: Ask, still_serves: Check
) -> None:
    processes.launcher = launcher_with(dict(os.environ))  # frames of 1 MiB
    await processes.load("echo", batch_size=8, max_batch_delay_ms=100)
    sizes = (400 << 10, 400 << 10, 2 << 20, 400 << 10, 1, 1000 << 10)
    asked = [begin(processes.engine.infer(ask("echo", bytes(size)))) for size in sizes]
    with pytest.raises(RequestTooLarge, match="max_frame_bytes is 1048576"):
        await asyncio.wait_for(asked.pop(2), 10)
    assert [len(body(await asyncio.wait_for(each, 10))) for each in asked] == [*sizes[:2], *sizes[3:]]
    (worker,) = processes.engine.describe("echo").workers
    assert worker.restarts == 0
    await still_serves(processes, "echo")


async def test_an_answer_over_the_frame_limit_fails_alone(
    processes: Bench, ask: Ask, still_serves: Check
) -> None:
    processes.launcher = launcher_with(dict(os.environ))
    processes.store.add("echo", "big")
    (processes.store.folder / "big" / "service.py").write_text(
        "def handle(data, context):\n"
        "    return data and [b'x' * (2 << 20) if d['body'] == b'big' else b'ok' for d in data]\n"
    )
    await processes.load("echo", "big", batch_size=2, max_batch_delay_ms=5_000)
    big, mate = [begin(processes.engine.infer(ask("big", each))) for each in (b"big", b"small")]
    with pytest.raises(HandlerError, match="max_frame_bytes is 1048576"):
        await asyncio.wait_for(big, 10)
    assert body(await mate) == b"ok"
    (worker,) = processes.engine.describe("big").workers
    assert worker.restarts == 0
    await still_serves(processes, "big")


SERVER = """
    import asyncio, logging, sys
    from pathlib import Path
    from mms_lite.engine.engine import Engine
    from mms_lite.engine.launcher import ProcessLauncher
    from mms_lite.engine.repository.mar import Defaults, MarRepository
    from mms_lite.types import InferRequest, LoadOptions, Tensor

    async def main(store, busy):
        defaults = Defaults(workers=2, queue_size=10, response_timeout_s=600, load_timeout_s=20)
        repository = MarRepository(Path(store), Path(store), defaults)
        engine = Engine(repository, ProcessLauncher(max_frame_bytes=1 << 20), cores=1)
        status = await engine.load(LoadOptions(url="slow", name="slow", handler="service:handle"))
        print(*(worker.pid for worker in status.workers), flush=True)
        part = Tensor("body", "BYTES", (), bytearray(busy.encode()))
        await asyncio.gather(*(
            engine.infer(InferRequest(id="1", model="slow", inputs=[part])) for _ in range(2)
        ))
        await asyncio.sleep(600)

    asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("seconds", ["0", "600"], ids=["idle", "busy"])
async def test_workers_of_a_server_that_is_killed_end_with_it(
    store: Any, wait_until: Wait, seconds: str
) -> None:
    store.add("slow")
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(SERVER), str(store.folder), seconds, stdout=subprocess.PIPE
    )
    pids: list[int] = []
    try:
        assert server.stdout is not None
        line = await asyncio.wait_for(server.stdout.readline(), 20)
        pids = [int(pid) for pid in line.split()]
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
        server.kill()
        await wait_until(lambda: all(gone(pid) for pid in pids), "the workers to end", timeout_s=5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        await server.communicate()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def test_a_worker_whose_parent_is_another_than_it_was_told_leaves_at_once() -> None:
    boot = str(Path(sys.modules["mms_lite"].__path__[0]) / "worker" / "boot.py")
    process = await asyncio.create_subprocess_exec(sys.executable, boot, "--fd", "0", "--parent", "1")
    assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_worker_that_could_be_polled_only_with_a_low_descriptor_still_serves(
    processes: Bench, ask: Ask, still_serves: Check
) -> None:
    # A worker inherits its socket under the server's number for it, which many clients push past 1024.
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1400:
        pytest.skip("this machine allows too few descriptors")
    with contextlib.ExitStack() as many:
        for _ in range(1100):
            many.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        await processes.load("echo")
        answer = await asyncio.wait_for(processes.engine.infer(ask("echo", b"x")), 10)
        assert body(answer) == b"x"
        await still_serves(processes, "echo")


async def test_the_state_of_a_model_whose_workers_cannot_restart_is_failed(
    processes: Bench, ask: Ask, wait_until: Wait
) -> None:
    folder = processes.store.add("crash", "m")
    await processes.load("crash", "m")
    (folder / "service.py").write_text("raise RuntimeError('the file has changed')")
    with pytest.raises(WorkerDied):
        await processes.engine.infer(ask("m", b"kill"))
    await wait_until(lambda: processes.engine.describe("m").state is VersionState.FAILED)
    assert processes.engine.describe("m").detail == "RuntimeError: the file has changed"
