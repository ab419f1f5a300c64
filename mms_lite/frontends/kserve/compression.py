"""gzip and deflate of bodies: requests are unpacked up to a limit, answers are packed for who asks for it."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

from mms_lite.errors import InvalidRequest, RequestTooLarge, UnsupportedMedia

_ANY_FORMAT = 47  # zlib's: gzip or zlib, seen by how it begins
_FORMATS = {"gzip": 31, "deflate": 15}
_LEVEL = 1  # numbers hardly become smaller by more work
_PIECE_BYTES = 1 << 16
_THREAD_BYTES = 1 << 16  # of an answer: a few milliseconds


async def unpack(body: memoryview, encoding: str, max_size: int) -> bytearray:
    """Return a request's body without its Content-Encoding.

    Raises:
        UnsupportedMedia: the encoding is none that we know.
        RequestTooLarge: there is more in it than `max_size` bytes.
        InvalidRequest: it is broken.
    """
    if encoding.strip().lower() not in _FORMATS:
        raise UnsupportedMedia("Unsupported compression type")
    return await asyncio.to_thread(_unpack, body, max_size)


def _unpack(body: memoryview, max_size: int) -> bytearray:
    packer, whole = zlib.decompressobj(_ANY_FORMAT), bytearray()
    try:
        for start in range(0, len(body), _PIECE_BYTES):
            rest: bytes | memoryview = body[start : start + _PIECE_BYTES]
            while True:
                piece = packer.decompress(rest, max_size + 1 - len(whole))
                whole += piece
                if len(whole) > max_size:
                    raise RequestTooLarge(
                        f"The request's body unpacks to more than the limit of {max_size} bytes."
                    )
                rest = packer.unconsumed_tail
                if not piece or not rest:
                    break
    except zlib.error as error:
        raise InvalidRequest(f"failed to decompress the request: {error}") from error
    if not packer.eof or packer.unused_data:
        raise InvalidRequest("failed to decompress the request: it does not end where its content does")
    return whole


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
