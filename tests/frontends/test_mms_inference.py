import asyncio
import json
import time

import pytest

from mms_lite.frontends.message import HttpRequest
from mms_lite.frontends.mms.body import _THREAD_BYTES, read_parts
from mms_lite.types import InferRequest, InferResponse, LoadOptions, Tensor

# Tells what the handler got: the type and the text of each entry.
SEEN = """
    def handle(data, context):
        if data is None:
            return None
        def text(value):
            return bytes(value).decode() if isinstance(value, (bytes, bytearray)) else value
        return [{name: [type(v).__name__, text(v)] for name, v in item.items()} for item in data]
"""
FORM = "multipart/form-data; boundary=XX"


def part(name, value, *, filename=None, kind=None):
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    lines = [f"Content-Disposition: {disposition}"] + ([f"Content-Type: {kind}"] if kind else [])
    return b"--XX\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + value + b"\r\n"


def form(*parts):
    return b"".join(parts) + b"--XX--\r\n"


async def test_ping_counts_workers(inline, model, inference, wait_until):
    answer = await inference("GET", "/ping")
    assert (answer.status, answer.body) == (200, b'{\n  "status": "Healthy"\n}\n')
    assert answer.headers["content-type"] == "application/json"
    await model("good", SEEN)
    assert (await inference("POST", "/ping/")).json == {"status": "Healthy"}
    await inline.load("bad_init", at_startup=True, wait=False)
    partial = {"status": "Partial Healthy"}
    assert (await inference("GET", "/ping/x")).json == partial
    await inline.engine.unload("good")
    assert (await inference("GET", "/ping")).json == {"status": "Unhealthy"}


@pytest.mark.parametrize("method", ["POST", "GET", "PUT", "DELETE", "PATCH"])
async def test_predictions_take_any_method_and_ignore_the_query(model, inference, method):
    await model("m", SEEN)
    answer = await inference(method, "/predictions/m?a=1", b"hi", ("Content-Type", "image/png"))
    assert answer.json == {"body": ["bytearray", "hi"]}
    assert answer.headers["content-type"] == "application/json"


async def test_the_second_segment_is_a_version_if_it_is_loaded(inline, inference):
    for version in ("1", "2"):
        await inline.load("facts", version=version)
    seen = []
    original = inline.engine.infer

    async def infer(request):
        seen.append(request.version)
        return await original(request)

    inline.engine.infer = infer
    for path in ("/predictions/facts", "/predictions/facts/2", "/predictions/facts/v7/x"):
        assert (await inference("POST", path)).status == 200
    assert seen == [None, "2", None]


@pytest.mark.parametrize(
    "target",
    [
        "/invocations?model_name=m&a=1+2",
        "/models/m/invoke?model_name=m&a=1%202",
        "/m/predict?model_name=m&a=1%202",
    ],
)
async def test_elsewhere_the_query_becomes_entries(model, inference, target):
    await model("m", SEEN)
    assert (await inference("POST", target, b"hi")).json == {
        "model_name": ["bytearray", "m"],
        "a": ["bytearray", "1 2"],
        "body": ["bytearray", "hi"],
    }


async def test_invocations_without_a_name_mean_the_only_startup_model(inline, model, inference):
    await model("other", SEEN)
    answer = await inference("POST", "/invocations", b"hi")
    assert answer.json == {
        "code": 400,
        "type": "BadRequestException",
        "message": "Parameter model_name is required.",
    }
    await model("m", SEEN, at_startup=True)
    assert (await inference("POST", "/invocations", b"hi")).json == {"body": ["bytearray", "hi"]}
    assert (await inference("POST", "/models//invoke", b"hi")).json == {"body": ["bytearray", "hi"]}


@pytest.mark.parametrize(
    ("kind", "body", "seen"),
    [
        (None, b"", ["bytearray", ""]),
        ("application/json", b'{"a": [1]}', ["dict", {"a": [1]}]),
        ("application/json; charset=utf-8", b"[1]", ["list", [1]]),
        ("Application/JSON", b"[1]", ["bytearray", "[1]"]),
        ("text/plain; charset=utf-8", "é".encode(), ["str", "é"]),
        ("multipart/form-data", b"no boundary", ["bytearray", "no boundary"]),
    ],
)
async def test_a_body_is_decoded_by_its_type(model, inference, kind, body, seen):
    await model("m", SEEN)
    headers = [("Content-Type", kind)] if kind else []
    assert (await inference("POST", "/predictions/m", body, *headers)).json == {"body": seen}


@pytest.mark.parametrize("body", [b"{", b"", b"\xff"])
async def test_a_body_that_is_not_what_it_says_gets_400(model, inference, body):
    await model("m", SEEN)
    answer = await inference("POST", "/predictions/m", body, ("content-type", "application/json"))
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")
    assert (await inference("POST", "/predictions/m", b"x")).status == 200


async def test_multipart_fields_and_files(model, inference):
    await model("m", SEEN)
    body = form(
        part("text", b"plain", kind="application/json"),
        part("twice", b"first"),
        part("file", b"raw", filename="a.bin"),
        part("json", b'{"a": 1}', filename="a.json", kind="application/json; charset=utf-8"),
        part("words", b"words", filename="a.txt", kind="text/plain"),
        part("twice", b"last"),
    )
    answer = await inference("POST", "/m/predict?text=q&query=1", body, ("Content-Type", FORM))
    assert answer.json == {
        "text": ["bytearray", "plain"],
        "query": ["bytearray", "1"],
        "twice": ["bytearray", "last"],
        "file": ["bytearray", "raw"],
        "json": ["dict", {"a": 1}],
        "words": ["str", "words"],
    }


OPTIONAL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [1], "optional": True})
        config.add_output({"name": "y", "data_type": "TYPE_INT64", "dims": [1]})
        return config

    def execute(self, requests):
        y = pb_utils.Tensor("y", np.array([7]))
        return [pb_utils.InferenceResponse([y]) for _ in requests]
"""


@pytest.mark.parametrize("kind", [FORM, "application/x-www-form-urlencoded", "application/json", ""])
async def test_a_model_of_tensors_may_be_asked_with_nothing(inline, inference, kind):
    model = {"modelName": "m", "handler": "tensor", "backend": "python", "modelFiles": ["model.py"]}
    inline.store.put("m", {"model.py": OPTIONAL, "MAR-INF/MANIFEST.json": json.dumps({"model": model})})
    await inline.engine.load(LoadOptions(url="m"))
    body = b"--XX--\r\n" if kind == FORM else b""
    answer = await inference("POST", "/predictions/m", body, *([("Content-Type", kind)] if kind else []))
    assert (answer.status, answer.json) == (200, {"y": [7]})


async def test_urlencoded_fields(model, inference):
    await model("m", SEEN)
    kind = ("Content-Type", "Application/x-www-form-urlencoded; charset=utf-8")
    answer = await inference("POST", "/predictions/m", b"a=1+2&b=%C3%A9&a=3&empty=&bare&&=", kind)
    assert answer.json == {
        "a": ["bytearray", "3"],
        "b": ["bytearray", "é"],
        "empty": ["bytearray", ""],
        "bare": ["bytearray", ""],
        "": ["bytearray", ""],
    }


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "cannot be read"),
        (b"no form at all", "cannot be read"),
        (part("a", b"x"), "cannot be read"),
        (form(b"--XX\r\nContent-Type: text/plain\r\n\r\nx\r\n"), "cannot be read"),
        (form(part("a\0b", b"x")), "NUL"),
        (form(*[part("a", b"x")] * 1001), "cannot be read"),
        (form(part("a", b"x", kind="k" * 9000)), "cannot be read"),
    ],
    ids=["empty", "no form", "no end", "no name", "NUL", "too many", "long header"],
)
async def test_a_malformed_form_gets_400(model, inference, body, why):
    await model("m", SEEN)
    answer = await inference("POST", "/predictions/m", body, ("Content-Type", FORM))
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")
    assert why in answer.json["message"]


async def test_a_form_with_bare_line_feeds_gets_400(model, inference):
    await model("m", SEEN)
    body = form(part("a", b"x")).replace(b"\r\n", b"\n")
    assert (await inference("POST", "/predictions/m", body, ("Content-Type", FORM))).status == 400


@pytest.mark.parametrize(
    ("kind", "body", "seen"),
    [
        ("Multipart/Form-Data; boundary=XX", form(part("a", b"x")), {"a": ["bytearray", "x"]}),
        ("application/x-www-form-urlencoded", b"a=1\r\n", {"a": ["bytearray", "1\r\n"]}),
        ("application/x-www-form-urlencoded", b'{"a": 1}', {'{"a": 1}': ["bytearray", ""]}),
        ("application/x-www-form-urlencoded", b"a=%zz", {"a": ["bytearray", "%zz"]}),
        ("application/json", b"\xef\xbb\xbf[1]", {"body": ["list", [1]]}),
    ],
    ids=["capitals", "line end", "JSON by curl", "bad escape", "byte order mark"],
)
async def test_bodies_that_mms_reads_otherwise(model, inference, kind, body, seen):
    await model("m", SEEN)
    assert (await inference("POST", "/predictions/m", body, ("Content-Type", kind))).json == seen


async def test_too_many_urlencoded_fields_get_400(model, inference):
    await model("m", SEEN)
    kind = ("Content-Type", "application/x-www-form-urlencoded")
    assert (await inference("POST", "/predictions/m", b"a=1&" * 1001, kind)).status == 400


@pytest.mark.parametrize("size", [100, _THREAD_BYTES + 1])
async def test_each_part_is_a_fresh_bytearray(size):
    payload = bytes(range(256)) * (size // 256 + 1)
    sent = bytearray(form(part("a", payload, filename="f"), part("b", b"\r\n--X\r\n", filename="g")))
    request = HttpRequest("POST", "/", headers=[("content-type", FORM)], body=sent)
    parts = await read_parts(request, with_query=False)
    assert parts == [
        Tensor("a", "BYTES", (), bytearray(payload), "application/octet-stream"),
        Tensor("b", "BYTES", (), bytearray(b"\r\n--X\r\n"), "application/octet-stream"),
    ]
    assert {type(each.data) for each in parts} == {bytearray}


async def test_the_loop_runs_while_a_large_form_is_read():
    sent = bytearray(form(part("a", bytes(20_000_000), filename="f")))
    request = HttpRequest("POST", "/", headers=[("content-type", FORM)], body=sent)
    reading = asyncio.ensure_future(read_parts(request, with_query=False))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 3
    assert len((await reading)[0].data) == 20_000_000


async def test_the_handler_sees_id_and_headers(model, inference):
    source = """
        def handle(data, context):
            if data is None:
                return None
            return [{"id": context.get_request_id(0), "x": context.get_request_header(0, "X-Mine")}]
    """
    await model("m", source)
    answer = await inference("POST", "/predictions/m", b"", ("X-Mine", "v"), request_id="id-7")
    assert answer.json == {"id": "id-7", "x": "v"}


async def test_what_the_handler_chooses_for_its_answer(inline, inference):
    await inline.load("statusful")
    answer = await inference("POST", "/predictions/statusful", b"teapot")
    assert (answer.status, answer.reason, answer.headers["x-word"]) == (418, "I am a teapot", "teapot")
    assert answer.json == {"word": "teapot"}
    answer = await inference("POST", "/predictions/statusful", b"csv")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/csv")


@pytest.mark.parametrize(
    ("result", "kind", "body"),
    [
        ("b'raw'", "application/octet-stream", b"raw"),
        ("'text é'", "text/plain; charset=utf-8", "text é".encode()),
        ("{'a': [1, None]}", "application/json", json.dumps({"a": [1, None]}, indent=2).encode()),
    ],
)
async def test_an_answer_says_what_it_is(model, inference, result, kind, body):
    await model("m", f"def handle(data, context):\n    return [{result}]")
    answer = await inference("POST", "/predictions/m")
    assert (answer.headers["content-type"], answer.body) == (kind, body)


async def test_a_response_over_the_limit_gets_500(model, inference):
    await model("m", "def handle(data, context):\n    return [b'x' * 200_001]")
    answer = await inference("POST", "/predictions/m")
    assert (answer.status, answer.json["type"]) == (500, "InternalServerException")
    assert "max_response_size is 200000" in answer.json["message"]


async def test_a_deadline_covers_the_queue(inline, inference, ask, tmp_path, wait_until):
    await inline.load("gate")
    gate = tmp_path / "open"
    running = asyncio.ensure_future(inline.engine.infer(ask("gate", str(gate))))
    await wait_until(gate.with_suffix(".started").exists)
    begin = time.monotonic()
    answer = await inference("POST", "/predictions/gate", b"x", ("x-request-timeout-ms", "30"))
    assert answer.status == 504 and 0.02 < time.monotonic() - begin < 5
    gate.touch()
    await running


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
async def test_a_deadline_that_is_none_gets_400(model, inference, value):
    await model("m", SEEN)
    answer = await inference("POST", "/predictions/m", b"x", ("X-Request-Timeout-Ms", value))
    assert answer.status == 400 and "X-Request-Timeout-Ms" in answer.json["message"]


@pytest.mark.parametrize("timeout_ms", ["1e10", "1e20", "1e300"])
async def test_a_time_limit_beyond_all_sense_is_no_limit(model, inference, timeout_ms):
    await model("m", SEEN)
    answer = await inference("POST", "/predictions/m", b"x", ("X-Request-Timeout-Ms", timeout_ms))
    assert answer.json == {"body": ["bytearray", "x"]}


async def test_a_photo_that_curl_calls_a_form_is_a_body(model, inference):
    await model("m", "def handle(data, context):\n    return data and [d['body'] for d in data]\n")
    photo = b"\xff\xd8a=1&b=2\x00"
    kind = ("Content-Type", "application/x-www-form-urlencoded")
    assert (await inference("POST", "/predictions/m", photo, kind)).body == photo


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/", 405, "MethodNotAllowedException"),
        ("GET", "/api-description/x", 405, "MethodNotAllowedException"),
        ("GET", "/predictions", 404, "ResourceNotFoundException"),
        ("GET", "/invocations/x", 404, "ResourceNotFoundException"),
        ("GET", "/models/m/other", 404, "ResourceNotFoundException"),
        ("GET", "/models", 404, "ResourceNotFoundException"),
        ("GET", "/nothing", 404, "ResourceNotFoundException"),
        ("POST", "/predictions/nobody", 404, "ModelNotFoundException"),
        ("POST", "/nobody/predict", 404, "ModelNotFoundException"),
    ],
)
async def test_routes_that_are_none(inference, method, path, status, kind):
    answer = await inference(method, path)
    assert (answer.status, answer.json["code"], answer.json["type"]) == (status, status, kind)


async def test_a_name_is_decoded(inline, inference):
    await inline.load("echo", "my model é")
    assert (await inference("POST", "/predictions/my%20model%20%C3%A9", b"x")).body == b"x"


async def test_an_answer_of_tensors_cannot_be_carried(inline, inference, monkeypatch):
    async def infer(request: InferRequest):
        return InferResponse(request.id, "m", "1", [Tensor("y", "FP32", (1,), bytearray(4))])

    monkeypatch.setattr(inline.engine, "infer", infer)
    assert (await inference("POST", "/predictions/m")).status == 500
