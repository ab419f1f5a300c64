"""What a request over HTTP may ask of the TensorFlow Serving API: JSON, parts of bodies, answers by row."""

import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from raw_http import Answer

from mms_lite.frontends.tfserving import bodies

Rest = Callable[..., Awaitable[Answer]]
Load = Callable[..., Awaitable[Any]]


async def predict(rest: Rest, name: str, request: Any) -> tuple[int, Any]:
    """Return the status and the JSON of an answer."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    answer = await rest("POST", f"/v1/models/{name}:predict", body)
    return answer.status, json.loads(answer.body)


@pytest.mark.parametrize("rows", [0, 1, 3, 9000])
async def test_rows_of_several_outputs_and_in_which_thread_they_are_written(
    rows: int, arrays: Load, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [
        ("a%b", "FP32", (-1, 2)),
        ("b_bytes", "BYTES", (-1,)),
        ("c", "INT32", (-1, 1, 2)),
        ("d", "BOOL", (-1,)),
    ]
    pair = "np.stack([arrays['x'], arrays['x'] / 8], 1)"
    code = (
        f"return {{'a%b': {pair}, 'b_bytes': np.array([b'}},{{' for _ in arrays['x']], np.object_),"
        f" 'c': {pair}.astype(np.int32)[:, None], 'd': arrays['x'] > 1}}"
    )
    await arrays("m", [("x", "FP32", (-1,))], outputs, code)
    threads, write = set[int](), bodies.write

    def watched(*given: Any, **named: Any) -> Any:
        threads.add(threading.get_ident())
        return write(*given, **named)

    monkeypatch.setattr(bodies, "write", watched)
    x = [number % 1000 for number in range(rows)]
    answer = await predict(rest, "m", {"instances": x} if rows else {"inputs": []})
    said = [
        {"a%b": [i, i / 8], "b_bytes": {"b64": "fSx7"}, "c": [[i, i // 8]], "d": i > 1} for i in map(float, x)
    ]
    columns: dict[str, Any] = {name: [] for name, *_ in outputs}
    assert answer == (200, {"predictions": said} if rows else {"outputs": columns})
    assert (threads == {threading.get_ident()}) is (rows < 9000)


async def test_json_of_many_objects_is_not_read(arrays: Load, rest: Rest) -> None:
    await arrays("m", [("x", "FP32", (-1,))])
    status, said = await predict(rest, "m", b'{"instances":[%s[]]}' % (b"[]," * 2_000_000))
    start = "The JSON of the request is more than the limit of 134217728 bytes, "
    assert (status, said["error"].startswith(start)) == (413, True)


async def test_a_handler_of_bodies_has_a_bound_of_parts_and_names(model: Load, rest: Rest) -> None:
    await model("parts", "def handle(data, context): return [str(len(each)) for each in data or []]")
    names = {f"n{number}": ["x"] for number in range(1025)}
    refused = (400, {"error": "the model takes at most 1024 inputs, got 1025"})
    assert await predict(rest, "parts", {"inputs": names}) == refused
    _, said = await predict(rest, "parts", {"inputs": {"n" * 1_000_000: [1]}})
    assert "n" * 80 + "'" in said["error"]
    assert len(said["error"]) < 300
