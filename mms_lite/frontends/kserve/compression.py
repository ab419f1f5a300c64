"""gzip and deflate of bodies: requests are unpacked up to limits, answers are packed for who asks for it."""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Sequence
from types import TracebackType

from mms_lite.errors import InvalidRequest, Overloaded, RequestTooLarge, UnsupportedMedia
from mms_lite.shared import SharedBytes

_ANY_FORMAT = 47  # zlib's: gzip or zlib, seen by how it begins
_FORMATS = {"gzip": 31, "deflate": 15}
_LEVEL = 1  # numbers hardly become smaller by more work
_PIECE_BYTES = 1 << 16  # packed
_UNPACKED_BYTES = 1 << 20  # that are made before they are counted
_MOST_MEMBERS = 1024  # of gzip
_THREAD_BYTES = 1 << 16  # of an answer: a few milliseconds


class Unpacked:
    """The unpacked bytes of all open requests together, which threads count."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self.held_bytes = 0

    def share(self) -> Share:
        """Return the share of one request, which is given back when its block ends."""
        return Share(self)

    def take(self, share: Share, size: int) -> None:
        """Count bytes as held by a share.

        Raises:
            Overloaded: all together are too many, or nobody waits for them any more.
        """
        with self._lock:
            if share.ended or self.held_bytes + size > self._most_bytes:
                raise Overloaded("The server holds as many bytes of requests as it may. Try again later.")
            self.held_bytes += size
            share.held_bytes += size

    def give_back(self, share: Share) -> None:
        """Count nothing as held by a share from now on: a thread may still be at work for who has left."""
        with self._lock:
            share.ended = True
            self.held_bytes -= share.held_bytes
            share.held_bytes = 0


class Share:
    """What one request holds of `Unpacked`, until its block ends in whatever way."""

    __slots__ = ("_all", "ended", "held_bytes")

    def __init__(self, of_all: Unpacked) -> None:
        self._all = of_all
        self.ended = False
        self.held_bytes = 0

    def take(self, size: int) -> None:
        """Count bytes as held.

        Raises:
            Overloaded: all together are too many.
        """
        self._all.take(self, size)

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._all.give_back(self)


async def unpack(body: bytearray | SharedBytes, encoding: str, max_size: int, share: Share) -> bytearray:
    """Return a request's body without its Content-Encoding.

    Raises:
        UnsupportedMedia: the encoding is none that we know.
        RequestTooLarge: there is more in it than `max_size` bytes.
        Overloaded: there is more in it and all other requests together than may be.
        InvalidRequest: it is broken.
    """
    if encoding.strip().lower() not in _FORMATS:
        raise UnsupportedMedia("Unsupported compression type")
    # The thread has the body, not a view of it: the place of what is shared must not be free before.
    return await asyncio.to_thread(_unpack, body, max_size, share)


def _unpack(body: bytearray | SharedBytes, max_size: int, share: Share) -> bytearray:
    view = body.view if isinstance(body, SharedBytes) else memoryview(body)
    packer, whole, members = zlib.decompressobj(_ANY_FORMAT), bytearray(), 1
    try:
        for start in range(0, len(view), _PIECE_BYTES):
            rest: bytes | memoryview = view[start : start + _PIECE_BYTES]
            while rest:
                if packer.eof:  # gzip may go on with another member (RFC 1952, section 2.2)
                    members += 1
                    if members > _MOST_MEMBERS:
                        raise InvalidRequest("failed to decompress the request: it has too many parts")
                    packer = zlib.decompressobj(_FORMATS["gzip"])
                rest = _unpack_piece(packer, rest, whole, max_size, share)
    except zlib.error as error:
        raise InvalidRequest(f"failed to decompress the request: {error}") from error
    if not packer.eof:
        raise InvalidRequest("failed to decompress the request: it does not end where its content does")
    return whole


def _unpack_piece(
    packer: zlib._Decompress, rest: bytes | memoryview, whole: bytearray, max_size: int, share: Share
) -> bytes:
    """Add what is in a piece to `whole`; return what is left of it behind the end."""
    while True:
        most_bytes = min(_UNPACKED_BYTES, max_size + 1 - len(whole))
        piece = packer.decompress(rest, most_bytes)
        if len(whole) + len(piece) > max_size:
            raise RequestTooLarge(f"The request's body unpacks to more than the limit of {max_size} bytes.")
        share.take(len(piece))
        whole += piece
        rest = packer.unconsumed_tail
        if len(piece) < most_bytes:  # else more may be to come, even of an empty rest
            return packer.unused_data


def wanted(accept: str | None) -> str | None:
    """Return the encoding that a client asks for, or None.

    It is asked for if nothing else is named: a list, such as "gzip, deflate", is what HTTP libraries send
    with every request, and packing tensors takes longer than sending them.
    """
    if accept is None:
        return None
    encoding = accept.strip().lower()
    return encoding if encoding in _FORMATS else None


async def packed(pieces: Sequence[bytes | bytearray | memoryview], encoding: str) -> bytes:
    """Return an answer's body in an encoding that `wanted` returned."""
    if sum(map(len, pieces)) > _THREAD_BYTES:
        return await asyncio.to_thread(_pack, pieces, encoding)
    return _pack(pieces, encoding)


def _pack(pieces: Sequence[bytes | bytearray | memoryview], encoding: str) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _FORMATS[encoding])
    return b"".join([*map(packer.compress, pieces), packer.flush()])
