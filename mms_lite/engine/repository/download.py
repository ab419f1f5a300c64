"""Model archives from http(s) addresses: from which machines, how much, for how long.

The address that was checked is the one that is connected to: no name is looked up a second time. All blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import ipaddress
import logging
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urldefrag, urljoin

from mms_lite.engine.repository.allow_list import AllowList, IpAddress, RemoteUrl, forbidden
from mms_lite.errors import DownloadFailed, ModelNotReady, ServingError

Resolve = Callable[[str, int], Sequence[str]]

_CONNECT_S = 5.0  # for a connection, and again for its TLS handshake
_IDLE_S = 30.0
_SLICE_S = 0.25  # how soon a read that waits notices that the server stops
_CHUNK_BYTES = 1 << 18
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

_log = logging.getLogger("mms_lite.engine")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that was downloaded, and the SHA-256 of its bytes (lower-case hexadecimal)."""

    path: Path
    sha256: str


def system_addresses(host: str, port: int) -> list[str]:
    """Look a name up as the system does.

    Raises:
        OSError: it has no address.
    """
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Downloads:
    """Fetches what `allowed` permits, at most `max_bytes` in at most `timeout_s`.

    A server that sends nothing for `idle_s` counts as late too. `resolve` looks names up.
    """

    def __init__(
        self,
        allowed: AllowList,
        *,
        max_bytes: int,
        timeout_s: float,
        idle_s: float = _IDLE_S,
        resolve: Resolve = system_addresses,
    ) -> None:
        self._allowed = allowed
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._resolve = resolve
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Give up the downloads that run: within a quarter of a second, or 5 s in a connect or handshake."""
        self._stopped.set()

    def fetch(self, text: str, folder: Path) -> Fetched:
        """Download a URL into a file in `folder`, which has the name that the URL's path ends in.

        Raises:
            ModelNotFound, InvalidRequest: it is no URL that can be fetched.
            Forbidden: it, or what it redirects to, is not permitted.
            DownloadFailed: it cannot be fetched, is too large or too slow.
            ModelNotReady: the server stops.
            OSError: the file cannot be written.
        """
        url = self._allowed.admit(text)
        transfer = _Transfer(text, self._timeout_s, self._idle_s, self._stopped)
        path = folder / _file_name(url)
        digest = hashlib.sha256()
        with path.open("xb") as file, contextlib.closing(self._chunks(url, transfer)) as chunks:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            size = file.tell()
        _log.info("Downloaded %s: %d bytes, SHA-256 %s.", text, size, digest.hexdigest())
        return Fetched(path, digest.hexdigest())

    def _chunks(self, url: RemoteUrl, transfer: _Transfer) -> Generator[memoryview, None, None]:
        """Yield the bytes of the archive; every failure of the network is a DownloadFailed."""
        try:
            with self._answer(url, transfer) as response:
                yield from self._body(response, transfer)
        except TimeoutError as error:
            raise transfer.late() from error
        except ssl.SSLCertVerificationError as error:
            raise transfer.failed(f" (its certificate: {error.verify_message})") from error
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            _log.warning("Download of %s: %s: %s", transfer.text, type(error).__name__, error)
            raise transfer.failed("") from error

    @contextlib.contextmanager
    def _answer(self, url: RemoteUrl, transfer: _Transfer) -> Iterator[http.client.HTTPResponse]:
        for _ in range(_MAX_REDIRECTS + 1):
            with contextlib.closing(self._connect(url, transfer)) as sock:
                response = _ask(sock, url, transfer)
                location = response.headers["Location"]
                if response.status not in _REDIRECTS or not location:
                    yield response
                    return
            url = self._redirected(url, location, transfer)
        raise transfer.failed(f" (more than {_MAX_REDIRECTS} redirects)")

    def _redirected(self, url: RemoteUrl, location: str, transfer: _Transfer) -> RemoteUrl:
        _log.info("Download of %s: redirected to %r.", transfer.text, location)
        try:
            to = self._allowed.admit(urldefrag(urljoin(str(url), location)).url)
        except (ServingError, ValueError) as error:
            raise forbidden(transfer.text, "allowed_urls does not permit what it redirects to") from error
        if (url.scheme, to.scheme) == ("https", "http"):
            raise forbidden(transfer.text, "it redirects from https to http")
        return to

    def _connect(self, url: RemoteUrl, transfer: _Transfer) -> socket.socket:
        """Connect to one of the addresses that were checked, and to no other."""
        addresses = [url.address] if url.address else self._addresses(url, transfer)
        failure = OSError("no address")
        for address in addresses:
            target, limit_s = (str(address), url.port), transfer.left_s(_CONNECT_S)
            try:
                sock = socket.create_connection(target, timeout=limit_s)
            except OSError as error:
                failure = error
                continue
            if url.scheme == "http":
                return sock
            with contextlib.ExitStack() as undo:
                undo.callback(sock.close)
                sock.settimeout(transfer.left_s(_CONNECT_S))
                secured = ssl.create_default_context().wrap_socket(sock, server_hostname=url.host)
                undo.pop_all()
            return secured
        raise failure

    def _addresses(self, url: RemoteUrl, transfer: _Transfer) -> list[IpAddress]:
        """Look the host up. The system's look-up knows no time limit: it has a thread that may be left."""
        answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(self._resolve(url.host, url.port))
            except (OSError, UnicodeError) as error:
                answers.put(error)

        threading.Thread(target=look_up, name="look-up", daemon=True).start()
        while True:
            with contextlib.suppress(queue.Empty):
                found = answers.get(timeout=transfer.left_s(_SLICE_S))
                break
        if isinstance(found, Exception):
            raise found
        addresses = [ipaddress.ip_address(each) for each in dict.fromkeys(found)]
        if not all(_is_public(each) or (url.host == "localhost" and each.is_loopback) for each in addresses):
            raise forbidden(transfer.text, "its host has an address that is not public")
        return addresses

    def _body(self, response: http.client.HTTPResponse, transfer: _Transfer) -> Iterator[memoryview]:
        if response.status != 200:
            raise transfer.failed(f", code: {response.status}")
        length, count = response.length, 0
        if (length or 0) > self._max_bytes:
            raise transfer.failed(f" ({length} bytes; max_download_bytes is {self._max_bytes})")
        # Not `read`: told of a chunk of -1 bytes, that one takes in all that comes.
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while size := response.readinto(buffer):
            count += size
            if count > self._max_bytes:
                raise transfer.failed(f" (more than max_download_bytes, {self._max_bytes})")
            yield buffer[:size]
        if length is not None and count != length:
            raise transfer.failed(f" (the connection ended after {count} of {length} bytes)")


class _Transfer:
    """One download: what it is called in errors, and what ends it early."""

    def __init__(self, text: str, timeout_s: float, idle_s: float, stopped: threading.Event) -> None:
        self.text = text
        self.idle_s = idle_s
        self._until = time.monotonic() + timeout_s
        self._stopped = stopped

    def left_s(self, most_s: float) -> float:
        """Return how long to wait for something, at most `most_s`.

        Raises:
            DownloadFailed: time is up.
            ModelNotReady: the server stops.
        """
        if self._stopped.is_set():
            raise ModelNotReady("the server is stopping")
        left_s = min(most_s, self._until - time.monotonic())
        if left_s <= 0:
            raise self.late()
        return left_s

    def late(self) -> DownloadFailed:
        return DownloadFailed(f"Download model timeout: {self.text}")

    def failed(self, why: str) -> DownloadFailed:
        return DownloadFailed(f"Failed to download model from: {self.text}{why}")


class _Incoming(io.RawIOBase):
    """The reading end of a socket. No wait in it, for a header or for the body, outlasts the transfer."""

    def __init__(self, sock: socket.socket, transfer: _Transfer) -> None:
        self._sock = sock
        self._transfer = transfer

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        until = time.monotonic() + self._transfer.idle_s
        while True:
            if time.monotonic() > until:
                raise self._transfer.late()
            self._sock.settimeout(self._transfer.left_s(_SLICE_S))
            with contextlib.suppress(TimeoutError):
                return self._sock.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return what http.client reads from: it asks its socket for that, and for nothing else."""
        return io.BufferedReader(self, _CHUNK_BYTES)


def _ask(sock: socket.socket, url: RemoteUrl, transfer: _Transfer) -> http.client.HTTPResponse:
    lines = (
        f"GET {url.target} HTTP/1.1",
        f"Host: {url.authority}",
        "User-Agent: mms-lite",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    sock.settimeout(transfer.left_s(_CONNECT_S))
    sock.sendall("\r\n".join((*lines, "", "")).encode("ascii"))
    response = http.client.HTTPResponse(cast(socket.socket, _Incoming(sock, transfer)), method="GET")
    response.begin()
    return response


def _is_public(address: IpAddress) -> bool:
    """Tell whether an address belongs to the public internet, as does any IPv4 address inside it."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not address.is_reserved
    inner = address.ipv4_mapped or address.sixtofour
    if address in _NAT64:
        inner = ipaddress.IPv4Address(address.packed[12:])
    if inner is not None:
        return _is_public(inner)
    return address in _GLOBAL_UNICAST and address.is_global


def _file_name(url: RemoteUrl) -> str:
    name = re.sub(r"[^\w.-]", "_", unquote(url.path.rpartition("/")[2])).lstrip(".")
    return name[-100:] or "model.mar"
