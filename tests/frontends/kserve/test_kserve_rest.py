"""The KServe v2 protocol over HTTP: routes, statuses, headers, compression, and what is said of errors."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_http import Answer, Client

from mms_lite.errors import from_wire
from mms_lite.frontends.json_bodies import Readers
from mms_lite.frontends.kserve import rest
from mms_lite.frontends.kserve.errors import ERRORS, grpc_status, http_status
from mms_lite.frontends.message import Limits
from mms_lite.shared import Arena, SharedBytes
from mms_lite.tensors import pack
from mms_lite.types import TensorSpec

Call = Callable[..., Awaitable[Answer]]

X = np.arange(4, dtype=np.float32)
INPUTS = [{"name": name, "datatype": "FP32", "shape": [1, 4], "data": X.tolist()} for name in ("x", "y")]
SIXTEEN = {"parameters": {"binary_data_size": 16}}
ECHO = """
    def handle(data, context):
        if data:
            context.set_response_content_type(0, "text/x-echo")
            return [each["body"] for each in data]
"""


def body_of(inputs: Any = None, **fields: Any) -> bytes:
    return json.dumps({"inputs": INPUTS if inputs is None else inputs, **fields}).encode()


def text(answer: Answer) -> str:
    """Return the text of an error."""
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json) == {"error"}
    return str(answer.json["error"])


@pytest.mark.usefixtures("double")
async def test_json_in_json_out(call: Call) -> None:
    answer = await call("POST", "/v2/models/double/infer?any=query", body_of(id="7"))
    assert (answer.status, answer.headers) == (200, {"content-type": "application/json"})
    assert answer.json == {
        "model_name": "double",
        "model_version": "1",
        "id": "7",
        "outputs": [
            {"name": "twice", "datatype": "FP32", "shape": [1, 4], "data": [0.0, 2.0, 4.0, 6.0]},
            {"name": "minus", "datatype": "FP32", "shape": [1, 4], "data": [0.0, 0.0, 0.0, 0.0]},
        ],
    }


@pytest.mark.usefixtures("double")
async def test_outputs_come_in_the_order_in_which_they_are_wanted(call: Call) -> None:
    for names in (["minus", "twice"], ["minus"], ["twice"]):
        body = body_of(outputs=[{"name": name} for name in names])
        answer = await call("POST", "/v2/models/double/infer", body)
        assert [each["name"] for each in answer.json["outputs"]] == names


async def test_a_binary_body_in_shared_memory_is_cut_where_it_is(
    arena: Arena, placed: Callable[[bytes], SharedBytes], double: None, call: Call
) -> None:
    inputs = [{"name": name, "datatype": "FP32", "shape": [1, 4], **SIXTEEN} for name in ("x", "y")]
    head = body_of(inputs, parameters={"binary_data_output": True})
    length = ("Inference-Header-Content-Length", str(len(head)))
    body = placed(head + X.tobytes() * 2)
    answer = await call("POST", "/v2/models/double/versions/1/infer", body, length)
    size = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.body[size:] == (X * 2).tobytes() + (X * 0).tobytes()
    del body
    assert arena.used_bytes == 0


async def test_a_handler_gets_a_body_out_of_shared_memory(
    arena: Arena, placed: Callable[[bytes], SharedBytes], model: Any, call: Call
) -> None:
    await model("echo", ECHO)
    photo = b"\xff\xd8" * 20_000
    described = {"name": "body", "datatype": "BYTES", "shape": [1]}
    head = body_of([{**described, "parameters": {"binary_data_size": len(photo) + 4}}])
    length = ("Inference-Header-Content-Length", str(len(head)))
    answer = await call("POST", "/v2/models/echo/infer", placed(head + pack([photo])), length)
    (output,) = answer.json["outputs"]
    assert base64.b64decode(output["data"][0]) == photo
    assert output["parameters"] == {"content_type": "base64", "media_type": "text/x-echo"}
    assert arena.used_bytes == 0


async def test_a_body_without_json_is_the_one_input(
    tensor_model: Callable[..., Awaitable[Any]], call: Call
) -> None:
    spec = TensorSpec("x", "FP32", (-1,))
    await tensor_model("same", [spec], [spec], "out = x")
    answer = await call(
        "POST", "/v2/models/same/infer", X.tobytes(), ("inference-header-content-length", "0")
    )
    size = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.body[:size])["outputs"]
    assert (output["shape"], answer.body[size:]) == ([4], X.tobytes())


async def test_a_handler_of_bodies_is_asked_in_json(model: Any, call: Call) -> None:
    await model("echo", ECHO)
    described = {"name": "body", "datatype": "BYTES", "shape": [1], "data": ["grün"]}
    (output,) = (await call("POST", "/v2/models/echo/infer", body_of([described]))).json["outputs"]
    assert (output["shape"], output["data"]) == ([1], ["grün"])
    assert output["parameters"] == {"content_type": "text/x-echo"}


async def test_a_large_answer_in_json_is_exact(
    tensor_model: Callable[..., Awaitable[Any]], call: Call
) -> None:
    spec = TensorSpec("x", "FP32", (-1,))
    await tensor_model("same", [spec], [spec], "out = x")
    values = np.random.default_rng(0).standard_normal(150_528).astype(np.float32)
    described = {"name": "x", "datatype": "FP32", "shape": [len(values)], "data": values.tolist()}
    answer = await call("POST", "/v2/models/same/infer", body_of([described]))
    found = np.array(answer.json["outputs"][0]["data"], np.float32)
    assert found.tobytes() == values.tobytes()


@pytest.mark.usefixtures("double")
async def test_a_name_in_the_path_is_decoded_part_by_part(call: Call) -> None:
    assert (await call("GET", "/v2/models/d%6Fuble")).json["name"] == "double"
    answer = await call("GET", "/v2/models/a%2Fready")
    assert (answer.status, text(answer)) == (404, "Request for unknown model: 'a/ready' is not found")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("encoding", "pack_body"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_bodies_are_unpacked_and_answers_packed_for_who_asks(
    call: Call, encoding: str, pack_body: Callable[[bytes], bytes]
) -> None:
    headers = (("Content-Encoding", encoding), ("Accept-Encoding", encoding))
    answer = await call("POST", "/v2/models/double/infer", pack_body(body_of()), *headers)
    assert (answer.status, answer.headers["content-encoding"]) == (200, encoding)
    unpacked = zlib.decompress(answer.body, 47)
    assert json.loads(unpacked)["outputs"][0]["data"] == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.usefixtures("double")
async def test_the_length_of_the_json_is_that_of_the_unpacked_body(call: Call) -> None:
    inputs = [{"name": each["name"], "datatype": "FP32", "shape": [1, 4]} for each in INPUTS]
    head = body_of(inputs, parameters={"binary_data_output": True})
    answer = await call(
        "POST",
        "/v2/models/double/infer",
        gzip.compress(head + X.tobytes() * 2),
        ("Content-Encoding", "gzip"),
        ("Inference-Header-Content-Length", str(len(head))),
        ("Accept-Encoding", "gzip"),
    )
    size = int(answer.headers["inference-header-content-length"])
    assert gzip.decompress(answer.body)[size:] == (X * 2).tobytes() + (X * 0).tobytes()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("accept", ["gzip, deflate", "br", "identity", "*"])
async def test_what_libraries_send_with_every_request_packs_nothing(call: Call, accept: str) -> None:
    answer = await call("POST", "/v2/models/double/infer", body_of(), ("Accept-Encoding", accept))
    assert "content-encoding" not in answer.headers
    assert answer.json["model_name"] == "double"


@pytest.mark.parametrize(
    ("body", "encoding", "status", "said"),
    [
        (b"x", "br", 415, "Unsupported compression type"),
        (b"no gzip", "gzip", 400, "failed to decompress the request"),
        (gzip.compress(b"{}")[:-4], "gzip", 400, "failed to decompress the request"),
        (gzip.compress(b"{}") + b"more", "gzip", 400, "failed to decompress the request"),
        (gzip.compress(bytes(5 << 20)), "gzip", 413, "unpacks to more than the limit of 4194304 bytes"),
    ],
)
@pytest.mark.usefixtures("double")
async def test_a_packed_body_that_cannot_be_used_is_refused(
    call: Call, body: bytes, encoding: str, status: int, said: str
) -> None:
    answer = await call("POST", "/v2/models/double/infer", body, ("Content-Encoding", encoding))
    assert answer.status == status
    assert said in text(answer)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2"),
        ("POST", "/v2/health/live"),
        ("GET", "/v2/models/m/infer"),
        ("DELETE", "/v2/models/m"),
        ("GET", "/v2/repository/index"),
        ("PUT", "/v2/repository/models/m/load"),
    ],
)
async def test_another_method_is_refused(call: Call, method: str, path: str) -> None:
    answer = await call(method, path)
    assert (answer.status, text(answer)) == (405, "Method Not Allowed")
    assert answer.headers["allow"] in ("GET", "POST")


@pytest.mark.parametrize(
    "path", ["/v2/nothing", "/v2/models", "/v2/models/m/versions", "/v2/models/m/nothing", "/v2/health"]
)
async def test_an_unknown_path_is_not_found(call: Call, path: str) -> None:
    answer = await call("GET", path)
    assert (answer.status, text(answer)) == (404, "Not Found")


async def test_head_is_answered_as_get_is(call: Call) -> None:
    assert (await call("HEAD", "/v2/health/ready")).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/models/m/generate"),
        ("POST", "/v2/models/m/generate_stream"),
        ("POST", "/v2/logging"),
        ("POST", "/v2/trace/setting"),
        ("POST", "/v2/repository/one/index"),
        ("POST", "/v2/repository/one/models/m/load"),
        ("POST", "/v2/systemsharedmemory/region/r/register"),
        ("GET", "/v2/cudasharedmemory/region/r/status"),
    ],
)
async def test_what_this_server_does_not_do_is_said_so(call: Call, method: str, path: str) -> None:
    answer = await call(method, path)
    assert answer.status == 501
    assert "cannot be changed" in text(answer) or "not supported" in text(answer)


async def test_shared_memory_has_no_regions_and_forgets_them(call: Call) -> None:
    for kind in ("system", "cuda"):
        assert (await call("GET", f"/v2/{kind}sharedmemory/status")).json == []
        assert (await call("POST", f"/v2/{kind}sharedmemory/unregister")).status == 200


async def test_settings_of_logs_and_traces_are_told(call: Call) -> None:
    assert (await call("GET", "/v2/logging")).json["log_verbose_level"] == 0
    assert (await call("GET", "/v2/trace/setting")).json["trace_level"] == ["OFF"]


@pytest.mark.usefixtures("double")
async def test_a_model_is_ready_has_metadata_config_and_statistics(call: Call) -> None:
    await call("POST", "/v2/models/double/infer", body_of())
    assert (await call("GET", "/v2/models/double/ready")).json == {"name": "double", "ready": True}
    assert (await call("GET", "/v2/models/double")).json["versions"] == ["1"]
    assert (await call("GET", "/v2/models/double/versions/1/config")).json["name"] == "double"
    for path in ("/v2/models/double/stats", "/v2/models/double/versions/1/stats", "/v2/models/stats"):
        (found,) = (await call("GET", path)).json["model_stats"]
        assert (found["name"], found["inference_stats"]["success"]["count"]) == ("double", 1)


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/v2/models/nobody", 404, "Request for unknown model: 'nobody' is not found"),
        ("/v2/models/nobody/ready", 400, "Request for unknown model: 'nobody' is not found"),
        ("/v2/models/nobody/config", 404, "Request for unknown model: 'nobody' is not found"),
        ("/v2/models/nobody/stats", 400, "requested model 'nobody' is not available"),
        ("/v2/models/double/versions/3", 404, "Request for unknown model: 'double' version 3 is not found"),
        (
            "/v2/models/double/versions/abc",
            400,
            "failed to get model version from specified version string 'abc'",
        ),
    ],
)
@pytest.mark.usefixtures("double")
async def test_what_is_unknown_is_said_as_triton_says_it(
    call: Call, path: str, status: int, said: str
) -> None:
    answer = await call("GET", path)
    assert (answer.status, text(answer)) == (status, said)


async def test_a_server_whose_models_still_load_is_not_ready(call: Call, inline: Any) -> None:
    inline.engine._starting = True
    answer = await call("GET", "/v2/health/ready")
    assert (answer.status, text(answer)) == (400, "Server not ready")
    answer = await call("POST", "/v2/models/m/infer", body_of())
    assert answer.status == 503
    assert "retry-after" in answer.headers


@pytest.mark.usefixtures("double")
async def test_an_error_of_a_request_names_its_id(call: Call) -> None:
    answer = await call("POST", "/v2/models/double/infer", body_of(INPUTS[:1], id="7"))
    assert answer.status == 400
    assert text(answer).startswith("[request id: 7] expected 2 inputs but got 1 inputs for model 'double'")
    answer = await call("POST", "/v2/models/double/infer", body_of(INPUTS[:1]))
    assert text(answer).startswith("[request id: <id_unknown>] expected 2 inputs")


async def test_headers_of_handlers_do_not_say_what_the_body_is(model: Any, call: Call) -> None:
    await model(
        "headers",
        """
        def handle(data, context):
            if data:
                for name in ("Content-Encoding", "inference-header-content-length", "Transfer-X", "X-Mine"):
                    context.set_response_header(0, name, "7")
                return [b""]
        """,
    )
    described = {"name": "body", "datatype": "BYTES", "shape": [1], "data": [""]}
    answer = await call("POST", "/v2/models/headers/infer", body_of([described]))
    assert answer.headers == {"content-type": "application/json", "x-mine": "7"}


async def test_handlers_see_our_id_where_the_client_gives_none(model: Any, call: Call) -> None:
    await model(
        "ids",
        """
        def handle(data, context):
            if data:
                return [context.get_request_id(0)]
        """,
    )
    described = {"name": "body", "datatype": "BYTES", "shape": [1], "data": [""]}
    answer = await call("POST", "/v2/models/ids/infer", body_of([described]))
    assert (answer.json["outputs"][0]["data"], "id" in answer.json) == (["our-id"], False)
    answer = await call("POST", "/v2/models/ids/infer", body_of([described], id="theirs"))
    assert (answer.json["outputs"][0]["data"], answer.json["id"]) == (["theirs"], "theirs")


async def test_a_deadline_in_the_header_is_kept(call: Call, inline: Any, tmp_path: Path) -> None:
    await inline.load("gate")
    gate = tmp_path / "open"
    body = body_of([{"name": "body", "datatype": "BYTES", "shape": [1], "data": [str(gate)]}])
    answer = await call("POST", "/v2/models/gate/infer", body, ("X-Request-Timeout-Ms", "30"))
    await asyncio.to_thread(gate.touch)
    assert answer.status == 504
    answer = await call("POST", "/v2/models/gate/infer", body, ("X-Request-Timeout-Ms", "x"))
    assert (answer.status, text(answer)) == (400, "X-Request-Timeout-Ms is not a positive number: x")


@pytest.mark.usefixtures("double")
async def test_every_inference_that_is_answered_is_counted(call: Call, inline: Any) -> None:
    await call("POST", "/v2/models/double/infer", body_of())
    await call("POST", "/v2/models/double/infer", b"{")
    await call("POST", "/v2/models/nobody/infer", body_of())
    for version in ("-1", "0"):
        await call("POST", f"/v2/models/double/versions/{version}/infer", body_of())
    snapshot = inline.engine.metrics()
    ((_, seen),) = snapshot.versions
    assert seen.requests == {("kserve-rest", "200"): 3, ("kserve-rest", "400"): 1}
    assert snapshot.unknown == {("kserve-rest", "404"): 1}


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_every_error_has_its_status_and_text(code: str) -> None:
    error = from_wire({"code": code, "message": "why"})
    response = rest.spell(error)
    assert (response.status, json.loads(b"".join(response.body))) == (ERRORS[code][0], {"error": "why"})
    names = {name for name, _ in response.headers}
    assert ("Retry-After" in names) == (code in ("overloaded", "model_not_ready", "queue_full"))
    assert ("WWW-Authenticate" in names) == (code == "unauthorized")


def test_a_handler_may_choose_the_status_of_its_error() -> None:
    details = {"status": 404, "grpc": "NOT_FOUND"}
    error = from_wire({"code": "handler_error", "message": "why", "details": details})
    assert (http_status(error), grpc_status(error)) == (404, "NOT_FOUND")
    details = {"status": 200, "grpc": "OK"}
    error = from_wire({"code": "handler_error", "message": "why", "details": details})
    assert (http_status(error), grpc_status(error)) == (500, "INTERNAL")


def test_a_full_queue_tells_when_to_come_back() -> None:
    details = {"depth": 100, "limit": 100, "answered_per_s": 20}
    response = rest.spell(from_wire({"code": "queue_full", "message": "full", "details": details}))
    assert dict(response.headers)["Retry-After"] == "5"


@pytest.mark.usefixtures("double")
async def test_a_body_may_come_in_chunks_and_over_a_real_connection(
    service: Any, listen: Callable[..., Awaitable[int]], connect: Callable[..., Awaitable[Client]]
) -> None:
    client = await connect(await listen(rest.protocol(service, Limits(), Readers())))
    answer = await client.ask("POST", "/v2/models/double/infer", body_of())
    assert answer.json["outputs"][0]["data"] == [0.0, 2.0, 4.0, 6.0]
    body = body_of()
    pieces = [body[:10], body[10:]]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    await client.send(
        b"POST /v2/models/double/infer HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    )
    answer = await asyncio.wait_for(client.response(), 10)
    assert answer.json["outputs"][0]["data"] == [0.0, 2.0, 4.0, 6.0]


async def test_bodies_may_be_larger_than_those_of_the_mms_api(
    service: Any, listen: Callable[..., Awaitable[int]], connect: Callable[..., Awaitable[Client]]
) -> None:
    limits = {"max_request_size": 10, "max_tensor_request_size": 5000}
    client = await connect(await listen(rest.protocol(service, Limits(**limits), Readers()), **limits))
    assert (await client.ask("POST", "/v2/models/m/infer", body_of())).status == 404
    answer = await client.ask("POST", "/v2/models/m/infer", bytes(5001))
    assert answer.status == 413
    assert "5000 bytes" in text(answer)
