"""What tritonclient's clients ask of a repository: its index, loading and unloading, and statistics."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_models import HERE

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (make clients)")
pytest.importorskip("tritonclient.http", reason="tritonclient is not installed (make clients)")

from triton_client import Array, TritonClient, sixteen
from tritonclient.utils import InferenceServerException

PRODUCT = b"""
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            one, other = (pb_utils.get_input_tensor_by_name(request, f"INPUT{i}").as_numpy() for i in (0, 1))
            outputs = [pb_utils.Tensor("OUTPUT0", one * other), pb_utils.Tensor("OUTPUT1", one)]
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses
"""


@pytest.fixture
def late(repository: Path, client: TritonClient) -> Iterator[str]:
    """A copy of `simple` that comes into the repository while the server runs, and goes again."""
    folder = repository / f"late_{client.face.replace('.', '_')}"
    shutil.copytree(HERE / "models" / "simple", folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace('"simple"', f'"{folder.name}"'))
    yield folder.name
    if client.is_model_ready(folder.name):
        client.unload_model(folder.name)
    shutil.rmtree(folder)


def first_output(client: TritonClient, model: str, one: Array, other: Array) -> list[int]:
    found = client.ask(model, INPUT0=one, INPUT1=other).as_numpy("OUTPUT0")
    return [int(each) for each in found[0]]


def index(client: TritonClient, model: str) -> list[dict[str, Any]]:
    """Return the entries of a model, one for each version."""
    said = client.json("get_model_repository_index")
    return [each for each in (said if client.over_http else said["models"]) if each["name"] == model]


def test_the_index_has_each_version_and_its_state(client: TritonClient) -> None:
    assert [(each["version"], each["state"]) for each in index(client, "simple")] == [("1", "READY")]
    versions = {each["version"]: each["state"] for each in index(client, "times_version")}
    assert versions == {"2": "READY", "3": "READY"}


def test_a_model_comes_and_goes(client: TritonClient, late: str) -> None:
    assert client.is_model_ready(late) is False
    assert [each.get("state", "") for each in index(client, late)] in ([""], ["UNKNOWN"])
    client.load_model(late)
    assert client.is_model_ready(late) is True
    assert [each["state"] for each in index(client, late)] == ["READY"]
    assert first_output(client, late, sixteen(0), sixteen(0)) == list(range(0, 32, 2))
    client.unload_model(late)
    assert client.is_model_ready(late) is False
    assert [(e["state"], e["reason"]) for e in index(client, late)] == [("UNAVAILABLE", "unloaded")]
    with client.refused(http="404", grpc="NOT_FOUND", saying=f"Request for unknown model: '{late}'"):
        client.ask(late, INPUT0=sixteen(0), INPUT1=sixteen(0))


def test_a_model_with_its_dependents_goes(client: TritonClient, late: str) -> None:
    client.load_model(late)
    client.unload_model(late, unload_dependents=True)
    assert client.is_model_ready(late) is False


def test_a_configuration_of_the_client_replaces_the_file_until_the_next_load(
    client: TritonClient, late: str
) -> None:
    client.load_model(late)
    said = client.json("get_model_config", late)
    config = said if client.over_http else said["config"]
    smaller = {**config, "max_batch_size": 2, "dynamic_batching": {}}
    client.load_model(late, config=json.dumps(smaller))
    with client.refused(http="400", grpc="INVALID_ARGUMENT", saying="batch-size must be <= 2"):
        client.ask(late, INPUT0=sixteen(0, 3), INPUT1=sixteen(0, 3))
    client.load_model(late)
    client.ask(late, INPUT0=sixteen(0, 3), INPUT1=sixteen(0, 3))


def test_files_of_the_client_replace_those_of_the_repository(client: TritonClient, late: str) -> None:
    client.load_model(late)
    said = client.json("get_model_config", late)
    config = json.dumps(said if client.over_http else said["config"])
    client.load_model(late, config=config, files={"file:1/model.py": PRODUCT})
    twos = np.full((1, 16), 2, np.int32)
    assert first_output(client, late, sixteen(0), twos) == list(range(0, 32, 2))
    assert first_output(client, late, sixteen(0), 5 * twos) == list(range(0, 160, 10))
    client.load_model(late)
    assert first_output(client, late, sixteen(0), twos) == list(range(2, 18))


def test_a_load_that_fails_says_why_and_what_was_loaded_stays(client: TritonClient, late: str) -> None:
    client.load_model(late)
    said = client.json("get_model_config", late)
    config = json.dumps(said if client.over_http else said["config"])
    with pytest.raises(InferenceServerException, match=f"failed to load '{late}'") as caught:
        client.load_model(late, config=config, files={"file:1/model.py": b"import no_such_module\n"})
    assert caught.value.status() is not None
    assert first_output(client, late, sixteen(0), sixteen(0)) == list(range(0, 32, 2))


def test_models_that_are_not_in_the_repository(client: TritonClient) -> None:
    saying = "failed to load 'nobody', failed to poll from model repository"
    with pytest.raises(InferenceServerException, match=saying):
        client.load_model("nobody")
    saying = "Model to be unloaded has not been served"
    with client.refused(http="400", grpc="INVALID_ARGUMENT", saying=saying):
        client.unload_model("nobody")


# Statistics


def counts(client: TritonClient, model: str, version: str = "") -> dict[str, int]:
    """Return the counts of a model with one version, flat."""
    (said,) = client.json("get_inference_statistics", model, version)["model_stats"]
    flat = {name: int(said.get(name, 0)) for name in ("inference_count", "execution_count")}
    for name, each in said.get("inference_stats", {}).items():
        flat[name] = int(each.get("count", 0))
        flat[f"{name}_ns"] = int(each.get("ns", 0))
    for each in said.get("batch_stats", []):
        flat[f"batches of {each['batch_size']}"] = int(each["compute_infer"].get("count", 0))
    return flat


def test_statistics_count_requests_rows_and_batches(client: TritonClient) -> None:
    before = counts(client, "simple")
    for _ in range(2):
        client.ask("simple", INPUT0=sixteen(0, 3), INPUT1=sixteen(0, 3))
    after = counts(client, "simple")
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    assert (more["inference_count"], more["execution_count"], more["success"]) == (6, 2, 2)
    assert more["batches of 3"] == 2
    for name in ("success_ns", "queue_ns", "compute_infer_ns"):
        assert more[name] > 0


def test_statistics_count_failures(client: TritonClient) -> None:
    before = counts(client, "faulty")
    with pytest.raises(InferenceServerException):
        client.ask("faulty", HOW=np.array([b"raise"], np.object_))
    after = counts(client, "faulty")
    assert (after["fail"] - before["fail"], after["success"] - before["success"]) == (1, 0)


def test_statistics_of_all_models_and_of_one_version(client: TritonClient) -> None:
    said = client.json("get_inference_statistics")["model_stats"]
    listed = {(each["name"], each["version"]) for each in said}
    assert {("simple", "1"), ("times_version", "2"), ("times_version", "3")} <= listed
    both = client.json("get_inference_statistics", "times_version")["model_stats"]
    assert sorted(each["version"] for each in both) == ["2", "3"]
    (one,) = client.json("get_inference_statistics", "times_version", "2")["model_stats"]
    assert one["version"] == "2"


def test_statistics_of_an_unknown_model(client: TritonClient) -> None:
    saying = "requested model 'nobody' is not available"
    with client.refused(http="400", grpc="INVALID_ARGUMENT", saying=saying):
        client.get_inference_statistics("nobody")
