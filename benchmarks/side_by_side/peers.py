"""The servers that are compared: how each is installed, and `running`, which starts one and ends it."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import identity_recipes
import processes
import protocols
import recipes
from environments import CannotCompareError, install, java_version
from recipes import Job, Launch

__all__ = ["FAILURES", "PEERS", "CannotCompareError", "Job", "NotStartedError", "Peer", "Server", "running"]

# Variables that change what servers do.
_SETTINGS = ("MMS_", "LOG_", "METR", "TS_", "MOSEC_", "LIT_", "MLSERVER_", "OMP_", "PYTHON")
_START_S = 120.0
_PROBE_S = 30.0  # the first answer of a large model takes its time
_GRACE_S = 8.0
_STEP_S = 0.02
_PHOTO = Path(__file__).resolve().parents[2] / "examples" / "photos" / "coffee.png"
_TENSOR_BYTES = 602_112


class NotStartedError(Exception):
    """A server did not answer rightly in time; the message has its last words."""


FAILURES = (
    CannotCompareError,
    NotStartedError,
    RuntimeError,
    ValueError,
    OSError,
    http.client.HTTPException,
    subprocess.SubprocessError,
)
"""What one server's run may end with; the others' go on."""


Recipe = Callable[[Job, Path, Path], Launch]


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to compare; `package` is empty for what runs in this project's own environment."""

    name: str
    package: str
    version: str
    launch: Recipe | None  # None: it has none for bodies of its own choice
    more: tuple[tuple[str, ...], ...] = ()
    works: tuple[str, ...] = ("noop", "onnx")
    speak: Recipe | None = None  # for the work "identity", in the open protocols
    java: bool = False
    bounded: bool = True  # its queue has a limit

    def install(self, work: str = "noop") -> Path:
        """Return the folder of the programs, installed with what the work needs.

        Raises:
            CannotCompareError: that is not possible on this machine.
        """
        self.recipe(work)
        if self.java:
            java_version()
        if not self.package:
            return recipes.own_programs()
        return install(self.package, self.version, *self.more, *_libraries(work))

    def recipe(self, work: str) -> Recipe:
        """Return what starts it for a work.

        Raises:
            CannotCompareError: it is not measured with this.
        """
        found = self.speak if work == "identity" else self.launch if work in self.works else None
        if found is None:
            raise CannotCompareError(f"{self.name} is not measured with {work}")
        return found


def _libraries(work: str) -> Iterator[tuple[str, ...]]:
    """Yield what pip is to install for a work: the versions that this project's own environment has."""
    if work == "mxnet":
        yield tuple(f"{name}=={version(name)}" for name in ("mxnet", "gluoncv", "numpy"))
        # gluoncv brings opencv-python, which needs libGL, in the same folder.
        headless = "opencv-python-headless"
        yield ("--force-reinstall", "--no-deps", f"{headless}=={version(headless)}")
    if work == "onnx":
        yield (f"onnxruntime=={version('onnxruntime')}",)  # with whatever numpy the server has


def _here(package: str) -> str:
    """Return the version that this project's own environment has, or what says that it has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


_ALL = ("noop", "mxnet", "onnx")
_FOR_TORCHSERVE = (
    (os.environ.get("TORCH", "torch==2.13.0"),),
    ("torch-model-archiver==0.12.0", "pyyaml", "numpy", "psutil", "packaging", "setuptools<81"),
)
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "mms-lite",
            "",
            version("mms-lite"),
            recipes.mms_lite,
            works=_ALL,
            speak=identity_recipes.mms_lite,
        ),
        Peer("mms", "multi-model-server", "1.1.11", recipes.multi_model_server, works=_ALL, java=True),
        Peer("mosec", "mosec", "0.9.8", recipes.mosec, works=_ALL),
        Peer("torchserve", "torchserve", "0.12.0", recipes.torchserve, _FOR_TORCHSERVE, java=True),
        Peer("litserve", "litserve", "0.2.19", recipes.litserve, works=_ALL, bounded=False),
        Peer(
            "mlserver",
            "mlserver",
            "1.7.1",
            recipes.mlserver,
            (("uvloop<0.22",),),  # its workers ask for an event loop that newer ones do not make for them
            bounded=False,
            speak=identity_recipes.mlserver,
        ),
        Peer("kserve", "kserve", "0.21.0", None, speak=identity_recipes.kserve),
        # Its wheel has the server, and a backend for each Python, without the models' frameworks.
        Peer("triton", "nvidia-pytriton", "0.7.0", None, speak=identity_recipes.triton),
        # No model servers: an echo on the library alone.
        Peer("aiohttp", "", _here("aiohttp"), None, speak=identity_recipes.aiohttp),
        Peer("grpcio", "", _here("grpcio"), None, speak=identity_recipes.grpcio),
    )
}


class Server:
    """A server that runs."""

    def __init__(self, peer: Peer, job: Job, launch: Launch, folder: Path) -> None:
        self.peer = peer
        self.job = job
        self.host = "127.0.0.1"
        self.port = 0
        self.path = launch.path
        self.headers: Mapping[str, str] = launch.headers
        self.encode = launch.encode
        self.decode: Callable[[bytes], Any] = launch.decode  # the text of an answer -> what the work returned
        self.doors = launch.doors
        self.first_answer_s = 0.0
        self._missed = ""  # the door that was not answered rightly when it was last asked
        self._launch = launch
        self._folder = folder
        self._marker = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, body: bytes, timeout_s: float = _PROBE_S) -> tuple[int, bytes]:
        """Send one request on a connection of its own; return the status and the answer's text.

        Raises:
            OSError, http.client.HTTPException: there is no answer.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request("POST", self.path, self.encode(body), dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def processes(self) -> list[processes.Process]:
        """Return all live processes of the server."""
        workers = {int(file.name) for file in (self._folder / "workers").iterdir()}
        return processes.described(processes.marked(self._marker), self.port, workers)

    def start(self) -> None:
        """Start it, and wait for the first right answer.

        Raises:
            NotStartedError: there is none in time.
            CannotCompareError: it does not take the model.
        """
        begin = time.monotonic()
        with (self._folder / "console.txt").open("wb") as console:
            self._process = subprocess.Popen(
                self._launch.command,
                cwd=self._folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        if self._launch.register is not None:
            self._launch.register()
        until = begin + _START_S
        self._wait(until, self._answers, "does not answer rightly")
        self.first_answer_s = time.monotonic() - begin
        self._wait(until, self._all_loaded, f"has less than {self.job.workers} workers")

    def _wait(self, until: float, done: Callable[[], bool], wrong: str) -> None:
        while not done():
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() > until:
                printed = self.last_lines()
                last = printed.rpartition("\n")[2] or "nothing"
                wrong += self._missed
                raise NotStartedError(f"{self.peer.name} {wrong}; it printed last: {last}\n{printed}")
            time.sleep(_STEP_S)

    def _answers(self) -> bool:
        if (port := self._launch.port()) is None:
            return False
        self.port = port
        if self.doors:
            return self._doors_answer()
        body = _probe(self.job.work)
        with suppress(OSError, http.client.HTTPException):
            status, text = self.ask(body)
            return status == 200 and self.is_right(body, text)
        return False

    def _doors_answer(self) -> bool:
        probe = bytes(_TENSOR_BYTES)
        for name, door in self.doors.items():
            try:
                protocols.check(protocols.PROTOCOLS[name], door, probe)
            except (OSError, http.client.HTTPException, protocols.WrongAnswerError) as error:
                self._missed = f" over {name} ({error})"
                return False
        return True

    def _all_loaded(self) -> bool:
        return sum(each.role == "worker" for each in self.processes()) >= self.job.workers

    def _environment(self) -> dict[str, str]:
        """Return the user's environment without what would change a server, and with the job."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(_SETTINGS) or key == "MMS_LITE_CACHE"  # where the models are
        }
        # Java servers run the `python` of the path, Triton's backend takes what that one has.
        programs = self._launch.programs or Path(self._launch.command[0]).parent
        return {
            **kept,
            **self.job.environment(self._folder, self._launch.port() or 0),
            "PATH": f"{programs}{os.pathsep}{kept.get('PATH', '')}",
            "TMPDIR": str(self._folder / "tmp"),
            "TEMP": str(self._folder / "tmp"),
            processes.MARKER: self._marker,
        }

    def is_right(self, body: bytes, text: bytes) -> bool:
        """Return whether this is an answer of the work to this body."""
        with suppress(ValueError, KeyError, TypeError, IndexError):
            answer = self.decode(text)
            return self.job.work != "noop" or answer["n"] == len(body)
        return False

    def last_lines(self) -> str:
        """Return the end of what the server printed."""
        text = (self._folder / "console.txt").read_text(errors="replace")
        return "\n".join(text.splitlines()[-15:])

    def end(self) -> None:
        """End all of its processes, by their ids.

        Raises:
            RuntimeError: one of them does not end.
        """
        if self._process is None:
            return
        left = processes.end(self._marker, self._process.pid, _GRACE_S)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        if left:
            raise RuntimeError(f"{self.peer.name}: processes {left} do not end")


def _probe(work: str) -> bytes:
    """Return a body that the work can answer."""
    if work == "mxnet":
        return _PHOTO.read_bytes()
    return bytes(_TENSOR_BYTES) if work == "onnx" else b"are you there?"


@contextmanager
def running(peer: Peer, job: Job) -> Iterator[Server]:
    """Start a server for a job; it ends with the context.

    Raises:
        CannotCompareError: it cannot be installed or does not take the job.
        NotStartedError: it does not answer.
    """
    programs = peer.install(job.work)
    with tempfile.TemporaryDirectory(prefix=f"{peer.name}-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        for each in ("tmp", "workers"):
            (folder / each).mkdir()
        server = Server(peer, job, peer.recipe(job.work)(job, folder, programs), folder)
        try:
            server.start()
            yield server
        finally:
            server.end()
