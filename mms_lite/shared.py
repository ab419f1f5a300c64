"""Memory for large request bodies that server and workers share, so that a body need not cross a socket.

The server receives a body here and tells the worker where it is, which copies it out when its turn comes.
Workers can only read. What finds no room crosses the socket like anything else: this is never needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref
from collections import defaultdict

LEAST_BYTES = 32 * 1024  # of a body for which the detour is worth while
MOST_BYTES = 64 << 20  # of an arena: what was used once stays with the process
_LEAST_PLACES = 16  # no body takes more than this part of it, so that a few cannot take it all
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1, not in fcntl: what maps the file from now on can only read


class SharedBytes:
    """A body in shared memory, or a part of one. Its place is free once nobody refers to any part of it.

    So whoever has a job that a worker may still read has this; `view`, of its length, shall not outlive it.
    """

    __slots__ = ("_place", "offset", "view")

    def __init__(self, offset: int, view: memoryview, place: _Place) -> None:
        self.offset = offset
        self.view = view
        self._place = place

    def __len__(self) -> int:
        return len(self.view)

    def part(self, start: int, stop: int) -> SharedBytes:
        """Return the bytes from `start` to `stop`, where they are."""
        return SharedBytes(self.offset + start, self.view[start:stop], self._place)


class _Place:
    """A place in an arena, which is free again when this goes."""

    __slots__ = ("_free", "_offset")

    def __init__(self, offset: int, free: list[int]) -> None:
        self._offset = offset
        self._free = free

    def __del__(self) -> None:
        self._free.append(self._offset)


class Arena:
    """The shared memory of a server, with the places that are free in it. For one thread.

    `fd` is the file's descriptor, which a worker inherits and maps.
    """

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd)
        self._memory = memoryview(memory)
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # offsets by the size of the place
        self._end = 0  # of what has ever been used

    @classmethod
    def create(cls, size: int = MOST_BYTES) -> Arena | None:
        """Return a new one of so many bytes; None where the system has nothing of the kind."""
        try:
            fd = memory_file("mms-lite-bodies", size)
        except (AttributeError, OSError):
            return None
        try:
            memory = mmap.mmap(fd, size)
            with contextlib.suppress(OSError):  # an older kernel: workers could write
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        except OSError:
            os.close(fd)
            return None
        return cls(fd, memory)

    def take(self, length: int) -> SharedBytes | None:
        """Return a place for `length` bytes, the one that became free last; None if there is none."""
        step = 1 << max(12, length.bit_length() - 3)  # whole pages, of which at most a quarter is left over
        size = -(-length // step) * step
        if size * _LEAST_PLACES > len(self._memory):
            return None
        free = self._free[size]
        if not free and self._end + size > len(self._memory):
            self._begin_again()
            free = self._larger(size)
        if free:
            offset = free.pop()
        elif self._end + size <= len(self._memory):
            offset = self._end
            self._end += size
        else:
            return None
        return SharedBytes(offset, self._memory[offset : offset + length], _Place(offset, free))

    def _larger(self, size: int) -> list[int]:
        """Return the free places of the least size that fits and has some; an empty list if none has."""
        for each in sorted(self._free):
            if each >= size and self._free[each]:
                return self._free[each]
        return self._free[size]

    @property
    def used_bytes(self) -> int:
        """How much of it is taken now."""
        return self._end - sum(size * len(offsets) for size, offsets in self._free.items())

    def _begin_again(self) -> None:
        """Divide the memory anew if all of it is free: the sizes that were asked for are not those of now."""
        if not self.used_bytes:
            self._free.clear()
            self._end = 0


def memory_file(name: str, size: int) -> int:
    """Return the descriptor of a file in memory, always of this size: who cuts it off would end the server.

    Raises:
        OSError: there is no memory or descriptor left.
        AttributeError: the system has nothing of the kind.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except (AttributeError, OSError):
        os.close(fd)
        raise
    return fd


def read_only(fd: int) -> memoryview:
    """Return the whole memory of an arena, for a worker.

    Raises:
        OSError: it cannot be mapped.
    """
    return memoryview(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ))
