"""Other servers on this machine: an environment in the cache for each, Java, free ports.

Both comparisons, of answers (compat) and of speed (side_by_side), stand on it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_JAVA = 17
_INSTALL_S = 900.0
_HIGHEST_PORT = 32_766  # that Multi Model Server takes
_LOWEST_PORT = 20_000


class CannotCompareError(Exception):
    """Something that the comparison needs is not on this machine; the message says what."""


def java_version() -> str:
    """Return the first line of `java -version`.

    Raises:
        CannotCompareError: there is none, or it is too old.
    """
    try:
        told = subprocess.run(["java", "-version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotCompareError(f"Java {_JAVA} is needed, and `java -version` does not run") from error
    line = told.stderr.splitlines()[0]
    found = re.search(r'"(\d+)', line)
    if not found or int(found[1]) < _JAVA:
        raise CannotCompareError(f"Java {_JAVA} is needed; here is {line}")
    return line


def install(package: str, version: str, *more: Sequence[str]) -> Path:
    """Return the bin folder of an environment with a package, made in the cache where it is absent.

    Each of `more` is what one further `pip install` takes; it is added to an environment that is there.

    Raises:
        CannotCompareError: pip cannot install it.
    """
    name = f"{package}-{version}-py{sys.version_info[0]}.{sys.version_info[1]}"
    folder = _cache() / "peers" / name
    with _alone(folder.with_name(f"{name}.lock")):
        done = folder / ".installed"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)])
            _pip(folder, [f"{package}=={version}"])
            done.touch()
        for step in more:
            if " ".join(step) not in done.read_text().splitlines():
                _pip(folder, step)
                with done.open("a") as file:
                    file.write(" ".join(step) + "\n")
    return folder / "bin"


def _cache() -> Path:
    if chosen := os.environ.get("MMS_LITE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base, "mms-lite") if base else Path.home() / ".cache" / "mms-lite"


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pip(folder: Path, what: Sequence[str]) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    _run([*pip, *what])


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        raise CannotCompareError(f"{command[-1]} cannot be installed: {' '.join(told)}") from error


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now, low enough for Multi Model Server."""
    found: list[int] = []
    for port in range(_LOWEST_PORT + os.getpid() % 5_000, _HIGHEST_PORT):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise CannotCompareError(f"no {count} free ports below {_HIGHEST_PORT}")
