"""What tritonclient's four clients do alike, against a Triton repository: each test runs with all four."""

import json
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (make clients)")
pytest.importorskip("tritonclient.http", reason="tritonclient is not installed (make clients)")

import ml_dtypes
from triton_client import Array, TritonClient, sixteen
from tritonclient.utils import InferenceServerException

ONE = np.array([1], np.int32)


def lengths(tensor: dict[str, Any]) -> list[int]:
    return [int(length) for length in tensor["shape"]]


# Health, metadata, configuration


def test_live_and_ready(client: TritonClient) -> None:
    assert client.is_server_live() is True
    assert client.is_server_ready() is True
    assert client.is_model_ready("simple") is True
    assert client.is_model_ready("times_version", "2") is True


@pytest.mark.parametrize(("model", "version"), [("nobody", ""), ("times_version", "7")])
def test_an_unknown_model_is_not_ready_which_is_no_error(
    client: TritonClient, model: str, version: str
) -> None:
    assert client.is_model_ready(model, version) is False


def test_server_metadata(client: TritonClient) -> None:
    said = client.json("get_server_metadata")
    assert said["name"] == "triton"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", said["version"])
    known = {"classification", "model_repository", "model_configuration", "binary_tensor_data", "statistics"}
    assert known <= set(said["extensions"])


def test_model_metadata_has_the_batch_axis(client: TritonClient) -> None:
    said = client.json("get_model_metadata", "simple")
    assert (said["name"], said["versions"], said["platform"]) == ("simple", ["1"], "python")
    for side, names in (("inputs", ["INPUT0", "INPUT1"]), ("outputs", ["OUTPUT0", "OUTPUT1"])):
        assert [each["name"] for each in said[side]] == names
        assert [each["datatype"] for each in said[side]] == ["INT32", "INT32"]
        assert [lengths(each) for each in said[side]] == [[-1, 16], [-1, 16]]


def test_model_metadata_without_batches(client: TritonClient) -> None:
    said = client.json("get_model_metadata", "mymodel")
    assert [(each["datatype"], lengths(each)) for each in said["inputs"]] == [
        ("UINT32", [2, 2]),
        ("BOOL", [3]),
    ]


def test_strings_are_called_bytes(client: TritonClient) -> None:
    assert client.json("get_model_metadata", "words")["inputs"][0]["datatype"] == "BYTES"


def test_metadata_of_all_versions_and_of_one(client: TritonClient) -> None:
    assert sorted(client.json("get_model_metadata", "times_version")["versions"]) == ["2", "3"]
    assert client.json("get_model_metadata", "times_version", "2")["versions"] == ["2"]


def test_model_config(client: TritonClient) -> None:
    said = client.json("get_model_config", "simple")
    config = said if client.over_http else said["config"]
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("simple", "python", 8)
    assert [(each["name"], each["data_type"]) for each in config["input"]] == [
        ("INPUT0", "TYPE_INT32"),
        ("INPUT1", "TYPE_INT32"),
    ]
    assert [int(length) for length in config["output"][1]["dims"]] == [16]
    if client.over_http:  # perf_analyzer reads numbers; protobuf's own JSON would have text
        assert config["input"][0]["dims"] == [16]


@pytest.mark.parametrize("call", ["get_model_metadata", "get_model_config"])
def test_of_an_unknown_model_nothing_is_told(client: TritonClient, call: str) -> None:
    saying = "Request for unknown model: 'nobody' is not found"
    with client.refused(http="404", grpc="NOT_FOUND", saying=saying):
        getattr(client, call)("nobody")


# Inference


def test_sum_and_difference(client: TritonClient) -> None:
    one, other = sixteen(0), np.ones((1, 16), np.int32)
    result = client.ask("simple", INPUT0=one, INPUT1=other)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), one + other)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), one - other)
    assert result.as_numpy("OUTPUT0").dtype == np.int32
    said = client.answer(result)
    assert (said["model_name"], said["model_version"]) == ("simple", "1")
    assert "id" not in said


def test_rows_of_a_batch(client: TritonClient) -> None:
    one, other = sixteen(0, rows=8), sixteen(1000, rows=8)
    result = client.ask("simple", INPUT0=one, INPUT1=other)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), one + other)


def test_text(client: TritonClient) -> None:
    one, other = sixteen(5), np.full((1, 16), -3, np.int32)
    as_text = [each.astype(str).astype(np.object_) for each in (one, other)]
    result = client.ask("simple_string", INPUT0=as_text[0], INPUT1=as_text[1])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0").astype(np.int32), one + other)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1").astype(np.int32), one - other)


def test_bytes_that_are_no_text(client: TritonClient) -> None:
    found = client.ask("identity_BYTES", INPUT0=np.array([[b"\xff\x00", b""]], np.object_))
    assert found.as_numpy("OUTPUT0").tolist() == [[b"\xff\x00", b""]]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(client: TritonClient, dtype: Any) -> None:
    array = np.array([[0.5, -1.25, 3.0], [65504.0, -0.0, np.inf]], dtype)
    name = "FP16" if dtype is np.float16 else "BF16"
    found = client.ask(f"identity_{name}", INPUT0=array).as_numpy("OUTPUT0")
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


def test_an_empty_array(client: TritonClient) -> None:
    found = client.ask("identity_FP32", INPUT0=np.zeros((0, 3), np.float32)).as_numpy("OUTPUT0")
    assert found.shape == (0, 3)


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, to tritonclient
def test_a_large_array(client: TritonClient) -> None:
    array = np.random.default_rng(1).random((600, 10_000), np.float32)  # 24 MB: beyond gRPC's own limit
    np.testing.assert_array_equal(client.ask("identity_FP32", INPUT0=array).as_numpy("OUTPUT0"), array)


def test_one_of_two_outputs(client: TritonClient) -> None:
    named = {"outputs": client.outputs("OUTPUT1")}
    result = client.ask("simple", named, INPUT0=sixteen(9), INPUT1=sixteen(4))
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), np.full((1, 16), 5))
    assert result.as_numpy("OUTPUT0") is None


def test_outputs_come_in_the_order_asked(client: TritonClient) -> None:
    named = {"outputs": client.outputs("OUTPUT1", "OUTPUT0")}
    said = client.answer(client.ask("simple", named, INPUT0=sixteen(0), INPUT1=sixteen(0)))
    assert [each["name"] for each in said["outputs"]] == ["OUTPUT1", "OUTPUT0"]


def test_the_latest_version_and_one_by_its_number(client: TritonClient) -> None:
    five = np.array([5], np.int32)
    latest = client.ask("times_version", INPUT0=five)
    assert (client.answer(latest)["model_version"], latest.as_numpy("OUTPUT0").tolist()) == ("3", [15])
    second = client.ask("times_version", {"model_version": "2"}, INPUT0=five)
    assert (client.answer(second)["model_version"], second.as_numpy("OUTPUT0").tolist()) == ("2", [10])


def test_the_id_comes_back_and_reaches_the_model(client: TritonClient) -> None:
    result = client.ask("request_facts", {"request_id": "night shift 7"}, ANY=ONE)
    assert client.answer(result)["id"] == "night shift 7"
    assert json.loads(result.as_numpy("FACTS")[0])["id"] == "night shift 7"


def test_parameters_reach_the_model(client: TritonClient) -> None:
    parameters = {"greeting": "hello", "count": 3, "flag": True}
    result = client.ask("request_facts", {"parameters": parameters}, ANY=ONE)
    assert json.loads(result.as_numpy("FACTS")[0])["parameters"] == parameters


def test_headers_of_the_client_are_taken(client: TritonClient) -> None:
    assert client.is_server_live(headers={"x-team": "night"}) is True
    result = client.ask("half_plus_two", {"headers": {"x-team": "night"}}, x=np.array([4], np.float32))
    assert result.as_numpy("y").tolist() == [4.0]


def test_priority_and_timeout_are_taken(client: TritonClient) -> None:
    named = {"priority": 1, "timeout": 60_000_000}  # microseconds
    result = client.ask("request_facts", named, ANY=ONE)
    assert json.loads(result.as_numpy("FACTS")[0])["parameters"] == {}


def test_inputs_are_used_again(client: TritonClient) -> None:
    inputs, outputs = client.inputs(INPUT0=sixteen(1), INPUT1=sixteen(2)), client.outputs("OUTPUT0")
    for start in (3, 4):
        inputs[0].set_data_from_numpy(sixteen(start))
        found = client.infer("simple", inputs, outputs=outputs).as_numpy("OUTPUT0")
        np.testing.assert_array_equal(found, sixteen(start) + sixteen(2))


# Classification


def labels(array: Array) -> list[list[tuple[float, int, str]]]:
    """Return what `VALUE:INDEX:LABEL` says, row by row; the label is empty where there is none."""
    found = []
    for row in array:
        parts = [(each.decode() + ":").split(":")[:3] for each in row]
        found.append([(float(value), int(index), label) for value, index, label in parts])
    return found


def test_the_likeliest_classes_with_their_labels(client: TritonClient) -> None:
    scores = np.array([[0.1, 0.5, 0.25, 0.15], [4, 3, 2, 1]], np.float32)
    outputs = client.outputs("SCORES", "PLAIN", class_count=2)
    result = client.ask("classifier", {"outputs": outputs}, SCORES_IN=scores)
    top = result.as_numpy("SCORES")
    assert top.shape == (2, 2)
    assert labels(top) == [[(0.5, 1, "dog"), (0.25, 2, "bird")], [(4.0, 0, "cat"), (3.0, 1, "dog")]]
    assert top[0, 0] == b"0.500000:1:dog"
    assert result.as_numpy("PLAIN")[1].tolist() == [b"4.000000:0", b"3.000000:1"]


def test_no_more_classes_than_there_are(client: TritonClient) -> None:
    outputs = client.outputs("SCORES", class_count=99)
    scores = np.array([[1, 2, 3, 4]], np.float32)
    top = client.ask("classifier", {"outputs": outputs}, SCORES_IN=scores).as_numpy("SCORES")
    assert [label for _, _, label in labels(top)[0]] == ["fish", "bird", "dog", "cat"]


def test_classes_of_a_model_without_batches(client: TritonClient) -> None:
    outputs = client.outputs("OUTPUT0", class_count=1)
    four = np.array([1, 9, 2, 3], np.float32)
    top = client.ask("add_sub", {"outputs": outputs}, INPUT0=four, INPUT1=four).as_numpy("OUTPUT0")
    assert top.tolist() == [b"18.000000:1"]


# Errors


def test_an_unknown_model_or_version(client: TritonClient) -> None:
    with client.refused(http="404", grpc="NOT_FOUND", saying="unknown model: 'nobody' is not found"):
        client.ask("nobody", INPUT0=ONE)
    with client.refused(http="404", grpc="NOT_FOUND", saying="'times_version' version 9 is not found"):
        client.ask("times_version", {"model_version": "9"}, INPUT0=ONE)


WRONG: dict[str, tuple[dict[str, Array], str]] = {
    "datatype": (
        {"INPUT0": sixteen(0).astype(np.float32), "INPUT1": sixteen(0)},
        "inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'",
    ),
    "shape": (
        {"INPUT0": sixteen(0)[:, :15].copy(), "INPUT1": sixteen(0)},
        "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,15]",
    ),
    "no batch axis": (
        {"INPUT0": sixteen(0)[0, :4].copy(), "INPUT1": sixteen(0)[0, :4].copy()},
        "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [4]",
    ),
    "batch size": (
        {"INPUT0": sixteen(0, 9), "INPUT1": sixteen(0, 9)},
        "inference request batch-size must be <= 8 for 'simple'",
    ),
    "batch sizes that differ": (
        {"INPUT0": sixteen(0, 2), "INPUT1": sixteen(0, 3)},
        "input 'INPUT1' batch size does not match other inputs for 'simple'",
    ),
    "input missing": (
        {"INPUT0": sixteen(0)},
        "expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], but missing"
        " required input(s) ['INPUT1']. Please provide all required input(s).",
    ),
    "input unknown": (
        {"INPUT0": sixteen(0), "INPUT9": sixteen(0)},
        "unexpected inference input 'INPUT9', allowed inputs are: INPUT0, INPUT1",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_inputs_that_do_not_fit(client: TritonClient, what: str) -> None:
    arrays, saying = WRONG[what]
    with client.refused(http="400", grpc="INVALID_ARGUMENT", saying=saying):
        client.ask("simple", **arrays)


def test_an_output_that_there_is_not(client: TritonClient) -> None:
    named = {"outputs": client.outputs("OUTPUT9")}
    saying = "unexpected inference output 'OUTPUT9'"
    with client.refused(http="400", grpc="INVALID_ARGUMENT", saying=saying):
        client.ask("simple", named, INPUT0=sixteen(0), INPUT1=sixteen(0))


@pytest.mark.parametrize("given", ["", "shift-9"])
def test_an_error_names_the_request(client: TritonClient, given: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.ask("simple", {"request_id": given}, INPUT0=sixteen(0))
    assert caught.value.message().startswith(f"[request id: {given or '<id_unknown>'}] ")


FAULTS = {
    "raise": ("500", "INTERNAL", "ValueError: raised on demand"),
    "INTERNAL": ("500", "INTERNAL", "an error on demand"),
    "INVALID_ARG": ("400", "INVALID_ARGUMENT", "an error on demand"),
    "UNAVAILABLE": ("503", "UNAVAILABLE", "an error on demand"),
    "NOT_FOUND": ("404", "NOT_FOUND", "an error on demand"),
    "UNSUPPORTED": ("501", "UNIMPLEMENTED", "an error on demand"),
}


@pytest.mark.parametrize("how", FAULTS)
def test_what_a_model_says_is_wrong(client: TritonClient, how: str) -> None:
    http, grpc, saying = FAULTS[how]
    with client.refused(http=http, grpc=grpc, saying=saying):
        client.ask("faulty", HOW=np.array([how.encode()], np.object_))
    well = client.ask("faulty", HOW=np.array([b"well"], np.object_))
    assert well.as_numpy("HOW_OUT").tolist() == [b"well"]


# What example clients call before they begin


def test_no_shared_memory_is_registered(client: TritonClient) -> None:
    for kind in ("system", "cuda"):
        getattr(client, f"unregister_{kind}_shared_memory")()
        said = client.json(f"get_{kind}_shared_memory_status")
        assert said == ([] if client.over_http else {})


def test_settings_of_logs_and_traces_are_told(client: TritonClient) -> None:
    logs, traces = client.json("get_log_settings"), client.json("get_trace_settings")
    assert "log_verbose_level" in (logs if client.over_http else logs["settings"])
    level = traces["trace_level"] if client.over_http else traces["settings"]["trace_level"]["value"]
    assert level == ["OFF"]
