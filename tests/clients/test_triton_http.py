"""What only tritonclient's HTTP clients have: JSON or binary for each tensor, compression, queries."""

import gzip
import http.client
import itertools
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from client_server import Server

pytest.importorskip("tritonclient.http", reason="tritonclient is not installed (make clients)")

from triton_client import TritonClient, sixteen
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

BOTH = (False, True)
SUM, DIFFERENCE = sixteen(0) + sixteen(100), sixteen(0) - sixteen(100)


@pytest.fixture(params=["http", "http.aio"])
def client(triton: Server, request: pytest.FixtureRequest) -> Iterator[TritonClient]:
    with TritonClient(request.param, triton) as made:
        yield made


def pair(first_binary: bool, second_binary: bool) -> list[InferInput]:
    inputs = [InferInput(f"INPUT{index}", [1, 16], "INT32") for index in (0, 1)]
    inputs[0].set_data_from_numpy(sixteen(0), binary_data=first_binary)
    inputs[1].set_data_from_numpy(sixteen(100), binary_data=second_binary)
    return inputs


def is_binary(result: Any, name: str) -> bool:
    output = result.get_output(name)
    assert ("data" in output) != ("binary_data_size" in output.get("parameters", {}))
    return "data" not in output


@pytest.mark.parametrize("forms", list(itertools.product(BOTH, repeat=4)))
def test_each_tensor_is_json_or_binary_as_the_client_says(
    client: TritonClient, forms: tuple[bool, ...]
) -> None:
    outputs = [InferRequestedOutput(f"OUTPUT{index}", binary_data=forms[2 + index]) for index in (0, 1)]
    result = client.infer("simple", pair(*forms[:2]), outputs=outputs)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), SUM)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), DIFFERENCE)
    assert [is_binary(result, f"OUTPUT{index}") for index in (0, 1)] == list(forms[2:])


@pytest.mark.parametrize("binary", BOTH)
def test_without_a_list_of_outputs_all_come_binary(client: TritonClient, binary: bool) -> None:
    result = client.infer("simple", pair(binary, binary))
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), SUM)
    assert is_binary(result, "OUTPUT0")
    assert is_binary(result, "OUTPUT1")


@pytest.mark.parametrize(("into", "out_of"), list(itertools.product(BOTH, repeat=2)))
def test_text_is_json_or_binary(client: TritonClient, into: bool, out_of: bool) -> None:
    words = np.array(["grün", "", 'a,b\n"c"'], np.object_)
    tensor = InferInput("words", [3], "BYTES").set_data_from_numpy(words, binary_data=into)
    result = client.infer("words", [tensor], outputs=[InferRequestedOutput("upper", binary_data=out_of)])
    assert is_binary(result, "upper") is out_of
    found = [each if isinstance(each, str) else each.decode() for each in result.as_numpy("upper")]
    # `bytes.upper` knows the letters of ASCII only.
    assert found == ["GRüN", "", 'A,B\n"C"']


@pytest.mark.parametrize("binary", BOTH)
def test_classes_are_json_or_binary(client: TritonClient, binary: bool) -> None:
    tensor = InferInput("SCORES_IN", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 2, 4, 3]], np.float32), binary_data=binary)
    outputs = [InferRequestedOutput("SCORES", binary_data=binary, class_count=1)]
    found = client.infer("classifier", [tensor], outputs=outputs).as_numpy("SCORES")
    assert found.tolist() == [[b"4.000000:2:bird" if binary else "4.000000:2:bird"]]


@pytest.mark.parametrize("request_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", BOTH)
def test_compression_both_ways(
    client: TritonClient, request_encoding: str | None, response_encoding: str | None, binary: bool
) -> None:
    result = client.infer(
        "simple",
        pair(binary, binary),
        outputs=[InferRequestedOutput("OUTPUT0", binary_data=binary)],
        request_compression_algorithm=request_encoding,
        response_compression_algorithm=response_encoding,
    )
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), SUM)


@pytest.mark.parametrize(("encoding", "undone"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_an_answer_is_really_compressed(triton: Server, encoding: str, undone: Any) -> None:
    body, json_size = InferenceServerClient.generate_request_body(pair(True, True))
    headers = {"Accept-Encoding": encoding, "Inference-Header-Content-Length": str(json_size)}
    connection = http.client.HTTPConnection(triton.http)
    connection.request("POST", "/v2/models/simple/infer", body, headers)
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Content-Encoding")) == (200, encoding)
    content, head = undone(answer.read()), int(answer.getheader("Inference-Header-Content-Length", "0"))
    connection.close()
    assert json.loads(content[:head])["outputs"][0]["name"] == "OUTPUT0"
    assert content[head : head + SUM.nbytes] == SUM.tobytes()


def test_another_encoding_is_refused_as_json(client: TritonClient) -> None:
    named = {"headers": {"Content-Encoding": "br"}}
    with pytest.raises(Exception, match="Unsupported compression type") as caught:
        client.ask("simple", named, INPUT0=sixteen(0), INPUT1=sixteen(0))
    assert caught.value.status() in ("400", "415", "501")  # type: ignore[attr-defined]


def test_a_query_is_of_no_consequence(client: TritonClient) -> None:
    query = {"tenant": "a b", "list": [1, 2]}
    assert client.is_server_ready(query_params=query) is True
    assert client.get_model_metadata("simple", query_params=query)["name"] == "simple"
    result = client.infer("simple", pair(True, True), query_params=query)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), DIFFERENCE)


def test_many_requests_at_once_over_one_client(triton: Server) -> None:
    with InferenceServerClient(triton.http, concurrency=8) as client:
        asked = []
        for number in range(50):
            array = np.full((2, 3), number, np.int64)
            tensor = InferInput("INPUT0", [2, 3], "INT64").set_data_from_numpy(array)
            asked.append(client.async_infer("identity_INT64", [tensor], request_id=str(number)))
        for number, each in enumerate(asked):
            result = each.get_result()
            assert result.get_response()["id"] == str(number)
            assert (result.as_numpy("OUTPUT0") == number).all()


def test_a_body_made_apart_is_a_request(triton: Server) -> None:
    """What a client without a connection may do: body and answer over any other HTTP client."""
    body, json_size = InferenceServerClient.generate_request_body(pair(True, False))
    connection = http.client.HTTPConnection(triton.http)
    headers = {"Inference-Header-Content-Length": str(json_size)}
    connection.request("POST", "/v2/models/simple/infer", body, headers)
    answer = connection.getresponse()
    content, head = answer.read(), answer.getheader("Inference-Header-Content-Length")
    connection.close()
    assert head is not None
    result = InferenceServerClient.parse_response_body(content, header_length=int(head))
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), SUM)
