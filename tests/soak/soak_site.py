"""A server under attack: its models, what it has to answer meanwhile, and what tells that it was harmed."""

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import grpc
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))

from client_models import write_repository, write_store
from client_server import Server
from rpc_messages import LOADED_BY_HAND, Shape

from mms_lite import protos

LIMIT_S = 2.0  # for a good request, whatever else is asked
MOST_GROWTH_BYTES = 256 << 20  # the server keeps some of what it has freed, in each thread
MOST_MORE_FILES = 60
UNKNOWN_TO_THE_SERVER = "Internal server error."
REPOSITORY, STORE = "repository", "store"
_BIG_ENOUGH = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_COUNTED = ("mms_queue_depth", "mms_requests_in_flight")
_IDLE_S = 20.0
_LOOKED_FOR = ("Traceback (most recent call last)", "never retrieved")
# What gRPC says of metadata that is no text, and of a path, for which it listens again.
_KNOWN = ("Invalid encoding on", "UnicodeDecodeError('utf-8', b'/inference.")
# What is attacked: name -> datatype, shape, inputs. The rest is for good requests alone.
_MODELS: dict[str, dict[str, tuple[str, Shape, tuple[str, ...]]]] = {
    REPOSITORY: {
        "simple": ("INT32", [-1, 16], ("INPUT0", "INPUT1")),
        "simple_string": ("BYTES", [-1, 16], ("INPUT0", "INPUT1")),
        "add_sub": ("FP32", [4], ("INPUT0", "INPUT1")),
        "classifier": ("FP32", [-1, 4], ("SCORES_IN",)),
        "words": ("BYTES", [-1], ("words",)),
        "times_version": ("INT32", [-1], ("INPUT0",)),
        **{
            f"identity_{each}": (each, [-1, -1], ("INPUT0",))
            for each in ("BOOL", "UINT8", "INT8", "UINT64", "FP16", "BF16", "FP32", "BYTES")
        },
    },
    STORE: {"echo": ("BYTES", [-1], ("body",)), "scale": ("FP32", [-1, 4], ("x",))},
}


@dataclass(slots=True)
class Defect:
    """Something that must not happen, and how to make it happen again."""

    what: str
    how: str


@dataclass(slots=True)
class Site:
    """A running server of one kind, and its state when the attack began."""

    kind: str
    server: Server
    session: aiohttp.ClientSession
    channel: grpc.aio.Channel
    process: psutil.Process
    workers: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    first_bytes: int = 0
    first_files: int = 0
    log_read: int = 0

    @property
    def models(self) -> dict[str, tuple[str, Shape, tuple[str, ...]]]:
        """The models to attack."""
        return _MODELS[self.kind]

    async def remember(self) -> None:
        """Take the state of now for what it shall be later."""
        self.workers = await self._workers()
        self.first_bytes, self.first_files = self.process.memory_info().rss, self.process.num_fds()

    async def check(self) -> list[Defect]:
        """Return what is not as it was: process, workers, answers, log."""
        pid = json.loads((self.server.folder / ".model_server.json").read_text())["pid"]
        if (
            not self.process.is_running()
            or self.process.status() == psutil.STATUS_ZOMBIE
            or pid != self.process.pid
        ):
            return [Defect("the server's process has ended", self._log_end())]
        found = [*self._log_defects()]
        for name, ask in good_requests(self):
            begin = time.monotonic()
            try:
                await asyncio.wait_for(ask(), LIMIT_S)
            except Exception as error:
                took_s = time.monotonic() - begin
                found.append(Defect(f"a good request by {name} failed after {took_s:.1f} s", repr(error)))
        now = await self._workers()
        if now != self.workers:
            changed = {
                name: (before, now.get(name))
                for name, before in self.workers.items()
                if now.get(name) != before
            }
            found.append(
                Defect("workers (pid, restarts) are not those of before", f"{changed}\n{self._log_end()}")
            )
            self.workers = now
        return found

    async def check_end(self) -> list[Defect]:
        """Return what is not as it was though nobody asks any more: also memory, files, what is held."""
        found = await self._check_idle()
        found += await self.check()
        grown = self.process.memory_info().rss - self.first_bytes
        if grown > MOST_GROWTH_BYTES:
            found.append(Defect(f"resident memory has grown by {grown >> 20} MB", ""))
        more = self.process.num_fds() - self.first_files
        if more > MOST_MORE_FILES:
            found.append(Defect(f"{more} more files are open than at the start", ""))
        if escaped := self._escaped():
            found.append(Defect("a loaded file was written elsewhere", " ".join(map(str, escaped))))
        return found

    def _escaped(self) -> list[Path]:
        """Return files of a load that are not where they belong."""
        return [*self.server.folder.parent.rglob("escaped"), *Path("/").glob("escaped")]

    def resources(self) -> str:
        """Return what the server uses, as a text."""
        memory, files = self.process.memory_info().rss, self.process.num_fds()
        begin = f"{self.first_bytes >> 20} MB, {self.first_files} files"
        return f"{begin} -> {memory >> 20} MB, {files} files, {self.process.num_threads()} threads"

    async def get(self, api: str, path: str) -> Any:
        """Return the JSON, or text, at a path of an API."""
        address = self.server._address(api)
        async with self.session.get(f"http://{address}{path}") as response:
            text = await response.text()
        return json.loads(text) if "json" in response.content_type else text

    async def _workers(self) -> dict[str, list[tuple[int, int]]]:
        found = {}
        for name in self.models:
            described = await self.get("management", f"/models/{name}")
            found[name] = sorted((each["pid"], each.get("restarts", 0)) for each in described["workers"])
        return found

    async def _check_idle(self) -> list[Defect]:
        """Wait until nothing waits or runs."""
        until, held = time.monotonic() + _IDLE_S, ["?"]
        while held and time.monotonic() < until:
            await asyncio.sleep(1.1)  # for so long the page of the metrics is the same
            page = await self.get("metrics", "/metrics")
            lines = [line for line in page.splitlines() if line.startswith(_COUNTED)]
            held = [line for line in lines if not line.endswith(" 0.0")]
        return [Defect("requests are still held though nobody asks", "\n".join(held))] if held else []

    def _log_defects(self) -> Iterator[Defect]:
        """Yield what the server wrote since the last look about errors of its own."""
        path = self.server.folder / "logs" / "mms_log.log"
        with path.open(errors="replace") as file:
            file.seek(self.log_read)
            text = file.read()
            self.log_read = file.tell()
        # What models print of their own errors is no matter.
        lines = [line for line in text.splitlines() if " mms_lite.model - " not in line]
        for at, line in enumerate(lines):
            near = "\n".join(lines[max(0, at - 1) : at + 1])
            if any(each in line for each in _LOOKED_FOR) and not any(each in near for each in _KNOWN):
                yield Defect("the log has a traceback", "\n".join(lines[max(0, at - 2) : at + 60]))
                return  # the first tells most

    def _log_end(self) -> str:
        """Return the end of the log and of what the process printed."""
        ends = []
        for name in ("mms_log.log", "server_output.log", "model_log.log"):
            path = self.server.folder / "logs" / name
            if path.exists():
                ends += [f"-- {name}", *path.read_text(errors="replace").splitlines()[-25:]]
        return "\n".join(ends)


@contextmanager
def serving(kind: str) -> Iterator[Server]:
    """Run a server of this kind in a folder of its own."""
    with TemporaryDirectory(prefix="mms-lite-soak-") as name:
        folder = Path(name)
        models, run = folder / "models", folder / "run"
        run.mkdir()
        if kind == REPOSITORY:
            write_repository(models)
            for each in models.iterdir():
                if each.name not in (*_MODELS[kind], LOADED_BY_HAND):
                    shutil.rmtree(each)
            server = Server(run, model_repository=models, model_control_mode="explicit")
        else:
            write_store(models)
            server = Server(run, model_store=models)
        try:
            server.start()
            yield server
        finally:
            server.end()


async def attacked(kind: str, attack: Callable[[Site], Awaitable[list[Defect]]]) -> list[Defect]:
    """Run a server, have it attacked, and return what came of it."""
    with serving(kind) as server:
        pid = json.loads((server.folder / ".model_server.json").read_text())["pid"]
        async with (
            aiohttp.ClientSession() as session,
            grpc.aio.insecure_channel(server.grpc, options=_BIG_ENOUGH) as channel,
        ):
            site = Site(kind, server, session, channel, psutil.Process(pid))
            await site.remember()
            found = await site.check()
            return found or await attack(site)


Ask = Callable[[], Awaitable[None]]


def good_requests(site: Site) -> list[tuple[str, Ask]]:
    """Return a request by each protocol, each of which checks its answer."""
    model, inputs, output, expected = _GOOD[site.kind]

    async def post(path: str, body: dict[str, Any]) -> Any:
        async with site.session.post(f"{site.server.url}{path}", json=body) as response:
            text = await response.read()
            assert response.status == 200, (response.status, text)
            return json.loads(text)

    async def v2_rest() -> None:
        tensors = [
            {"name": name, "datatype": "FP32", "shape": shape, "data": data} for name, shape, data in inputs
        ]
        answer = await post(f"/v2/models/{model}/infer", {"inputs": tensors})
        found = next(each["data"] for each in answer["outputs"] if each["name"] == output)
        assert found == expected, answer

    async def v1_rest() -> None:
        named = {name: data if len(shape) == 1 else [data] for name, shape, data in inputs}
        answer = await post(f"/v1/models/{model}:predict", {"inputs": named})
        found = answer["outputs"]
        found = found[output] if isinstance(found, dict) else found[0]
        assert found == expected, answer

    async def mms() -> None:
        named = {name: data if len(shape) == 1 else [data] for name, shape, data in inputs}
        answer = await post(f"/predictions/{model}", named)
        found = answer[output] if isinstance(answer, dict) else answer
        assert found in (expected, [expected]), answer

    async def v2_grpc() -> None:
        asked = protos.message("inference.ModelInferRequest")(model_name=model)
        for name, shape, data in inputs:
            asked.inputs.add(name=name, datatype="FP32", shape=shape).contents.fp32_contents.extend(data)
        response = await site.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(
            asked.SerializeToString()
        )
        answer = protos.message("inference.ModelInferResponse").FromString(response)
        at = [each.name for each in answer.outputs].index(output)
        assert list(memoryview(answer.raw_output_contents[at]).cast("f")) == expected, answer

    async def v1_grpc() -> None:
        asked = protos.message("tensorflow.serving.PredictRequest")()
        asked.model_spec.name = model
        for name, shape, data in inputs:
            asked.inputs[name].dtype = 1
            for length in shape:
                asked.inputs[name].tensor_shape.dim.add(size=length)
            asked.inputs[name].float_val.extend(data)
        response = await site.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")(
            asked.SerializeToString()
        )
        answer = protos.message("tensorflow.serving.PredictResponse").FromString(response)
        assert list(memoryview(answer.outputs[output].tensor_content).cast("f")) == expected, answer

    asks = {"v2 REST": v2_rest, "v2 gRPC": v2_grpc, "v1 REST": v1_rest, "v1 gRPC": v1_grpc, "MMS": mms}
    return list(asks.items())


_Inputs = list[tuple[str, Shape, list[float]]]
_GOOD: dict[str, tuple[str, _Inputs, str, list[float]]] = {
    REPOSITORY: (
        "add_sub",
        [("INPUT0", [4], [1.0, 2.0, 3.0, 4.0]), ("INPUT1", [4], [1.0, 1.0, 1.0, 1.0])],
        "OUTPUT0",
        [2.0, 3.0, 4.0, 5.0],
    ),
    STORE: ("scale", [("x", [1, 4], [1.0, 2.0, 3.0, 4.0])], "y", [3.0, 6.0, 9.0, 12.0]),
}
