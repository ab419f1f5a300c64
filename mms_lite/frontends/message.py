"""What HTTP adapters and protocols over HTTP share: requests, responses, limits, and an answer's bytes.

Apart from the adapters so that a protocol knows no server library, and each rule about bytes exists once.
"""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from mms_lite.errors import InvalidRequest, ServingError
from mms_lite.shared import SharedBytes

Buffer = bytes | bytearray | memoryview

JOIN_BYTES = 64 * 1024  # up to here head and body are copied into one write
CLIENT_LEFT = 499  # nginx's number, in the access log only
_LONGEST_RETRY_S = 60
_MOST_SHOWN = 80  # characters
_STATUS_LINES = {int(status): f"HTTP/1.1 {status} {status.phrase}\r\n" for status in HTTPStatus}
_ID_BITS = (1 << 128) - 1 ^ 0xF << 76 ^ 3 << 62  # of a UUID: all but its version and variant
_RANDOM = 4 << 76 | 2 << 62  # that it is version 4 of RFC 4122
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f]")
_NOT_A_NAME = re.compile(r"[^!#$%&'*+.^_`|~0-9A-Za-z-]")
# Ours, whatever a handler sets: the framing of the message, and what MMS puts on every response.
_OWN_HEADERS = frozenset(
    (
        "x-request-id",
        "pragma",
        "cache-control",
        "expires",
        "content-length",
        "connection",
        "keep-alive",
        "transfer-encoding",
        "upgrade",
        "trailer",
    )
)
_COMMON_HEADERS = (
    "Pragma: no-cache\r\n"
    "Cache-Control: no-cache; no-store, must-revalidate, private\r\n"
    "Expires: Thu, 01 Jan 1970 00:00:00 UTC\r\n"
)
_KEEP_ALIVE, _CLOSE = "Connection: keep-alive\r\n\r\n", "Connection: close\r\n\r\n"

_NO_LIMIT_MS = 1e10  # four months: whoever says more means no limit

_log = logging.getLogger("mms_lite.http")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a client may send and be sent, and how long it may take. Sizes are bytes.

    `max_request_size` and `max_response_size` are those of the MMS API, `max_tensor_request_size` that of the
    protocols of tensors.
    `keepalive_s` bounds both an idle connection and the time a request's head may take, `handshake_s` what
    comes before over TLS. After an answer to a request that was not read to its end, the connection is
    drained of `linger_bytes` for `linger_s`.
    """

    max_request_size: int = 6_553_500
    max_response_size: int = 6_553_500
    max_tensor_request_size: int = 64 << 20
    max_bytes_in_flight: int = 1 << 30
    max_line_size: int = 4096
    max_header_size: int = 8192
    idle_s: float = 60.0
    keepalive_s: float = 75.0
    handshake_s: float = 10.0
    linger_s: float = 5.0
    linger_bytes: int = 64 << 20


@dataclass(slots=True)
class HttpRequest:
    """A request as read. `raw_path` is the target as sent; `path` is decoded and without the query.

    `headers` keep the client's spelling and order; `id` is ours; `remote` is host:port, or empty. `named`
    has the first header of each name, in lower case, where the reader knows them anyway. A large `body` may
    be in memory that workers share: what reads it here takes `body_view`, or `own_body`.
    """

    method: str
    path: str
    id: str = ""
    raw_path: str = ""
    query: Sequence[tuple[str, str]] = ()
    headers: Sequence[tuple[str, str]] = ()
    body: bytearray | SharedBytes = field(default_factory=bytearray)
    remote: str = ""
    named: Mapping[str, str] | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """The query as parameters of the call: of those with one name the first."""
        return dict(reversed(self.query))

    @property
    def body_view(self) -> memoryview:
        """The body where it is."""
        return self.body.view if isinstance(self.body, SharedBytes) else memoryview(self.body)

    @property
    def own_body(self) -> bytearray:
        """The body, copied if it is in shared memory."""
        return bytearray(self.body.view) if isinstance(self.body, SharedBytes) else self.body

    def header(self, name: str) -> str | None:
        """Return the first header of this name in any letter case, or None; `name` is in lower case."""
        if self.named is not None:
            return self.named.get(name)
        for key, value in self.headers:
            if key.lower() == name:
                return value
        return None


@dataclass(slots=True)
class HttpResponse:
    """An answer. An empty `reason` gets the standard one; the adapter adds length, id and common headers."""

    status: int = 200
    headers: Sequence[tuple[str, str]] = ()
    body: Sequence[Buffer] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Cors:
    """What every answer of an address tells browsers about pages of other origins."""

    lines: tuple[tuple[str, str], ...]  # name in lower case and whole line
    answers_preflights: bool

    @classmethod
    def of(cls, origin: str | None, methods: str | None, headers: str | None) -> Cors | None:
        """Return the headers for these values, None if there are none; an origin lets preflights pass."""
        given = {"origin": origin, "methods": methods, "headers": headers}
        names = {f"access-control-allow-{key}": value for key, value in given.items() if value}
        lines = tuple((name, f"{name}: {_CONTROL.sub(' ', value)}\r\n") for name, value in names.items())
        return cls(lines, bool(origin)) if lines else None

    def head(self, response: HttpResponse) -> str:
        """Return the lines for a response, without those that it brings itself."""
        own = {name.lower() for name, _ in response.headers}
        return "".join(line for name, line in self.lines if name not in own)

    def is_preflight(self, request: HttpRequest) -> bool:
        """Tell whether a browser only asks if it may send a request, and gets an answer here."""
        return (
            request.method == "OPTIONS"
            and self.answers_preflights
            and request.header("origin") is not None
            and request.header("access-control-request-method") is not None
        )


class HttpProtocol(Protocol):
    """What an adapter serves. The engine is behind it; sockets are not its business."""

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer a request.

        Raises:
            ServingError: for `spell`.
        """

    def spell(self, error: ServingError, path: str) -> HttpResponse:
        """Return the error as this protocol writes it; `path` is empty where none could be read."""

    def size_limit(self, path: str) -> str:
        """Return the name of the one of `Limits` that bounds bodies for this path."""


def deadline(request: HttpRequest) -> float | None:
    """Return when the client stops waiting, on the monotonic clock (X-Request-Timeout-Ms).

    Raises:
        InvalidRequest: its header is no positive number.
    """
    text = request.header("x-request-timeout-ms")
    if text is None:
        return None
    try:
        timeout_ms = float(text)
    except ValueError:
        timeout_ms = math.nan
    if not 0 < timeout_ms < math.inf:
        raise InvalidRequest(f"X-Request-Timeout-Ms is not a positive number: {text}")
    return time.monotonic() + timeout_ms / 1000 if timeout_ms < _NO_LIMIT_MS else None


def response_head(
    response: HttpResponse, request_id: str, *, keep_alive: bool, size: int | None, cors: Cors | None = None
) -> bytes:
    """Return status line and headers; `size` is the content's length, None for a status without content.

    What would break the message's framing is taken out of names, values and reason.
    """
    lines = ""
    for name, value in response.headers:
        allowed = _allows(name)
        if allowed:
            lines += f"{name}: {value if value.isprintable() else _CONTROL.sub(' ', value)}\r\n"
        elif allowed is None:
            _log.warning("request %s: the response header %r has no valid name, left out", request_id, name)
    status = None if response.reason else _STATUS_LINES.get(response.status)
    if status is None:
        status = f"HTTP/1.1 {response.status} {_CONTROL.sub(' ', response.reason)}\r\n"
    length = "" if size is None else f"Content-Length: {size}\r\n"
    return (
        f"{status}{lines}x-request-id: {request_id}\r\n{'' if cors is None else cors.head(response)}"
        f"{_COMMON_HEADERS}{length}{_KEEP_ALIVE if keep_alive else _CLOSE}"
    ).encode("utf-8", "replace")


@lru_cache(maxsize=256)
def _allows(name: str) -> bool | None:
    """Tell whether a response may bring this header; None says that it is no name."""
    if name.lower() in _OWN_HEADERS:
        return False
    return None if not name or _NOT_A_NAME.search(name) else True


def encode_response(
    method: str, response: HttpResponse, request_id: str, *, keep_alive: bool, cors: Cors | None = None
) -> list[Buffer]:
    """Return the bytes of a response: one piece for a small one, else its head and its parts."""
    size = sum(map(len, response.body))
    bodiless = response.status in (204, 304)
    stated = None if bodiless else size
    head = response_head(response, request_id, keep_alive=keep_alive, size=stated, cors=cors)
    if bodiless or method == "HEAD" or not size:
        return [head]
    if size <= JOIN_BYTES:
        return [b"".join((head, *response.body))]
    return [head, *response.body]


def retry_after_s(error: ServingError) -> int:
    """Return when a queue that drains as fast as of late is empty, or 1 where nothing is known."""
    rate = error.details.get("answered_per_s", 0)
    depth = error.details.get("depth", 0)
    return min(_LONGEST_RETRY_S, max(1, math.ceil(depth / rate))) if rate else 1


def split_target(target: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the decoded path and the query's pairs of a request's target, in origin or absolute form."""
    if not target.startswith("/"):
        absolute = urlsplit(target)
        target = (absolute.path or "/") + (f"?{absolute.query}" if absolute.query else "")
    path, _, query = target.partition("?")
    if "%" in path:
        path = unquote(path)
    return path, parse_qsl(query, keep_blank_values=True) if query else []


def client_name(peer: object) -> str:
    """Return host:port of a socket's peer name; empty for the client of a Unix socket."""
    if not isinstance(peer, tuple):
        return ""
    return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"


def shown(text: str) -> str:
    """Return as much of a client's text as is told in a message."""
    return text[:_MOST_SHOWN]


def random_id() -> str:
    """Return a random UUID. It names a request and guards nothing: no system call for it."""
    digits = f"{random.getrandbits(128) & _ID_BITS | _RANDOM:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
