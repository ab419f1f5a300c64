"""What the core's tests share: model folders, engines on threads and on processes, waiting, time limits."""

import asyncio
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np  # noqa: F401 - tests that forget imports must not forget this one: it loads once only
import psutil
import pytest

from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import InlineLauncher, Launcher, ProcessLauncher
from mms_lite.engine.model import Model
from mms_lite.engine.repository.mar import Defaults, MarRepository
from mms_lite.types import InferRequest, LoadOptions, ModelSpec, ModelStatus, Tensor
from mms_lite.wire import Item, Outcome
from mms_lite.worker import loop

HANDLERS = Path(__file__).parent / "handlers"
MAX_FRAME_BYTES = 64 << 20
_LIMIT_S = 60.0
_STEP_S = 0.005

Load = Callable[..., Any]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "time_limit(seconds): the test fails when it runs longer (default 60)")


@pytest.fixture(autouse=True)
def _time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs fails by itself, with a traceback of where it hung."""
    marker = request.node.get_closest_marker("time_limit")
    if marker is None and {"e2e", "examples"} & set(request.path.parts):
        yield
        return
    limit_s = marker.args[0] if marker else _LIMIT_S

    def expired(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"the test ran longer than {limit_s:g} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    """Wait until a condition holds, with the loop running: `await wait_until(lambda: ..., "what")`."""

    async def wait(condition: Callable[[], Any], what: str = "the condition", timeout_s: float = 10.0) -> Any:
        until = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > until:
                pytest.fail(f"waited {timeout_s:g} s in vain for {what}")
            await asyncio.sleep(_STEP_S)
        return value

    return wait


@pytest.fixture
def ask() -> Callable[..., InferRequest]:
    """Make a request with one raw part, as a client of the MMS API would."""

    def make(model: str, body: bytes | str = b"hello", **fields: Any) -> InferRequest:
        data = body.encode() if isinstance(body, str) else body
        part = Tensor("body", "BYTES", (), bytearray(data), fields.pop("content_type", ""))
        return InferRequest(id=fields.pop("id", "request-1"), model=model, inputs=[part], **fields)

    return make


class Store:
    """A model store in a temporary folder, filled from tests/handlers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, url: str, files: Mapping[str, str]) -> None:
        """Write a model of these files: a zip if `url` has a suffix, else a folder."""
        target = self.folder / url
        if target.suffix:
            with zipfile.ZipFile(target, "w") as archive:
                for name, text in files.items():
                    archive.writestr(name, text)
            return
        for name, text in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text)

    def add(self, handler: str, name: str | None = None) -> Path:
        """Make a model folder with one handler of tests/handlers as service.py; return it."""
        folder = self.folder / (name or handler)
        source = HANDLERS / handler
        if source.is_dir():
            shutil.copytree(source, folder)
        else:
            folder.mkdir()
            shutil.copy(source.with_suffix(".py"), folder / "service.py")
        return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = tmp_path / "store"
    folder.mkdir()
    return Store(folder)


class Bench:
    """An engine with its store: `await bench.load("echo")` loads tests/handlers/echo.py."""

    def __init__(self, store: Store, work: Path, launcher: Launcher) -> None:
        self.store = store
        self.work = work
        self.launcher = launcher
        self.defaults: dict[str, Any] = {
            "workers": 1,
            "queue_size": 100,
            "response_timeout_s": 20.0,
            "load_timeout_s": 20.0,
        }
        self.drain_s = 5.0
        self.cores = 2
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            repository = MarRepository(self.store.folder, self.work, Defaults(**self.defaults))
            self._engine = Engine(repository, self.launcher, cores=self.cores, unload_s=self.drain_s)
        return self._engine

    def options(self, handler: str, name: str | None = None, **fields: Any) -> LoadOptions:
        name = name or handler
        if not (self.store.folder / name).exists():
            self.store.add(handler, name)
        fields.setdefault(
            "handler", "service" if handler in ("classy", "bad_init_class") else "service:handle"
        )
        return LoadOptions(url=name, name=name, **fields)

    async def load(self, handler: str, name: str | None = None, **fields: Any) -> ModelStatus:
        return await self.engine.load(self.options(handler, name, **fields))

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close(drain_s=self.drain_s)


def own_children() -> list[psutil.Process]:
    """Return the live processes that this test process or its children started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def worker_threads(name: str) -> list[threading.Thread]:
    """Return the live inline workers of a model."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"W-{name}-")]


@pytest.fixture
def live_workers() -> Callable[[str], list[threading.Thread]]:
    return worker_threads


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    return own_children


@pytest.fixture
async def inline(store: Store, tmp_path: Path) -> AsyncIterator[Bench]:
    """An engine whose workers are threads."""
    bench = Bench(store, tmp_path, InlineLauncher(loop.run, max_frame_bytes=MAX_FRAME_BYTES))
    yield bench
    await bench.close()


@pytest.fixture
async def processes(store: Store, tmp_path: Path, wait_until: Callable[..., Any]) -> AsyncIterator[Bench]:
    """An engine whose workers are processes. None is left when the test is over."""
    bench = Bench(store, tmp_path, ProcessLauncher(max_frame_bytes=MAX_FRAME_BYTES))
    yield bench
    await bench.close()
    await wait_until(lambda: not own_children(), "every child process to end")


@pytest.fixture
def still_serves(ask: Callable[..., InferRequest], wait_until: Callable[..., Any]) -> Callable[..., Any]:
    """Assert that the model answers a good request, and that no child is left once the engine is closed."""

    async def check(bench: Bench, model: str, body: bytes = b"good") -> None:
        answer = await asyncio.wait_for(bench.engine.infer(ask(model, body)), 20)
        assert answer.status == 200
        await bench.close()
        await wait_until(lambda: not own_children(), "every child process to end")

    return check


async def no_call(_item: Item) -> Outcome:
    """Stand in for the engine behind a model that calls no other."""
    raise AssertionError("this model calls no other")


@pytest.fixture
async def make_model(tmp_path: Path) -> AsyncIterator[Callable[..., Model]]:
    """Make a Model without an engine: `make_model(launcher, batch_size=8, ...)`; it is closed at the end."""
    models: list[Model] = []

    def make(launcher: Launcher, *, cores: int = 2, call: Any = no_call, **fields: Any) -> Model:
        defaults: dict[str, Any] = {
            "name": "m",
            "version": "1",
            "path": str(tmp_path),
            "handler": "service:handle",
            "response_timeout_s": 20.0,
            "load_timeout_s": 20.0,
        }
        model = Model(ModelSpec(**{**defaults, **fields}), launcher, cores=cores, call=call)
        models.append(model)
        return model

    yield make
    for model in models:
        await model.close(drain_s=0)
