"""One listening address: where it listens, how it drains and stops, and what every request gets in common.

Two kinds of connections serve it: hot.py reads messages of plain form at a fraction of the cost, http.py
reads every other. What they share (accounts of what is open, errors, the access log) is here, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import Protocol

from mms_lite.errors import Overloaded, RequestTooLarge, ServingError
from mms_lite.frontends.hot import HotConnections
from mms_lite.frontends.http import AnyConnections
from mms_lite.frontends.message import Cors, HttpProtocol, HttpRequest, HttpResponse, Limits
from mms_lite.logs import log_access
from mms_lite.shared import Arena

_BACKLOG = 1024
_CLOSE_S = 0.5  # for what is left of a connection once its grace is over

Access = Callable[[str, str, str, str, int, int], None]
"""Writes a line of the access log: remote, method, raw path, version, status, milliseconds."""

_log = logging.getLogger("mms_lite.http")


class Connections(Protocol):
    """The connections of one kind; called, it makes the next."""

    def __call__(self) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection."""

    def close_idle(self) -> None:
        """Close those without an open request."""

    async def shutdown(self, timeout: float | None = None) -> None:
        """Cancel what is open and close all."""


class HttpListener:
    """One listening address, all of whose requests go to one protocol.

    `hot` lets messages of plain form take the fast way in; without it all take the other.
    """

    def __init__(
        self,
        protocol: HttpProtocol,
        limits: Limits,
        *,
        access: Access = log_access,
        cors: Cors | None = None,
        hot: bool = True,
        arena: Arena | None = None,
    ) -> None:
        self.limits = limits
        self.cors = cors
        self.stopping = False
        self.active = 0  # requests
        self.held_bytes = 0  # of request bodies
        self.arena = arena
        self._access = access
        self._hot = hot
        self._protocol = protocol
        self._connections: list[Connections] = []
        self._listening: asyncio.Server | None = None
        self._socket_file: tuple[str, os.stat_result] | None = None
        self._drained: asyncio.Future[None] | None = None

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> int:
        """Listen on host and port (0: any free one) and return the bound port.

        Raises:
            OSError: the address cannot be bound.
        """
        self._listening = await asyncio.get_running_loop().create_server(
            self._first_connections(encrypted=tls is not None),
            host,
            port,
            backlog=_BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else self.limits.handshake_s,
        )
        for sock in self._listening.sockets:
            # Connections inherit it; TCP_NODELAY is the loops' own default.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return int(self._listening.sockets[0].getsockname()[1])

    async def start_unix(self, path: str) -> None:
        """Listen on a Unix socket; a file that is in the way is the caller's to remove, ours goes with us.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        connections = self._first_connections(encrypted=False)
        self._listening = await loop.create_unix_server(connections, path, backlog=_BACKLOG)
        self._socket_file = path, os.stat(path)

    def _first_connections(self, *, encrypted: bool) -> Connections:
        """Return what a new connection begins as. Next to encryption the fast way would save nothing."""
        every = AnyConnections(self)
        self._connections = [every]
        if encrypted or not self._hot:
            return every
        hot = HotConnections(self, every.take_over)
        self._connections.append(hot)
        return hot

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more, close idle connections, and wait up to `grace_s` for open requests."""
        if self._listening is None:
            return
        self.stopping = True
        self._listening.close()
        self._remove_socket_file()
        for connections in self._connections:
            connections.close_idle()
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_s
        while self.active and loop.time() < until:
            self._drained = loop.create_future()
            await asyncio.wait([self._drained], timeout=until - loop.time())
            await asyncio.sleep(0)  # one that was handed over is open again in a moment

    async def stop(self, grace_s: float) -> None:
        """Drain, then close what is left."""
        await self.drain(grace_s)
        if self._listening is None:
            return
        await asyncio.gather(*(connections.shutdown(_CLOSE_S) for connections in self._connections))
        # From Python 3.12 on it waits for clients too, whose end of TLS may take as long as they like.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._listening.wait_closed(), _CLOSE_S)

    def _remove_socket_file(self) -> None:
        """Remove the file of our Unix socket, unless another server has put its own in the place."""
        if self._socket_file is None:
            return
        path, ours = self._socket_file
        self._socket_file = None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(path), ours):
                os.unlink(path)

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Return the answer to a request that has been read, whatever happens."""
        if self.cors is not None and self.cors.is_preflight(request):
            return HttpResponse()
        try:
            return await self._protocol.handle(request)
        except ServingError as error:
            return self._protocol.spell(error, request.path)
        except Exception:
            _log.exception("request %s: %s %s failed", request.id, request.method, request.raw_path)
            return self._protocol.spell(ServingError("Internal server error."), request.path)

    def refusal(self, error: ServingError, path: str) -> HttpResponse:
        """Return the answer to a request that could not be read; `path` is empty where none was."""
        return self._protocol.spell(error, path)

    def check_size(self, size: int, path: str, *, more: int = 0) -> None:
        """Check that a body of this size for this path, or of this size and as much more, may be held.

        Raises:
            ServingError: it is too large, or all together are.
        """
        name = self._protocol.size_limit(path)
        limit: int = getattr(self.limits, name)
        if size + more > limit:
            raise RequestTooLarge(f"The request's body is larger than {name}, {limit} bytes.")
        if self.held_bytes + (more or size) > self.limits.max_bytes_in_flight:
            raise Overloaded("The server holds as many bytes of requests as it may. Try again later.")

    def release(self, held_bytes: int) -> None:
        """Count a request, and so many bytes of its body, as open no longer."""
        self.held_bytes -= held_bytes
        self.active -= 1
        if self._drained is not None and not self.active and not self._drained.done():
            self._drained.set_result(None)

    def log_access(self, request: HttpRequest, version: str, status: int, begin: float) -> None:
        """Write a line of the access log; `begin` is in time.monotonic() seconds."""
        ms = int((time.monotonic() - begin) * 1000)
        self._access(request.remote, request.method, request.raw_path, version, status, ms)
