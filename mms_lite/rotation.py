"""A log file that becomes an old one when it is full or its day is over, as MMS's log4j2 does it.

Hides the names of old files, their compression and their number. Whoever writes waits for a rename at most:
the rest is done by a short-lived thread, and what a killed server left undone by the next one.
"""

from __future__ import annotations

import gzip
import logging
import os
import re
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from typing import BinaryIO

MAX_BYTES = 100 << 20
OLD_FILES = 5
_CHUNK_BYTES = 256 << 10
_BUFFER_BYTES = 1 << 20  # what is written at once is less, so that a full disk takes none or all of a line
_GZIP_LEVEL = 6  # that of gzip itself; Python's default takes three times as long for 1 % less
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_log = logging.getLogger(__name__)


class RotatingFile:
    """`NAME.log`, and `NAME.dd-MMM.log.gz` for each of its old ones. One thread writes."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._rotates = False
        self._flushed = True
        self._bytes = 0
        self._full_bytes = max_bytes
        self._day = ""
        self._day_ends_s = 0.0  # the first line of an empty file begins its day
        self._tidying = Lock()

    def open(self) -> None:
        """Open the file; finish what a killed server left uncompressed.

        Raises:
            OSError: it cannot be opened.
        """
        status = self._open()
        if status.st_size:
            self._begin(status.st_mtime)
        if any(plain.exists() for plain in self._old()):
            self._tidy_on_thread()

    def has_room(self, size_bytes: int, at_s: float) -> bool:
        """Say whether this file would take as much more, until the moment `at_s`, line by line as at once."""
        room_bytes = min(self._full_bytes - self._bytes, _BUFFER_BYTES)
        return size_bytes <= room_bytes and at_s < self._day_ends_s

    def write(self, data: bytes, at_s: float) -> None:
        """Append a line of the moment `at_s` (seconds of the epoch), to a new file if it is time for one.

        Many lines, the last of that moment, stay together: ask has_room() first.

        Raises:
            OSError: the disk is full, or the folder does not let us.
        """
        try:
            if self._file is None:  # it could not be opened when it was last tried
                self._open()
            # Another server, or logrotate, may have made it an old one since the last line.
            gone = self._flushed and self._rotates and self._is_gone()
            if gone or self._bytes >= self._full_bytes or at_s >= self._day_ends_s:
                self._rotate(at_s)
        finally:
            if self._file is not None:
                self._bytes += len(data)
                self._flushed = False
                self._file.write(data)

    def flush(self) -> None:
        """Hand over to the system what was written.

        Raises:
            OSError: the disk is full.
        """
        if self._file is not None and not self._flushed:
            self._file.flush()
            self._flushed = True

    def _is_gone(self) -> bool:
        try:
            return self._file is not None and not os.path.samestat(
                os.fstat(self._file.fileno()), os.stat(self.path)
            )
        except FileNotFoundError:
            return True

    def close(self) -> None:
        """Close the file; what a full disk did not take is lost."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> os.stat_result:
        self._file = self.path.open("ab", _BUFFER_BYTES)
        status = os.fstat(self._file.fileno())
        self._bytes = status.st_size
        self._rotates = stat.S_ISREG(status.st_mode)  # not a link to /dev/stdout
        return status

    def _begin(self, at_s: float) -> None:
        """Begin the day of the moment `at_s`."""
        at = time.localtime(at_s)
        self._day = f"{at.tm_mday:02d}-{_MONTHS[at.tm_mon - 1]}"
        self._day_ends_s = time.mktime((at.tm_year, at.tm_mon, at.tm_mday + 1, 0, 0, 0, 0, 0, -1))

    def _rotate(self, at_s: float) -> None:
        try:
            if self._rotates and self._bytes and not self._is_gone():
                self.close()
                os.rename(self.path, self._next_name())
                self._tidy_on_thread()
        finally:
            # Where renaming failed this goes on in the same file, until it is time once more.
            if self._file is None or self._is_gone():
                self.close()
                self._open()
            self._begin(at_s)
            self._full_bytes = self._bytes + self._max_bytes

    def _next_name(self) -> Path:
        # The highest number of the day plus one, not the first free one: the lowest may have been deleted.
        number = max((number for day, number in self._old().values() if day == self._day), default=-1) + 1
        tail = f"-{number}" if number else ""
        return self.path.with_name(f"{self.path.stem}.{self._day}{tail}{self.path.suffix}")

    def _old(self) -> dict[Path, tuple[str, int]]:
        """Return the old files by their names before compression, with the day and the number of each."""
        stem, suffix = re.escape(self.path.stem), re.escape(self.path.suffix)
        form = re.compile(rf"({stem}\.(\d\d-(?:{'|'.join(_MONTHS)}))(?:-(\d+))?{suffix})(?:\.gz)?")
        matches = [match for name in os.listdir(self.path.parent) if (match := form.fullmatch(name))]
        return {self.path.with_name(match[1]): (match[2], int(match[3] or 0)) for match in matches}

    def _tidy_on_thread(self) -> None:
        Thread(target=self._tidy, name="log-compress", daemon=True).start()

    def _tidy(self) -> None:
        """Delete all but the newest old files, then compress those that are not."""
        try:
            with self._tidying:
                old = self._old()
                by_age = sorted(old, key=lambda plain: (_written_ns(plain), old[plain][1]), reverse=True)
                for plain in by_age[OLD_FILES:]:
                    for path in (plain, _compressed(plain), _unfinished(plain)):
                        path.unlink(missing_ok=True)
                for plain in by_age[:OLD_FILES]:
                    if plain.exists():
                        _compress(plain)
        except OSError as error:
            _log.warning("Old files of %s stay as they are: %s", self.path.name, error.strerror)


def _compressed(plain: Path) -> Path:
    return plain.with_name(f"{plain.name}.gz")


def _unfinished(plain: Path) -> Path:
    return plain.with_name(f"{plain.name}.gz.part")


def _written_ns(plain: Path) -> int:
    """Return when the last line was written, whichever of the two files is there."""
    for path in (plain, _compressed(plain)):
        with suppress(OSError):
            return path.stat().st_mtime_ns
    return 0


def _compress(plain: Path) -> None:
    part = _unfinished(plain)
    try:
        with (
            plain.open("rb") as source,
            part.open("wb") as target,
            gzip.GzipFile(plain.name, "wb", _GZIP_LEVEL, target) as packer,
        ):
            shutil.copyfileobj(source, packer, _CHUNK_BYTES)
        shutil.copystat(plain, part)  # the time tells which is the oldest
        part.replace(_compressed(plain))
        plain.unlink()
    except OSError:
        part.unlink(missing_ok=True)
        raise
