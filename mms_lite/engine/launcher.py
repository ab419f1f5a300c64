"""How a worker comes to life and leaves: processes over a socket pair, or the same loop on a thread.

Everything the pool needs is a `Channel`: send, frames in, kill, and one report when it is over. Nothing else
in the engine knows of pids, pipes or signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mms_lite.engine.output import LineReader
from mms_lite.errors import ConfigError, LoadError
from mms_lite.shared import Arena, memory_file
from mms_lite.transport import AsyncConnection, BlockingConnection, Buffer, ExitCode, Frame, Marks
from mms_lite.types import ModelSpec

_BOOT = str(Path(__file__).resolve().parent.parent / "worker" / "boot.py")
_GUARD = str(Path(__file__).resolve().parent / "guard.py")
_GUARD_ENDS_S = 2.0
_LAST_LINES = 50
# Pools of OpenCV and of Rust's rayon (tokenizers), which OMP_NUM_THREADS does not bind: each takes all CPUs.
_OTHER_POOLS = ("OPENCV_FOR_THREADS_NUM", "RAYON_NUM_THREADS")
_GRACE_S = 5.0  # from closing its socket a worker has this long to end by itself
_PIPES_S = 1.0  # for the rest of its output, once it has ended
_EXIT_NAMES: dict[int, str] = {
    ExitCode.LOAD_FAILED: "load failed",
    ExitCode.OUT_OF_MEMORY: "out of memory",
    ExitCode.PROTOCOL: "protocol error",
}


_SO_SNDBUFFORCE = 32  # Linux; needs CAP_NET_ADMIN
_SEND_BUFFER_BYTES = 4 << 20

RunLoop = Callable[[BlockingConnection, Marks], int]  # the worker's `loop.run`


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended: in words, its exit code (negative: signal), and its last lines of output."""

    text: str
    code: int | None
    lines: tuple[str, ...]
    out_of_memory: bool = False


class Channel(Protocol):
    """A live worker, seen from the pool. `arena` is the memory that it can read, if there is any."""

    pid: int | None
    arena: Arena | None
    ended: asyncio.Future[Exit]
    marks: Marks

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send encoded frames."""

    def kill(self) -> None:
        """End the worker at once, and every process it started."""


class Launcher(Protocol):
    """Starts workers. `on_frame` is called for each frame until the channel's `ended` is set."""

    max_frame_bytes: int  # of what is sent to them, and of what they send

    def start(self, spec: ModelSpec, name: str, threads: int, on_frame: Callable[[Frame], None]) -> Channel:
        """Start a worker.

        Raises:
            LoadError: it cannot be started.
        """


class Guard:
    """A process that outlives a killed server by a moment, to end what its workers had started."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, group: int) -> None:
        """Have a process group ended with this server."""
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        """Take note that a group has ended, before its number can be given to another."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """Let it end what it still watches, and itself."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GUARD_ENDS_S)

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                os.write(self._process.stdin.fileno(), line.encode())


class ProcessLauncher:
    """Makes each worker a process group of its own, by `subprocess` from the loop's thread, never by fork."""

    def __init__(
        self,
        *,
        max_frame_bytes: int,
        environ: Mapping[str, str] | None = None,
        guard: Guard | None = None,
        arena: Arena | None = None,
    ) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._arena = arena
        self._guard = guard
        self._environ = dict(os.environ if environ is None else environ)

    def start(self, spec: ModelSpec, name: str, threads: int, on_frame: Callable[[Frame], None]) -> Channel:
        """Start a worker process.

        Raises:
            LoadError: the interpreter cannot be run.
        """
        interpreter = _interpreter(spec)
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise LoadError(f"the worker cannot be started: {error.strerror}") from error
        _widen(ours)
        command = [interpreter, _BOOT, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        shared = None
        marks = -1
        try:
            marks = _marks_file()
            shared = Marks.map(marks)
            command += ["--marks-fd", str(marks), "--max-frame-bytes", str(self.max_frame_bytes)]
            inherited = [theirs.fileno(), marks]
            if self._arena is not None:
                command += ["--bodies-fd", str(self._arena.fd)]
                inherited.append(self._arena.fd)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._worker_environ(threads),
                pass_fds=inherited,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            shared = None  # the error is kept, and this frame with it
            raise LoadError(f"cannot start the worker's interpreter: {error.strerror}") from error
        finally:
            theirs.close()
            if marks >= 0:
                os.close(marks)
        if self._guard is not None:
            self._guard.watch(process.pid)
        channel = ProcessChannel(process, name, shared, self._guard)
        channel.arena = self._arena
        channel.open(ours, on_frame, self.max_frame_bytes)
        return channel

    def _worker_environ(self, threads: int) -> dict[str, str]:
        environ = dict(self._environ)
        share = environ.setdefault("OMP_NUM_THREADS", str(threads))
        for name in _OTHER_POOLS:
            environ.setdefault(name, share)
        environ.setdefault("MXNET_USE_OPERATOR_TUNING", "0")
        return environ


def _widen(sock: socket.socket) -> None:
    """Let a socket take a large batch whole, so that one sent ahead is there when it is wanted (Linux)."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):  # past the system's limit, or up to it
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, _SEND_BUFFER_BYTES)
            return


def _marks_file() -> int:
    """Return the descriptor of a nameless file for `Marks`, which a child process can inherit.

    Raises:
        OSError: there is no memory or descriptor left.
    """
    try:
        fd = memory_file("mms-lite-marks", Marks.SIZE)
    except AttributeError:  # macOS
        with tempfile.TemporaryFile() as file:
            file.truncate(Marks.SIZE)
            return os.dup(file.fileno())
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def worker_environ(environ: Mapping[str, str], blacklist: str) -> dict[str, str]:
    """Return the environment for workers, without the variables whose whole name matches `blacklist`.

    Raises:
        ConfigError: `blacklist` is not a regular expression.
    """
    try:
        hidden = re.compile(blacklist)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"blacklist_env_vars is not a regular expression: {error}") from error
    return {name: value for name, value in environ.items() if not hidden.fullmatch(name)}


def _interpreter(spec: ModelSpec) -> str:
    if spec.python is not None:
        return spec.python
    if spec.runtime == "python":
        return sys.executable
    found = shutil.which(spec.runtime)
    if found is None:
        raise LoadError(f"the model asks for the runtime {spec.runtime}, which is not installed")
    return found


class ProcessChannel:
    """A worker process: its socket, its output, its end."""

    def __init__(
        self, process: subprocess.Popen[bytes], name: str, marks: Marks, guard: Guard | None = None
    ) -> None:
        self.pid: int | None = process.pid
        self.arena: Arena | None = None
        self.marks = marks
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._process = process
        self._name = name
        self._guard = guard
        self._connection: AsyncConnection | None = None
        self._exited = asyncio.Event()
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._reaper: asyncio.Task[None] | None = None
        self._oom_kills = oom_kill_count()
        self._pipes: list[asyncio.Future[None]] = []
        self._why: Exception | None = None

    def open(self, sock: socket.socket, on_frame: Callable[[Frame], None], max_frame_bytes: int) -> None:
        """Begin to receive frames and output, and to watch for the end."""
        self._connection = AsyncConnection(
            sock,
            loop=asyncio.get_running_loop(),
            on_frame=on_frame,
            on_close=self._on_close,
            max_frame_bytes=max_frame_bytes,
        )
        self._connection.start()
        for stream, level in ((self._process.stdout, logging.INFO), (self._process.stderr, logging.WARNING)):
            assert stream is not None  # PIPE was asked for
            reader = LineReader(stream.fileno(), self._lines, self._name, level)
            stream.close()  # the reader has a descriptor of its own
            reader.start()
            self._pipes.append(reader.finished)
        self._watch_exit()

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send encoded frames; to a worker that has ended they are lost, as `ended` tells."""
        if self._connection is not None:
            self._connection.send(pieces)

    def kill(self) -> None:
        """Kill the process group."""
        if not self._exited.is_set() and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _watch_exit(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            fd = os.pidfd_open(self._process.pid)
        except (AttributeError, OSError):  # not Linux, or an old kernel
            threading.Thread(target=self._wait_on_thread, args=(loop,), daemon=True).start()
            return

        def ended() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            self._on_exit()

        loop.add_reader(fd, ended)

    def _wait_on_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._on_exit)

    def _on_exit(self) -> None:
        # The zombie still holds the group's id, so this cannot hit a stranger.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._exited.set()
        self._begin_reaping()

    def _on_close(self, error: Exception | None) -> None:
        self._why = error
        self._begin_reaping()

    def _begin_reaping(self) -> None:
        if self._reaper is None:
            self._reaper = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        if self._why is not None:
            self.kill()  # it does not speak our protocol
        if not self._exited.is_set():
            try:
                await asyncio.wait_for(self._exited.wait(), _GRACE_S)
            except (TimeoutError, asyncio.TimeoutError):
                self.kill()
                await self._exited.wait()
        if self._connection is not None:
            self._connection.read_rest()
        if self._guard is not None:
            self._guard.forget(self._process.pid)
        self.marks.let_go()
        code = self._process.wait()
        await asyncio.wait(self._pipes, timeout=_PIPES_S)
        oom = code == ExitCode.OUT_OF_MEMORY or (
            code == -signal.SIGKILL and oom_kill_count() > self._oom_kills
        )
        if not self.ended.done():
            self.ended.set_result(Exit(_describe(code, self._why), code, tuple(self._lines), oom))


def _describe(code: int, why: Exception | None) -> str:
    if why is not None:
        return f"broke the protocol: {why}"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
    name = _EXIT_NAMES.get(code)
    return f"exit code {code} ({name})" if name else f"exit code {code}"


def oom_kill_count() -> int:
    """Return how often the kernel killed for memory in our cgroup (v2: memory.events); 0 where unknown."""
    try:
        for line in Path("/sys/fs/cgroup/memory.events").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


class InlineLauncher:
    """The worker's loop on a thread over the same socket pair: for tests and debugging.

    `run` is the worker's `loop.run`. A thread cannot be killed: `kill` closes its socket.
    """

    def __init__(self, run: RunLoop, *, max_frame_bytes: int) -> None:
        self._run = run
        self.max_frame_bytes = max_frame_bytes

    def start(self, spec: ModelSpec, name: str, threads: int, on_frame: Callable[[Frame], None]) -> Channel:
        """Start a worker thread."""
        channel = InlineChannel(name)
        channel.open(self._run, on_frame, self.max_frame_bytes)
        return channel


class InlineChannel:
    """A worker on a thread."""

    def __init__(self, name: str) -> None:
        self.pid: int | None = None
        self.arena: Arena | None = None
        self.marks = Marks(bytearray(Marks.SIZE))
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._name = name
        self._connection: AsyncConnection | None = None
        self._theirs: socket.socket | None = None

    def open(
        self,
        run: RunLoop,
        on_frame: Callable[[Frame], None],
        max_frame_bytes: int,
    ) -> None:
        """Start the thread."""
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection = AsyncConnection(
            ours,
            loop=asyncio.get_running_loop(),
            on_frame=on_frame,
            on_close=self._on_close,
            max_frame_bytes=max_frame_bytes,
        )
        self._connection.start()
        theirs = BlockingConnection(self._theirs, max_frame_bytes)
        threading.Thread(target=self._thread, args=(run, theirs), name=self._name, daemon=True).start()

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send encoded frames."""
        if self._connection is not None:
            self._connection.send(pieces)

    def kill(self) -> None:
        """Cut the thread off."""
        if self._theirs is not None:
            with contextlib.suppress(OSError):
                self._theirs.shutdown(socket.SHUT_RDWR)

    def _thread(self, run: RunLoop, connection: BlockingConnection) -> None:
        try:
            run(connection, self.marks)
        finally:
            connection.close()

    def _on_close(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(Exit("thread ended" if error is None else str(error), None, ()))
