"""The two servers: the peer's own environment, and starting and ending each in a process group of its own."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).resolve().parents[1]))

from environments import CannotCompareError, free_ports, install, java_version

__all__ = [
    "PEER",
    "CannotCompareError",
    "NotStartedError",
    "Server",
    "free_ports",
    "install_peer",
    "java_version",
]

PEER = "multi-model-server"
PEER_VERSION = "1.1.11"

_START_S = 90.0
_END_S = 10.0
_STEP_S = 0.1
_PROBE_S = 5.0


class NotStartedError(Exception):
    """A server did not come up; the message has its last words."""


def install_peer() -> Path:
    """Return the bin folder of an environment with the peer, made in the cache where it is absent.

    Raises:
        CannotCompareError: pip cannot install it.
    """
    return install(PEER, PEER_VERSION)


@dataclass(slots=True)
class Server:
    """A server in a folder of its own, which is its TMPDIR too; `ports` by the name of their API."""

    name: str
    command: Sequence[str]
    folder: Path
    ports: Mapping[str, int]
    settings: Mapping[str, object]
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self, models: Sequence[str]) -> None:
        """Start it, and wait until each model answers.

        Raises:
            NotStartedError: it does not get there in time.
        """
        self.folder.mkdir(parents=True)
        (self.folder / "tmp").mkdir()
        lines = [f"{key}={value}" for key, value in self.settings.items()]
        (self.folder / "config.properties").write_text("\n".join(lines) + "\n")
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("MMS_", "LOG_", "METR"))
        }
        temp = str(self.folder / "tmp")
        path = Path(self.command[0]).parent  # `python3`, for models whose runtime it is
        with (self.folder / "console.txt").open("wb") as console:
            self._process = subprocess.Popen(
                [*self.command, "--start", "--foreground", "--mms-config", "config.properties"],
                cwd=self.folder,
                env={
                    **kept,
                    "PATH": f"{path}{os.pathsep}{kept.get('PATH', '')}",
                    "TMPDIR": temp,
                    "TEMP": temp,
                },
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        until = time.monotonic() + _START_S
        for model in models:
            while not self.answers(f"/predictions/{model}"):
                if time.monotonic() > until or self._process.poll() is not None:
                    raise NotStartedError(f"{self.name} does not serve {model}:\n{self._last_lines()}")
                time.sleep(_STEP_S)

    def answers(self, target: str) -> bool:
        """Return whether the inference API answers with what a model's worker says."""
        port = self.ports["inference"]
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_S)
            try:
                connection.request("GET", target)
                answer = connection.getresponse()
                text = answer.read()
            finally:
                connection.close()
            return answer.status != 404 and b"No worker" not in text and b"Worker died" not in text
        return False

    def end(self) -> None:
        """End it and everything that it started, by their ids."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        until = time.monotonic() + _END_S
        while (left := _started_in(self.folder / "tmp")) and time.monotonic() < until:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=_STEP_S)
        self._process.wait(_END_S)

    def _last_lines(self) -> str:
        text = (self.folder / "console.txt").read_text(errors="replace")
        return "\n".join(text.splitlines()[-15:])


def _started_in(temp: Path) -> list[psutil.Process]:
    """Return the live processes whose TMPDIR is this folder: the server's, in whatever session they are."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            ours = process.environ().get("TMPDIR") == str(temp)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
