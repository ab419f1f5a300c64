"""A folder from which a test runs one server through the command line, as a user does, and HTTP to ask it."""

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
_COMMAND_S = 60.0
_END_S = 10.0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """One server's working folder, TMPDIR and model store. `end` leaves no process of it behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.logs = folder / "logs"
        self.store.mkdir(parents=True)
        self.user: int | None = None
        self.python: list[str] = []  # instead of the installed scripts
        self.environ: dict[str, str] = {}
        self._foreground: list[subprocess.Popen[str]] = []

    # What is served.

    def handler(self, name: str, source: str) -> Path:
        """Make a model folder with a service.py."""
        model = self.store / name
        model.mkdir()
        (model / "service.py").write_text(textwrap.dedent(source))
        return model

    def archive(self, name: str, source: str) -> Path:
        """Make an archive with a service.py; its manifest names model and handler."""
        manifest = {"model": {"modelName": name, "handler": "service:handle"}}
        path = self.store / f"{name}.mar"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
            archive.writestr("service.py", textwrap.dedent(source))
        return path

    def configure(self, file: str = "config.properties", **settings: object) -> None:
        """Write a properties file: free ports, the store, one worker per model, and `settings` over it."""
        defaults = {
            "inference_address": "http://127.0.0.1:0",
            "management_address": "http://127.0.0.1:0",
            "metrics_address": "http://127.0.0.1:0",
            "grpc_address": "http://127.0.0.1:0",
            "model_store": "store",
            "default_workers_per_model": 1,
            "default_service_handler": "service:handle",
            "drain_timeout_s": 20,
            "load_models": "ALL",
        }
        lines = [f"{key}={value}" for key, value in {**defaults, **settings}.items()]
        (self.folder / file).write_text("\n".join(lines) + "\n")

    # The command line.

    async def mms(self, *arguments: str, program: str = "mms-lite") -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with its output captured through pipes."""
        command = [*self.python, "-m", "mms_lite"] if self.python else [str(BIN / program)]
        return await asyncio.to_thread(self.run, [*command, *arguments])

    def run(
        self, command: Sequence[str], *, cwd: Path | None = None, timeout_s: float = _COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the site's environment; its two outputs come as one."""
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self._environ(),
            user=self.user,
            group=self.user,
            extra_groups=None if self.user is None else [],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )

    async def start(self, *arguments: str) -> str:
        """Run `--start`, which must succeed; return what it printed."""
        result = await self.mms("--start", *arguments)
        assert result.returncode == 0, result.stdout
        return result.stdout

    async def stop(self) -> None:
        result = await self.mms("--stop")
        assert (result.returncode, result.stdout) == (0, "Model server stopped.\n")

    def foreground(self, *arguments: str) -> subprocess.Popen[str]:
        """Run `--foreground`; its output goes to the file foreground.txt."""
        with (self.folder / "foreground.txt").open("w") as output:
            process = subprocess.Popen(
                [str(BIN / "mms-lite"), "--foreground", *arguments],
                cwd=self.folder,
                env=self._environ(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
            )
        self._foreground.append(process)
        return process

    def printed(self) -> str:
        """What the server in the foreground printed."""
        return (self.folder / "foreground.txt").read_text()

    def _environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MMS_CONFIG")}
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**kept, "TMPDIR": str(self.folder), "PATH": path, **self.environ}

    # The running server.

    @property
    def state(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / ".model_server.json").read_text())
        return value

    @property
    def server(self) -> psutil.Process:
        return psutil.Process(self.state["pid"])

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.server.children() if any(part.endswith("boot.py") for part in p.cmdline())]

    def processes(self) -> list[psutil.Process]:
        """Every live process that was started from here, as its TMPDIR tells, also one without parents."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                ours = process.environ().get("TMPDIR") == str(self.folder)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        """Kill, by their ids, all processes that were started from here."""
        until = time.monotonic() + _END_S
        while (left := self.processes()) and time.monotonic() < until:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=0.05)
        for started in self._foreground:
            started.wait(_END_S)
        assert not left, f"processes that cannot be ended: {left}"

    def host(self, api: str = "inference") -> tuple[str, int]:
        """Return where an API listens."""
        address = urlsplit(self.state[f"{api}_address"])
        assert address.hostname is not None
        assert address.port is not None
        return address.hostname, address.port

    async def connect(self, api: str = "inference") -> "Connection":
        return Connection(*await asyncio.open_connection(*self.host(api)))

    async def ask(self, method: str, target: str, body: bytes = b"", *, api: str = "inference") -> Answer:
        """Send one request on a connection of its own."""
        connection = await self.connect(api)
        try:
            await connection.send(request(method, target, body, "Content-Type: application/octet-stream"))
            return await asyncio.wait_for(connection.answer(), _COMMAND_S)
        finally:
            await connection.close()

    def log(self) -> str:
        return (self.logs / "mms_log.log").read_text()


class Connection:
    """One keep-alive connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def post(self, target: str, body: bytes, *lines: str) -> Answer:
        await self.send(request("POST", target, body, *lines))
        return await self.answer()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        line, *rest = head[:-4].split("\r\n")
        headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in rest)}
        body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(int(line.split(" ")[1]), headers, body)

    def leave(self) -> None:
        """Hang up without a word."""
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


def request(method: str, target: str, body: bytes, *lines: str) -> bytes:
    """Return the bytes of an HTTP/1.1 request."""
    head = [f"{method} {target} HTTP/1.1", "Host: test", *lines, f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def copy_tutorial(site: Site) -> Path:
    """Copy the example of the tutorial, as it is in the repository, with free ports; return its folder."""
    if importlib.util.find_spec("mxnet") is None or importlib.util.find_spec("gluoncv") is None:
        pytest.skip("the mxnet extra is not installed (pip install 'mms-lite[mxnet]')")
    examples = site.folder / "examples"
    made = shutil.ignore_patterns("*.params", "*-symbol.json", "mxnet_squeezenet", "__pycache__", "logs")
    shutil.copytree(ROOT / "examples" / "mxnet_resnet50", examples / "mxnet_resnet50", ignore=made)
    shutil.copytree(ROOT / "examples" / "photos", examples / "photos")
    shutil.copytree(ROOT / "examples" / "weights", examples / "weights", ignore=made)
    config = examples / "mxnet_resnet50" / "config.properties"
    text = config.read_text()
    assert ":8080" in text
    assert ":8081" in text
    config.write_text(text.replace(":8080", ":0").replace(":8081", ":0"))
    return config.parent
