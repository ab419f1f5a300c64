"""The composition root: build -> serve -> drain -> stop. Signals only set an event; one coroutine acts.

`report` receives plain events on the way up ({"event": "listening" | "model" | "ready" | "failed", ...}), so
that a command line that started the server in the background can tell its user.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mms_lite.address import Address
from mms_lite.config import Config
from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import Guard, ProcessLauncher
from mms_lite.engine.repository.mar import Defaults, MarRepository, startup_models
from mms_lite.errors import ConfigError, ServingError
from mms_lite.frontends import mms
from mms_lite.frontends.http import HttpListener
from mms_lite.frontends.message import HttpProtocol, Limits
from mms_lite.instance import Instance
from mms_lite.machine import cpu_count, gpu_count
from mms_lite.types import LoadOptions
from mms_lite.work_dir import WorkDir

EXIT_OK = 0
EXIT_MODELS_FAILED = 3
_ANSWERS_S = 1.0  # for answers to requests that outlasted the drain time
_FRAME_HEADROOM = 1 << 20  # what a message between processes holds besides the body

Report = Callable[[Mapping[str, Any]], None]

_log = logging.getLogger("mms_lite.server")


class Server:
    """One configured server. `run` serves until a signal or `stop`, and returns the exit code."""

    def __init__(self, config: Config, *, report: Report, access: Callable[[str], None]) -> None:
        self._config = config
        self._report = report
        self._access = access
        self._stopping = asyncio.Event()
        self._guard = Guard()

    def stop(self) -> None:
        """Begin to drain; a second call ends the process at once."""
        if self._stopping.is_set():
            os._exit(1)
        self._stopping.set()

    async def run(self, instance: Instance) -> int:
        """Serve until told to stop; `instance` is claimed and told the bound addresses.

        Raises:
            ConfigError: an address is taken or cannot be served.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        _allow_many_files()
        _let_models_run()
        work_dir = WorkDir(self._config.temp_directory)
        try:
            await asyncio.to_thread(work_dir.make)
            self._guard.start()
            return await self._serve(work_dir.path, instance)
        finally:
            await asyncio.to_thread(self._guard.close)
            await asyncio.to_thread(work_dir.remove)
            _log.info("Model server stopped.")

    async def _serve(self, work_dir: Path, instance: Instance) -> int:
        config = self._config
        if config.max_request_size + _FRAME_HEADROOM > config.max_frame_bytes:
            raise ConfigError("max_request_size must be smaller than max_frame_bytes by a mebibyte")
        models, engine = self._build(work_dir)
        listeners: list[HttpListener] = []
        state: dict[str, Any] = {"pid": os.getpid(), "drain_timeout_s": config.drain_timeout_s}
        try:
            addresses = await self._listen(engine, listeners)
            state.update(addresses)
            instance.describe(state)
            self._report({"event": "listening", **addresses})
            code = await self._load(engine, models)
            gc.set_threshold(20_000, 20, 50)
            gc.freeze()  # what start-up made stays: later collections need not look at it
            if code == EXIT_OK and not self._stopping.is_set():
                self._report({"event": "ready", **addresses})
                await self._stopping.wait()
            return code
        finally:
            with contextlib.suppress(OSError):  # a full disk must not keep the requests from their drain
                instance.describe({**state, "stopping": True})
            await self._drain(engine, listeners)

    async def _drain(self, engine: Engine, listeners: list[HttpListener]) -> None:
        """Stop accepting, let open requests finish, then unload; all within drain_timeout_s."""
        drain_s = self._config.drain_timeout_s
        _log.info("Stopping: open requests have %g s.", drain_s)
        until = time.monotonic() + drain_s
        # The models stay until the requests are done: one whose body is still coming finds its model.
        await asyncio.gather(*(listener.drain(drain_s) for listener in listeners))
        await engine.close(drain_s=max(0.0, until - time.monotonic()))
        # What was too slow has been refused now, and the answer is on its way.
        await asyncio.gather(*(listener.stop(_ANSWERS_S) for listener in listeners))

    def _build(self, work_dir: Path) -> tuple[MarRepository, Engine]:
        config = self._config
        cores, gpus = cpu_count(), gpu_count(config.number_of_gpu)
        defaults = Defaults(
            workers=config.default_workers_per_model or gpus or cores,
            queue_size=config.job_queue_size,
            response_timeout_s=config.response_timeout_s,
            load_timeout_s=config.load_timeout_s,
            handler=config.default_service_handler,
            devices=tuple(range(gpus)),
            decode_input_request=config.decode_input_request,
        )
        models = MarRepository(config.model_store, work_dir, defaults)
        launcher = ProcessLauncher(max_frame_bytes=config.max_frame_bytes, guard=self._guard)
        engine = Engine(
            models,
            launcher,
            cores=cores,
            unload_s=config.unregister_model_timeout_s,
        )
        return models, engine

    async def _listen(self, engine: Engine, listeners: list[HttpListener]) -> dict[str, str]:
        config = self._config
        limits = Limits(
            max_request_size=config.max_request_size,
            max_response_size=config.max_response_size,
            max_bytes_in_flight=config.max_bytes_in_flight,
        )
        workers = config.default_workers_per_model
        wanted: list[tuple[str, Address, HttpProtocol]]
        if config.shares_listener:
            both = mms.merged(engine, limits, default_workers=workers)
            wanted = [("inference_address", config.inference_address, both)]
        else:
            management = mms.management(engine, limits, default_workers=workers)
            wanted = [
                ("inference_address", config.inference_address, mms.inference(engine, limits)),
                ("management_address", config.management_address, management),
            ]
        bound: dict[str, str] = {}
        for name, address, protocol in wanted:
            listener = HttpListener(protocol, limits, access=self._access)
            listeners.append(listener)
            bound[name] = await _bind(listener, address)
        bound.setdefault("management_address", bound["inference_address"])
        return bound

    async def _load(self, engine: Engine, models: MarRepository) -> int:
        wanted = self._startup_models(models)
        begin = time.monotonic()

        def told(name: str, error: ServingError | None) -> None:
            event = {"event": "model", "model": name, "seconds": time.monotonic() - begin}
            self._report({**event, "error": error.message if error else None})

        loading = asyncio.ensure_future(engine.start(wanted, told))
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            await asyncio.wait([loading])
            return EXIT_OK
        failed = loading.result()
        if failed and (self._config.strict or failed == len(wanted)):
            self._report({"event": "failed", "message": f"{failed} of {len(wanted)} models failed to load."})
            return EXIT_MODELS_FAILED
        return EXIT_OK

    def _startup_models(self, models: MarRepository) -> list[LoadOptions]:
        text = self._config.load_models
        if text.strip().upper() != "ALL":
            return startup_models(text)
        try:
            return models.all()
        except ServingError as error:
            _log.warning("%s", error.message)
            return []


async def _bind(listener: HttpListener, address: Address) -> str:
    if address.scheme != "http":
        raise ConfigError(f"addresses of scheme {address.scheme} are not served yet")
    if address.host not in ("127.0.0.1", "localhost", "::1"):
        _log.warning("Listening on %s: whoever reaches it can use this API.", address.host)
    try:
        port = await listener.start(address.host, address.port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address.host}:{address.port}: {error.strerror or error}"
        ) from error
    return str(replace(address, port=port))


def _allow_many_files() -> None:
    """Raise the soft limit of open files to the hard one: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _let_models_run() -> None:
    """Have the kernel finish a worker's time slice before it wakes this thread on the same core (Linux).

    Where the cores are full, each answer would else interrupt the model that was about to start its next
    batch. On a free core the thread wakes as fast as ever. Workers inherit it.
    """
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def serve(config: Config, *, report: Report, access: Callable[[str], None], instance: Instance) -> int:
    """Run a server on an event loop of its own (uvloop where installed) and return the exit code.

    Raises:
        ConfigError: as `Server.run`.
    """
    try:
        import uvloop
    except ImportError:
        loop = asyncio.new_event_loop()
    else:
        loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(Server(config, report=report, access=access).run(instance))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
