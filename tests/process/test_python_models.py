"""Python models of a Triton repository in real workers: where they work, what they see and may leave out."""

import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.engine.repository.mar import Defaults
from mms_lite.engine.repository.triton import TritonRepository
from mms_lite.tensors import to_array, to_tensor
from mms_lite.types import InferRequest, InferResponse

pytest.importorskip("google.protobuf", reason="reads config.pbtxt")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes as on Linux")

CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] reshape { shape: [ 2, 2 ] } optional: true }
output { name: "said" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 4 ] reshape { shape: [ 2, 2 ] } }
"""
MODEL = """
import json, os, pathlib
import beside
import numpy as np
import random
import secrets
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        pathlib.Path("notes.txt").write_text(args["model_instance_name"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x")
        said = {"cwd": os.getcwd(), "beside": beside.__file__, "shape": x and x.shape()}
        said |= {"random": random.__file__, "beside_says": beside.SAYS}
        found = [pb_utils.Tensor("said", np.array([json.dumps(said)], object))]
        if x is not None:
            found.append(pb_utils.Tensor("y", x.as_numpy().T))
        return pb_utils.InferenceResponse(found)
"""


class Site:
    """A repository of one model, whose files are links into a folder elsewhere, and its engine."""

    def __init__(self, root: Path) -> None:
        self.version, self.work, stored = root / "models" / "m" / "1", root / "work", root / "stored"
        for folder in (self.version, self.work, stored):
            folder.mkdir(parents=True)
        self.files = {"model.py": MODEL, "beside.py": "SAYS = 1\n"}
        for name, text in self.files.items():
            (stored / f"{name}.blob").write_text(text)
            (self.version / name).symlink_to(stored / f"{name}.blob")
        (self.version.parent / "config.pbtxt").write_text(CONFIG)
        defaults = Defaults(workers=1, queue_size=9, response_timeout_s=20.0, load_timeout_s=20.0)
        repository = TritonRepository(root / "models", self.work, defaults)
        # As users have it: Python may keep what it makes of their code.
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        launcher = ProcessLauncher(max_frame_bytes=1 << 20, environ=environ)
        self.engine = Engine(repository, launcher, cores=2, unload_s=5)

    async def ask(self, *arrays: np.ndarray) -> tuple[InferResponse, dict[str, Any]]:
        """Return the answer to an x, or to no input at all, and what the model says in it."""
        inputs = [to_tensor("x", each) for each in arrays]
        answer = await self.engine.infer(InferRequest("r", "m", inputs=inputs))
        return answer, json.loads(to_array(answer.outputs[0])[0])


@pytest.fixture
async def site(tmp_path: Path, wait_until: Any, children: Callable[[], Any]) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    await made.engine.load_model("m")
    yield made
    await made.engine.close(drain_s=5)
    await wait_until(lambda: not children(), "every child process to end")


async def test_a_model_works_in_a_folder_of_its_own_which_goes_with_it(site: Site) -> None:
    _, said = await site.ask()
    folder = Path(said["cwd"])
    assert site.work in folder.parents
    assert (folder / "notes.txt").read_text() == "m_0_0"
    assert os.listdir(folder) == ["notes.txt"]
    assert {each.name for each in site.version.iterdir()} == set(site.files)
    assert said["beside"] == str(site.version / "beside.py")
    await site.engine.unload_model("m")
    assert list(site.work.iterdir()) == []


async def test_what_a_killed_worker_left_goes_with_the_model(site: Site, wait_until: Any) -> None:
    (worker,) = site.engine.describe("m").workers
    assert worker.pid is not None
    os.kill(worker.pid, 9)
    await wait_until(lambda: site.engine.describe("m").workers[0].restarts, "the worker to come back")
    _, said = await site.ask()
    assert (Path(said["cwd"]) / "notes.txt").exists()
    await site.engine.unload_model("m")
    assert list(site.work.iterdir()) == []


async def test_a_request_may_have_no_inputs_where_all_are_optional(site: Site) -> None:
    answer, said = await site.ask()
    assert [each.name for each in answer.outputs] == ["said"]
    assert said["shape"] is None


async def test_the_model_sees_the_shape_of_reshape_and_the_client_dims(site: Site) -> None:
    answer, said = await site.ask(np.arange(4, dtype=np.float32))
    assert said["shape"] == [2, 2]
    assert to_array(answer.outputs[1]).tolist() == [0, 2, 1, 3]
    _, signature = site.engine.interface("m")
    assert [str(each) for each in signature.inputs] == ["x FP32 [4]"]
    assert [str(each) for each in signature.outputs] == ["said BYTES [1]", "y FP32 [4]"]


async def test_files_beside_the_model_may_be_called_as_handlers_and_pythons_modules_are(site: Site) -> None:
    for name in ("tensor", "random", "platform", "numbers", "secrets"):
        (site.version / f"{name}.py").write_text("raise RuntimeError('this is not the module')")
    await site.engine.load_model("m")
    _, said = await site.ask()
    assert not Path(said["random"]).is_relative_to(site.version)


async def test_code_is_read_anew_also_where_its_file_looks_as_it_did(site: Site) -> None:
    before = (site.version / "beside.py").stat()
    (site.version / "beside.py").write_text("SAYS = 2\n")
    os.utime(site.version / "beside.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    await site.engine.load_model("m")
    _, said = await site.ask()
    assert said["beside_says"] == 2
