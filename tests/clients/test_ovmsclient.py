"""OpenVINO Model Server's client, over HTTP and gRPC: the TensorFlow Serving API as its users call it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from client_server import Server

ovmsclient = pytest.importorskip("ovmsclient", reason="ovmsclient is not installed (make clients)")

ONE, OTHER = np.arange(16, dtype=np.int32).reshape(1, 16), np.full((1, 16), 3, np.int32)


class Face:
    """ovmsclient over one of the two protocols."""

    def __init__(self, protocol: str, server: Server) -> None:
        self.over_http = protocol == "http"
        made = ovmsclient.make_http_client if self.over_http else ovmsclient.make_grpc_client
        self.client = made(server.http if self.over_http else server.grpc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


@pytest.fixture(params=["http", "grpc"])
def client(triton: Server, request: pytest.FixtureRequest) -> Iterator[Face]:
    face = Face(request.param, triton)
    yield face
    if face.over_http:
        face.session.close()
    else:
        face.channel.close()


def test_one_output_comes_as_its_array(client: Face) -> None:
    found = client.predict({"x": np.array([1, 2, 5], np.float32)}, "half_plus_two")
    np.testing.assert_array_equal(found, [2.5, 3.0, 4.5])


def test_several_outputs_come_by_name(client: Face) -> None:
    found = client.predict({"INPUT0": ONE, "INPUT1": OTHER}, "simple")
    assert sorted(found) == ["OUTPUT0", "OUTPUT1"]
    np.testing.assert_array_equal(found["OUTPUT0"], ONE + OTHER)
    np.testing.assert_array_equal(found["OUTPUT1"], ONE - OTHER)


def test_lists_become_what_the_model_takes(client: Face) -> None:
    """The client makes 32-bit integers and floats of Python's numbers."""
    np.testing.assert_array_equal(client.predict({"x": [2.0, 4.0]}, "half_plus_two"), [3.0, 4.0])
    np.testing.assert_array_equal(client.predict({"INPUT0": [1, 2]}, "times_version"), [3, 6])


def test_one_number_is_an_array_of_one(client: Face) -> None:
    np.testing.assert_array_equal(client.predict({"x": 8.0}, "half_plus_two"), [6.0])


def test_text_and_bytes(client: Face) -> None:
    found = client.predict({"words": np.array([b"one", b"two words"])}, "words")
    assert found.astype("U").tolist() == ["ONE", "TWO WORDS"]


def test_text_of_two_axes(client: Face) -> None:
    one, other = (array.astype(str) for array in (ONE, OTHER))
    found = client.predict({"INPUT0": one, "INPUT1": other}, "simple_string")
    np.testing.assert_array_equal(found["OUTPUT1"].astype(np.int32), ONE - OTHER)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.uint8, np.int16, np.uint16, np.int64, np.bool_])
def test_arrays_of_many_types(client: Face, dtype: Any) -> None:
    name = {"float64": "FP64", "bool": "BOOL"}.get(np.dtype(dtype).name, np.dtype(dtype).name.upper())
    array = np.array([[0, 1], [1, 0]], dtype)
    np.testing.assert_array_equal(client.predict({"INPUT0": array}, f"identity_{name}"), array)


def test_the_latest_version_and_one_by_its_number(client: Face) -> None:
    five = np.array([5], np.int32)
    assert client.predict({"INPUT0": five}, "times_version").tolist() == [15]
    assert client.predict({"INPUT0": five}, "times_version", model_version=2).tolist() == [10]


def test_metadata(client: Face) -> None:
    assert client.get_model_metadata("simple") == {
        "model_version": 1,
        "inputs": {name: {"shape": [-1, 16], "dtype": "DT_INT32"} for name in ("INPUT0", "INPUT1")},
        "outputs": {name: {"shape": [-1, 16], "dtype": "DT_INT32"} for name in ("OUTPUT0", "OUTPUT1")},
    }
    words = client.get_model_metadata("words")
    assert words["inputs"] == {"words": {"shape": [-1], "dtype": "DT_STRING"}}
    assert client.get_model_metadata("times_version", model_version=2)["model_version"] == 2


def test_status(client: Face) -> None:
    status = client.get_model_status("times_version")
    assert sorted(status) == [2, 3]
    for each in status.values():
        assert (each["state"], each["error_code"]) == ("AVAILABLE", 0)
        assert each["error_message"] in ("", "OK")
    assert list(client.get_model_status("times_version", model_version=2)) == [2]


@pytest.mark.parametrize(("model", "version"), [("nobody", 0), ("times_version", 9)])
def test_what_is_not_there(client: Face, model: str, version: int) -> None:
    five = np.array([5], np.int32)
    missing = "version" if version else "name"
    saying = f"Model with requested {missing} is not found"
    with pytest.raises(ovmsclient.ModelNotFoundError, match=saying):
        client.predict({"INPUT0": five}, model, model_version=version)
    with pytest.raises(ovmsclient.ModelNotFoundError, match=saying):
        client.get_model_metadata(model, model_version=version)
    with pytest.raises(ovmsclient.ModelNotFoundError, match=saying):
        client.get_model_status(model, model_version=version)


WRONG = {
    "shape": ({"INPUT0": ONE[:, :4].copy(), "INPUT1": OTHER}, "Invalid input shape"),
    "rank": ({"INPUT0": ONE[0].copy(), "INPUT1": OTHER}, "Invalid number of shape dimensions"),
    "missing": ({"INPUT0": ONE}, "Invalid number of inputs"),
    "unknown": ({"INPUT0": ONE, "INPUT9": OTHER}, "INPUT1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_inputs_that_do_not_fit(client: Face, what: str) -> None:
    inputs, saying = WRONG[what]
    with pytest.raises(ovmsclient.InvalidInputError, match=saying):
        client.predict(inputs, "simple")


def test_another_datatype_is_refused_over_grpc_and_is_only_a_number_over_http(client: Face) -> None:
    inputs = {"INPUT0": ONE.astype(np.int64), "INPUT1": OTHER}
    if client.over_http:
        np.testing.assert_array_equal(client.predict(inputs, "simple")["OUTPUT0"], ONE + OTHER)
    else:
        with pytest.raises(ovmsclient.InvalidInputError, match="Invalid input precision"):
            client.predict(inputs, "simple")


def test_a_time_limit(client: Face) -> None:
    with pytest.raises(TimeoutError):
        client.predict({"SECONDS": np.array([2], np.float32)}, "slow", timeout=0.3)
    assert client.predict({"SECONDS": np.array([0], np.float32)}, "slow").tolist() == [0.0]


def test_a_request_made_apart(triton: Server) -> None:
    """The client's own tensors, values in their typed fields, through the stubs that it brings."""
    import grpc
    from ovmsclient.tfs_compat.protos.tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "half_plus_two"
    request.inputs["x"].CopyFrom(ovmsclient.make_tensor_proto(7.0))
    assert request.inputs["x"].float_val[:] == [7.0]
    with grpc.insecure_channel(triton.grpc) as channel:
        answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, 10.0)
    assert list(answer.outputs) == ["y"]
    assert (answer.model_spec.name, answer.model_spec.version.value) == ("half_plus_two", 1)
