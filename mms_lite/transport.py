"""How bytes cross between the server and a worker: frames over a Unix socket pair, and two shared counters.

One sans-I/O decoder serves two ends: `AsyncConnection` for the server's event loop, `BlockingConnection`
for the worker. A frame is a head, a table of buffer lengths, a small meta block and the buffers, each of
which arrives in a fresh bytearray of its own. End of file means that the other side is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop  # workers do not load asyncio

PROTOCOL_VERSION = 1
_HEAD = struct.Struct("!BBxxQII")  # version, kind, conversation, meta bytes, number of buffers
_LENGTH = struct.Struct("!Q")
_SCRATCH_BYTES = 16 * 1024  # what is read of a frame before its buffers are known, and then copied
_DIRECT_BYTES = 8 * 1024  # a buffer that still wants this much is received in place, without a copy
_LEAST_WAIT_S = 1e-6  # the system's unit; 0 would be for ever
_UNCLEARED_BYTES = 64 * 1024  # a buffer of this size is worth a call of Python's own C interface
# A bytearray whose memory is not cleared first: it is handed out only once it is filled.
_uncleared = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyByteArray_FromStringAndSize", ctypes.pythonapi)
)
_IOV_MAX = 512  # under every system's limit for one sendmsg
DEFAULT_MAX_FRAME_BYTES = 1 << 30

Buffer: TypeAlias = bytes | bytearray | memoryview


class FrameKind(IntEnum):
    """What a frame says. Either side may open a conversation; an answer carries its number."""

    LOAD = 1  # server -> worker: the model's spec (JSON)
    LOADED = 2  # worker -> server: ready, or why not (JSON)
    BATCH = 3  # server -> worker: requests to run together
    STARTED = 4  # worker -> server: one item of a batch that failed runs again, alone, from now on
    OUTCOME = 5  # worker -> server: an answer or error for one job; several until one is final
    CANCEL = 6  # server -> worker: do not start these jobs
    CALL = 7  # worker -> server: infer on another model
    RESULT = 8  # server -> worker: the answer to CALL
    METRICS = 9  # worker -> server: metric lines of batches
    STOP = 10  # server -> worker: leave after what you hold


_KINDS = {int(kind): kind for kind in FrameKind}


class ExitCode(IntEnum):
    """What a worker's exit code says; any other is a crash."""

    STOPPED = 0
    LOAD_FAILED = 3
    OUT_OF_MEMORY = 4
    PROTOCOL = 5


class Marks:
    """Two counters in memory that both sides share: facts that would else cost each batch a system call.

    `begun` is the worker's: the conversation of the last batch that its model was given, 0 before the first.
    It is right in the moment in which the process ends, however it ends. `cancels` is the server's: how many
    CANCEL frames it has sent, so that the worker need not look for one.
    """

    __slots__ = ("_sent", "_words")
    SIZE = mmap.PAGESIZE

    def __init__(self, memory: bytearray | mmap.mmap) -> None:
        self._words = memoryview(memory).cast("Q")
        self._sent = 0

    @classmethod
    def map(cls, fd: int) -> Marks:
        """Return the counters in this file, of `SIZE` bytes or more."""
        return cls(mmap.mmap(fd, cls.SIZE))

    def let_go(self) -> None:
        """Keep the numbers as they are now, and give back the memory that was shared, with its descriptor."""
        self._words = memoryview(bytearray(self._words)).cast("Q")

    @property
    def begun(self) -> int:
        """The last batch that was begun."""
        return self._words[0]

    @begun.setter
    def begun(self, conversation: int) -> None:
        self._words[0] = conversation

    @property
    def cancels(self) -> int:
        """How many CANCEL frames were sent."""
        return self._words[1]

    def count_cancel(self) -> None:
        """Take note that a CANCEL was sent. What the other side may have written there is not read."""
        self._sent += 1
        self._words[1] = self._sent


class ProtocolError(Exception):
    """The peer sent something that is not a frame, or one over the limit."""


class ConnectionClosed(Exception):
    """The other side is gone."""


@dataclass(slots=True)
class Frame:
    """A whole frame, as received."""

    kind: FrameKind
    conversation: int
    meta: bytes
    buffers: list[bytearray]


def encode(
    kind: FrameKind, conversation: int, meta: bytes = b"", buffers: Sequence[Buffer] = ()
) -> list[Buffer]:
    """Return the pieces of a frame, ready for `sendmsg`; large buffers are passed through uncopied."""
    if len(buffers) == 1:  # nearly always
        only = buffers[0]
        view = only if isinstance(only, (bytes, bytearray)) else _octets(only)
        head = _HEAD.pack(PROTOCOL_VERSION, kind, conversation, len(meta), 1)
        lead = head + _LENGTH.pack(len(view)) + meta
        return [lead, view] if len(view) else [lead]
    views = [b if isinstance(b, (bytes, bytearray)) else _octets(b) for b in buffers]
    lengths = b"".join([_LENGTH.pack(len(b)) for b in views])
    head = _HEAD.pack(PROTOCOL_VERSION, kind, conversation, len(meta), len(buffers))
    return [head + lengths + meta, *[b for b in views if len(b)]]


def frame_bytes(meta: bytes, buffers: Sequence[Buffer]) -> int:
    """Return the size of a frame of these, which must not be over the limit of who receives it."""
    sizes = [_LENGTH.size + (b.nbytes if type(b) is memoryview else len(b)) for b in buffers]
    return _HEAD.size + len(meta) + sum(sizes)


def _octets(buffer: Buffer) -> Buffer:
    """Return a view whose length is in bytes: that of an array counts items."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else b""


class Decoder:
    """Turn received bytes into frames: ask for `space()`, fill it, tell `received(n)`."""

    def __init__(self, max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> None:
        self._max = max_frame_bytes
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._end = 0
        self._head: tuple[FrameKind, int, int] | None = None  # kind, conversation, number of buffers
        self._lead = bytearray()  # the table of lengths, then the meta block
        self._targets: list[bytearray] = []  # what is filled, in order; the lead comes first
        self._index = 0
        self._filled = 0

    def space(self) -> memoryview:
        """Return the memory in which the next bytes belong."""
        target = self._target()
        if target is not None and self._end == 0 and len(target) - self._filled >= _DIRECT_BYTES:
            return memoryview(target)[self._filled :]
        return memoryview(self._scratch)[self._end :]

    def received(self, count: int) -> list[Frame]:
        """Take note of `count` bytes in `space()` and return the frames that are whole now.

        Raises:
            ProtocolError: not a frame of this version, or over the limit.
        """
        frames: list[Frame] = []
        target = self._target()
        if target is not None and self._end == 0 and len(target) - self._filled >= _DIRECT_BYTES:
            self._filled += count
            self._advance(frames)
            return frames
        self._end += count
        start = 0
        with memoryview(self._scratch) as scratch:
            while True:
                target = self._target()
                if target is None:
                    if self._end - start < _HEAD.size:
                        break
                    size = self._whole(scratch, start, frames)
                    if size:
                        start += size
                        if start == self._end:
                            break
                        continue
                    self._open(scratch, start)
                    start += _HEAD.size
                else:
                    take = min(len(target) - self._filled, self._end - start)
                    target[self._filled : self._filled + take] = scratch[start : start + take]
                    self._filled += take
                    start += take
                self._advance(frames)
                if start == self._end:
                    break
            rest = bytes(scratch[start : self._end])
        self._scratch[: len(rest)] = rest
        self._end = len(rest)
        return frames

    def _whole(self, scratch: memoryview, start: int, frames: list[Frame]) -> int:
        """Take a frame that is here from end to end, as small ones are, and return its size; else 0."""
        version, kind, conversation, meta_bytes, count = _HEAD.unpack_from(scratch, start)
        here = self._end - start
        at = start + _HEAD.size + count * _LENGTH.size
        size = _HEAD.size + count * _LENGTH.size + meta_bytes
        if size > here or size > self._max or version != PROTOCOL_VERSION:
            return 0  # the long way, with its checks
        if count == 1:
            lengths = _LENGTH.unpack_from(scratch, at - _LENGTH.size)
        else:
            lengths = tuple(n for (n,) in _LENGTH.iter_unpack(scratch[start + _HEAD.size : at]))
        size += sum(lengths)
        if size > here or size > self._max or kind not in _KINDS:
            return 0
        meta = bytes(scratch[at : at + meta_bytes])
        at += meta_bytes
        buffers = []
        for length in lengths:
            buffers.append(bytearray(scratch[at : at + length]))
            at += length
        frames.append(Frame(_KINDS[kind], conversation, meta, buffers))
        return int(size)

    def _target(self) -> bytearray | None:
        return self._targets[self._index] if self._head is not None else None

    def _open(self, scratch: memoryview, start: int) -> None:
        version, kind, conversation, meta_bytes, buffer_count = _HEAD.unpack_from(scratch, start)
        if version != PROTOCOL_VERSION:
            raise ProtocolError(f"frame of protocol version {version}, not {PROTOCOL_VERSION}")
        lead_bytes = buffer_count * _LENGTH.size + meta_bytes
        if lead_bytes > self._max:
            raise ProtocolError(f"frame head of {lead_bytes} bytes is over the limit of {self._max}")
        try:
            self._head = (FrameKind(kind), conversation, buffer_count)
        except ValueError:
            raise ProtocolError(f"unknown kind of frame: {kind}") from None
        self._lead = bytearray(lead_bytes)
        self._targets = [self._lead]
        self._index = self._filled = 0

    def _advance(self, frames: list[Frame]) -> None:
        """Move past every target that is full, empty ones included; close the frame after the last."""
        while self._head is not None and self._filled == len(self._targets[self._index]):
            if self._index == 0:
                self._allocate(self._head[2])
            self._index += 1
            self._filled = 0
            if self._index == len(self._targets):
                kind, conversation, count = self._head
                meta = bytes(self._lead[count * _LENGTH.size :])
                frames.append(Frame(kind, conversation, meta, self._targets[1:]))
                self._head = None
                self._targets = []

    def _allocate(self, count: int) -> None:
        lengths = [n for (n,) in _LENGTH.iter_unpack(bytes(self._lead[: count * _LENGTH.size]))]
        total = len(self._lead) + sum(lengths)
        if total > self._max:
            raise ProtocolError(f"frame of {total} bytes is over the limit of {self._max}")
        self._targets += [_uncleared(None, n) if n >= _UNCLEARED_BYTES else bytearray(n) for n in lengths]


def _consume(pending: deque[memoryview], sent: int) -> None:
    while sent:
        first = pending[0]
        if sent < len(first):
            pending[0] = first[sent:]
            return
        sent -= len(first)
        pending.popleft()


class BlockingConnection:
    """The worker's end: exact blocking reads and writes."""

    def __init__(self, sock: socket.socket, max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes  # in both directions
        self._sock = sock
        self._decoder = Decoder(max_frame_bytes)
        self._ready: deque[Frame] = deque()
        self._limit_s = 0.0  # how long a read of the socket waits; 0: for ever

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send encoded frames whole.

        Raises:
            ConnectionClosed: the server is gone.
        """
        try:
            sent = self._sock.sendmsg(pieces[:_IOV_MAX])
            if sent == sum(map(len, pieces)):  # nearly always
                return
            pending = deque(memoryview(p).cast("B") for p in pieces)
            _consume(pending, sent)
            while pending:
                _consume(pending, self._sock.sendmsg(list(islice(pending, _IOV_MAX))))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionClosed("the server is gone") from error

    def recv(self) -> Frame:
        """Wait for a frame.

        Raises:
            ConnectionClosed: the server is gone.
            ProtocolError: what came is not a frame.
        """
        if not self._ready:
            self._wait_at_most(0)
            while not self._ready:
                self._read()
        return self._ready.popleft()

    def recv_within(self, limit_s: float) -> Frame | None:
        """Wait for a frame and return it; None if for so long nothing of it comes.

        Raises:
            ConnectionClosed, ProtocolError: as `recv`.
        """
        if not self._ready:
            self._wait_at_most(max(limit_s, _LEAST_WAIT_S))
            try:
                while not self._ready:
                    self._read()
            except BlockingIOError:
                return None
        return self._ready.popleft()

    def poll(self) -> Frame | None:
        """Return a frame that is already here, or None, without waiting."""
        while not self._ready:
            try:
                self._read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
        return self._ready.popleft()

    def close(self) -> None:
        """Close the socket: the server sees end of file."""
        self._sock.close()

    def _wait_at_most(self, limit_s: float) -> None:
        """Bound how long reads wait (0: for ever), from now on: most reads need no new bound."""
        if limit_s != self._limit_s:
            self._limit_s = limit_s
            timeval = struct.pack("@ll", int(limit_s), int(limit_s % 1 * 1_000_000))
            with contextlib.suppress(OSError):  # macOS refuses once the peer is gone: the read tells
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)

    def _read(self, flags: int = 0) -> None:
        try:
            count = self._sock.recv_into(self._decoder.space(), 0, flags)
        except ConnectionResetError as error:
            raise ConnectionClosed("the server is gone") from error
        if count == 0:
            raise ConnectionClosed("the server is gone")
        self._ready.extend(self._decoder.received(count))


class AsyncConnection:
    """The server's end, on an event loop: calls `on_frame` for each frame, `on_close` once at the end."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        loop: AbstractEventLoop,
        on_frame: Callable[[Frame], None],
        on_close: Callable[[Exception | None], None],
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._on_frame = on_frame
        self._on_close = on_close
        self._decoder = Decoder(max_frame_bytes)
        self._pending: deque[memoryview] = deque()
        self._writing = False
        self.closed = False

    def start(self) -> None:
        """Begin to receive."""
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send encoded frames, now as far as the socket takes them, the rest when it can.

        A peer that is gone is reported to `on_close`, not here.
        """
        if self.closed:
            return
        sent = 0
        if not self._writing:
            try:
                sent = self._sock.sendmsg(pieces[:_IOV_MAX])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                return  # the peer is gone: the reader takes in what it had still sent, then reports the end
            if sent == sum(map(len, pieces)):  # nearly always
                return
        self._pending.extend(memoryview(p).cast("B") for p in pieces)
        _consume(self._pending, sent)
        if not self._writing:
            self._flush()

    def close(self) -> None:
        """Close the socket without calling `on_close`."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        self._pending.clear()
        self._sock.close()

    def read_rest(self) -> None:
        """Take in what a peer that has ended had still sent, then close and report."""
        while not self.closed and self._read_once():
            pass
        self._fail(None)

    def _readable(self) -> None:
        # One read: the loop calls again if there is more, and others get their turn.
        if not self.closed:
            self._read_once()

    def _read_once(self) -> bool:
        try:
            count = self._sock.recv_into(self._decoder.space())
            if count == 0:
                self._fail(None)
                return False
            frames = self._decoder.received(count)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionResetError:  # gone with something unread: an end like any other
            self._fail(None)
            return False
        except (OSError, ProtocolError) as error:
            self._fail(error)
            return False
        for frame in frames:
            if not self.closed:
                self._on_frame(frame)
        return True

    def _flush(self) -> None:
        try:
            while self._pending:
                _consume(self._pending, self._sock.sendmsg(list(islice(self._pending, _IOV_MAX))))
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._sock.fileno(), self._flush)
            return
        except OSError:
            # The peer is gone. The reader takes in what it had still sent, then reports the end.
            self._pending.clear()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())

    def _fail(self, error: Exception | None) -> None:
        if not self.closed:
            self.close()
            self._on_close(error)
