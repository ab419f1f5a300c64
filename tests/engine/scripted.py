"""A launcher whose workers are played by the test: frames in, frames out, an end when the test says so."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from mms_lite import wire
from mms_lite.engine.launcher import Channel, Exit
from mms_lite.errors import LoadError
from mms_lite.transport import AsyncConnection, Buffer, Frame, FrameKind, Marks, encode
from mms_lite.types import ModelSpec, Tensor
from mms_lite.wire import Item, Outcome


class ScriptedWorker:
    """A worker's process as the pool sees it (`Channel`), and its inside as the test plays it."""

    def __init__(self, on_frame: Callable[[Frame], None], threads: int) -> None:
        loop = asyncio.get_running_loop()
        self.pid: int | None = None
        self.arena = None
        self.marks = Marks(bytearray(Marks.SIZE))
        self.ended: asyncio.Future[Exit] = loop.create_future()
        self.threads = threads
        self.killed = False
        self.deaf = False  # to STOP
        self._received: asyncio.Queue[Frame] = asyncio.Queue()
        self._exit = Exit("end of file", 0, ())
        ours, theirs = socket.socketpair()
        self._ours = AsyncConnection(ours, loop=loop, on_frame=on_frame, on_close=self._on_close)
        self._theirs = AsyncConnection(theirs, loop=loop, on_frame=self._hear, on_close=lambda _: None)
        self._ours.start()
        self._theirs.start()

    def send(self, pieces: Sequence[Buffer]) -> None:
        self._ours.send(pieces)

    def kill(self) -> None:
        self.killed = True
        self.die("killed by SIGKILL", -9)

    def die(self, text: str = "killed by SIGSEGV", code: int = -11, *lines: str, oom: bool = False) -> None:
        """End; what was said before still arrives."""
        if self.ended.done():
            return
        self._exit = Exit(text, code, lines, oom)
        self._theirs.close()
        self._ours.read_rest()

    def say(self, kind: FrameKind, number: int, meta: bytes = b"", buffers: Sequence[Buffer] = ()) -> None:
        self._theirs.send(encode(kind, number, meta, buffers))

    def say_loaded(self, **report: Any) -> None:
        self.say(FrameKind.LOADED, 0, wire.encode_json(report))

    def begin(self, number: int) -> None:
        """Give a batch to the model."""
        self.marks.begun = number

    def say_alone(self, number: int, item: Item) -> None:
        """Say that the batch failed and this item of it runs again, alone."""
        self.say(FrameKind.STARTED, number, wire.encode_ids([item.job_id]))

    def say_outcome(self, number: int, outcome: Outcome) -> None:
        self.say(FrameKind.OUTCOME, number, *wire.encode_outcome(outcome))

    def answer(self, number: int, item: Item, text: bytes | None = None) -> None:
        """Give an item a final answer: its own body, or `text`."""
        data = bytes(item.request.inputs[0].data) if text is None else text
        self.say_outcome(number, Outcome(item.job_id, outputs=[Tensor("body", "BYTES", (), data)]))

    async def serve(self) -> None:
        """Answer every batch, until something else is heard."""
        while True:
            number, items = await self.hear_batch()
            self.begin(number)
            for item in items:
                self.answer(number, item)

    async def hear(self, kind: FrameKind) -> Frame:
        """Wait for the next frame, which must be of this kind."""
        frame = await asyncio.wait_for(self._received.get(), 3)
        assert frame.kind is kind, f"heard {frame.kind.name} {frame.meta!r}, not {kind.name}"
        return frame

    async def hear_batch(self) -> tuple[int, list[Item]]:
        frame = await self.hear(FrameKind.BATCH)
        return frame.conversation, wire.decode_batch(frame)

    def heard_nothing(self) -> bool:
        return self._received.empty()

    def _hear(self, frame: Frame) -> None:
        self._received.put_nowait(frame)
        if frame.kind is FrameKind.STOP and not self.deaf:
            asyncio.get_running_loop().call_soon(self.die, "exit code 0", 0)

    def _on_close(self, error: Exception | None) -> None:
        self._theirs.close()
        if error is not None:
            self._exit = Exit(str(error), None, ())
        if not self.ended.done():
            self.ended.set_result(self._exit)


class ScriptedLauncher:
    """Hands the test each worker that the pool starts; `loads` says whether they load by themselves."""

    def __init__(self, *, loads: bool = True) -> None:
        self.loads = loads
        self.max_frame_bytes = 1 << 30
        self.failures: list[Exception] = []  # raised by the next starts
        self.started: list[ScriptedWorker] = []
        self.specs: list[dict[str, Any]] = []
        self._new: asyncio.Queue[ScriptedWorker] = asyncio.Queue()

    def start(self, spec: ModelSpec, name: str, threads: int, on_frame: Callable[[Frame], None]) -> Channel:
        if self.failures:
            raise self.failures.pop(0)
        worker = ScriptedWorker(on_frame, threads)
        self.started.append(worker)
        self._new.put_nowait(worker)
        if self.loads:
            worker.say_loaded(pid=1)
        return worker

    async def worker(self) -> ScriptedWorker:
        """Wait for the next worker, and for its LOAD."""
        worker = await asyncio.wait_for(self._new.get(), 3)
        self.specs.append(wire.decode_json(await worker.hear(FrameKind.LOAD)))
        return worker


def broken(reason: str = "") -> LoadError:
    return LoadError(reason or "cannot start the worker's interpreter")
