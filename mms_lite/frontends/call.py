"""What the gRPC server and protocols over gRPC share: services, their methods, and what is known of a call.

Apart from the server so that a protocol knows no gRPC library: messages come and go as bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mms_lite.errors import ServingError
from mms_lite.frontends.message import HttpRequest


@dataclass(slots=True)
class Call:
    """One call. `metadata` are its headers, `deadline` is in time.monotonic() seconds, `id` is ours.

    `peer` is the client's host:port, empty where it has none.
    """

    id: str
    metadata: Sequence[tuple[str, str]] = ()
    deadline: float | None = None
    peer: str = ""

    @property
    def as_http(self) -> HttpRequest:
        """The call as a request over HTTP without a body: for rules that are made of headers and peers."""
        return HttpRequest("POST", "/", self.id, "/", headers=self.metadata, remote=self.peer)


Unary = Callable[[bytes, Call], Awaitable[bytes]]
Stream = Callable[[AsyncIterator[bytes], Call], AsyncGenerator[bytes, None]]


class RpcService(Protocol):
    """A gRPC service. Its methods take and return serialized messages and raise ServingError.

    `name` is the full one, such as "inference.GRPCInferenceService". `files` are the serialized
    FileDescriptorProtos that describe it and its messages, imports first, for server reflection.
    """

    name: str
    unary: dict[str, Unary]
    streams: dict[str, Stream]
    files: Sequence[bytes]

    def spell(self, error: ServingError, method: str) -> tuple[str, str]:
        """Return the name of the gRPC status code, such as "NOT_FOUND", and the message for an error."""
