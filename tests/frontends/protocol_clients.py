"""One question in seven spellings: clients of the protocols of tensors, and the server that they ask."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from raw_http import Client, request

from mms_lite.frontends import mms, tfserving
from mms_lite.frontends.auth import Authoriser
from mms_lite.frontends.json_bodies import Readers
from mms_lite.frontends.kserve import rest as kserve
from mms_lite.frontends.kserve.grpc import InferenceService
from mms_lite.frontends.kserve.service import KServeService
from mms_lite.frontends.listener import HttpListener
from mms_lite.frontends.message import Limits
from mms_lite.frontends.router import Router
from mms_lite.frontends.rpc import GrpcListener
from mms_lite.frontends.tfserving.grpc import services
from mms_lite.protos import message
from mms_lite.types import LoadOptions

LIMIT_S = 20.0
TOKEN = b"a token"
KSERVE, PREDICTION = "inference.GRPCInferenceService", "tensorflow.serving.PredictionService"
V2_JSON, V2_BINARY, V2_RAW, V2_CONTENTS = "v2 json", "v2 binary", "v2 grpc raw", "v2 grpc contents"
V1_ROW, V1_COLUMN, V1_GRPC = "v1 row", "v1 column", "v1 grpc"
ALL = (V2_JSON, V2_BINARY, V2_RAW, V2_CONTENTS, V1_ROW, V1_COLUMN, V1_GRPC)
V2, V1 = ALL[:4], ALL[4:]
V2_REST, V2_GRPC, V1_REST = (V2_JSON, V2_BINARY), (V2_RAW, V2_CONTENTS), (V1_ROW, V1_COLUMN)
REST, GRPC = (*V2_REST, *V1_REST), (*V2_GRPC, V1_GRPC)
_TYPES = {"FP32": ("fp32_contents", np.float32, 1), "INT64": ("int64_contents", np.int64, 9)}
_COMPLEX = 8  # DT_COMPLEX64, which no model here takes


@dataclass(frozen=True)
class Input:
    """A tensor as it is said to be, and the values that are sent for it, whatever is said."""

    name: str = "x"
    datatype: str = "FP32"
    shape: tuple[int, ...] = (1, 2)
    values: tuple[float, ...] = (3, 4)

    @property
    def kind(self) -> tuple[str, Any, int]:
        """Field of InferTensorContents, numpy's type, TensorFlow's number; FP32's for what there is not."""
        return _TYPES.get(self.datatype, ("fp32_contents", np.float32, _COMPLEX))

    @property
    def data(self) -> bytes:
        return np.array(self.values, self.kind[1]).tobytes()


@dataclass(frozen=True)
class Question:
    """A prediction. `body` and `lines` are in place of what an HTTP client would write, or a gRPC message."""

    model: str = "m"
    version: str = ""
    inputs: tuple[Input, ...] = (Input(),)
    outputs: tuple[str, ...] = ()
    timeout_s: float | None = None
    body: bytes | None = None
    lines: tuple[str, ...] = ()
    edit: Callable[[Any], None] | None = None  # of the gRPC message, or of the JSON object


GOOD = Question()


@dataclass
class Reply:
    """What came back: the code as it is counted, the error's text, and how the connection goes on."""

    code: str
    text: str = ""
    values: list[float] = field(default_factory=list)
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpClient:
    """One protocol over one connection; it is opened anew once the server has said that it closes."""

    good = "200"

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port
        self._client: Client | None = None
        self.label = "kserve-rest" if name in (V2_JSON, V2_BINARY) else "tfserving-rest"

    async def ask(self, question: Question) -> Reply:
        return await self.post(*self._spell(question))

    async def post(self, path: str, body: bytes = b"", *lines: str) -> Reply:
        if self._client is None:
            self._client = Client(*await asyncio.open_connection("127.0.0.1", self._port))
        await self._client.send(request("POST", path, body, *lines))
        answer = await asyncio.wait_for(self._client.response(), LIMIT_S)
        if answer.headers["connection"] == "close":
            await self.close()
        if answer.status == 200:
            return Reply("200", "", self._values(answer.body, answer.headers), answer.headers)
        assert answer.headers["content-type"] == "application/json"
        assert set(answer.json) == {"error"}
        return Reply(str(answer.status), answer.json["error"], [], answer.headers)

    async def leave(self) -> None:
        assert self._client is not None
        self._client.leave()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _spell(self, question: Question) -> tuple[Any, ...]:
        lines = list(question.lines)
        if question.timeout_s is not None:
            lines.append(f"X-Request-Timeout-Ms: {question.timeout_s * 1000:.6f}")
        version = f"/versions/{question.version}" if question.version else ""
        verb = "/infer" if self.label == "kserve-rest" else ":predict"
        path = f"/{self._name[:2]}/models/{question.model}{version}{verb}"
        if question.body is not None:
            return path, question.body, *lines
        asked, tail = self._object(question)
        if question.edit is not None:
            question.edit(asked)
        head = json.dumps(asked).encode()
        if self._name == V2_BINARY:
            lines.append(f"Inference-Header-Content-Length: {len(head)}")
        return path, head + tail, *lines

    def _object(self, question: Question) -> tuple[dict[str, Any], bytes]:
        if self.label == "tfserving-rest":
            arrays = {
                each.name: np.array(each.values, object).reshape(each.shape).tolist()
                for each in question.inputs
            }
            if self._name == V1_COLUMN:
                return {"inputs": arrays}, b""
            rows = max((len(array) for array in arrays.values()), default=0)
            return {"instances": [{name: arrays[name][row] for name in arrays} for row in range(rows)]}, b""
        inputs: list[dict[str, Any]] = [
            {"name": each.name, "datatype": each.datatype, "shape": each.shape} for each in question.inputs
        ]
        asked: dict[str, Any] = {"inputs": inputs}
        if question.outputs:
            asked["outputs"] = [{"name": name} for name in question.outputs]
        for described, each in zip(inputs, question.inputs, strict=True):
            if self._name == V2_JSON:
                described["data"] = each.values
            else:
                described["parameters"] = {"binary_data_size": len(each.data)}
        if self._name == V2_JSON:
            return asked, b""
        asked["parameters"] = {"binary_data_output": True}
        return asked, b"".join(each.data for each in question.inputs)

    def _values(self, body: bytes, headers: Mapping[str, str]) -> list[float]:
        length = headers.get("inference-header-content-length")
        if length is not None:
            return np.frombuffer(body[int(length) :], np.float32).tolist()
        answer = json.loads(body) if body else {}
        if self.label == "kserve-rest":
            return [value for each in answer.get("outputs", ()) for value in each["data"]]
        rows = answer.get("predictions" if self._name == V1_ROW else "outputs", [])
        return [value for row in rows for value in row]


class GrpcClient:
    """One protocol over one channel."""

    good = "OK"

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        options = [("grpc.max_send_message_length", -1)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
        self.label = "tfserving-grpc" if name == V1_GRPC else "kserve-grpc"
        self.path = f"/{PREDICTION}/Predict" if name == V1_GRPC else f"/{KSERVE}/ModelInfer"
        self._call: Any = None

    async def ask(self, question: Question, *, compression: Any = None) -> Reply:
        asked = self.spell(question) if question.body is None else question.body
        timeout_s = question.timeout_s if self._name == V1_GRPC and question.timeout_s else LIMIT_S
        reply, received = await self.post(self.path, asked, timeout_s=timeout_s, compression=compression)
        if received is not None:
            reply.values = self._values(received)
        return reply

    async def post(
        self,
        path: str,
        body: bytes,
        *metadata: tuple[str, str],
        timeout_s: float = LIMIT_S,
        compression: Any = None,
    ) -> tuple[Reply, bytes | None]:
        self._call = self._channel.unary_unary(path)(
            body, timeout=timeout_s, metadata=metadata, compression=compression
        )
        try:
            return Reply("OK"), await self._call
        except grpc.aio.AioRpcError as error:
            headers = {str(name): str(value) for name, value in error.trailing_metadata()}
            return Reply(error.code().name, error.details(), [], headers), None

    async def leave(self) -> None:
        self._call.cancel()

    async def close(self) -> None:
        await self._channel.close()

    def spell(self, question: Question) -> bytes:
        asked = self._predict(question) if self._name == V1_GRPC else self._infer(question)
        if question.edit is not None:
            question.edit(asked)
        return bytes(asked.SerializeToString())

    def _infer(self, question: Question) -> Any:
        asked = message("inference.ModelInferRequest")(
            model_name=question.model, model_version=question.version
        )
        for each in question.inputs:
            tensor = asked.inputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
            if self._name == V2_RAW:
                asked.raw_input_contents.append(each.data)
            else:
                getattr(tensor.contents, each.kind[0]).extend(each.values)
        for name in question.outputs:
            asked.outputs.add(name=name)
        if question.timeout_s is not None:
            asked.parameters["timeout"].int64_param = math.ceil(question.timeout_s * 1e6)
        return asked

    def _predict(self, question: Question) -> Any:
        asked = message("tensorflow.serving.PredictRequest")(output_filter=question.outputs)
        asked.model_spec.name = question.model
        if question.version:
            asked.model_spec.version.value = int(question.version)
        for each in question.inputs:
            tensor = asked.inputs[each.name]
            tensor.dtype, tensor.tensor_content = each.kind[2], each.data
            for length in each.shape:
                tensor.tensor_shape.dim.add(size=length)
        return asked

    def _values(self, received: bytes) -> list[float]:
        if self._name == V1_GRPC:
            answer = message("tensorflow.serving.PredictResponse").FromString(received)
            return np.frombuffer(answer.outputs["y"].tensor_content, np.float32).tolist()
        answer = message("inference.ModelInferResponse").FromString(received)
        return np.frombuffer(b"".join(answer.raw_output_contents), np.float32).tolist()


AnyClient = HttpClient | GrpcClient


class Served:
    """An engine behind both kinds of addresses, composed as the server does it."""

    def __init__(self, engine: Any, limits: Limits) -> None:
        self.engine = engine
        authorise = Authoriser(TOKEN).check
        service = KServeService(engine, server_name="mms-lite", server_version="0", authorise=authorise)
        readers = Readers()
        tensors = {
            "v2": kserve.protocol(service, limits, readers),
            "v1": tfserving.protocol(engine, authorise, readers),
        }
        rest = mms.protocol(engine, limits, inference=True)
        self.http = HttpListener(Router(tensors, rest), limits)
        self.grpc = GrpcListener(
            [InferenceService(service), *services(engine, authorise, limits)], limits, ready=service.ready
        )
        self.ports: dict[str, int] = {}
        self._clients: list[AnyClient] = []

    async def start(self) -> None:
        self.ports = {"http": await self.http.start("127.0.0.1", 0)}
        self.ports["grpc"] = await self.grpc.start("127.0.0.1", 0)

    def client(self, protocol: str) -> AnyClient:
        """Return a client with a connection of its own."""
        made: AnyClient
        if protocol in (V2_RAW, V2_CONTENTS, V1_GRPC):
            made = GrpcClient(protocol, self.ports["grpc"])
        else:
            made = HttpClient(protocol, self.ports["http"])
        self._clients.append(made)
        return made

    def counted(self) -> Counter[tuple[str, str]]:
        """Return how many requests were counted, by protocol and code."""
        found = self.engine.metrics()
        return sum((Counter(seen.requests) for _, seen in found.versions), Counter(found.unknown))

    def batches(self) -> int:
        """Return how many batches workers have been given and have ended."""
        return sum(sum(seen.batch_rows.counts) for _, seen in self.engine.statistics())

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await asyncio.gather(self.http.stop(0.2), self.grpc.stop(0.2))


RAISE, NO_MEMORY, DIE, WAIT, CHOOSE = (
    -1.0,
    -2.0,
    -3.0,
    -4.0,
    -5.0,
)  # of the model, by the first element

_MODEL = """
import time
from pathlib import Path

import numpy as np
from mms_lite.errors import BadTensor
from mms_lite.types import Signature, TensorSpec
from mms_lite.worker.context import PredictionException
from mms_lite.worker.predictor import Predictor

GATE = Path({gate!r})


class Model:
    inputs = [TensorSpec("x", "FP32", {shape})]
    outputs = [TensorSpec("y", "FP32", {shape})]
    signature = Signature(tuple(inputs), tuple(outputs), takes_tensors=True)
    metadata = {{}}

    def initialize(self, context):
        self.predictor = Predictor(self, batch=False)  # which checks what comes in

    def handle(self, data, context):
        return self.predictor.infer_each(data)

    def infer(self, inputs, outputs):
        wish = inputs["x"].flat[0] if inputs["x"].size else 0
        if wish == -1:
            raise ValueError("a secret of /srv/models")
        if wish == -2:
            raise MemoryError
        if wish == -3:
            raise SystemExit(3)
        if wish == -4:
            GATE.with_suffix(".started").touch()
            while not GATE.exists():
                time.sleep(0.002)
        if wish == -5:
            raise PredictionException("no such customer", 404)
        return {{"y": inputs["x"] * 2}}

    def close(self):
        pass
"""


class Gate:
    """What a request of WAIT waits for."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gate"

    def open(self) -> None:
        self.path.touch()

    def reached(self) -> bool:
        """Tell whether a worker waits, or has."""
        return self.path.with_suffix(".started").exists()


@asynccontextmanager
async def serving(bench: Any, gate: Gate, limits: Limits, **options: Any) -> AsyncIterator[Served]:
    """Serve the models `m`, which doubles FP32 [-1,2] or does what its first element asks for, and `any`.

    `any` does the same with FP32 of any shape. The options are those of `m`.
    """
    for name, shape in (("m", (-1, 2)), ("any", None)):
        bench.store.put(name, {"service.py": _MODEL.format(gate=str(gate.path), shape=shape)})
        more = options if name == "m" else {}
        await bench.engine.load(LoadOptions(url=name, name=name, handler="service", **more))
    made = Served(bench.engine, limits)
    await made.start()
    try:
        yield made
    finally:
        gate.open()
        await made.close()
