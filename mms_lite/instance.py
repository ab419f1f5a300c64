"""The one running server of a temporary folder: its lock, its pid file, and what it says of itself.

The lock on the pid file is held for the server's life and dies with it, so a stale or re-used pid can never
be taken for a running server. Beside it a JSON file tells the bound addresses.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mms_lite.errors import ConfigError

_PID_FILE = ".model_server.pid"
_STATE_FILE = ".model_server.json"
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.02


class Instance:
    """A claim on the temporary folder; `claim` in the server, `running` from the command line."""

    def __init__(self, folder: str | None = None) -> None:
        root = Path(folder or tempfile.gettempdir())
        self.pid_file = root / _PID_FILE
        self.state_file = root / _STATE_FILE
        self._fd: int | None = None

    def claim(self) -> bool:
        """Take the lock for this process and write its pid; False if another server has it.

        Raises:
            ConfigError: the pid file cannot be written.
        """
        while True:
            fd = self._open(os.O_RDWR | os.O_CREAT)
            assert fd is not None  # it is created
            if not _lock(fd):
                os.close(fd)
                return False
            if self._is_pid_file(fd):
                break
            os.close(fd)  # its holder removed it between our open and our lock
        self._fd = fd
        try:
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        except OSError as error:  # a full disk
            raise ConfigError(f"cannot write the pid file {self.pid_file}: {error.strerror}") from error
        return True

    def describe(self, state: Mapping[str, Any]) -> None:
        """Write what others may know of this server: addresses, pid, drain time, whether it is stopping."""
        fd, scratch = tempfile.mkstemp(prefix=_STATE_FILE, dir=self.state_file.parent)
        with os.fdopen(fd, "w") as file:
            file.write(json.dumps(dict(state), indent=2) + "\n")
        os.chmod(scratch, 0o644)
        os.replace(scratch, self.state_file)

    def release(self) -> None:
        """Remove both files and let go of the lock."""
        if self._fd is not None:
            self.state_file.unlink(missing_ok=True)
            self.pid_file.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None

    def running(self) -> int | None:
        """Return the pid of the server that holds the lock, or None.

        Raises:
            ConfigError: the pid file cannot be read.
        """
        fd = self._open(os.O_RDONLY, missing_ok=True)
        if fd is None:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            text = os.read(fd, 32).decode("ascii", "replace").strip()
            return int(text) if text.isdecimal() else None
        else:
            return None
        finally:
            os.close(fd)

    def state(self) -> dict[str, Any]:
        """Return what the running server wrote of itself; empty if it has not yet."""
        try:
            value = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def _is_pid_file(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.pid_file))
        except FileNotFoundError:
            return False

    def _open(self, flags: int, *, missing_ok: bool = False) -> int | None:
        # Without O_NONBLOCK a named pipe put in its place would hang us.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            return os.open(self.pid_file, flags, 0o644)
        except OSError as error:
            if missing_ok and isinstance(error, FileNotFoundError):
                return None
            raise ConfigError(f"cannot use the pid file {self.pid_file}: {error.strerror}") from error


def _lock(fd: int) -> bool:
    """Take the lock, past those who hold it for a moment to see whether it is free."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False
