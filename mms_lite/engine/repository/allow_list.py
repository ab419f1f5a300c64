"""Which http(s) addresses archives may be fetched from: one spelling of a URL, and the list that permits it.

What is compared is what is asked for later: nothing is parsed a second time. Nothing here looks a name up.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote

from mms_lite.errors import ConfigError, Forbidden, InvalidRequest, ModelNotFound

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?")
_MAX_HOST = 253
_HOST = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_DOTS = re.compile(r"/\.\.?(?:;|%3B|/|\Z)", re.IGNORECASE)  # some servers read "..;x" as ".."
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
# Dot, slash, backslash, percent and controls: servers disagree about what these mean once decoded.
_REFUSED_CODES = {0x2E, 0x2F, 0x5C, 0x25, 0x7F, *range(0x20)}
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_DELIMITERS = "%/:@!$&'()*+,;="


def is_remote(text: str) -> bool:
    """Tell whether this is a URL of any scheme, and no path in the model store."""
    return _SCHEME.match(text) is not None


class _Malformed(ValueError):
    """The text is no http(s) URL."""


class _Refused(ValueError):
    """It is a URL, but of a kind that is never fetched; the message says why."""


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """An http(s) URL in the one spelling that is compared, connected to and asked for.

    `host` is in lower case ASCII without a dot at its end, `address` its value if it is a literal address.
    """

    scheme: str
    host: str
    address: IpAddress | None
    port: int
    path: str
    query: str = ""

    @classmethod
    def parse(cls, text: str) -> RemoteUrl:
        """Return the URL in its one spelling.

        Raises:
            ValueError: it is malformed, or of a kind that is never fetched.
        """
        match = _URL.fullmatch(text)
        if match is None or not text.isprintable() or " " in text or "\\" in text:
            raise _Malformed("it is not a URL")
        scheme, authority, path, query = match[1].lower(), match[2], match[3] or "/", match[4] or ""
        if "@" in authority:
            raise _Refused("it has a user name in it")
        where = _AUTHORITY.fullmatch(authority)
        if where is None:
            raise _Malformed("its host or port is not valid")
        port = int(where[3] or (443 if scheme == "https" else 80))
        if not 0 < port < 65536:
            raise _Malformed("its port is not valid")
        host, address = _host(where[1], where[2])
        return cls(scheme, host, address, port, _path(path), quote(query, safe=_DELIMITERS + "?[]"))

    @property
    def authority(self) -> str:
        """Return host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        """Return what the request line asks for."""
        return self.path + self.query

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one item of allowed_urls permits: an origin, and the paths that begin with `prefix`."""

    origin: tuple[str, str, int]
    prefix: str
    whole_segments: bool

    @classmethod
    def parse(cls, text: str) -> _Entry:
        begin = re.sub(r"\.?\*\Z", "", text)
        if "*" in begin or (begin != text and begin.count("/") < 3):
            raise _Malformed("a * may only end a path")
        url = RemoteUrl.parse(begin)
        if url.query:
            raise _Malformed("it has a query")
        return cls((url.scheme, url.host, url.port), url.path, begin == text)

    def permits(self, url: RemoteUrl) -> bool:
        if self.origin != (url.scheme, url.host, url.port) or not url.path.startswith(self.prefix):
            return False
        rest = url.path[len(self.prefix) :]
        return not self.whole_segments or self.prefix.endswith("/") or rest[:1] in ("", "/")


@dataclass(frozen=True, slots=True)
class AllowList:
    """The option allowed_urls: where archives may come from. Empty: from nowhere."""

    entries: tuple[_Entry, ...] = ()

    @classmethod
    def parse(cls, text: str) -> AllowList:
        """Read `scheme://host[:port]/prefix,...`.

        A prefix ends where a segment of the path ends: `/models` permits `/models/m.mar`, not `/models2`.
        After `*` (or `.*`, as a regular expression would have it) at its end it may end anywhere.

        Raises:
            ConfigError: an entry is not of this form.
        """
        entries = []
        for item in filter(None, map(str.strip, text.split(","))):
            try:
                entries.append(_Entry.parse(item))
            except ValueError as error:
                raise ConfigError(
                    f"allowed_urls: {item} is not scheme://host[:port]/prefix: {error}"
                ) from error
        return cls(tuple(entries))

    def admit(self, text: str) -> RemoteUrl:
        """Return the URL if it may be fetched. Looks nothing up.

        Raises:
            ModelNotFound: it is malformed.
            InvalidRequest: it has a fragment.
            Forbidden: it is not permitted.
        """
        scheme = _SCHEME.match(text)
        if scheme is None or scheme[1].lower() not in ("http", "https"):
            raise forbidden(text, "only http and https are read")
        if "#" in text:
            raise InvalidRequest("The checksum is given as parameter sha256, not behind # in the url.")
        try:
            url = RemoteUrl.parse(text)
        except _Malformed as error:
            raise ModelNotFound(f"Invalid model url: {text}") from error
        except _Refused as error:
            raise forbidden(text, str(error)) from error
        if not any(entry.permits(url) for entry in self.entries):
            host = "/".join(text.split("/")[:3])
            raise forbidden(text, f"allowed_urls does not permit it; allowed_urls={host}/ would")
        return url


def forbidden(text: str, why: str) -> Forbidden:
    """Return the refusal of a URL."""
    return Forbidden(f"Models may not be loaded from {text}: {why}")


def _host(in_brackets: str | None, name: str | None) -> tuple[str, IpAddress | None]:
    try:
        if in_brackets is not None:
            v6 = ipaddress.IPv6Address(in_brackets)
            return v6.compressed, v6
        if name is None or len(name) > _MAX_HOST:
            raise ValueError("no name, or too long for one")
        host = name.encode("idna").decode("ascii").lower().removesuffix(".")
        if not _HOST.fullmatch(host):
            raise ValueError("a character that names do not have")
        if not _NUMBER.fullmatch(host.rpartition(".")[2]):
            return host, None
        # What ends in a number is an address, and 127.1 or 0x7f000001 are no spellings of one here.
        v4 = ipaddress.IPv4Address(host)
    except ValueError as error:  # UnicodeError is one
        raise _Malformed("its host is not valid") from error
    return str(v4), v4


def _path(text: str) -> str:
    """Return a path with every character in its one spelling."""

    def spelled(match: re.Match[str]) -> str:
        code = int(match[1], 16)
        if code in _REFUSED_CODES:
            raise _Refused("its path has an encoded dot, slash, backslash, percent or control character")
        plain = chr(code)
        return plain if _UNRESERVED.fullmatch(plain) else match[0].upper()

    path = quote(text, safe=_DELIMITERS)
    if path.count("%") != len(_ENCODED.findall(path)):
        raise _Malformed("its path has a % that encodes nothing")
    if _DOTS.search(path):
        raise _Refused("its path has a . or .. segment")
    return _ENCODED.sub(spelled, path)
