"""What the gRPC server and protocols over gRPC share: services, their methods, and what is known of a call.

Apart from the server so that a protocol knows no gRPC library: messages come and go as bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mms_lite.errors import HandlerError, InvalidRequest, RequestTooLarge, ServingError
from mms_lite.frontends.message import HttpRequest

MOST_SHORT_BYTES = 128 << 10  # of a message that is parsed at once: some milliseconds
# A model's own error: the codes that it may name, and those of its HTTP status (google/rpc/code.proto).
_CHOICE = frozenset(("UNKNOWN", "NOT_FOUND", "UNAVAILABLE", "UNIMPLEMENTED", "ALREADY_EXISTS", "CANCELLED"))
_OF_HTTP = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
    507: "RESOURCE_EXHAUSTED",
}


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
"""Answers come in the order of the messages: with each, the oldest message counts as held no more."""


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


def parse(kind: Any, received: bytes) -> Any:
    """Return the message of this class that the bytes are; the caller has bounded what they can become.

    Raises:
        InvalidRequest: they are none.
    """
    from google.protobuf.message import DecodeError

    try:
        return kind.FromString(received)
    except DecodeError as error:
        raise InvalidRequest(f"the message is no valid {kind.DESCRIPTOR.full_name}") from error


def parse_short(kind: Any, received: bytes, *, most_bytes: int = MOST_SHORT_BYTES) -> Any:
    """Return the message of this class that the bytes are; for methods whose messages are never long.

    A parser may make a hundred times the bytes of it, while everything else waits.

    Raises:
        RequestTooLarge: there are more bytes than that.
        InvalidRequest: they are none.
    """
    if len(received) > most_bytes:
        name = kind.DESCRIPTOR.full_name
        raise RequestTooLarge(f"the {name} has {len(received)} bytes; {most_bytes} are the most")
    return parse(kind, received)


def chosen_code(error: ServingError) -> str | None:
    """Return the name of the gRPC status that a model has chosen for its error, None if it has not."""
    if not isinstance(error, HandlerError):
        return None
    code, status = error.details.get("grpc"), error.details.get("status")
    if isinstance(code, str) and code in _CHOICE:
        return code
    if type(status) is not int or not 400 <= status <= 599:
        return None
    return _OF_HTTP.get(status, "INVALID_ARGUMENT" if status < 500 else "INTERNAL")
