"""Models without code over HTTP: an ONNX file in a real worker, asked as curl asks on the routes of MMS."""

import asyncio
import base64
import http.client
import io
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.errors import HandlerError
from mms_lite.frontends import mms
from mms_lite.frontends.listener import HttpListener
from mms_lite.frontends.message import HttpRequest, Limits
from mms_lite.tensors import to_array, to_tensor
from mms_lite.types import InferRequest, LoadOptions

onnx = pytest.importorskip("onnx", reason="writes the models")
pytest.importorskip("onnxruntime", reason="runs the models")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes as on Linux")

Bench = Any
JSON, NPY, NPZ = "application/json", "application/x-npy", "application/x-npz"
FORM = "application/x-www-form-urlencoded"  # what curl says of --data-binary
FLOAT, INT, TEXT = 1, 6, 8  # onnx.TensorProto


def write(path: Path, nodes: list[Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Write an ONNX model; inputs and outputs are name -> (type, shape)."""

    def infos(specs: Mapping[str, Any]) -> list[Any]:
        return [onnx.helper.make_tensor_value_info(name, *spec) for name, spec in specs.items()]

    graph = onnx.helper.make_graph(nodes, "tiny", infos(inputs), infos(outputs))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_double(path: Path) -> None:
    """y = x + x."""
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    write(path, [node], {"x": (FLOAT, ["n", 3])}, {"y": (FLOAT, ["n", 3])})


def write_pair(path: Path) -> None:
    """Total and difference of a and b."""
    nodes = [
        onnx.helper.make_node("Add", ["a", "b"], ["sum"]),
        onnx.helper.make_node("Sub", ["a", "b"], ["difference"]),
    ]
    whole = (INT, ["n"])
    write(path, nodes, {"a": whole, "b": whole}, {"sum": whole, "difference": whole})


def write_inverse(path: Path) -> None:
    """y = 1 / x, which is infinite for 0."""
    node = onnx.helper.make_node("Reciprocal", ["x"], ["y"])
    write(path, [node], {"x": (FLOAT, ["n"])}, {"y": (FLOAT, ["n"])})


def write_means(path: Path) -> None:
    """The mean of each channel of an image."""
    node = onnx.helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)
    write(path, [node], {"image": (FLOAT, ["n", 3, 8, 8])}, {"mean": (FLOAT, ["n", 3])})


def write_copy(path: Path) -> None:
    """The text as it came."""
    node = onnx.helper.make_node("Identity", ["text"], ["copy"])
    write(path, [node], {"text": (TEXT, ["n"])}, {"copy": (TEXT, ["n"])})


MODELS = {
    "double": write_double,
    "pair": write_pair,
    "inverse": write_inverse,
    "means": write_means,
    "copy": write_copy,
}


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.kind = response.headers["content-type"]
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Ask = Callable[..., Awaitable[Answer]]


@pytest.fixture
async def ask_model(processes: Bench) -> AsyncIterator[Ask]:
    """Ask a model by its route: `await ask_model("double", body, accept=..., content_type=...)`."""
    limits = Limits(max_request_size=1_000_000, max_response_size=1_000_000)
    listener = HttpListener(mms.protocol(processes.engine, limits, inference=True), limits)
    port = await listener.start("127.0.0.1", 0)

    def ask(path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", path, body, headers)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    async def call(
        model: str, body: bytes | str, content_type: str = "", accept: str = "*/*", path: str = ""
    ) -> Answer:
        if not (processes.store.folder / model).exists():
            await load(processes, model)
        headers = {"Accept": accept, **({"Content-Type": content_type} if content_type else {})}
        raw = body.encode() if isinstance(body, str) else body
        return await asyncio.to_thread(ask, path or f"/predictions/{model}", raw, headers)

    yield call
    await listener.stop(0.2)


async def load(bench: Bench, name: str, config: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Load one of MODELS from a folder as model-archiver packs it."""
    model = {"modelName": name, "handler": "tensor", "backend": "onnxruntime", "modelFiles": ["m.onnx"]}
    manifest = json.dumps({"model": {**model, "handlerConfig": config or {}}})
    bench.store.put(name, {"MAR-INF/MANIFEST.json": manifest})
    MODELS[name](bench.store.folder / name / "m.onnx")
    await bench.engine.load(LoadOptions(url=name, name=name, **options))


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def form(**fields: bytes) -> tuple[bytes, str]:
    """Return a multipart body of files and its content type."""
    head = '--cut\r\nContent-Disposition: form-data; name="{}"; filename="f"\r\n\r\n'
    parts = [head.format(name).encode() + data + b"\r\n" for name, data in fields.items()]
    return b"".join(parts) + b"--cut--\r\n", "multipart/form-data; boundary=cut"


X = np.array([[1, 2, 0.1]], np.float32)
A, B = np.array([5, 6], np.int32), np.array([1, 2], np.int32)
DOUBLED = {"y": [[2.0, 4.0, 0.2]]}
COMBINED = {"sum": [6, 8], "difference": [4, 4]}


@pytest.mark.time_limit(120)
async def test_bodies_of_every_kind_are_answered_with_json(ask_model: Ask) -> None:
    table: list[tuple[str, tuple[Any, ...], Any]] = [
        ("double", ('{"x": [[1, 2, 0.1]]}', JSON), DOUBLED),
        ("double", ('{"input": [[1, 2, 0.1]]}',), DOUBLED),
        ("double", ("[[1, 2, 0.1]]", "text/plain"), DOUBLED),
        ("double", (npy(X),), DOUBLED),
        ("double", (npy(X.astype(">f4")), FORM), DOUBLED),
        ("double", (npz(x=X), NPZ), DOUBLED),
        ("double", form(x=npy(X)), DOUBLED),
        ("double", (npy(np.repeat(X, 2, 0)), NPY), {"y": DOUBLED["y"] * 2}),
        ("double", ("x=[[1,2,0.1]]", FORM), DOUBLED),
        ("pair", ('{"a": [5, 6], "b": [1, 2]}', JSON), COMBINED),
        ("pair", (npz(a=A, b=B),), COMBINED),
        ("pair", form(a=npy(A), b=b"[1, 2]"), COMBINED),
        ("copy", ('["gr\\u00fcn"]', JSON), {"copy": ["grün"]}),
    ]
    for model, request, wanted in table:
        answer = await ask_model(model, *request)
        assert (answer.status, answer.kind, answer.json) == (200, JSON, wanted), request


async def test_an_older_route_takes_its_model_from_the_query(ask_model: Ask) -> None:
    await ask_model("double", npy(X))
    answer = await ask_model("double", npy(X), path="/invocations?model_name=double")
    assert (answer.status, answer.json) == (200, DOUBLED)
    answer = await ask_model("double", b"", path="/double/predict?x=[[1,2,0.1]]")
    assert (answer.status, answer.json) == (200, DOUBLED)


async def test_answers_come_as_the_client_accepts_them(ask_model: Ask) -> None:
    answer = await ask_model("double", npy(X), accept=NPY)
    assert (answer.status, answer.kind) == (200, NPY)
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.body)), X * 2)
    answer = await ask_model("pair", npz(a=A, b=B), accept=f"{NPY}, {NPZ};q=0.5, */*;q=0.1")
    assert (answer.status, answer.kind) == (200, NPZ)
    assert {name: array.tolist() for name, array in np.load(io.BytesIO(answer.body)).items()} == COMBINED
    answer = await ask_model("inverse", "[0, 2]", accept=NPY)
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.body)), np.array([np.inf, 0.5], np.float32))


@pytest.mark.time_limit(120)
async def test_what_a_model_cannot_take_is_refused_in_words(ask_model: Ask) -> None:
    hostile = npy(X).replace(b"(1, 3)", b"(9" + 14 * b"0" + b",)")
    table: list[tuple[str, tuple[Any, ...], int, str]] = [
        ("double", ("",), 400, "the request has no body; the model takes x FP32 [-1,3]"),
        ("double", ('{"x": [[1, 2]]}', JSON), 400, "expects FP32 [-1,3], got FP32 [1,2]"),
        ("double", ('{"x": [[1, "2", 3]]}', JSON), 400, 'got text: "2" at [0, 1]'),
        ("double", ("[[1, 2, 1e400]]",), 400, "got no finite number: Infinity at [0, 2]"),
        ("double", ("[[1, 2, NaN]]", JSON), 400, "got no finite number: NaN at [0, 2]"),
        ("double", ("[" * 100_000, JSON), 400, "looks like JSON and is not"),
        ("double", ('{"x": [[1, 2, 3]]}', FORM), 400, "looks like JSON: send it as application/json"),
        ("double", (npy(X.astype(float)),), 400, "expects FP32 [-1,3], got FP64 [1,3]"),
        ("double", (hostile,), 400, "input 'x' is"),
        ("double", (npz(z=X),), 400, "one each of x.npy; got: 'z.npy'"),
        ("double", (b"\xff\xd8\xff\xe0 a photo", "image/jpeg"), 415, "of no kind that is read here"),
        ("double", ("<x>1</x>", "text/xml"), 415, "application/json, application/x-npy or"),
        ("double", (npy(X), NPY, "text/html"), 400, "the request accepts: text/html"),
        ("pair", (npz(a=A, b=B), "", NPY), 400, "can be application/json or application/x-npz"),
        ("pair", ('{"a": [1]}', JSON), 400, "input 'b' is missing"),
        ("pair", ('{"a": [1.5], "b": [1]}', JSON), 400, "a number that is not whole: 1.5 at [0]"),
        ("pair", (npy(A),), 400, "an .npy file names no input; the model takes"),
        ("inverse", ("[0, 2]",), 503, "the output 'y' holds NaN or Infinity, which JSON cannot carry"),
    ]
    for model, request, status, message in table:
        answer = await ask_model(model, *request)
        assert (answer.status, message in answer.json["message"]) == (status, True), (request, answer.body)
    answer = await ask_model("double", npy(X))
    assert (answer.status, answer.json) == (200, DOUBLED)


async def test_requests_that_come_together_are_each_answered_with_their_own_rows(
    processes: Bench, ask_model: Ask
) -> None:
    await load(processes, "double", batch_size=4, max_batch_delay_ms=2_000)
    bodies = ["[[1, 2, 3]]", "[[4, 5, 6], [7, 8, 9]]", "[[1]]", "[[0, 0, 0]]"]
    answers = await asyncio.gather(*(ask_model("double", body) for body in bodies))
    assert [answer.status for answer in answers] == [200, 200, 400, 200]
    assert answers[1].json == {"y": [[8.0, 10.0, 12.0], [14.0, 16.0, 18.0]]}
    assert answers[3].json == {"y": [[0.0, 0.0, 0.0]]}


async def test_a_photo_is_scaled_as_the_handler_config_says(processes: Bench, ask_model: Ask) -> None:
    await load(processes, "means", {"image": {"scale": 0.01, "color": "BGR"}})
    png = base64.b64decode(  # 1 x 1, of red 100, green 50, blue 0
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNIMWIAAAGUAJed7hN7AAAAAElFTkSuQmCC"
    )
    for request in ((png,), (png, "image/png"), form(photo=png)):
        answer = await ask_model("means", *request)
        assert (answer.status, answer.json) == (200, {"mean": [[0.0, 0.5, 1.0]]})


async def test_a_model_without_code_is_described_with_its_tensors(processes: Bench) -> None:
    await load(processes, "pair")
    protocol = mms.protocol(processes.engine, Limits(), management=lambda request: None)
    answer = await protocol.handle(HttpRequest("GET", "/models/pair"))
    described = json.loads(b"".join(answer.body))
    whole = {"datatype": "INT32", "shape": [-1]}
    assert described["inputs"] == [{"name": "a", **whole}, {"name": "b", **whole}]
    assert described["outputs"] == [{"name": "sum", **whole}, {"name": "difference", **whole}]


CODE = """import beside_the_file
import beside_the_versions
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [-1]})
        config.add_output({"name": "y", "data_type": "TYPE_FP32", "dims": [-1]})
        return config

    def execute(self, requests):
        return [self.answer(each, len(requests)) for each in requests]

    def answer(self, request, together):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        if not x.size:
            error = pb_utils.TritonError("no x", pb_utils.TritonError.NOT_FOUND)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2)], parameters={"together": together})
"""


async def test_python_code_of_a_repository_runs_requests_together_and_answers_each(
    make_model: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    folder = tmp_path / "code" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(CODE)
    (folder / "beside_the_file.py").touch()
    (folder.parent / "beside_the_versions.py").touch()
    packed = {"backend": "python", "modelFiles": ["model.py"], "handlerConfig": {"allow_nan": True}}
    model = make_model(
        ProcessLauncher(max_frame_bytes=1 << 20),
        path=str(folder),
        handler="tensor",
        manifest={"model": packed},
        config={"name": "code", "max_batch_size": 0},
        batch_size=4,
        max_batch_delay_ms=2_000,
        isolate_failures=False,
    )
    await model.scale(1, 1)
    asked = [np.ones(1, np.float32), np.ones(0, np.float32), np.array([np.nan, -0.0], np.float32)]
    jobs = [model.submit(InferRequest("r", "m", inputs=[to_tensor("x", each)])) for each in asked]
    first, missing, last = await asyncio.gather(*(job.answer() for job in jobs), return_exceptions=True)
    assert to_array(first.outputs[0]).tolist() == [2]
    assert first.parameters == last.parameters == {"together": 3}
    assert np.array_equal(to_array(last.outputs[0]), asked[2] * 2, equal_nan=True)
    assert isinstance(missing, HandlerError)
    assert (missing.message, missing.details) == ("no x", {"status": 404, "grpc": "NOT_FOUND"})


async def test_python_code_in_an_archive_answers_bodies(processes: Bench, ask_model: Ask) -> None:
    model = {"modelName": "code", "handler": "tensor", "backend": "python", "modelFiles": ["model.py"]}
    code = CODE.replace("import beside_the_file\nimport beside_the_versions\n", "")
    processes.store.put("code", {"model.py": code, "MAR-INF/MANIFEST.json": json.dumps({"model": model})})
    await processes.engine.load(LoadOptions(url="code", name="code", batch_size=2, max_batch_delay_ms=200))
    bodies = [b"[1, 2]", npy(np.array([3], np.float32))]
    answers = await asyncio.gather(*(ask_model("code", body) for body in bodies))
    assert [(answer.status, answer.json) for answer in answers] == [(200, {"y": [2, 4]}), (200, {"y": [6]})]
    answer = await ask_model("code", b"[]")
    assert (answer.status, answer.json["message"]) == (404, "no x")
