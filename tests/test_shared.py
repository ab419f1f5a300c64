"""Memory that workers can read: no two bodies share a byte, none is given away while it is referred to."""

import gc
import mmap
import os
import random
import subprocess
import sys

import pytest

from mms_lite.shared import Arena, SharedBytes, read_only

PAGE = 4096
SIZE = 4 << 20


@pytest.fixture
def arena() -> Arena:
    arena = Arena.create(SIZE)
    if arena is None:
        pytest.skip("this system has no memory of the kind")
    return arena


def taken(arena: Arena, length: int) -> SharedBytes:
    place = arena.take(length)
    assert place is not None
    return place


def test_what_the_server_writes_a_worker_reads_at_the_same_place(arena: Arena) -> None:
    seen = read_only(arena.fd)
    assert len(seen) == SIZE
    places = [taken(arena, length) for length in (1, PAGE, 100_001)]
    for number, place in enumerate(places, 1):
        place.view[:] = bytes([number]) * len(place)
    assert [len(place) for place in places] == [1, PAGE, 100_001]
    for number, place in enumerate(places, 1):
        assert seen[place.offset : place.offset + len(place)] == bytes([number]) * len(place)


def test_a_worker_can_neither_write_nor_cut_off(arena: Arena) -> None:
    seen = read_only(arena.fd)
    with pytest.raises(TypeError):
        seen[0] = 1
    with pytest.raises(OSError, match=r"not permitted|EPERM"):
        os.truncate(arena.fd, PAGE)
    with pytest.raises(PermissionError):
        mmap.mmap(arena.fd, PAGE)


def test_a_place_is_free_when_the_last_reference_is_gone(arena: Arena) -> None:
    first, second = taken(arena, 40_000), taken(arena, 40_000)
    assert first.offset != second.offset
    again, offset = first, first.offset
    del first
    assert taken(arena, 40_000).offset not in (offset, second.offset)
    del again
    assert taken(arena, 40_000).offset == offset  # the one that is still in the processor's caches
    del second
    assert arena.used_bytes == 0


def test_no_two_bodies_overlap_whatever_comes_and_goes(arena: Arena) -> None:
    chance = random.Random(5)
    held: dict[int, SharedBytes] = {}
    refused = 0
    for number in range(3000):
        place = arena.take(chance.choice([1, 5000, 33_000, 70_000, 200_000, 260_000]))
        if place is None:
            refused += 1
        else:
            place.view[:] = bytes([number % 251]) * len(place)
            held[number] = place
        while len(held) > chance.randrange(40):
            one = chance.choice(list(held))
            place = held.pop(one)
            assert place.view == bytes([one % 251]) * len(place)
    assert refused and len(held) < 40
    held.clear()
    del place
    assert arena.used_bytes == 0


def test_a_full_arena_has_no_place_until_one_is_free(arena: Arena) -> None:
    places = [taken(arena, SIZE // 16) for _ in range(16)]
    assert arena.take(PAGE) is None
    places.pop()
    assert arena.take(SIZE // 16) is not None


def test_one_body_does_not_take_it_all(arena: Arena) -> None:
    assert arena.take(SIZE // 16 + 1) is None
    assert arena.take(SIZE // 16) is not None


def test_a_larger_place_serves_where_none_of_the_size_is_left(arena: Arena) -> None:
    places = [taken(arena, size) for size in [SIZE // 32] * 4 + [SIZE // 16] * 14]
    assert arena.take(PAGE) is None
    large = places.pop()
    offset = large.offset
    del large
    small = taken(arena, PAGE)
    assert (small.offset, len(small)) == (offset, PAGE)
    del small
    assert taken(arena, SIZE // 16).offset == offset


def test_an_empty_arena_is_divided_anew(arena: Arena) -> None:
    assert all([arena.take(PAGE) for _ in range(SIZE // PAGE)])
    places = [taken(arena, SIZE // 16) for _ in range(16)]
    assert arena.take(PAGE) is None
    places.clear()
    assert arena.take(PAGE) is not None


def test_an_arena_leaves_no_descriptor_and_its_bodies_outlive_it() -> None:
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    arena = Arena.create(1 << 20)
    if arena is None:
        pytest.skip("this system has no memory of the kind")
    place = taken(arena, 40_000)
    del arena
    gc.collect()
    place.view[:3] = b"abc"
    assert bytes(place.view[:3]) == b"abc"
    del place
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= before


def test_a_system_without_such_memory_has_no_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert Arena.create() is None


def test_a_system_that_seals_nothing_has_no_arena_and_keeps_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError("no seals")

    gc.collect()
    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr("mms_lite.shared.fcntl.fcntl", refuse)
    assert Arena.create(1 << 20) is None
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= before


def test_another_process_reads_what_is_there_when_it_looks(arena: Arena) -> None:
    place = taken(arena, 40_000)
    place.view[:] = bytes(40_000)
    place.view[-5:] = b"hello"
    code = (
        "import sys; from mms_lite.shared import read_only; m = read_only(int(sys.argv[1]));"
        "a = int(sys.argv[2]); sys.stdout.buffer.write(m[a : a + 40_000][-5:])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(arena.fd), str(place.offset)],
        pass_fds=[arena.fd],
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert run.stdout == b"hello"


def test_a_part_keeps_the_place_of_the_whole() -> None:
    arena = Arena.create(1 << 20)
    assert arena is not None
    whole = arena.take(40_000)
    assert whole is not None
    whole.view[10:15] = b"hello"
    part = whole.part(10, 15).part(1, 5)
    assert (bytes(part.view), part.offset, len(part)) == (b"ello", whole.offset + 11, 4)
    del whole
    assert arena.used_bytes
    del part
    assert not arena.used_bytes
