"""The composition root: build -> serve -> drain -> stop. Signals only set an event; one coroutine acts.

`report` receives plain events on the way up ({"event": "listening" | "model" | "note" | "ready" | "failed",
...}), so that a command line that started the server in the background can tell its user.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mms_lite import memory
from mms_lite.config import LoadedConfig
from mms_lite.config_report import banner, workers_per_model
from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import Guard, ProcessLauncher, worker_environ
from mms_lite.engine.repository.allow_list import AllowList
from mms_lite.engine.repository.download import Downloads
from mms_lite.engine.repository.mar import Defaults, MarRepository, startup_models
from mms_lite.engine.repository.triton import TritonRepository, startup_names
from mms_lite.errors import ConfigError, LoadError, ModelNotFound, ServingError
from mms_lite.frontends.listener import Access
from mms_lite.host_metrics import HostMetrics
from mms_lite.instance import Instance
from mms_lite.listening import Listener, Listening
from mms_lite.machine import cpu_count, gpu_count
from mms_lite.shared import MOST_BYTES, Arena
from mms_lite.types import LoadOptions
from mms_lite.work_dir import WorkDir

EXIT_OK = 0
EXIT_MODELS_FAILED = 3
_ANSWERS_S = 1.0  # for answers to requests that outlasted the drain time
_NO_LIMIT_S = 10 * 365 * 86400.0  # finite, for clocks and timers that know no other numbers

Report = Callable[[Mapping[str, Any]], None]

_log = logging.getLogger("mms_lite.server")


class Server:
    """One configured server. `run` serves until a signal or `stop`, and returns the exit code."""

    def __init__(self, loaded: LoadedConfig, *, report: Report, access: Access) -> None:
        self._loaded = loaded
        self._config = loaded.config
        self._host_metrics = HostMetrics(loaded.config.metric_time_interval_s)
        self._report = report
        self._access = access
        self._stopping = asyncio.Event()
        self._guard = Guard()
        self._arena = Arena.create(min(MOST_BYTES, loaded.config.max_bytes_in_flight))

    def stop(self) -> None:
        """Begin to drain; a second call ends the process at once."""
        if self._stopping.is_set():
            os.write(2, b"Stopped at once: what was open is cut.\n")
            os._exit(1)
        self._stopping.set()

    async def run(self, instance: Instance) -> int:
        """Serve until told to stop; `instance` is claimed and told the bound addresses.

        Raises:
            ConfigError: an address is taken or cannot be served.
        """
        loop = asyncio.get_running_loop()
        ends = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # in the background, or under nohup
            ends.append(signal.SIGHUP)
        for number in ends:
            loop.add_signal_handler(number, self.stop)
        _allow_many_files()
        work_dir = WorkDir(self._config.temp_directory)
        try:
            await asyncio.to_thread(work_dir.make)
            self._guard.start()
            self._host_metrics.start()
            return await self._serve(work_dir.path, instance)
        finally:
            self._host_metrics.close()
            await asyncio.to_thread(self._guard.close)
            await asyncio.to_thread(work_dir.remove)
            _log.info("Model server stopped.")

    async def _serve(self, work_dir: Path, instance: Instance) -> int:
        config = self._config
        models, engine = self._build(work_dir)
        listening = Listening(self._loaded, engine, access=self._access, note=self._note, arena=self._arena)
        state: dict[str, Any] = {"pid": os.getpid(), "drain_timeout_s": config.drain_timeout_s}
        try:
            addresses = await listening.open(instance)
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
            await self._drain(engine, listening.listeners)

    async def _drain(self, engine: Engine, listeners: list[Listener]) -> None:
        """Stop accepting, let open requests finish, then unload; all within drain_timeout_s."""
        drain_s = self._config.drain_timeout_s
        _log.info("Stopping: open requests have %g s. A second signal ends at once.", drain_s)
        until = time.monotonic() + drain_s
        await engine.stop_loading()  # else a registration that is under way holds its listener up
        # The models stay until the requests are done: one whose body is still coming finds its model.
        await asyncio.gather(*(listener.drain(drain_s) for listener in listeners))
        await engine.close(drain_s=max(0.0, until - time.monotonic()))
        # What was too slow has been refused now, and the answer is on its way.
        await asyncio.gather(*(listener.stop(_ANSWERS_S) for listener in listeners))

    def _build(self, work_dir: Path) -> tuple[MarRepository | TritonRepository, Engine]:
        config = self._config
        cores, gpus = cpu_count(), gpu_count(config.number_of_gpu)
        defaults = Defaults(
            workers=workers_per_model(config, cpus=cores, gpus=gpus),
            queue_size=config.job_queue_size,
            response_timeout_s=_NO_LIMIT_S if config.debug else config.response_timeout_s,
            load_timeout_s=_NO_LIMIT_S if config.debug else config.load_timeout_s,
            handler=config.default_service_handler,
            devices=tuple(range(gpus)),
            decode_input_request=config.decode_input_request,
        )
        lines = banner(self._loaded, cpus=cores, gpus=gpus, workers=defaults.workers)
        _log.info("%s", "\n".join(lines), extra={"lines": lines})
        models: MarRepository | TritonRepository
        downloads = Downloads(
            AllowList.parse(config.allowed_urls),
            max_bytes=config.max_download_bytes,
            timeout_s=config.download_timeout_s,
        )
        if config.model_repository is None:
            models = MarRepository(config.model_store, work_dir, defaults, downloads)
        else:
            models = TritonRepository(config.model_repository, work_dir, defaults)
        launcher = ProcessLauncher(
            max_frame_bytes=config.max_frame_bytes,
            environ={
                **worker_environ(os.environ, config.blacklist_env_vars),
                "MMS_DECODE_INPUT_REQUEST": str(config.decode_input_request).lower(),
            },
            guard=self._guard,
            arena=self._arena,
        )
        engine = Engine(
            models,
            launcher,
            cores=cores,
            unload_s=config.unregister_model_timeout_s,
            starting=True,
            poll_s=config.repository_poll_s if config.model_control_mode == "poll" else None,
        )
        return models, engine

    async def _load(self, engine: Engine, models: MarRepository | TritonRepository) -> int:
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
        if not failed:
            return EXIT_OK
        message = f"{failed} of {len(wanted)} models failed to load."
        later = self._config.model_control_mode != "none"  # files that change, or clients, may bring models
        if self._config.strict or (failed == len(wanted) and not later):
            _log.error("%s", message)
            self._report({"event": "failed", "message": message})
            return EXIT_MODELS_FAILED
        self._note(message)
        return EXIT_OK

    def _note(self, message: str) -> None:
        """Tell the log, and whoever starts the server."""
        _log.warning("%s", message)
        self._report({"event": "note", "message": message})

    def _startup_models(self, models: MarRepository | TritonRepository) -> Sequence[LoadOptions | str]:
        config = self._config
        if isinstance(models, TritonRepository):
            if config.load_models and config.model_control_mode != "explicit":
                self._note("load_models is ignored: all models of the repository are served in this mode")
            try:
                return startup_names(models, config.model_control_mode, config.load_models)
            except LoadError as error:
                raise ConfigError(error.message) from error
        if config.load_models.strip().upper() != "ALL":
            return startup_models(config.load_models)
        try:
            return models.all()
        except ModelNotFound as error:
            self._note(error.message)
            return []


def _allow_many_files() -> None:
    """Raise the soft limit of open files to the hard one: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(loaded: LoadedConfig, *, report: Report, access: Access, instance: Instance) -> int:
    """Run a server on an event loop of its own (uvloop where installed) and return the exit code.

    Raises:
        ConfigError: as `Server.run`.
    """
    memory.keep_freed()
    try:
        import uvloop
    except ImportError:
        loop = asyncio.new_event_loop()
    else:
        loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(Server(loaded, report=report, access=access).run(instance))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
