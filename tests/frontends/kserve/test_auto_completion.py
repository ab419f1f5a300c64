"""What a model says of itself when it is loaded counts as if its config.pbtxt had said it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from raw_http import Answer

pytest.importorskip("google.protobuf", reason="reads config.pbtxt")

from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import InlineLauncher
from mms_lite.engine.repository.mar import Defaults
from mms_lite.engine.repository.triton import TritonRepository
from mms_lite.frontends.kserve.service import KServeService
from mms_lite.types import ModelSpec
from mms_lite.worker import loop

COMPLETING = """
import time

import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(4)
        config.set_dynamic_batching()
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [2]})
        config.add_input({"name": "extra", "data_type": "TYPE_FP32", "dims": [1], "optional": True})
        config.add_output({"name": "y", "data_type": "TYPE_FP32", "dims": [-1]})
        return config

    def execute(self, requests):
        return [self.answer(request, len(requests)) for request in requests]

    def answer(self, request, together):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        if x[0, 0] == 9:
            time.sleep(0.1)  # while others come
        y = np.tile(np.float32([together, 5, 3]), (len(x), 1))
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", y)])
"""
Call = Callable[..., Awaitable[Answer]]


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Engine]:
    """The engine of an empty repository in the folder `models`."""
    (tmp_path / "models").mkdir()
    defaults = Defaults(workers=1, queue_size=9, response_timeout_s=20.0, load_timeout_s=20.0)
    launcher = InlineLauncher(loop.run, max_frame_bytes=1 << 20)
    made = Engine(TritonRepository(tmp_path / "models", tmp_path, defaults), launcher, cores=2, unload_s=5)
    yield made
    await made.close(drain_s=5)


@pytest.fixture
def service(repository: Engine) -> KServeService:
    return KServeService(repository, server_name="s", server_version="1", authorise=lambda _: None)


@pytest.fixture
def load(repository: Engine, tmp_path: Path) -> Callable[..., Awaitable[ModelSpec]]:
    """Load the model `m` from a config.pbtxt and its file, and return its specification."""

    async def serve(config: str, file: str, content: str | bytes) -> ModelSpec:
        folder = tmp_path / "models" / "m" / "1"
        folder.mkdir(parents=True)
        (folder.parent / "config.pbtxt").write_text(config)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
        await repository.load_model("m")
        return repository.interface("m")[0]

    return serve


def infer(rows: list[list[float]], **more: Any) -> bytes:
    flat = [number for row in rows for number in row]
    x = {"name": "x", "datatype": "FP32", "shape": [len(rows), 2], "data": flat}
    return json.dumps({"inputs": [x], **more}).encode()


async def test_the_configuration_has_what_python_code_adds(load: Any, call: Call) -> None:
    spec = await load('backend: "python"', "model.py", COMPLETING)
    assert spec.batch_size == 4
    config = json.loads((await call("GET", "/v2/models/m/config")).body)
    assert config["max_batch_size"] == 4
    assert config["dynamic_batching"]["preferred_batch_size"] == [4]
    seen = [(each["name"], each["data_type"], each["dims"], each["optional"]) for each in config["input"]]
    assert seen == [("x", "TYPE_FP32", [2], False), ("extra", "TYPE_FP32", [1], True)]
    (output,) = config["output"]
    assert (output["name"], output["dims"], output["label_filename"]) == ("y", [-1], "")


async def test_rows_and_optional_inputs_are_those_that_python_code_adds(load: Any, call: Call) -> None:
    await load('backend: "python"', "model.py", COMPLETING)
    classes = [{"name": "y", "parameters": {"classification": 1}}]
    answer = await call("POST", "/v2/models/m/infer", infer([[1, 2], [3, 4]], outputs=classes))
    assert answer.status == 200, answer.body
    (output,) = json.loads(answer.body)["outputs"]
    assert (output["shape"], len(output["data"])) == ([2, 1], 2)
    refused = await call("POST", "/v2/models/m/infer", infer([[1, 2]] * 5))
    assert b"batch-size must be <= 4 for 'm'" in refused.body


async def test_requests_are_joined_where_python_code_says_so(load: Any, call: Call) -> None:
    await load('backend: "python"', "model.py", COMPLETING)
    asked = [call("POST", "/v2/models/m/infer", infer([[first, 0]])) for first in (9, 1, 1, 1, 1)]
    found = [json.loads(each.body)["outputs"][0]["data"][0] for each in await asyncio.gather(*asked)]
    assert found == [1, 4, 4, 4, 4]


async def test_the_configuration_has_the_tensors_of_a_models_file(load: Any, call: Call) -> None:
    onnx = pytest.importorskip("onnx", reason="writes the model")
    pytest.importorskip("onnxruntime", reason="runs the model")
    tensors = [onnx.helper.make_tensor_value_info(name, 1, ["n", 3]) for name in ("x", "y")]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "same", tensors[:1], tensors[1:])
    imports = [onnx.helper.make_opsetid("", 13)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    spec = await load('backend: "onnxruntime"\nmax_batch_size: 2', "model.onnx", model)
    assert spec.batch_size == 1
    config = json.loads((await call("GET", "/v2/models/m/config")).body)
    assert config["max_batch_size"] == 2
    for side, name in (("input", "x"), ("output", "y")):
        (tensor,) = config[side]
        assert (tensor["name"], tensor["data_type"], tensor["dims"]) == (name, "TYPE_FP32", [3])


async def test_a_worker_that_comes_later_changes_nothing(load: Any, repository: Engine) -> None:
    before = await load('backend: "python"', "model.py", COMPLETING)
    await repository.scale("m", 2, 2)
    after, _ = repository.interface("m")
    assert (after.config is before.config, after.batch_size, after.max_workers) == (True, 4, 2)
