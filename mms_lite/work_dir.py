"""The folder into which one server unpacks archives, and the removal of those that killed servers left.

Each holds a file that its server keeps locked, so that life is told by the lock and not by a pid: servers
in several containers may share a temporary folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from mms_lite.errors import ConfigError

_PREFIX = "mms-lite-"
_LOCK_FILE = ".mms-lite-lock"


class WorkDir:
    """A folder of our own below `root`, or below the system's temporary folder."""

    def __init__(self, root: Path | None) -> None:
        self._root = Path(root or tempfile.gettempdir())
        self._lock: int | None = None
        self.path = self._root

    def make(self) -> Path:
        """Remove what killed servers left, and make the folder.

        Raises:
            ConfigError: it cannot be made.
        """
        for folder in self._root.glob(f"{_PREFIX}*"):
            _remove_if_left(folder)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=self._root))
            # Locked before it gets its name: no other server sees it unlocked.
            fd, unnamed = tempfile.mkstemp(dir=self.path)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.rename(unnamed, self.path / _LOCK_FILE)
        except OSError as error:
            raise ConfigError(f"cannot make a folder for models in {self._root}: {error.strerror}") from error
        self._lock = fd
        return self.path

    def remove(self) -> None:
        """Delete the folder and let go of its lock."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):  # no folder of ours, in use, or gone by now
        if folder.lstat().st_uid != os.getuid():
            return
        fd = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(fd)
