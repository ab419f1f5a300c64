"""The table of cases: cases/*.toml as requests to send.

Every character of a body is one byte, so that any bytes can be written as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib
from exchange import Sent

CASES = Path(__file__).parent / "cases"
_HEAD = "Host: test"
_REPEATED = re.compile(r"<(\d+)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request, or `parallel` equal ones `stagger_ms` apart, to both servers.

    `port` is inference, management or merged. With `until` the request is repeated, for `limit_s`, until
    the answer's status and body contain that text.
    """

    id: str
    group: str
    send: str = ""
    raw: str | None = None
    headers: tuple[str, ...] = ()
    body: str | None = None
    body_size: int = 0
    chunks: tuple[str, ...] = ()
    waits: bool = False
    port: str = "inference"
    answers: int = 1
    parallel: int = 1
    stagger_ms: int = 0
    until: str = ""
    limit_s: float = 30.0

    @property
    def request(self) -> str:
        """The request in a line, for people."""
        return self.send or (self.raw or "").split("\r\n")[0]

    @property
    def requests(self) -> int:
        """How many requests the case sends to each server."""
        return self.parallel * self.answers

    def bytes(self, places: Mapping[str, str]) -> Sent:
        """Return what is sent, with the run's addresses put in for <files> and the like, and N x for <N>."""
        if self.raw is not None:
            data = _placed(self.raw, places)
            return Sent(data, head_only=data.startswith(b"HEAD "), answers=self.answers)
        body = b"x" * self.body_size or _placed(self.body or "", places)
        lines = [*self.headers]
        if self.chunks:
            lines.append("Transfer-Encoding: chunked")
            body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in map(_latin, self.chunks)) + b"0\r\n\r\n"
        elif self.body is not None or self.body_size:
            lines.append(f"Content-Length: {len(body)}")
        method, target, *version = self.send.split(" ")
        head = "\r\n".join([f"{method} {target} {''.join(version) or 'HTTP/1.1'}", _HEAD, *lines, "", ""])
        return Sent(
            _placed(head, places), body, waits=self.waits, head_only=method == "HEAD", answers=self.answers
        )


def read(folder: Path = CASES) -> list[Case]:
    """Return all cases, the files by name and each file's in its order.

    Raises:
        ValueError: a file is no table of cases, or an id stands for two.
    """
    cases: list[Case] = []
    for path in sorted(folder.glob("*.toml")):
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        for row in table.pop("cases"):
            lists = {key: tuple(value) for key, value in row.items() if isinstance(value, list)}
            cases.append(Case(**{"group": path.stem[3:], **table, **row, **lists}))
    ids = [case.id for case in cases]
    if twice := {each for each in ids if ids.count(each) > 1}:
        raise ValueError(f"ids of more than one case: {', '.join(sorted(twice))}")
    return cases


def _placed(text: str, places: Mapping[str, str]) -> bytes:
    for name, value in places.items():
        text = text.replace(name, value)
    return _latin(_REPEATED.sub(lambda found: "x" * int(found[1]), text))


def _latin(text: str) -> bytes:
    return text.encode("latin-1")
