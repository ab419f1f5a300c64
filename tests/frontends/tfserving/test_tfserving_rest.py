"""The TensorFlow Serving API over HTTP: predictions by row and column, statuses, metadata, errors."""

import asyncio
import base64
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_http import Answer

from mms_lite.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidArchive,
    InvalidRequest,
    ModelNotReady,
    OutOfMemory,
    QueueFull,
    RequestTooLarge,
    ServingError,
    Unauthorized,
    WorkerDied,
)
from mms_lite.frontends import tfserving
from mms_lite.frontends.json_bodies import Readers, loads
from mms_lite.frontends.message import HttpRequest
from mms_lite.frontends.tfserving.rest import spell
from mms_lite.shared import Arena
from mms_lite.types import VersionState

GOLDEN = Path(__file__).parent.parent / "golden" / "tfserving"
EXAMPLES = {path.stem: json.loads(path.read_text()) for path in GOLDEN.glob("*.json")}
HALF_PLUS_TWO = "return {'y': arrays['x'] / 2 + 2}"
Rest = Callable[..., Awaitable[Answer]]
Load = Callable[..., Awaitable[Any]]

# What the examples of the documentation are about: name -> inputs, outputs, code.
MODELS: dict[str, Any] = {
    "half_plus_two": ([("x", "FP32", (-1,))], [("y", "FP32", (-1,))], HALF_PLUS_TWO),
    "sensors": (
        [("tag", "BYTES", (-1,)), ("signal", "FP32", (-1, 5)), ("sensor", "FP32", (-1, 2, 2))],
        [("total", "FP32", (-1,)), ("tag", "BYTES", (-1,))],
        "return {'total': arrays['signal'].sum(1) + arrays['sensor'].sum((1, 2)), 'tag': arrays['tag']}",
    ),
    "resnet": (
        [("image", "FP32", (1, 3, 224, 224))],
        [("softmax_tensor", "FP32", (1, 1001))],
        "return {'softmax_tensor': np.zeros((1, 1001), 'f')}",
    ),
}


async def predict(rest: Rest, name: str, request: Any) -> Any:
    answer = await rest("POST", f"/v1/models/{name}:predict", json.dumps(request).encode())
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json"), answer.body
    return json.loads(answer.body)


async def fault(rest: Rest, name: str, request: Any) -> tuple[int, str]:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    answer = await rest("POST", f"/v1/models/{name}:predict", body)
    said = json.loads(answer.body)
    assert said.keys() == {"error"}
    return answer.status, said["error"]


@pytest.mark.parametrize("example", sorted(EXAMPLES))
async def test_documented_examples(example: str, arrays: Load, rest: Rest) -> None:
    said = EXAMPLES[example]
    await arrays(said["model"], *MODELS[said["model"]])
    body = json.dumps(said["body"]).encode() if "body" in said else b""
    answer = await rest(said["method"], said["path"], body)
    assert (answer.status, json.loads(answer.body)) == (said["status"], said["answer"])


@pytest.mark.parametrize("path", ["/versions/1", "/versions/0", "/labels/stable", ""])
async def test_a_version_or_a_label_may_be_named(path: str, arrays: Load, rest: Rest) -> None:
    await arrays("m", *MODELS["half_plus_two"])
    answer = await rest("POST", f"/v1/models/m{path}:predict", b'{"inputs": [2]}')
    assert json.loads(answer.body) == {"outputs": [3.0]}


async def test_one_input_needs_no_name_and_several_outputs_have_theirs(arrays: Load, rest: Rest) -> None:
    outputs = [("double", "INT64", (-1, 2)), ("sum", "INT64", (-1,))]
    code = "return {'double': arrays['x'] * 2, 'sum': arrays['x'].sum(1)}"
    await arrays("m", [("x", "INT64", (-1, 2))], outputs, code)
    rows = [{"double": [2, 4], "sum": 3}, {"double": [6, 8], "sum": 7}]
    columns = {"double": [[2, 4], [6, 8]], "sum": [3, 7]}
    assert await predict(rest, "m", {"instances": [[1, 2], [3, 4]]}) == {"predictions": rows}
    assert await predict(rest, "m", {"instances": [{"x": [1, 2]}, {"x": [3, 4]}]}) == {"predictions": rows}
    assert await predict(rest, "m", {"inputs": [[1, 2], [3, 4]]}) == {"outputs": columns}
    assert await predict(rest, "m", {"inputs": {"x": [[1, 2], [3, 4]]}}) == {"outputs": columns}


async def test_numbers_that_are_none(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("x", "FP64", (-1,))])
    answer = await rest("POST", "/v1/models/m:predict", b'{"instances": [NaN, Infinity, -Infinity, 1]}')
    assert answer.body == b'{"predictions":[NaN,Infinity,-Infinity,1.0]}'


async def test_numbers_come_back_as_they_were_sent(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (-1,))])
    body = b'{"inputs":[0.1,1e-45,3.4028235e+38,16777216.0,-0.0]}'
    answer = await rest("POST", "/v1/models/m:predict", body)
    assert answer.body == body.replace(b"inputs", b"outputs")


async def test_texts_and_bytes(arrays: Load, rest: Rest) -> None:
    inputs = [("x", "BYTES", (-1,))]
    outputs = [("text", "BYTES", (-1,)), ("x_bytes", "BYTES", (-1,))]
    await arrays("m", inputs, outputs, "return {'text': arrays['x'], 'x_bytes': arrays['x']}")
    raw = {"b64": base64.b64encode(b"\xff\0").decode()}
    answer = await predict(rest, "m", {"instances": ["grün", raw]})
    first = {"text": "grün", "x_bytes": {"b64": base64.b64encode("grün".encode()).decode()}}
    assert answer == {"predictions": [first, {"text": raw, "x_bytes": raw}]}


async def test_a_handler_of_bodies(model: Load, rest: Rest) -> None:
    await model("loud", "def handle(data, context): return [each['body'].upper() for each in data or []]")
    bodies = [{"b64": base64.b64encode(b"one").decode()}, "two"]
    assert await predict(rest, "loud", {"instances": bodies}) == {"predictions": ["ONE", "TWO"]}
    assert await predict(rest, "loud", {"inputs": {"body": "one"}}) == {"outputs": ["ONE"]}
    status, said = await fault(rest, "loud", {"instances": [1.5]})
    assert (status, said) == (
        400,
        "Could not parse instance content. Not valid ndarray detected - input 'body' does not fit: "
        "the model expects BYTES [-1], got a number: 1.5 at [0]",
    )


async def test_large_bodies_go_through_a_thread(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (-1, 1000))])
    values = np.arange(300_000, dtype=np.float32).reshape(300, 1000) / 8
    body = json.dumps({"inputs": values.tolist()}).encode()
    assert len(body) > 1 << 20
    answer = await rest("POST", "/v1/models/m:predict", body)
    assert np.array_equal(np.array(json.loads(answer.body)["outputs"], np.float32), values)


@pytest.mark.parametrize(
    ("request_body", "status", "text"),
    [
        (b"[1,", 412, "The file is not valid json - Error: "),
        (b"", 412, "The file is not valid json - Error: "),
        (b"[NaN", 412, "The file is not valid json - Error: "),
        ([1], 400, "Request body should be JSON object"),
        ({}, 400, "Invalid JSON structure. Could not detect row or column format"),
        (
            {"inputs": [1], "instances": [1]},
            400,
            "Invalid JSON structure. Could not detect row or column format",
        ),
        ({"instances": {"x": [1]}}, 400, "Invalid JSON structure. Nonamed instance is not an array."),
        ({"instances": []}, 400, "Invalid JSON structure. Missing instances in row format"),
        ({"instances": [None]}, 400, "Could not detect neither named or nonamed format"),
        ({"instances": [{}]}, 400, "Could not parse instance content. Not valid ndarray detected"),
        (
            {"instances": [{"x": 1}, 2]},
            400,
            "Invalid JSON structure. One of named instances is not a JSON object.",
        ),
        (
            {"instances": [{"x": 1}, {"y": 2}]},
            400,
            "Invalid JSON structure. Request inputs have different batch sizes",
        ),
        (
            {"instances": [[1, 2], [3]]},
            400,
            "Could not parse instance content. Not valid ndarray detected - input 'x' does not fit: "
            "the model expects FP32 [-1,2], got a ragged list",
        ),
        (
            {"inputs": [[1, 2], 3]},
            400,
            "Could not parse input content. Not valid ndarray detected - input 'x' does not fit: "
            "the model expects FP32 [-1,2], got a ragged list",
        ),
        ({"inputs": [["a", "b"]]}, 400, "Could not parse input content. Not valid ndarray detected"),
        ({"inputs": [[True, False]]}, 400, "Could not parse input content. Not valid ndarray detected"),
        ({"inputs": [[1e300, 0]]}, 400, "Could not parse input content. Not valid ndarray detected"),
        ({"inputs": None}, 400, "Invalid JSON structure. One of inputs is not a JSON object."),
        ({"inputs": {}}, 400, "Invalid JSON structure. Missing inputs in column format"),
        ({"inputs": {"x": [[1, 2]], "y": 1}}, 400, "Invalid number of inputs - Expected: 1; Actual: 2"),
        ({"inputs": {"y": [[1, 2]]}}, 400, "Missing input with specific name - Required input: x"),
        (
            {"inputs": [1, 2]},
            400,
            "Invalid number of shape dimensions - Expected: (-1,2); Actual: (2); input name: x",
        ),
        (
            {"inputs": [[1, 2, 3]]},
            400,
            "Invalid input shape - Expected: (-1,2); Actual: (1,3); input name: x",
        ),
    ],
    ids=str,
)
async def test_requests_that_are_refused(
    request_body: Any, status: int, text: str, arrays: Load, rest: Rest
) -> None:
    await arrays("m", [("x", "FP32", (-1, 2))])
    answered, said = await fault(rest, "m", request_body)
    assert (answered, said[: len(text)]) == (status, text)


async def test_a_batch_that_is_fixed(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (1, 2))])
    expected = "Invalid input batch size - Expected: 1; Actual: 2; input name: x"
    assert await fault(rest, "m", {"instances": [[1, 2], [3, 4]]}) == (400, expected)


async def test_several_inputs_need_names(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("a", "FP32", (-1,)), ("b", "FP32", (-1,))])
    expected = "Invalid number of inputs - Expected: 2; Actual: 1"
    assert await fault(rest, "m", {"instances": [1.0]}) == (400, expected)


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        (
            "{'a': np.zeros(2), 'b': np.zeros(3)}",
            "Tensor name: b has inconsistent batch size: 3 expecting: 2",
        ),
        ("{'a': np.float64(1).reshape(())}", "Tensor name: a has no shape information"),
    ],
)
async def test_outputs_that_have_no_rows(outputs: str, text: str, arrays: Load, rest: Rest) -> None:
    specs = [("a", "FP64", None), ("b", "FP64", None)]
    await arrays("m", [("x", "FP32", (-1,))], specs, f"return {outputs}")
    expected = 500, f"Response parsing to JSON error - {text}"
    assert await fault(rest, "m", {"instances": [1]}) == expected
    assert "outputs" in await predict(rest, "m", {"inputs": [1]})


async def test_what_is_not_there(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (-1,))])

    async def ask(method: str, path: str) -> tuple[int, str]:
        answer = await rest(method, path, b'{"inputs": [1]}')
        return answer.status, json.loads(answer.body)["error"]

    no_model = 404, "Model with requested name is not found"
    no_version = 404, "Model with requested version is not found"
    assert await ask("POST", "/v1/models/n:predict") == no_model
    assert await ask("POST", "/v1/models/n/versions/1:predict") == no_model
    assert await ask("GET", "/v1/models/n") == no_model
    assert await ask("GET", "/v1/models") == no_model
    assert await ask("GET", "/v1/models/n/metadata") == no_model
    assert await ask("POST", "/v1/models/m/versions/2:predict") == no_version
    assert await ask("GET", "/v1/models/m/versions/2") == no_version
    assert await ask("GET", "/v1/models/m/versions/2/metadata") == no_version
    too_large = await ask("GET", f"/v1/models/m/versions/{1 << 63}")
    assert too_large == (400, "Could not parse model version in request")
    for verb in ("classify", "regress"):
        assert await ask("POST", f"/v1/models/m:{verb}") == (404, "Requested REST resource not found")


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/v1/models/m:predict", 406, "Unsupported method"),
        ("POST", "/v1/models/m", 406, "Unsupported method"),
        ("DELETE", "/v1/models/m", 406, "Unsupported method"),
        ("POST", "/v1/config", 400, "Invalid request URL"),
        ("GET", "/v1/config/reload", 400, "Invalid request URL"),
        ("GET", "/v1/models/m/versions/one", 400, "Invalid request URL"),
        ("POST", "/v1/models/m:explain", 400, "Invalid request URL"),
        ("GET", "/v1/../etc", 400, "Invalid request URL"),
        ("GET", "/v1", 400, "Invalid request URL"),
    ],
)
async def test_routes_and_methods_that_are_none(
    method: str, path: str, status: int, text: str, rest: Rest
) -> None:
    answer = await rest(method, path)
    assert (answer.status, json.loads(answer.body)) == (status, {"error": text})


async def test_a_body_that_is_compressed(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (-1,))])
    answer = await rest("POST", "/v1/models/m:predict", b"\x1f\x8b", ("Content-Encoding", "gzip"))
    assert (answer.status, json.loads(answer.body)) == (415, {"error": "Unsupported content encoding - gzip"})


async def test_a_version_by_its_leading_number(arrays: Load, inline: Any, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (-1,))], version="1.0")
    answer = await rest("POST", "/v1/models/m/versions/1:predict", b'{"inputs": [1]}')
    assert json.loads(answer.body) == {"outputs": [1.0]}
    status = json.loads((await rest("GET", "/v1/models/m/versions/1")).body)
    assert status["model_version_status"][0]["version"] == "1"
    metadata = json.loads((await rest("GET", "/v1/models/m/metadata")).body)
    assert metadata["modelSpec"]["version"] == "1"


async def test_the_client_s_deadline(model: Load, rest: Rest) -> None:
    source = (
        "import time\ndef handle(data, context): data and time.sleep(0.5); return data and [''] * len(data)"
    )
    await model("slow", source)
    body, header = b'{"instances": ["x"]}', ("X-Request-Timeout-Ms", "50")
    assert (await rest("POST", "/v1/models/slow:predict", body, header)).status == 504


async def test_the_zeros_before_a_version_mean_nothing(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (-1,))])
    zeros = "0" * 5000
    for number, status in (("1", 200), ("99", 404), ("", 200), (str(1 << 63), 400)):
        assert (await rest("GET", f"/v1/models/m/versions/{zeros}{number}")).status == status


async def test_a_body_that_is_being_read_keeps_its_place_when_the_client_leaves(
    arrays: Load, inline: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    await arrays("m", [("x", "FP32", (-1,))])
    memory = Arena.create(64 << 20)
    assert memory is not None
    body = b'{"inputs": [' + b"1," * 600_000 + b"1]}"
    begun, go_on = threading.Event(), threading.Event()

    def slowly(text: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return loads(text)

    monkeypatch.setattr("mms_lite.frontends.tfserving.bodies.loads", slowly)
    place = memory.take(len(body))
    assert place is not None
    place.view[:] = body
    protocol = tfserving.protocol(inline.engine, lambda _: None, Readers())
    request = HttpRequest("POST", "/v1/models/m:predict", "id-1", body=place)
    asking = asyncio.ensure_future(protocol.handle(request))
    del request, place
    await wait_until(begun.is_set)
    asking.cancel()
    await asyncio.wait([asking])
    del asking
    try:
        assert memory.used_bytes >= len(body)
    finally:
        go_on.set()
    await wait_until(lambda: not memory.used_bytes, "the place to be free")


async def test_every_prediction_is_counted(arrays: Load, inline: Any, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (-1,))])
    for body in (b'{"inputs": [1]}', b'{"inputs": [1]}', b"{"):
        await rest("POST", "/v1/models/m:predict", body)
    await rest("POST", "/v1/models/unknown:predict", b"{}")
    ((_, metrics),) = inline.engine.statistics("m")
    assert metrics.requests == {("tfserving-rest", "200"): 2, ("tfserving-rest", "412"): 1}
    assert inline.engine.metrics().unknown == {("tfserving-rest", "404"): 1}


async def test_versions_that_load_and_that_failed(
    inline: Any, model: Load, rest: Rest, wait_until: Callable[..., Any]
) -> None:
    await model("broken", "raise RuntimeError('no')", wait=False)
    await model("slow", "import time\ntime.sleep(0.3)\ndef handle(data, context): return data", wait=False)
    slow = json.loads((await rest("GET", "/v1/models/slow")).body)
    state = {"version": "1", "state": "LOADING", "status": {"error_code": "OK", "error_message": "OK"}}
    assert slow == {"model_version_status": [state]}
    answer = await rest("POST", "/v1/models/slow:predict", b'{"instances": ["x"]}')
    expected = {"error": "Model with requested version is not loaded yet - model slow is loading"}
    assert (answer.status, json.loads(answer.body)) == (503, expected)
    assert answer.headers["retry-after"] == "1"

    await wait_until(lambda: inline.engine.describe("broken").state is VersionState.FAILED, "the failure")
    failure = {"error_code": "UNKNOWN", "error_message": "UNKNOWN"}
    config = json.loads((await rest("GET", "/v1/config")).body)
    assert list(config) == ["broken", "slow"]
    assert config["broken"]["model_version_status"] == [{**state, "status": failure}]


async def test_a_version_without_workers_is_not_available(inline: Any, rest: Rest) -> None:
    async def state() -> tuple[str, str]:
        answer = json.loads((await rest("GET", "/v1/models/echo")).body)["model_version_status"][0]
        return answer["state"], answer["status"]["error_code"]

    await inline.load("echo", workers=0)
    assert await state() == ("LOADING", "OK")
    assert (await rest("POST", "/v1/models/echo:predict", b'{"instances": ["x"]}')).status == 503
    ((_, metrics),) = inline.engine.statistics("echo")
    assert metrics.refusals["no_workers"] == 1
    await inline.engine.scale("echo", 1, 1)
    assert await state() == ("AVAILABLE", "OK")


async def test_reload_tells_whether_something_changed(
    arrays: Load, inline: Any, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads((await rest("GET", "/v1/config")).body) == {}
    await arrays("m", [("x", "FP32", (-1,))])
    results: list[Any] = [True, False, ConfigError("not this"), InvalidArchive("not that")]

    async def rescan() -> bool:
        result = results.pop(0)
        if isinstance(result, ServingError):
            raise result
        return bool(result)

    monkeypatch.setattr(inline.engine, "rescan", rescan, raising=False)
    for status in (201, 200):
        answer = await rest("POST", "/v1/config/reload")
        assert (answer.status, list(json.loads(answer.body))) == (status, ["m"])
    texts = {
        412: "Reloading config file failed. Check server logs for more info.",
        500: "Reloading models versions failed. Check server logs for more info.",
    }
    for status, text in texts.items():
        answer = await rest("POST", "/v1/config/reload")
        assert (answer.status, json.loads(answer.body)) == (status, {"error": text})
    assert (await rest("POST", "/v1/config/reload", remote="203.0.113.7:1")).status == 403


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (QueueFull("full", depth=30, answered_per_s=10.0), 429, ("Retry-After", "3")),
        (QueueFull("full"), 429, ("Retry-After", "1")),
        (ModelNotReady("loading"), 503, ("Retry-After", "1")),
        (Unauthorized("who?"), 401, ("WWW-Authenticate", "Bearer")),
        (DeadlineExceeded("late"), 504, None),
        (OutOfMemory("none left"), 507, None),
        (WorkerDied("gone"), 500, None),
        (RequestTooLarge("much"), 413, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ServingError) else "",
)
def test_errors_of_the_engine(error: ServingError, status: int, header: tuple[str, str] | None) -> None:
    response = spell(error)
    assert response.status == status
    assert list(response.headers)[1:] == ([] if header is None else [header])


def test_an_error_about_half_a_character_can_be_written() -> None:
    assert spell(InvalidRequest("no input \ud800")).body == [b'{"error":"no input ?"}']


async def test_a_handler_s_own_status(model: Load, rest: Rest) -> None:
    source = """
        def handle(data, context):
            if data:
                context.set_response_status(418, "teapot")
                return ["short and stout"]
    """
    await model("picky", source)
    assert await fault(rest, "picky", {"instances": ["tea"]}) == (418, "short and stout")
