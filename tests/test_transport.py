"""Frames over a socket pair: whatever the boundaries, the same frames; what is wrong raises, never hangs."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mms_lite.transport import (
    PROTOCOL_VERSION,
    AsyncConnection,
    BlockingConnection,
    ConnectionClosed,
    Decoder,
    Frame,
    FrameKind,
    Marks,
    ProtocolError,
    encode,
)

HEAD = struct.Struct("!BBxxQII")
ROOT = Path(__file__).resolve().parent.parent

frames = st.builds(
    Frame,
    kind=st.sampled_from(FrameKind),
    conversation=st.integers(0, 2**64 - 1),
    meta=st.binary(max_size=200),
    buffers=st.lists(
        st.one_of(
            st.binary(max_size=64).map(bytearray),
            st.integers(0, 80_000).map(lambda n: bytearray(bytes(range(256)) * (n // 256 + 1))[:n]),
        ),
        max_size=5,
    ),
)


def wire_bytes(frame: Frame) -> bytes:
    return b"".join(bytes(p) for p in encode(frame.kind, frame.conversation, frame.meta, frame.buffers))


def feed(decoder: Decoder, data: bytes, cuts: list[int]) -> list[Frame]:
    """Give `data` to the decoder in pieces that end at `cuts`, as far as its space allows."""
    got: list[Frame] = []
    edges = [*sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    at = 0
    for edge in edges:
        while at < edge:
            with decoder.space() as space:
                assert len(space) > 0, "a decoder without space would make recv look like end of file"
                count = min(len(space), edge - at)
                space[:count] = data[at : at + count]
            got += decoder.received(count)
            at += count
    return got


@settings(max_examples=150, deadline=None)
@given(st.lists(frames, min_size=1, max_size=4), st.lists(st.integers(0, 2**20), max_size=12))
def test_frames_split_anywhere_decode_to_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    assert feed(Decoder(), b"".join(map(wire_bytes, sent)), cuts) == sent


@settings(max_examples=30, deadline=None)
@given(st.lists(frames, min_size=1, max_size=2))
def test_frames_that_come_byte_by_byte_decode_to_the_same_frames(sent: list[Frame]) -> None:
    small = [Frame(f.kind, f.conversation, f.meta, [b[:40] for b in f.buffers]) for f in sent]
    data = b"".join(map(wire_bytes, small))
    assert feed(Decoder(), data, list(range(len(data)))) == small


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=4000))
@example(bytes(64))
@example(b"\xff" * 64)
@example(HEAD.pack(PROTOCOL_VERSION, 3, 0, 0xFFFFFFFF, 0xFFFFFFFF))
def test_noise_is_refused_or_waits_for_more_but_never_hangs_or_allocates(noise: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        feed(Decoder(max_frame_bytes=1 << 16), noise, [])


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (HEAD.pack(PROTOCOL_VERSION + 1, FrameKind.STOP, 0, 0, 0), "version 2"),
        (HEAD.pack(0, FrameKind.STOP, 0, 0, 0), "version 0"),
        (HEAD.pack(PROTOCOL_VERSION, 0, 0, 0, 0), "unknown kind"),
        (HEAD.pack(PROTOCOL_VERSION, 11, 0, 0, 0), "unknown kind"),
        (HEAD.pack(PROTOCOL_VERSION, FrameKind.LOAD, 0, 1001, 0), "over the limit"),
        (HEAD.pack(PROTOCOL_VERSION, FrameKind.BATCH, 0, 0, 126), "over the limit"),
        (HEAD.pack(PROTOCOL_VERSION, FrameKind.BATCH, 0, 0, 1) + struct.pack("!Q", 993), "over the limit"),
        (HEAD.pack(PROTOCOL_VERSION, FrameKind.BATCH, 0, 0, 1) + struct.pack("!Q", 2**63), "over the limit"),
        (
            HEAD.pack(PROTOCOL_VERSION, FrameKind.BATCH, 0, 0, 2) + struct.pack("!QQ", 500, 500),
            "over the limit",
        ),
    ],
)
def test_what_is_not_a_frame_of_ours_is_refused(head: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        feed(Decoder(max_frame_bytes=1000), head, [])


def test_a_frame_of_exactly_the_limit_passes() -> None:
    frame = Frame(FrameKind.BATCH, 7, b"m" * 92, [bytearray(900)])
    assert feed(Decoder(max_frame_bytes=1000), wire_bytes(frame), []) == [frame]


def test_received_buffers_are_fresh_and_independent() -> None:
    decoder = Decoder()
    frame = Frame(FrameKind.BATCH, 1, b"", [bytearray(b"a" * 20_000), bytearray(b"b" * 10)])
    (first,) = feed(decoder, wire_bytes(frame), [])
    kept = [bytes(b) for b in first.buffers]
    for buffer in first.buffers:
        buffer.extend(b"grown")  # nothing else exports them
        buffer[:] = b"overwritten"
    (second,) = feed(decoder, wire_bytes(frame), [])
    assert [bytes(b) for b in second.buffers] == kept


@pytest.mark.parametrize(
    "buffer",
    [memoryview(array("f", [1.0, 2.0, 3.0])), memoryview(bytes(24)).cast("d", [1, 3]), memoryview(b"")],
    ids=["floats", "two axes", "empty"],
)
def test_a_buffer_of_items_wider_than_a_byte_crosses_whole(buffer: memoryview) -> None:
    pieces = encode(FrameKind.BATCH, 1, b"meta", [buffer])
    (frame,) = feed(Decoder(), b"".join(memoryview(p).tobytes() for p in pieces), [])
    assert frame.buffers == [bytearray(buffer.tobytes())]
    assert frame.meta == b"meta"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


Pair = tuple[socket.socket, socket.socket]


def test_a_blocking_connection_receives_what_the_other_sends(pair: Pair) -> None:
    one, other = map(BlockingConnection, pair)
    one.send(encode(FrameKind.LOAD, 1, b"{}"))
    one.send(encode(FrameKind.BATCH, 2, b"", [b"x" * 1000, b""]))
    assert other.recv() == Frame(FrameKind.LOAD, 1, b"{}", [])
    assert other.recv() == Frame(FrameKind.BATCH, 2, b"", [bytearray(b"x" * 1000), bytearray()])


def test_more_buffers_than_one_system_call_takes_are_sent_whole(pair: Pair) -> None:
    one, other = map(BlockingConnection, pair)
    buffers = [bytes([n % 256]) * (n % 7) for n in range(3000)]
    sender = threading.Thread(target=one.send, args=(encode(FrameKind.BATCH, 1, b"", buffers),))
    sender.start()
    assert other.recv().buffers == [bytearray(b) for b in buffers]
    sender.join()


def test_poll_returns_what_is_here_and_does_not_wait(pair: Pair) -> None:
    one, other = map(BlockingConnection, pair)
    assert other.poll() is None
    one.send([*encode(FrameKind.STOP, 1), *encode(FrameKind.STOP, 2)])
    assert [frame.conversation for frame in iter(other.poll, None)] == [1, 2]


def test_poll_does_not_wait_for_the_rest_of_half_a_frame(pair: Pair) -> None:
    other = BlockingConnection(pair[1])
    data = wire_bytes(Frame(FrameKind.BATCH, 1, b"meta", [bytearray(100)]))
    pair[0].sendall(data[:50])
    assert other.poll() is None
    pair[0].sendall(data[50:])
    assert other.poll() is not None


def test_a_connection_with_a_high_descriptor_can_be_polled(pair: Pair) -> None:
    # A server with a thousand clients hands its workers descriptors that select() refuses.
    high = 1500
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= high:
        pytest.skip(f"this machine allows no descriptor {high}")
    with socket.socket(fileno=os.dup2(pair[1].fileno(), high, inheritable=False)) as sock:
        other = BlockingConnection(sock)
        assert other.poll() is None
        assert other.recv_within(0.001) is None
        for receive in (other.poll, lambda: other.recv_within(5)):
            pair[0].sendall(wire_bytes(Frame(FrameKind.STOP, 9, b"", [])))
            frame = receive()
            assert frame is not None and frame.conversation == 9


def test_who_waits_for_a_frame_gets_it_or_is_told_that_none_came_in_time(pair: Pair) -> None:
    other = BlockingConnection(pair[1])
    for limit_s in (0.01, 0.0, -1.0):  # a time that has passed is no error
        assert other.recv_within(limit_s) is None
    pair[0].sendall(
        wire_bytes(Frame(FrameKind.STOP, 1, b"", [])) + wire_bytes(Frame(FrameKind.STOP, 2, b"", []))
    )
    frames = [other.recv_within(5), other.recv_within(0)]  # the other one came with it
    assert [frame.conversation for frame in frames if frame is not None] == [1, 2]
    sender = threading.Timer(0.02, pair[0].sendall, [wire_bytes(Frame(FrameKind.STOP, 3, b"", []))])
    sender.start()
    frame = other.recv_within(10)
    assert frame is not None and frame.conversation == 3
    sender.join()


def test_a_wait_for_a_frame_ends_when_the_peer_leaves(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(ConnectionClosed):
        BlockingConnection(pair[1]).recv_within(10)


@pytest.mark.parametrize("sent", [0, 1, 15, 16, 20, 60])
def test_a_peer_that_leaves_mid_frame_is_reported_to_a_blocking_reader(pair: Pair, sent: int) -> None:
    pair[0].sendall(wire_bytes(Frame(FrameKind.BATCH, 1, b"meta", [bytearray(100)]))[:sent])
    pair[0].close()
    with pytest.raises(ConnectionClosed):
        BlockingConnection(pair[1]).recv()


def test_sending_to_a_peer_that_left_is_reported(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(ConnectionClosed):
        BlockingConnection(pair[1]).send(encode(FrameKind.BATCH, 1, b"", [bytes(1 << 20)]))


class End:
    """An AsyncConnection that notes what it hears."""

    def __init__(self, sock: socket.socket, **options: Any) -> None:
        self.frames: list[Frame] = []
        self.closes: list[Exception | None] = []
        self.connection = AsyncConnection(
            sock,
            loop=asyncio.get_running_loop(),
            on_frame=self.frames.append,
            on_close=self.closes.append,
            **options,
        )
        self.connection.start()


async def test_fifty_megabytes_reach_a_slow_reader_whole_and_in_order(pair: Pair) -> None:
    end = End(pair[0])
    body = bytes(range(256)) * (50 * 4096)
    end.connection.send(encode(FrameKind.BATCH, 1, b"meta", [body, b"tail"]))
    end.connection.send(encode(FrameKind.STOP, 2))
    for _ in range(50):  # the loop stays free while nobody reads
        await asyncio.sleep(0)
    reader = BlockingConnection(pair[1])
    big = await asyncio.to_thread(reader.recv)
    assert big.buffers == [bytearray(body), bytearray(b"tail")]
    assert (await asyncio.to_thread(reader.recv)).conversation == 2
    end.connection.close()


async def test_big_frames_cross_in_both_directions_at_once(
    pair: Pair, wait_until: Callable[..., Any]
) -> None:
    one, other = End(pair[0]), End(pair[1])
    body = os.urandom(1 << 20) * 4
    for number in range(3):
        one.connection.send(encode(FrameKind.BATCH, number, b"", [body]))
        other.connection.send(encode(FrameKind.OUTCOME, number, b"", [body]))
    await wait_until(lambda: len(one.frames) == len(other.frames) == 3)
    for end in (one, other):
        assert [frame.conversation for frame in end.frames] == [0, 1, 2]
        assert all(frame.buffers == [bytearray(body)] for frame in end.frames)
        end.connection.close()


@pytest.mark.parametrize("sent", [0, 10, 20, 60])
async def test_a_peer_that_leaves_mid_frame_is_reported_once(
    pair: Pair, wait_until: Callable[..., Any], sent: int
) -> None:
    end = End(pair[0])
    whole = wire_bytes(Frame(FrameKind.STOP, 5, b"", []))
    pair[1].sendall(whole + wire_bytes(Frame(FrameKind.BATCH, 1, b"meta", [bytearray(100)]))[:sent])
    pair[1].close()
    await wait_until(lambda: end.closes)
    assert [frame.conversation for frame in end.frames] == [5]
    end.connection.send(encode(FrameKind.STOP, 1))  # to a closed connection: lost, without an error
    end.connection.close()
    assert end.closes == [None]


async def test_a_peer_that_leaves_while_much_waits_to_be_sent_is_reported_once(
    pair: Pair, wait_until: Callable[..., Any]
) -> None:
    end = End(pair[0])
    end.connection.send(encode(FrameKind.BATCH, 1, b"", [bytes(8 << 20)]))
    pair[1].recv(1000)
    pair[1].close()
    await wait_until(lambda: end.closes)
    assert len(end.closes) == 1


async def test_a_peer_that_leaves_without_reading_is_no_protocol_error(
    pair: Pair, wait_until: Callable[..., Any]
) -> None:
    # The kernel reports unread data as "connection reset", which is an end like any other.
    end = End(pair[0])
    end.connection.send(encode(FrameKind.STOP, 1))
    pair[1].close()
    await wait_until(lambda: end.closes)
    assert end.closes == [None]


async def test_noise_closes_an_async_connection_with_the_reason(
    pair: Pair, wait_until: Callable[..., Any]
) -> None:
    end = End(pair[0], max_frame_bytes=100)
    pair[1].sendall(wire_bytes(Frame(FrameKind.BATCH, 1, b"", [bytearray(200)])))
    await wait_until(lambda: end.closes)
    (why,) = end.closes
    assert isinstance(why, ProtocolError) and "over the limit" in str(why)
    assert end.connection.closed


async def test_read_rest_takes_in_what_an_ended_peer_had_sent(pair: Pair) -> None:
    end = End(pair[0])
    body = bytes(100_000)
    pair[1].sendall(wire_bytes(Frame(FrameKind.OUTCOME, 1, b"", [bytearray(body)])))
    end.connection.read_rest()  # the other end is still open, as if a grandchild held it
    assert [frame.conversation for frame in end.frames] == [1]
    assert end.closes == [None]


async def test_closing_reports_nothing_and_can_be_repeated(pair: Pair) -> None:
    end = End(pair[0])
    end.connection.send(encode(FrameKind.BATCH, 1, b"", [bytes(8 << 20)]))
    end.connection.close()
    end.connection.close()
    end.connection.read_rest()
    await asyncio.sleep(0)
    assert end.closes == []


async def test_closing_from_within_on_frame_stops_the_frames_behind_it(pair: Pair) -> None:
    heard: list[int] = []

    def on_frame(frame: Frame) -> None:
        heard.append(frame.conversation)
        connection.close()

    connection = AsyncConnection(
        pair[0], loop=asyncio.get_running_loop(), on_frame=on_frame, on_close=lambda _: None
    )
    connection.start()
    pair[1].sendall(b"".join(wire_bytes(Frame(FrameKind.STOP, n, b"", [])) for n in range(3)))
    connection.read_rest()
    assert heard == [0]


@pytest.fixture
def marks_fd() -> Iterator[int]:
    """A nameless file that holds marks."""
    with tempfile.TemporaryFile() as file:
        file.truncate(Marks.SIZE)
        yield file.fileno()


def test_what_one_side_marks_the_other_sees(marks_fd: int) -> None:
    server, worker = Marks.map(marks_fd), Marks.map(marks_fd)
    assert (server.begun, server.cancels) == (0, 0)
    worker.begun = 2**32 - 1
    server.count_cancel()
    server.count_cancel()
    assert (server.begun, worker.begun) == (2**32 - 1, 2**32 - 1)
    assert (server.cancels, worker.cancels) == (2, 2)


def test_what_the_worker_writes_over_the_servers_count_does_not_count(marks_fd: int) -> None:
    server, worker = Marks.map(marks_fd), Marks.map(marks_fd)
    worker._words[1] = 2**64 - 1
    server.count_cancel()
    assert server.cancels == 1


def test_what_a_killed_process_had_marked_stays_marked(marks_fd: int) -> None:
    marks = Marks.map(marks_fd)
    for _ in range(5):
        marks.count_cancel()
    program = """
        import os, signal, sys
        from mms_lite.transport import Marks
        fd = int(sys.argv[1])
        marks = Marks.map(fd)
        os.close(fd)
        marks.begun = 40 + marks.cancels
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(marks_fd)]
    ended = subprocess.run(command, cwd=ROOT, pass_fds=[marks_fd], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (marks.begun, marks.cancels) == (45, 5)
