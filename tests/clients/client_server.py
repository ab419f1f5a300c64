"""A server of its own in a private folder, as a user starts and stops it, and where it listens."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

FACES = ("http", "http.aio", "grpc", "grpc.aio")  # tritonclient's clients
BIN = Path(sys.executable).parent
_START_S = 120.0
_END_S = 10.0
_ANY_PORT = "http://127.0.0.1:0"


class Server:
    """Started by `start`; ended, with its workers, by `end`, whatever happened to it."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        names = ("inference_address", "management_address", "metrics_address", "grpc_address")
        self._settings = {**dict.fromkeys(names, _ANY_PORT), "default_workers_per_model": 1, **settings}

    def start(self) -> None:
        """Run `mms-lite --start`, which returns when all models are ready."""
        lines = [f"{name}={value}" for name, value in self._settings.items()]
        (self.folder / "config.properties").write_text("\n".join(lines) + "\n")
        done = self._run("--start", "--mms-config", "config.properties", "--models", "ALL")
        assert done.returncode == 0, done.stdout + self.log()

    def end(self) -> None:
        """Stop the server as a user does; what is left of it then is killed, and is a failure."""
        with suppress(subprocess.TimeoutExpired):
            self._run("--stop")
        left = self._processes()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_END_S)
        assert not left, f"not ended by --stop: {left}; {self.log()}"

    @property
    def http(self) -> str:
        """HOST:PORT of HTTP."""
        return self._address("inference")

    @property
    def grpc(self) -> str:
        """HOST:PORT of gRPC."""
        return self._address("grpc")

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def log(self) -> str:
        """Return what the server logged."""
        return "\n".join(path.read_text() for path in sorted((self.folder / "logs").glob("*.log")))

    def _address(self, api: str) -> str:
        state: dict[str, Any] = json.loads((self.folder / ".model_server.json").read_text())
        return urlsplit(state[f"{api}_address"]).netloc

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command([str(BIN / "mms-lite"), *arguments], cwd=self.folder, temp=self.folder)

    def _processes(self) -> list[psutil.Process]:
        """Return what lives of all that was started from here, as its TMPDIR tells."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                ours = process.environ().get("TMPDIR") == str(self.folder)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def command(words: Sequence[str], *, cwd: Path, temp: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end with a temporary folder of its own; its two outputs come as one."""
    environ = {**os.environ, "TMPDIR": str(temp), "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run(
        words,
        cwd=cwd,
        env=environ,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_START_S,
        check=False,
    )
