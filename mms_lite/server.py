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
import socket
import ssl
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mms_lite import memory
from mms_lite.address import Address
from mms_lite.config import LoadedConfig
from mms_lite.config_report import banner, workers_per_model
from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import Guard, ProcessLauncher, worker_environ
from mms_lite.engine.repository.allow_list import AllowList
from mms_lite.engine.repository.download import Downloads
from mms_lite.engine.repository.mar import Defaults, MarRepository, startup_models
from mms_lite.errors import ConfigError, ModelNotFound, ServingError
from mms_lite.frontends import mms
from mms_lite.frontends.auth import TOKEN_FILE, Authoriser, is_local, read_token
from mms_lite.frontends.listener import Access, HttpListener
from mms_lite.frontends.message import Cors, HttpProtocol, Limits
from mms_lite.frontends.prometheus import Prometheus
from mms_lite.host_metrics import HostMetrics
from mms_lite.instance import Instance
from mms_lite.machine import cpu_count, gpu_count
from mms_lite.shared import MOST_BYTES, Arena
from mms_lite.tls import server_context
from mms_lite.types import LoadOptions
from mms_lite.work_dir import WorkDir

EXIT_OK = 0
EXIT_MODELS_FAILED = 3
_ANSWERS_S = 1.0  # for answers to requests that outlasted the drain time
_NO_LIMIT_S = 10 * 365 * 86400.0  # finite, for clocks and timers that know no other numbers
_INFERENCE, _MANAGEMENT, _METRICS = "inference_address", "management_address", "metrics_address"

Report = Callable[[Mapping[str, Any]], None]

_log = logging.getLogger("mms_lite.server")


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """An address that is to be listened on, and the APIs that it serves.

    One that is `optional` is left out, with a warning, when its port is taken.
    """

    address: Address
    apis: Sequence[str]
    optional: bool = False


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
        listeners: list[HttpListener] = []
        state: dict[str, Any] = {"pid": os.getpid(), "drain_timeout_s": config.drain_timeout_s}
        try:
            addresses = await self._listen(engine, instance, listeners)
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
        _log.info("Stopping: open requests have %g s. A second signal ends at once.", drain_s)
        until = time.monotonic() + drain_s
        await engine.stop_loading()  # else a registration that is under way holds its listener up
        # The models stay until the requests are done: one whose body is still coming finds its model.
        await asyncio.gather(*(listener.drain(drain_s) for listener in listeners))
        await engine.close(drain_s=max(0.0, until - time.monotonic()))
        # What was too slow has been refused now, and the answer is on its way.
        await asyncio.gather(*(listener.stop(_ANSWERS_S) for listener in listeners))

    def _build(self, work_dir: Path) -> tuple[MarRepository, Engine]:
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
        downloads = Downloads(
            AllowList.parse(config.allowed_urls),
            max_bytes=config.max_download_bytes,
            timeout_s=config.download_timeout_s,
        )
        models = MarRepository(config.model_store, work_dir, defaults, downloads)
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
        )
        return models, engine

    async def _listen(
        self, engine: Engine, instance: Instance, listeners: list[HttpListener]
    ) -> dict[str, str]:
        """Open every address, into `listeners`; return where each API is now."""
        config = self._config
        limits = Limits(
            max_request_size=config.max_request_size,
            max_response_size=config.max_response_size,
            max_bytes_in_flight=config.max_bytes_in_flight,
        )
        cors = Cors.of(config.cors_allowed_origin, config.cors_allowed_methods, config.cors_allowed_headers)
        token_file, authoriser = await self._authoriser(instance)
        endpoints = self._endpoints()
        tls: ssl.SSLContext | None = None
        if any(endpoint.address.scheme == "https" for endpoint in endpoints):
            tls = await asyncio.to_thread(server_context, config)
        bound: dict[str, str] = {}
        for endpoint in endpoints:
            protocol = self._protocol(endpoint.apis, engine, limits, authoriser)
            listener = HttpListener(protocol, limits, access=self._access, cors=cors, arena=self._arena)
            listeners.append(listener)
            try:
                told = await _bind(listener, endpoint.address, tls)
            except ConfigError as error:
                if not endpoint.optional:
                    raise
                self._note(f"metrics are not served: {error.message} (metrics_address)")
                continue
            _warn_of_exposure(endpoint, told, token_file)
            if _MANAGEMENT in endpoint.apis and token_file is not None:
                self._report(
                    {"event": "note", "message": f"other machines need the token in {token_file} to manage"}
                )
            bound.update(dict.fromkeys(endpoint.apis, told))
        return bound

    def _endpoints(self) -> list[_Endpoint]:
        """Return the addresses to listen on. APIs with the same address share it, but for port 0."""
        config = self._config
        wanted = [(_INFERENCE, config.inference_address), (_MANAGEMENT, config.management_address)]
        if config.metrics_address is not None:
            wanted.append((_METRICS, config.metrics_address))
        sharing: dict[tuple[Address, str], list[str]] = {}
        for api, address in wanted:
            alone = "" if address.port or address.path else api
            sharing.setdefault((address, alone), []).append(api)
        # Another server's metrics at the default port are no reason not to serve models.
        default = self._loaded.origins.get(_METRICS) == "default"
        return [
            _Endpoint(address, apis, optional=default and apis == [_METRICS])
            for (address, _), apis in sharing.items()
        ]

    def _protocol(
        self, apis: Sequence[str], engine: Engine, limits: Limits, authoriser: Authoriser
    ) -> HttpProtocol:
        return mms.protocol(
            engine,
            limits,
            inference=_INFERENCE in apis,
            management=authoriser.check if _MANAGEMENT in apis else None,
            default_workers=self._config.default_workers_per_model,
            more=[Prometheus(engine).handle] if _METRICS in apis else [],
        )

    async def _authoriser(self, instance: Instance) -> tuple[Path | None, Authoriser]:
        """Return who may manage, and the file of the token where one is needed."""
        config = self._config
        names = ("localhost", socket.gethostname(), config.management_address.host)
        hosts = frozenset(name.lower() for name in names)
        if is_local(config.management_address) or config.management_open:
            return None, Authoriser(None, config.cors_allowed_origin, hosts)
        named = config.management_token_file
        file = named or instance.pid_file.with_name(TOKEN_FILE)
        token = await asyncio.to_thread(read_token, file, default_place=named is None)
        return file, Authoriser(token, config.cors_allowed_origin, hosts)

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
        if not failed:
            return EXIT_OK
        message = f"{failed} of {len(wanted)} models failed to load."
        if self._config.strict or failed == len(wanted):
            _log.error("%s", message)
            self._report({"event": "failed", "message": message})
            return EXIT_MODELS_FAILED
        self._note(message)
        return EXIT_OK

    def _note(self, message: str) -> None:
        """Tell the log, and whoever starts the server."""
        _log.warning("%s", message)
        self._report({"event": "note", "message": message})

    def _startup_models(self, models: MarRepository) -> list[LoadOptions]:
        text = self._config.load_models
        if text.strip().upper() != "ALL":
            return startup_models(text)
        try:
            return models.all()
        except ModelNotFound as error:
            self._note(error.message)
            return []


async def _bind(listener: HttpListener, address: Address, tls: ssl.SSLContext | None) -> str:
    """Listen, and return the address with the port that was found."""
    try:
        if address.scheme == "unix":
            _clear_socket(address.path)
            await listener.start_unix(address.path)
            return str(address)
        secured = tls if address.scheme == "https" else None
        port = await listener.start(address.host, address.port, tls=secured)
    except OSError as error:
        where = address.path or f"{address.host}:{address.port}"
        # The event loops wrap the reason in sentences of their own.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"cannot listen on {where}: {reason}") from error
    return str(replace(address, port=port))


def _clear_socket(path: str) -> None:
    """Remove the socket file of a server that has ended.

    Raises:
        ConfigError: a server still listens there, or the file is no socket.
        OSError: the file cannot be looked at or removed.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"cannot listen on {path}: there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full
    raise ConfigError(f"cannot listen on {path}: another server does")


def _warn_of_exposure(endpoint: _Endpoint, bound: str, token_file: Path | None) -> None:
    """Say once what those can do who reach an address from another machine."""
    if is_local(endpoint.address):
        return
    able = {_INFERENCE: "use the models", _METRICS: "read the metrics"}
    if token_file is None:
        able[_MANAGEMENT] = "load, scale and unload models (management_open=true)"
    open_to_all = [able[api] for api in endpoint.apis if api in able]
    says = [f"whoever reaches it can {' and '.join(open_to_all)}"] if open_to_all else []
    if _MANAGEMENT in endpoint.apis and token_file is not None:
        says.append(f"other machines need the token in {token_file} to manage")
    _log.warning("Listening on %s: %s.", bound, "; ".join(says))


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
