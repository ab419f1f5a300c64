"""The heads of messages that hot.py reads itself: httptools reads them, and what it gets is checked first.

Two readers that disagree on where a message ends are how requests are smuggled. So the rule is not what this
parser accepts, but what no parser could take for anything else; all that is doubtful is left to http.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from mms_lite.frontends.message import Limits, split_target

_TEXT = bytes(range(0x20, 0x7F)) + b"\r\n"
_METHODS = frozenset((b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH"))
_MAX_LINES = 128  # aiohttp takes as many headers
_MAX_DIGITS = 15  # of a length: below what any parser counts with
# What asks for more than an answer, or is read in two ways.
_NOT_PLAIN = frozenset((b"transfer-encoding", b"expect", b"upgrade", b"sec-websocket-key1"))


@dataclass(slots=True)
class Head:
    """The head of a message as read; `raw` are its bytes."""

    raw: bytes
    method: str
    version: str
    target: str
    path: str
    query: Sequence[tuple[str, str]]
    headers: Sequence[tuple[str, str]]
    named: Mapping[str, str]
    length: int
    keep_alive: bool


class _Lines:
    """What httptools calls while it reads a head."""

    __slots__ = ("complete", "headers", "keep_alive", "parser", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.keep_alive = False
        self.complete = False
        self.parser: HttpRequestParser | None = None

    def on_url(self, target: bytes) -> None:
        self.target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self.parser is not None
        self.keep_alive = self.parser.should_keep_alive()
        self.complete = True


def read_head(raw: bytes, limits: Limits) -> Head | None:
    """Return what a head says, from its first byte to its empty line; None unless its form is plain.

    Plain are: ASCII without control characters; lines that end in CR LF, without spaces before it, none
    folded; an ordinary method; a path as target; HTTP/1.0, or 1.1 with a host; no header twice; no length or
    one of digits; no transfer coding, expectation or upgrade; all within the limits.
    """
    lines = raw.count(b"\n")
    if not _is_text(raw) or raw.count(b"\r") != lines or b"\n " in raw or b" \r" in raw:
        return None
    if len(raw) > limits.max_header_size or lines > _MAX_LINES:
        return None
    read = _Lines()
    read.parser = parser = HttpRequestParser(read)
    try:
        parser.feed_data(raw)
    except (HttpParserError, HttpParserUpgrade):
        return None
    finally:
        read.parser = None  # no cycle for the collector to find
    method, version = parser.get_method(), parser.get_http_version()
    given = {name.lower(): value for name, value in read.headers}
    length = given.get(b"content-length", b"0")
    if (
        not read.complete
        or method not in _METHODS
        or version not in {"1.0", "1.1"}
        or not read.target.startswith(b"/")
        or len(read.target) > limits.max_line_size
        or len(given) < len(read.headers)
        or not _NOT_PLAIN.isdisjoint(given)
        or (version == "1.1" and b"host" not in given)
        or not length.isdigit()
        or len(length) > _MAX_DIGITS
        or not raw.startswith(b"%b %b HTTP/%b\r\n" % (method, read.target, version.encode()))
    ):
        return None
    target = read.target.decode()
    path, query = split_target(target)
    headers = tuple((name.decode(), value.decode()) for name, value in read.headers)
    return Head(
        raw=raw,
        method=method.decode(),
        version=f"HTTP/{version}",
        target=target,
        path=path,
        query=query,
        headers=headers,
        named={name.lower(): value for name, value in headers},  # none is there twice
        length=int(length),
        keep_alive=read.keep_alive,
    )


def may_begin_a_head(part: bytes) -> bool:
    """Tell whether the bytes so far can become the head of a message that is plain."""
    if not _is_text(part):
        return False
    try:
        HttpRequestParser(object()).feed_data(part)
    except (HttpParserError, HttpParserUpgrade):
        return False
    return True


def _is_text(part: bytes) -> bool:
    """Tell whether this is printable ASCII in lines that end in CR LF."""
    return not part.translate(None, _TEXT) and part.count(b"\n") == part.count(b"\r\n")
