"""The documented examples of KServe v2, of Triton's extensions and of TensorFlow Serving, asked with curl."""

import base64
import json
import math
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_server import Server

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
pytest.importorskip("grpc", reason="the grpc extra is not installed (make clients)")

# Open Inference Protocol, "Inference Request Examples", with as many elements of input1 as its shape says.
EXAMPLE = {
    "id": "42",
    "inputs": [
        {"name": "input0", "shape": [2, 2], "datatype": "UINT32", "data": [1, 2, 3, 4]},
        {"name": "input1", "shape": [3], "datatype": "BOOL", "data": [True, False, True]},
    ],
    "outputs": [{"name": "output0"}],
}
OUTPUT0 = [4.0, 6.0, 2.0, 3.0, 4.0, 6.0]
HEAD = "Inference-Header-Content-Length"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def curl(url: str, *options: str, given: bytes | None = None) -> Answer:
    """Ask as a user at a terminal; `given` is what the option `@-` reads."""
    command = ["curl", "--silent", "--show-error", "--include", "--max-time", "30", url, *options]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    head, body = b"HTTP/1.1 100", done.stdout
    while head.startswith(b"HTTP/1.1 100"):  # Continue
        head, _, body = body.partition(b"\r\n\r\n")
    line, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in rest)}
    return Answer(int(line.split()[1]), headers, body)


def post(url: str, value: object, *options: str) -> Answer:
    """Send JSON as the examples do: curl calls it a form, unless told otherwise."""
    return curl(url, "-d", json.dumps(value), *options)


# KServe v2


@pytest.mark.parametrize("path", ["live", "ready"])
def test_health(triton: Server, path: str) -> None:
    assert curl(f"{triton.url}/v2/health/{path}").status == 200


def test_server_metadata(triton: Server) -> None:
    said = curl(f"{triton.url}/v2").json
    assert sorted(said) == ["extensions", "name", "version"]


def test_model_metadata_of_the_example(triton: Server) -> None:
    assert curl(f"{triton.url}/v2/models/mymodel").json == {
        "name": "mymodel",
        "versions": ["1"],
        "platform": "python",
        "inputs": [
            {"name": "input0", "datatype": "UINT32", "shape": [2, 2]},
            {"name": "input1", "datatype": "BOOL", "shape": [3]},
        ],
        "outputs": [{"name": "output0", "datatype": "FP32", "shape": [3, 2]}],
    }


def test_an_unready_model_is_an_error_of_status_400(triton: Server) -> None:
    assert curl(f"{triton.url}/v2/models/mymodel/ready").status == 200
    assert curl(f"{triton.url}/v2/models/mymodel/versions/1/ready").status == 200
    unready = curl(f"{triton.url}/v2/models/nobody/ready")
    assert unready.status == 400
    assert "error" in unready.json


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("path", ["mymodel", "mymodel/versions/1"])
def test_the_inference_of_the_example(triton: Server, path: str, nested: bool) -> None:
    asked = json.loads(json.dumps(EXAMPLE))
    if nested:
        asked["inputs"][0]["data"] = [[1, 2], [3, 4]]
    answer = post(f"{triton.url}/v2/models/{path}/infer", asked)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == {
        "id": "42",
        "model_name": "mymodel",
        "model_version": "1",
        "outputs": [{"name": "output0", "shape": [3, 2], "datatype": "FP32", "data": OUTPUT0}],
    }


def test_neither_id_nor_outputs_need_be_said(triton: Server) -> None:
    answer = post(f"{triton.url}/v2/models/mymodel/infer", {"inputs": EXAMPLE["inputs"]})
    assert "id" not in answer.json
    assert answer.json["outputs"][0]["data"] == OUTPUT0


@pytest.mark.parametrize("options", [("-H", "Transfer-Encoding: chunked"), ("-H", "Expect: 100-continue")])
def test_a_body_in_chunks_or_after_asking(triton: Server, options: tuple[str, ...]) -> None:
    given = json.dumps(EXAMPLE).encode()
    answer = curl(f"{triton.url}/v2/models/mymodel/infer", "--data-binary", "@-", *options, given=given)
    assert answer.json["outputs"][0]["data"] == OUTPUT0


def test_a_compressed_answer(triton: Server) -> None:
    answer = post(f"{triton.url}/v2/models/mymodel/infer", EXAMPLE, "--compressed")
    assert answer.json["outputs"][0]["data"] == OUTPUT0


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v2/nothing", "GET", 404),
        ("/v2/models/mymodel/infer", "GET", 405),
        ("/v2/models/mymodel", "DELETE", 405),
    ],
)
def test_routes_that_there_are_not(triton: Server, path: str, method: str, status: int) -> None:
    answer = curl(f"{triton.url}{path}", "-X", method)
    assert answer.status == status
    assert list(answer.json) == ["error"]


@pytest.mark.parametrize("body", ["", "{", "[]", "{}", '{"inputs": 3}', '{"inputs": [{"name": "input0"}]}'])
def test_bodies_that_are_no_request(triton: Server, body: str) -> None:
    answer = curl(f"{triton.url}/v2/models/mymodel/infer", "--data-binary", "@-", given=body.encode())
    assert answer.status == 400
    assert list(answer.json) == ["error"]


@pytest.mark.parametrize(
    "data",
    [[1, 2, 3], [1, 2, 3, 4, 5], [[1, 2], [3]], [1, 2, 3, -4], [1, 2, 3, 4.5], [1, 2, 3, "4"], "1234", None],
)
def test_data_that_are_not_what_shape_and_datatype_say(triton: Server, data: object) -> None:
    asked = json.loads(json.dumps(EXAMPLE))
    asked["inputs"][0]["data"] = data
    answer = post(f"{triton.url}/v2/models/mymodel/infer", asked)
    assert answer.status == 400
    assert list(answer.json) == ["error"]


def test_numbers_that_json_has_no_word_for(triton: Server) -> None:
    """Python's json writes them so; the answer's reader is Python's, too."""
    text = b'{"inputs":[{"name":"INPUT0","shape":[1,3],"datatype":"FP32","data":[NaN,Infinity,-Infinity]}]}'
    answer = curl(f"{triton.url}/v2/models/identity_FP32/infer", "--data-binary", "@-", given=text)
    nan, *rest = answer.json["outputs"][0]["data"]
    assert math.isnan(nan)
    assert rest == [math.inf, -math.inf]


# Triton's extensions


def binary_example(**parameters: object) -> tuple[bytes, int]:
    """Return the example of the binary tensor data extension, and how long its JSON is."""
    asked = {
        "model_name": "mymodel",
        "inputs": [
            {**EXAMPLE["inputs"][0], "parameters": {"binary_data_size": 16}},
            {**EXAMPLE["inputs"][1], "parameters": {"binary_data_size": 3}},
        ],
        **parameters,
    }
    for each in asked["inputs"]:
        del each["data"]
    head = json.dumps(asked).encode()
    return head + struct.pack("<4I3?", 1, 2, 3, 4, True, False, True), len(head)


@pytest.mark.parametrize(
    "wish",
    [
        {"outputs": [{"name": "output0", "parameters": {"binary_data": True}}]},
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "output0"}], "parameters": {"binary_data_output": True}},
    ],
)
def test_the_binary_example(triton: Server, wish: dict[str, Any]) -> None:
    body, size = binary_example(**wish)
    options = ("--data-binary", "@-", "-H", "Content-Type: application/octet-stream", "-H", f"{HEAD}: {size}")
    answer = curl(f"{triton.url}/v2/models/mymodel/infer", *options, given=body)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream")
    size = int(answer.headers[HEAD.lower()])
    said = json.loads(answer.body[:size])["outputs"][0]
    assert said == {
        "name": "output0",
        "shape": [3, 2],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 24},
    }
    assert struct.unpack("<6f", answer.body[size:]) == tuple(OUTPUT0)


def test_an_output_may_want_json_where_the_others_are_binary(triton: Server) -> None:
    outputs = [{"name": "output0", "parameters": {"binary_data": False}}]
    body, size = binary_example(outputs=outputs, parameters={"binary_data_output": True})
    answer = curl(
        f"{triton.url}/v2/models/mymodel/infer", "--data-binary", "@-", "-H", f"{HEAD}: {size}", given=body
    )
    assert answer.json["outputs"][0]["data"] == OUTPUT0


def test_a_raw_binary_request(triton: Server) -> None:
    """The header's length 0: the whole body is the only input."""
    body = np.arange(5, dtype=np.int32).tobytes()
    answer = curl(
        f"{triton.url}/v2/models/times_version/infer", "--data-binary", "@-", "-H", f"{HEAD}: 0", given=body
    )
    size = int(answer.headers[HEAD.lower()])
    assert json.loads(answer.body[:size])["outputs"][0]["shape"] == [5]
    assert answer.body[size:] == (3 * np.arange(5, dtype=np.int32)).tobytes()


def test_a_raw_binary_request_to_a_model_of_two_inputs(triton: Server) -> None:
    url = f"{triton.url}/v2/models/simple/infer"
    answer = curl(url, "--data-binary", "@-", "-H", f"{HEAD}: 0", given=bytes(128))
    assert answer.status == 400
    saying = "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'simple'"
    assert saying in answer.json["error"]


@pytest.mark.parametrize("size", [-1, 10_000, "x"])
def test_a_header_length_that_cannot_be(triton: Server, size: object) -> None:
    body, _ = binary_example()
    url = f"{triton.url}/v2/models/mymodel/infer"
    answer = curl(url, "--data-binary", "@-", "-H", f"{HEAD}: {size}", given=body)
    assert (answer.status, list(answer.json)) == (400, ["error"])


@pytest.mark.parametrize("more", [-1, 1])
def test_binary_data_of_another_length(triton: Server, more: int) -> None:
    body, size = binary_example()
    url = f"{triton.url}/v2/models/mymodel/infer"
    body = body + b"x" if more > 0 else body[:-1]
    answer = curl(url, "--data-binary", "@-", "-H", f"{HEAD}: {size}", given=body)
    assert (answer.status, list(answer.json)) == (400, ["error"])


def test_the_index_of_the_repository(triton: Server) -> None:
    url = f"{triton.url}/v2/repository/index"
    for options in (("-X", "POST"), ("-d", "{}"), ("-d", '{"ready": true}')):
        listed = curl(url, *options).json
        assert {"name": "simple", "version": "1", "state": "READY"} in [
            {key: value for key, value in each.items() if key != "reason"} for each in listed
        ]
    wrong = post(url, {"ready": "x"})
    assert (wrong.status, wrong.json) == (400, {"error": "Invalid value for 'ready': expected a boolean"})


def test_loading_again_answers_200_without_a_body(triton: Server) -> None:
    answer = curl(f"{triton.url}/v2/repository/models/add_sub/load", "-X", "POST")
    assert (answer.status, answer.body) == (200, b"")


def test_loading_is_refused_where_the_server_says_so(store_server: Server) -> None:
    answer = curl(f"{store_server.url}/v2/repository/models/scale/load", "-X", "POST")
    assert answer.status == 403
    assert answer.json["error"].startswith("explicit model load / unload is not allowed")


def test_statistics_are_numbers(triton: Server) -> None:
    (said,) = curl(f"{triton.url}/v2/models/simple/stats").json["model_stats"]
    kinds = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    for kind in (*kinds, "cache_hit", "cache_miss"):
        assert all(isinstance(said["inference_stats"][kind][unit], int) for unit in ("count", "ns"))
    for name in ("last_inference", "inference_count", "execution_count"):
        assert isinstance(said[name], int)


# TensorFlow Serving, "RESTful API"


@pytest.mark.parametrize("path", ["half_plus_two", "half_plus_two/versions/1", "half_plus_two/labels/stable"])
def test_rows(triton: Server, path: str) -> None:
    answer = post(f"{triton.url}/v1/models/{path}:predict", {"instances": [1.0, 2.0, 5.0]})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == {"predictions": [2.5, 3.0, 4.5]}


def test_rows_by_name(triton: Server) -> None:
    asked = {"signature_name": "serving_default", "instances": [{"x": 1.0}, {"x": 2.0}]}
    assert post(f"{triton.url}/v1/models/half_plus_two:predict", asked).json == {"predictions": [2.5, 3.0]}


def test_columns(triton: Server) -> None:
    for inputs in ([1.0, 2.0, 5.0], {"x": [1.0, 2.0, 5.0]}):
        answer = post(f"{triton.url}/v1/models/half_plus_two:predict", {"inputs": inputs})
        assert answer.json == {"outputs": [2.5, 3.0, 4.5]}


def test_rows_and_columns_of_several_tensors(triton: Server) -> None:
    one, other = list(range(16)), [1] * 16
    total, difference = [each + 1 for each in one], [each - 1 for each in one]
    url = f"{triton.url}/v1/models/simple:predict"
    row = {"INPUT0": one, "INPUT1": other}
    assert post(url, {"instances": [row, row]}).json == {
        "predictions": [{"OUTPUT0": total, "OUTPUT1": difference}] * 2
    }
    column = {"INPUT0": [one, one], "INPUT1": [other, other]}
    assert post(url, {"inputs": column}).json == {
        "outputs": {"OUTPUT0": [total, total], "OUTPUT1": [difference, difference]}
    }


def test_bytes_in_base64(triton: Server) -> None:
    words = [{"b64": base64.b64encode(each).decode()} for each in (b"one", b"two")]
    url = f"{triton.url}/v1/models/words:predict"
    assert post(url, {"instances": words}).json == {"predictions": ["ONE", "TWO"]}
    assert post(url, {"inputs": {"words": words}}).json == {"outputs": ["ONE", "TWO"]}


def test_status_and_metadata(triton: Server) -> None:
    (status,) = curl(f"{triton.url}/v1/models/half_plus_two").json["model_version_status"]
    assert (status["version"], status["state"], status["status"]["error_code"]) == ("1", "AVAILABLE", "OK")
    said = curl(f"{triton.url}/v1/models/half_plus_two/metadata").json
    assert said["modelSpec"] == {"name": "half_plus_two", "signatureName": "", "version": "1"}
    signature = said["metadata"]["signature_def"]["signatureDef"]["serving_default"]
    assert signature["inputs"]["x"]["dtype"] == "DT_FLOAT"
    assert signature["inputs"]["x"]["tensorShape"]["dim"][0]["size"] == "-1"
    kind = "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    assert said["metadata"]["signature_def"]["@type"] == kind


WRONG_ROWS = {
    "neither": ({}, 400),
    "both": ({"instances": [1.0], "inputs": [1.0]}, 400),
    "no object": ([1.0], 400),
    "ragged": ({"instances": [[1.0], [1.0, 2.0]]}, 400),
    "text": ({"instances": ["one"]}, 400),
    "name": ({"inputs": {"z": [1.0]}}, 400),
}


@pytest.mark.parametrize("what", WRONG_ROWS)
def test_what_is_neither_rows_nor_columns(triton: Server, what: str) -> None:
    asked, status = WRONG_ROWS[what]
    answer = post(f"{triton.url}/v1/models/half_plus_two:predict", asked)
    assert (answer.status, list(answer.json)) == (status, ["error"])


def test_what_is_not_json(triton: Server) -> None:
    answer = curl(f"{triton.url}/v1/models/half_plus_two:predict", "-d", "{")
    assert answer.status == 412
    assert "The file is not valid json" in answer.json["error"]


def test_a_model_that_is_not_there(triton: Server) -> None:
    answer = post(f"{triton.url}/v1/models/nobody:predict", {"instances": [1.0]})
    assert (answer.status, answer.json) == (404, {"error": "Model with requested name is not found"})
    assert curl(f"{triton.url}/v1/models/nobody").status == 404
    assert curl(f"{triton.url}/v1/models/half_plus_two/versions/9").status == 404


@pytest.mark.parametrize("verb", ["classify", "regress"])
def test_verbs_that_openvino_model_server_has_not_either(triton: Server, verb: str) -> None:
    answer = post(f"{triton.url}/v1/models/half_plus_two:{verb}", {"examples": [{"x": 1.0}]})
    assert (answer.status, list(answer.json)) == (404, ["error"])


def test_status_of_all_models(triton: Server) -> None:
    said = curl(f"{triton.url}/v1/config").json
    versions = {each["version"] for each in said["times_version"]["model_version_status"]}
    assert versions == {"2", "3"}
    reloaded = curl(f"{triton.url}/v1/config/reload", "-X", "POST")
    assert reloaded.status in (200, 201)
    assert "half_plus_two" in reloaded.json


# An archive of the model store by the same routes


def test_a_handler_of_bodies_over_both_protocols(store_server: Server, tmp_path: Path) -> None:
    asked = {"inputs": [{"name": "body", "shape": [2], "datatype": "BYTES", "data": ["one", "two"]}]}
    answer = post(f"{store_server.url}/v2/models/echo/infer", asked)
    (said,) = answer.json["outputs"]
    assert (said["name"], said["datatype"], said["shape"]) == ("body", "BYTES", [2])
    assert said["data"] == ["one", "two"]
    answer = post(f"{store_server.url}/v1/models/echo:predict", {"instances": ["one", "two"]})
    assert answer.json == {"predictions": ["one", "two"]}


def test_a_model_without_a_handler_over_both_protocols(store_server: Server) -> None:
    url, rows = store_server.url, [[1.0, 2.0, 3.0, 4.0]]
    asked = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": rows}]}
    assert post(f"{url}/v2/models/scale/infer", asked).json["outputs"][0]["data"] == [3.0, 6.0, 9.0, 12.0]
    answer = post(f"{url}/v1/models/scale:predict", {"instances": rows})
    assert answer.json == {"predictions": [[3.0, 6.0, 9.0, 12.0]]}
    metadata = curl(f"{url}/v2/models/scale").json
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
