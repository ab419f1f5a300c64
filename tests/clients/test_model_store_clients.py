"""A model store's archives asked by the clients of other servers: what MMS serves, every protocol serves."""

import http.client
from collections.abc import Iterator

import numpy as np
import pytest
from client_server import FACES, Server

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (make clients)")
pytest.importorskip("tritonclient.http", reason="tritonclient is not installed (make clients)")
pytest.importorskip("ovmsclient", reason="ovmsclient is not installed (make clients)")

import ovmsclient
from triton_client import TritonClient

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(params=FACES)
def client(store_server: Server, request: pytest.FixtureRequest) -> Iterator[TritonClient]:
    with TritonClient(request.param, store_server) as made:
        yield made


def test_the_server_has_its_own_name(client: TritonClient) -> None:
    assert client.is_server_ready() is True
    assert client.json("get_server_metadata")["name"] == "mms-lite"


def test_a_handler_of_bodies(client: TritonClient) -> None:
    said = client.json("get_model_metadata", "echo")
    assert [(each["name"], each["datatype"]) for each in said["inputs"]] == [("body", "BYTES")]
    bodies = np.array([b"one", b"\xff\x00", b""], np.object_)
    assert client.ask("echo", body=bodies).as_numpy("body").tolist() == bodies.tolist()


def test_a_model_without_a_handler(client: TritonClient) -> None:
    said = client.json("get_model_metadata", "scale")
    assert [(each["name"], each["datatype"]) for each in said["inputs"]] == [("x", "FP32")]
    np.testing.assert_array_equal(client.ask("scale", x=ROWS).as_numpy("y"), 3 * ROWS)
    with client.refused(http="400", grpc="INVALID_ARGUMENT", saying="'x'"):
        client.ask("scale", x=ROWS[:, :3].copy())


def test_what_is_loaded_is_in_the_index(client: TritonClient) -> None:
    said = client.json("get_model_repository_index")
    entries = said if client.over_http else said["models"]
    loaded = {each["name"] for each in entries if each.get("state") == "READY"}
    assert loaded == {"echo", "scale"}


def test_requests_of_all_protocols_are_counted(client: TritonClient, store_server: Server) -> None:
    def answered() -> int:
        (said,) = client.json("get_inference_statistics", "scale")["model_stats"]
        return int(said["inference_stats"]["success"].get("count", 0))

    before = answered()
    client.ask("scale", x=ROWS)
    connection = http.client.HTTPConnection(store_server.http)
    connection.request("POST", "/predictions/scale", "[[1, 2, 3, 4]]", {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()
    assert answered() == before + 2


def test_openvino_model_servers_client(store_server: Server) -> None:
    over_http, over_grpc = (
        ovmsclient.make_http_client(store_server.http),
        ovmsclient.make_grpc_client(store_server.grpc),
    )
    try:
        for asked in (over_http, over_grpc):
            np.testing.assert_array_equal(asked.predict({"x": ROWS}, "scale"), 3 * ROWS)
            assert asked.get_model_metadata("scale")["inputs"]["x"]["dtype"] == "DT_FLOAT"
            found = asked.predict({"body": np.array([b"one", b"two"])}, "echo")
            assert found.astype("U").tolist() == ["one", "two"]
    finally:
        over_http.session.close()
        over_grpc.channel.close()
