"""Bytes on a gRPC port that no gRPC library sends: noise, broken frames, calls that stop in their middle.

Frames: RFC 9113; headers are literals without Huffman coding (RFC 7541, 6.2.2); messages: gRPC over HTTP/2.
"""

import asyncio
import gzip
import socket
import struct
from contextlib import suppress
from random import Random

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _END_HEADERS = 1, 4
_READ_S = 0.2
_BOMB = gzip.compress(bytes(100 << 20), 9)  # 100 KB that become 100 MB: over the limit of a message
_TIMEOUTS = ("0n", "1n", "1u", "1m", "99999999H", "1x", "-1S", "", "999999999999S")


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame."""
    return struct.pack("!I", len(payload))[1:] + bytes((kind, flags)) + struct.pack("!I", stream) + payload


def headers(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """Return a block of headers."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs)


def _text(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes((size,)) + text
    size -= 127
    encoded = bytearray(b"\x7f")
    while size >= 128:
        encoded.append(size & 127 | 128)
        size >>= 7
    return bytes([*encoded, size]) + text


def attack(random: Random, path: str, message: bytes) -> tuple[list[bytes], bool]:
    """Return the pieces of an attack, and whether the connection is to be reset and not closed."""
    kinds = (_noise, _half_open, _call, _call, _call, _odd_headers, _odd_frames, _reset_storm)
    return random.choice(kinds)(random, path.encode(), message), random.random() < 0.5


def call(path: bytes) -> list[bytes]:
    """Return a call without a message."""
    return [_start() + frame(_HEADERS, _END_HEADERS | _END_STREAM, 1, _call_headers(path))]


async def send(address: str, pieces: list[bytes], *, reset: bool) -> None:
    """Send the pieces on a connection of their own, read what comes for a moment, and leave."""
    host, port = address.rsplit(":", 1)
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 5)
    except (OSError, TimeoutError):
        return  # whether the server is there, others find out
    with suppress(OSError, TimeoutError):
        for piece in pieces:
            writer.write(piece)
            await asyncio.wait_for(writer.drain(), 5)
        await asyncio.wait_for(reader.read(1 << 16), _READ_S)
    if reset:
        linger = struct.pack("ii", 1, 0)
        with suppress(OSError):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def _start() -> bytes:
    return _PREFACE + frame(_SETTINGS, 0, 0, b"")


def _call_headers(path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    return headers(
        [
            *((b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost")),
            *((b"content-type", b"application/grpc"), (b"te", b"trailers"), *more),
        ]
    )


def _noise(random: Random, path: bytes, message: bytes) -> list[bytes]:
    noise = random.randbytes(random.choice((1, 9, 24, 100, 5000)))
    return [random.choice((noise, b"GET / HTTP/1.1\r\n\r\n", _PREFACE + noise, b"\x16\x03\x01" + noise))]


def _half_open(random: Random, path: bytes, message: bytes) -> list[bytes]:
    whole = _start() + frame(_HEADERS, _END_HEADERS, 1, _call_headers(path))
    return [whole[: random.randrange(1, len(whole))]]


def _call(random: Random, path: bytes, message: bytes) -> list[bytes]:
    """A call whose messages are cut, lie about their length, or about how they are packed."""
    packing = random.choice((b"gzip", b"deflate", b"br", b"identity", b""))
    flag = random.choice((0, 0, 1, 2, 255))
    body, size = message, len(message)
    if flag == 1:
        body = random.choice((gzip.compress(message), message, gzip.compress(message)[:-3], _BOMB))
        size = len(body)
    size = random.choice((size, size, size + 1, max(0, size - 1), 0, 2**31, 2**32 - 1))
    content = bytes((flag,)) + struct.pack("!I", size) + body
    content = content * random.choice((1, 1, 3)) if len(content) < 10_000 else content
    content = content[: random.choice((len(content), len(content), random.randrange(len(content) + 1), 3))]
    more = [(b"grpc-encoding", packing)] if flag else []
    pieces = [_start() + frame(_HEADERS, _END_HEADERS, 1, _call_headers(path, *more))]
    step = random.choice((16_384, 16_384, 1000, max(1, len(content) // 3)))
    for at in range(0, len(content), step):
        end = _END_STREAM if at + step >= len(content) and random.random() < 0.7 else 0
        pieces.append(frame(_DATA, end, 1, content[at : at + step]))
    if random.random() < 0.3:
        pieces.append(frame(_RST, 0, 1, struct.pack("!I", 8)))
    return pieces


def _odd_headers(random: Random, path: bytes, message: bytes) -> list[bytes]:
    odd: tuple[tuple[bytes, bytes], ...] = (
        (b"grpc-timeout", random.choice(_TIMEOUTS).encode()),
        (b"x-id", b"\xff\xfe\x80"),
        (b"x-id", b"a\0b"),
        (b"x-id-bin", b"!!! no base64"),
        (b"X-Upper", b"1"),
        (b"x" * 5000, b"1"),
        (b"x-long", b"y" * 20_000),
        (b":path", b"/again"),
        (b"content-length", b"-1"),
        (b"triton_grpc_error", b"true"),
        (b"grpc-accept-encoding", b"\xff"),
        (b"authorization", b"Bearer \xff"),
        (b"content-type", b"text/html"),
    )
    chosen = random.sample(odd, random.choice((1, 1, 3))) * random.choice((1, 1, 40))
    path = random.choice((path, path, b"", b"/", b"no", b"*", path * 50))
    content = b"\0" + struct.pack("!I", len(message)) + message[:16_000]
    head = frame(_HEADERS, _END_HEADERS, 1, _call_headers(path, *chosen)[:16_384])
    return [_start() + head, frame(_DATA, _END_STREAM, 1, content)]


def _odd_frames(random: Random, path: bytes, message: bytes) -> list[bytes]:
    head = _call_headers(path)
    chosen = (
        frame(_PING, 0, 0, bytes(8)) * 100,
        frame(
            _SETTINGS, 0, 0, struct.pack("!HI", random.randrange(8), random.choice((0, 1, 2**31, 2**32 - 1)))
        ),
        frame(_WINDOW, 0, random.choice((0, 1)), struct.pack("!I", random.choice((0, 1, 2**31 - 1)))) * 3,
        frame(_HEADERS, 0, 1, head[:20]) + frame(_CONTINUATION, 0, 1, b"") * 1000,
        frame(_DATA, 0, random.choice((0, 1, 2, 99)), b"x" * 100),
        frame(_GOAWAY, 0, 0, bytes(8)),
        frame(random.randrange(256), random.randrange(256), random.randrange(4), random.randbytes(30)),
        b"\xff\xff\xff" + random.randbytes(6),
    )
    pieces = [frame(_HEADERS, _END_HEADERS, 1, head)] if random.random() < 0.5 else []
    return [_start(), *pieces, *random.sample(chosen, random.choice((1, 2, 4)))]


def _reset_storm(random: Random, path: bytes, message: bytes) -> list[bytes]:
    """Calls that are cancelled as soon as they are there (CVE-2023-44487)."""
    content = b"\0" + struct.pack("!I", len(message)) + message[:2000]
    calls = [
        frame(_HEADERS, _END_HEADERS, stream, _call_headers(path))
        + frame(_DATA, _END_STREAM, stream, content)
        + frame(_RST, 0, stream, struct.pack("!I", 8))
        for stream in range(1, 120, 2)
    ]
    return [_start(), b"".join(calls)]
