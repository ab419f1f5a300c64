"""Where a server listens, and how MMS spells it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from mms_lite.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: scheme, host and port, or for scheme `unix` the path of a socket."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str, *, http_port: int = 80, https_port: int = 443) -> Address:
        """Return the address that `(http|https)://HOST[:PORT]` or `unix:/PATH` spells.

        Beyond MMS: IPv6 literals in brackets, a trailing slash, ports 0 and 32767 to 65535.

        Raises:
            ConfigError: the text is no address or the port is over 65535.
        """
        text = text.strip()
        if match := re.fullmatch(r"unix:(/.+)", text, re.IGNORECASE):
            return cls("unix", "", 0, match[1])
        pattern = r"(https?)://(?:\[([^\]]+)\]|([^\s:/^\[\]]+))(?::([0-9]+))?/?"
        match = re.fullmatch(pattern, text, re.IGNORECASE)
        if match is None or (match[2] and not _is_ipv6(match[2])):
            raise ConfigError(f"Invalid binding address: {text}")
        scheme = match[1].lower()
        digits = match[4] or str(https_port if scheme == "https" else http_port)
        if len(digits.lstrip("0")) > 5 or int(digits) > 65535:
            raise ConfigError(f"Invalid port number: {text}")
        return cls(scheme, match[2] or match[3], int(digits))

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
