"""Where each API listens: which addresses there are, what is served at each, and who may do what there.

Apart from the server's life, which begins and ends what is opened here.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mms_lite
from mms_lite.address import Address
from mms_lite.config import LoadedConfig
from mms_lite.engine.engine import Engine
from mms_lite.errors import ConfigError, Forbidden
from mms_lite.frontends import mms, tfserving
from mms_lite.frontends.auth import TOKEN_FILE, Authoriser, is_local, read_token
from mms_lite.frontends.json_bodies import Readers
from mms_lite.frontends.kserve import description as kserve_description
from mms_lite.frontends.kserve import rest as kserve
from mms_lite.frontends.kserve.service import KServeService
from mms_lite.frontends.listener import Access, HttpListener
from mms_lite.frontends.message import Cors, HttpProtocol, HttpRequest, Limits
from mms_lite.frontends.prometheus import Prometheus
from mms_lite.frontends.router import Router
from mms_lite.instance import Instance
from mms_lite.shared import Arena
from mms_lite.tls import Identity, server_identity

_INFERENCE, _MANAGEMENT, _METRICS = "inference_address", "management_address", "metrics_address"
_GRPC = "grpc_address"
_NAME = "mms-lite"

# What is at the inference address besides the MMS API.
_OTHERS = [
    mms.Described(kserve_description.paths(), kserve_description.components()),
    mms.Described(tfserving.paths(), {}),
]

Note = Callable[[str], None]
"""Tells whoever starts the server."""

_log = logging.getLogger("mms_lite.server")


class Listener(Protocol):
    """A listening address, whatever is spoken there."""

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more, and wait for open requests."""

    async def stop(self, grace_s: float) -> None:
        """Drain, then close what is left."""


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """An address that is to be listened on, and the APIs that it serves.

    One that is `optional` is left out, with a warning, when its port is taken.
    """

    address: Address
    apis: Sequence[str]
    optional: bool = False


class Listening:
    """The listening addresses of a server. `note` is called with what its user should know."""

    def __init__(
        self, loaded: LoadedConfig, engine: Engine, *, access: Access, note: Note, arena: Arena | None
    ) -> None:
        self.listeners: list[Listener] = []
        self._loaded = loaded
        self._config = loaded.config
        self._engine = engine
        self._access = access
        self._note = note
        self._arena = arena
        self._limits = Limits(
            max_request_size=self._config.max_request_size,
            max_response_size=self._config.max_response_size,
            max_tensor_request_size=self._config.max_tensor_request_size,
            max_bytes_in_flight=self._config.max_bytes_in_flight,
        )
        self._authoriser: Authoriser
        self._token_file: Path | None = None

    async def open(self, instance: Instance) -> dict[str, str]:
        """Open every address, into `listeners`; return where each API is now.

        Raises:
            ConfigError: an address is taken or cannot be served.
        """
        await self._authorise(instance)
        service = self._kserve()
        bound: dict[str, str] = {}
        endpoints = self._endpoints()
        grpc = self._config.grpc_address
        identity: Identity | None = None
        if any(each.scheme == "https" for each in [*(each.address for each in endpoints), grpc] if each):
            identity = await asyncio.to_thread(server_identity, self._config)
        for endpoint in endpoints:
            if told := await self._open_http(endpoint, service, identity):
                bound.update(dict.fromkeys(endpoint.apis, told))
        if grpc is not None and (told := await self._open_grpc(grpc, service, identity)):
            bound[_GRPC] = told
        return bound

    def _endpoints(self) -> list[_Endpoint]:
        """Return the addresses for HTTP. APIs with the same address share it, but for port 0."""
        config = self._config
        wanted = [(_INFERENCE, config.inference_address), (_MANAGEMENT, config.management_address)]
        if config.metrics_address is not None:
            wanted.append((_METRICS, config.metrics_address))
        sharing: dict[tuple[Address, str], list[str]] = {}
        for api, address in wanted:
            alone = "" if address.port or address.path else api
            sharing.setdefault((address, alone), []).append(api)
        # Another server's metrics at the default port are no reason not to serve models.
        return [
            _Endpoint(address, apis, optional=self._by_default(_METRICS) and apis == [_METRICS])
            for (address, _), apis in sharing.items()
        ]

    async def _open_http(self, endpoint: _Endpoint, service: KServeService, identity: Identity | None) -> str:
        config = self._config
        cors = Cors.of(config.cors_allowed_origin, config.cors_allowed_methods, config.cors_allowed_headers)
        listener = HttpListener(
            self._protocol(endpoint.apis, service),
            self._limits,
            access=self._access,
            cors=cors,
            arena=self._arena,
        )
        return await self._open(listener, endpoint, identity and identity.context, "metrics are not served")

    async def _open_grpc(self, address: Address, service: KServeService, identity: Identity | None) -> str:
        optional = self._by_default(_GRPC)
        # Else each stranger's failed handshake prints a line past our log.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        try:
            rpc = importlib.import_module("mms_lite.frontends.rpc")
            kserve_grpc = importlib.import_module("mms_lite.frontends.kserve.grpc")
            tfserving_grpc = importlib.import_module("mms_lite.frontends.tfserving.grpc")
        except ModuleNotFoundError as error:
            why = f"gRPC needs {error.name}, which is not installed: pip install 'mms-lite[grpc]'"
            if not optional:
                raise ConfigError(f"{why} ({_GRPC})") from error
            _log.info("gRPC is not served: %s", why)
            return ""
        services = [
            kserve_grpc.InferenceService(service),
            *tfserving_grpc.services(self._engine, self._check_control, self._limits),
        ]
        listener = rpc.GrpcListener(services, self._limits, access=self._access, ready=service.ready)
        endpoint = _Endpoint(address, [_GRPC], optional)
        return await self._open(listener, endpoint, identity and identity.pem, "gRPC is not served")

    async def _open(self, listener: Any, endpoint: _Endpoint, tls: Any, without: str) -> str:
        """Have an HTTP or gRPC listener listen; return its address, empty for an optional one without."""
        self.listeners.append(listener)
        try:
            told = await _bind(listener, endpoint.address, tls)
        except ConfigError as error:
            if not endpoint.optional:
                raise
            self._note(f"{without}: {error.message} ({endpoint.apis[0]})")
            return ""
        self._warn_of_exposure(endpoint, told)
        return told

    def _protocol(self, served: Sequence[str], service: KServeService) -> HttpProtocol:
        inference, engine = _INFERENCE in served, self._engine
        in_repository = self._config.model_repository is not None
        rest = mms.protocol(
            engine,
            self._limits,
            inference=inference,
            management=self._authoriser.check if _MANAGEMENT in served else None,
            default_workers=None if in_repository else self._config.default_workers_per_model,
            more=[Prometheus(engine).handle] if _METRICS in served else [],
            others=_OTHERS if inference else [],
        )
        if not inference:
            return rest
        readers = Readers()  # one for both: how much JSON is read at a time is the server's affair
        tensors: dict[str, HttpProtocol] = {
            "v2": kserve.protocol(service, self._limits, readers),
            "v1": tfserving.protocol(engine, self._check_control, readers),
        }
        return Router(tensors, rest)

    def _kserve(self) -> KServeService:
        name = _NAME if self._config.model_repository is None else "triton"
        return KServeService(
            self._engine,
            server_name=self._config.server_name or name,
            server_version=mms_lite.__version__,
            authorise=self._check_control,
        )

    def _check_control(self, request: HttpRequest) -> None:
        """Let a client pass that may load and unload models of the repository.

        Raises:
            Forbidden: nobody may.
            Unauthorized: it has not said who it is.
        """
        if self._config.model_control_mode != "explicit":
            raise Forbidden("explicit model load / unload is not allowed: model_control_mode is not explicit")
        self._authoriser.check(request)

    async def _authorise(self, instance: Instance) -> None:
        """Find out who may manage, and the file of the token where one is needed."""
        config = self._config
        managing = [config.management_address]
        if config.model_control_mode == "explicit":
            managing += filter(None, [config.inference_address, config.grpc_address])
        addresses = (address.host.lower() for address in managing)
        hosts = frozenset(("localhost", socket.gethostname().lower(), *addresses))
        local = all(map(is_local, managing))
        # A proxy on this machine is put before the inference address, rarely before that of the management.
        if config.management_open or (local and config.model_control_mode != "explicit"):
            self._authoriser = Authoriser(None, config.cors_allowed_origin, hosts)
            return
        named = config.management_token_file
        self._token_file = named or instance.pid_file.with_name(TOKEN_FILE)
        token = await asyncio.to_thread(read_token, self._token_file, default_place=named is None)
        self._authoriser = Authoriser(token, config.cors_allowed_origin, hosts)
        if local:
            _log.info("Clients that come through a proxy need the token in %s to manage.", self._token_file)
        else:
            self._note(f"other machines need the token in {self._token_file} to manage")

    def _controls(self, endpoint: _Endpoint) -> bool:
        """Tell whether models can be loaded and unloaded at an address."""
        explicit = self._config.model_control_mode == "explicit"
        return _MANAGEMENT in endpoint.apis or (explicit and bool({_INFERENCE, _GRPC} & set(endpoint.apis)))

    def _by_default(self, name: str) -> bool:
        return self._loaded.origins.get(name) == "default"

    def _warn_of_exposure(self, endpoint: _Endpoint, bound: str) -> None:
        """Say once what those can do who reach an address from another machine."""
        if is_local(endpoint.address):
            return
        able = {_INFERENCE: "use the models", _GRPC: "use the models", _METRICS: "read the metrics"}
        if self._token_file is None:
            if self._config.model_control_mode == "explicit":
                able[_INFERENCE] = able[_GRPC] = "use, load and unload the models (management_open=true)"
            able[_MANAGEMENT] = "load, scale and unload models (management_open=true)"
        open_to_all = [able[api] for api in endpoint.apis if api in able]
        says = [f"whoever reaches it can {' and '.join(open_to_all)}"] if open_to_all else []
        if self._controls(endpoint) and self._token_file is not None:
            says.append(f"other machines need the token in {self._token_file} to manage")
        _log.warning("Listening on %s: %s.", bound, "; ".join(says))


async def _bind(listener: Any, address: Address, tls: Any) -> str:
    """Have a listener listen; return the address with the port that was found.

    Raises:
        ConfigError: it cannot.
    """
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
