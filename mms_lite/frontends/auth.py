"""Who may manage: whoever is on this machine (no web page in its browser), and from afar who has the token.

The rule and the file in which the token lives are here; which routes are guarded is the protocol's business.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from mms_lite.address import Address
from mms_lite.errors import ConfigError, Forbidden, Unauthorized
from mms_lite.frontends.message import HttpRequest

TOKEN_FILE = ".model_server.token"  # beside the pid file, where no other is configured
_MAX_TOKEN_BYTES = 4096  # more does not fit into a header
_TOO_OPEN = stat.S_IWGRP | stat.S_IRWXO
# A reverse proxy on this machine connects from it for clients that are elsewhere.
_FORWARDED = frozenset(
    ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
)


@dataclass(frozen=True, slots=True)
class Authoriser:
    """The rule of one address. Without a token whoever reaches the address may manage.

    `origin` is that of the web pages that may (cors_allowed_origin), or `*`. `hosts` are the names of this
    machine, in lower case, under which a page of our own may ask.
    """

    token: bytes | None = None
    origin: str | None = None
    hosts: frozenset[str] = frozenset(("localhost",))

    def check(self, request: HttpRequest) -> None:
        """Let a request pass that may manage this server.

        Raises:
            Unauthorized: it may not.
            Forbidden: a web page sent it that is not ours.
        """
        if not self._is_of_ours(request):
            raise Forbidden("Web pages of other sites may not manage this server (cors_allowed_origin).")
        if self.token is None or _comes_from_here(request):
            return
        scheme, _, given = (request.header("authorization") or "").partition(" ")
        said = given.strip().encode("utf-8", "replace")
        if scheme.lower() != "bearer" or not hmac.compare_digest(said, self.token):
            raise Unauthorized(
                "To manage this server from another machine, send its token in the header"
                " Authorization: Bearer TOKEN; the server's log names the token's file."
            )

    def _is_of_ours(self, request: HttpRequest) -> bool:
        """Tell whether no web page sent a request, or one that may. Browsers tell of the page that sends."""
        origin, site = request.header("origin"), request.header("sec-fetch-site")
        if (origin is None and site is None) or (origin is not None and self.origin in ("*", origin)):
            return True
        host = (request.header("host") or "").lower()
        if origin is not None and origin.partition("://")[2].lower() != host:
            return False
        # A site of others may let its own name lead here; then page and server have one origin.
        name = re.sub(r":\d*$", "", host).strip("[]")
        return site in (None, "same-origin", "none") and (_is_address(name) or name in self.hosts)


def is_local(address: Address) -> bool:
    """Tell whether only this machine can reach an address. A name other than localhost counts as not."""
    return address.scheme == "unix" or address.host.lower() == "localhost" or _is_loopback(address.host)


def read_token(path: Path, *, default_place: bool) -> bytes:
    """Return the token in the first line of a file; make the file, for us alone, where there is none.

    In the `default_place`, a folder that others may write, it must not be a link.

    Raises:
        ConfigError: others could have read or chosen the token, there is none, or the file cannot be used.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if default_place else 0)
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        return _make_token(path)
    except OSError as error:
        why = "it is a link" if default_place and error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"cannot use the token file {path}: {why}; {_way_out(default_place)}") from error
    try:
        if why := _flaw(os.fstat(fd)):
            raise ConfigError(f"cannot use the token file {path}: {why}; {_way_out(default_place)}")
        token = os.read(fd, _MAX_TOKEN_BYTES + 1).partition(b"\n")[0].strip()
    finally:
        os.close(fd)
    if not 0 < len(token) <= _MAX_TOKEN_BYTES or not token.isascii() or not token.decode().isprintable():
        raise ConfigError(
            f"the first line of the token file {path} must have 1 to {_MAX_TOKEN_BYTES} printable characters"
            " of ASCII"
        )
    return token


def _make_token(path: Path) -> bytes:
    token = secrets.token_urlsafe(32).encode()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
        try:
            os.write(fd, token + b"\n")
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"cannot make the token file {path}: {error.strerror}") from error
    return token


def _flaw(status: os.stat_result) -> str:
    """Return why a file cannot be trusted to hold a secret of ours, or an empty text."""
    if not stat.S_ISREG(status.st_mode):
        return "it is no plain file"
    if status.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    if status.st_mode & _TOO_OPEN:
        return f"others can read or write it (mode {stat.S_IMODE(status.st_mode):04o}, want 0600 or 0640)"
    return ""


def _way_out(default_place: bool) -> str:
    return "remove it, or set management_token_file" if default_place else "mend it, or name another"


def _comes_from_here(request: HttpRequest) -> bool:
    host = request.remote.rpartition(":")[0].strip("[]")  # none: a Unix socket
    return (not host or _is_loopback(host)) and not any(
        name.lower() in _FORWARDED for name, _ in request.headers
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
