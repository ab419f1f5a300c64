"""A Triton model repository in a temporary folder, written model by model."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import InlineLauncher
from mms_lite.engine.repository.mar import Defaults
from mms_lite.engine.repository.triton import TritonRepository
from mms_lite.tensors import to_array, to_tensor
from mms_lite.types import InferRequest, RepositoryEntry
from mms_lite.worker import loop

PYTHON = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x * np.float32({factor}))]))
        return answers
"""
TENSORS = """
input [{ name: "x" data_type: TYPE_FP32 dims: [ 3 ] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [ 3 ] }]
"""
_ticks = itertools.count(1)


def multiplier(factor: float, rows: str | None = "N") -> bytes:
    """Return an ONNX model of y = factor * x, with x of three numbers, or of rows of three."""
    shape = [3] if rows is None else [rows, 3]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "multiplier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])],
    )
    model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


class TritonSite:
    """The repository's folder, and the engine that serves it."""

    def __init__(self, root: Path) -> None:
        self.folder, self.work = root / "models", root / "work"
        self.folder.mkdir()
        self.work.mkdir()
        self.defaults: dict[str, Any] = {
            "workers": 7,
            "queue_size": 100,
            "response_timeout_s": 20.0,
            "load_timeout_s": 20.0,
        }
        self.poll_s: float | None = None
        self._engine: Engine | None = None

    @property
    def repository(self) -> TritonRepository:
        return TritonRepository(self.folder, self.work, Defaults(**self.defaults))

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            launcher = InlineLauncher(loop.run, max_frame_bytes=1 << 20)
            self._engine = Engine(self.repository, launcher, cores=2, unload_s=5, poll_s=self.poll_s)
        return self._engine

    def write(self, path: str, content: str | bytes) -> Path:
        """Write a file; its time of change is never one that a file here had before."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        tick = 1_700_000_000 + next(_ticks)
        os.utime(file, (tick, tick))
        return file

    def onnx(self, name: str, config: str | None = None, **factors: float) -> None:
        """Write an ONNX model: `onnx("m", "", v1=2.0)` has a version 1 that doubles."""
        if config is not None:
            self.write(f"{name}/config.pbtxt", 'backend: "onnxruntime"\n' + config)
        for version, factor in factors.items():
            self.write(f"{name}/{version[1:]}/model.onnx", multiplier(factor))

    def python(self, name: str, *, version: int = 1, initialize: str = "pass", factor: float = 2.0) -> None:
        """Write a Python model with the tensors x and y."""
        self.write(f"{name}/config.pbtxt", 'backend: "python"\nmax_batch_size: 4\n' + TENSORS)
        code = PYTHON.format(initialize=initialize, factor=factor)
        self.write(f"{name}/{version}/model.py", code)

    async def ask(self, name: str, *row: float, version: str | None = None) -> list[float]:
        """Ask a model with one row; return the row that it answers."""
        x = to_tensor("x", np.asarray([row or (1, 2, 3)], np.float32))
        answer = await self.engine.infer(InferRequest("r", name, version, inputs=[x]))
        return [float(each) for each in to_array(answer.outputs[0]).reshape(-1)]

    async def index(self) -> list[tuple[str, str, str | None, str]]:
        """Return the repository's index as tuples."""
        return _tuples(await self.engine.repository_index())

    def entries(self) -> list[tuple[str, str, str | None, str]]:
        """Return what the index says of models that were or are to be loaded."""
        return _tuples(self.engine.version_entries())


def _tuples(entries: Iterable[RepositoryEntry]) -> list[tuple[str, str, str | None, str]]:
    return [(e.name, e.version, e.state and e.state.value, e.reason) for e in entries]
