"""What is Python code's alone: the conventions of the Triton Python backend, and faults of users' code."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mms_lite.errors import BadTensor, HandlerError, InvalidArchive
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import BackendSettings
from mms_lite.worker.backends.python import PythonBackend
from mms_lite.worker.compat import triton_python_backend_utils as pb_utils

X = TensorSpec("x", "FP32", (-1, 3))
Y = TensorSpec("y", "FP32", (-1, 2))
ROWS = np.ones((2, 3), np.float32)
IMPORT = "import numpy as np\nimport triton_python_backend_utils as pb_utils\n\n"


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a model imported, and from where."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name in {"model", "own_module", "triton_python_backend_utils"}:
            del sys.modules[name]


@pytest.fixture
def open_model(tmp_path: Path) -> Any:
    """Open a model.py of this text; x and y are stated unless the test says otherwise."""

    def make(text: str, **settings: Any) -> PythonBackend:
        path = tmp_path / "model.py"
        path.write_text(IMPORT + text)
        return PythonBackend.open(
            BackendSettings(files=(path,), **{"inputs": (X,), "outputs": (Y,), **settings})
        )

    return make


def execute(body: str) -> str:
    """Return a model whose `execute` has this body."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return f"class TritonPythonModel:\n    def execute(self, requests):\n{lines}"


def test_initialize_gets_tritons_arguments_as_text(open_model, tmp_path):
    model = open_model(
        """class TritonPythonModel:
    def initialize(self, args):
        self.args = args

    def execute(self, requests):
        text = np.array([__import__("json").dumps(self.args)], object)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", text)])]
""",
        outputs=(TensorSpec("y", "BYTES", (-1,)),),
        options={"threshold": 0.5},
    )
    args = json.loads(model.infer({"x": ROWS}, ["y"])["y"][0])
    config = json.loads(args.pop("model_config"))
    assert args == {
        "model_instance_kind": "CPU",
        "model_instance_name": "model_0_0",
        "model_instance_device_id": "0",
        "model_repository": str(tmp_path),
        "model_version": "1",
        "model_name": "model",
    }
    assert config["max_batch_size"] == 0
    assert pb_utils.get_input_config_by_name(config, "x") == {
        "name": "x",
        "data_type": "TYPE_FP32",
        "dims": [-1, 3],
    }
    assert pb_utils.get_output_config_by_name(config, "y")["data_type"] == "TYPE_STRING"
    assert config["parameters"] == {"threshold": {"string_value": "0.5"}}
    assert not pb_utils.using_decoupled_model_transaction_policy(config)


COMPLETING = """class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(4)
        config.set_dynamic_batching()
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [3]})
        config.add_output({"name": "y", "data_type": "TYPE_STRING", "dims": [1]})
        return config

    def execute(self, requests):
        x = pb_utils.get_input_tensor_by_name(requests[0], "x").as_numpy()
        y = np.array([[str(row.sum())] for row in x], object)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", y)])]
"""


def test_a_model_may_state_its_own_tensors_with_their_batch_apart(open_model):
    model = open_model(COMPLETING, inputs=(), outputs=())
    assert list(model.inputs) == [TensorSpec("x", "FP32", (-1, 3))]
    assert list(model.outputs) == [TensorSpec("y", "BYTES", (-1, 1))]
    assert model.infer({"x": ROWS}, ["y"])["y"].tolist() == [["3.0"], ["3.0"]]
    with pytest.raises(BadTensor, match="at most 4 rows at once, got 5"):
        model.infer({"x": np.ones((5, 3), np.float32)}, ["y"])


def test_the_archive_may_state_tensors_in_place_of_the_models_own(open_model):
    model = open_model(COMPLETING, inputs=(TensorSpec("x", "FP32", (-1, -1)),), outputs=())
    assert list(model.inputs) == [TensorSpec("x", "FP32", (-1, -1))]
    with pytest.raises(InvalidArchive, match="declares the input 'z'"):
        open_model(COMPLETING, inputs=(TensorSpec("z", "FP32", (-1,)),), outputs=())


def test_tensors_that_nobody_states_are_asked_for_with_the_json_to_write(open_model):
    with pytest.raises(InvalidArchive, match=r"^model.py does not say what the model takes") as caught:
        open_model(execute("return []"), outputs=())
    stated = re.search(r"such as (\{.*\}), or", caught.value.message)
    assert stated and set(json.loads(stated[1])["backend"]) == {"inputs", "outputs"}


def test_the_client_is_told_where_importing_the_code_failed(open_model, tmp_path):
    with pytest.raises(InvalidArchive, match=r"^model.py, line 4: ModuleNotFoundError: No module named 'no_"):
        open_model("import no_such_library\n")
    with pytest.raises(InvalidArchive, match=r"^model.py, line 5: SyntaxError: "):
        open_model("class TritonPythonModel:\n    def execute(self requests):\n")
    (tmp_path / "own_module.py").write_text("\n\nraise ValueError('no weights')\n")
    with pytest.raises(InvalidArchive, match=r"^own_module.py, line 3: ValueError: no weights$"):
        open_model("import own_module\n")
    with pytest.raises(InvalidArchive, match="no class TritonPythonModel"):
        open_model("def execute(requests): ...\n")
    with pytest.raises(InvalidArchive, match="no method execute"):
        open_model("class TritonPythonModel: ...\n")


def test_what_initialize_raises_is_left_as_it_is(open_model):
    with pytest.raises(RuntimeError, match=r"^no licence for this model$"):
        open_model(
            "class TritonPythonModel:\n"
            "    def initialize(self, args): raise RuntimeError('no licence for this model')\n"
            "    def execute(self, requests): ...\n"
        )


def test_modules_beside_the_models_file_can_be_imported(open_model, tmp_path):
    (tmp_path / "own_module.py").write_text("FACTOR = 3\n")
    body = "x = requests[0].inputs()[0].as_numpy()\n"
    body += "return [pb_utils.InferenceResponse([pb_utils.Tensor('y', x[:, :2] * own_module.FACTOR)])]"
    model = open_model("import own_module\n" + execute(body))
    assert model.infer({"x": ROWS}, ["y"])["y"].tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "returned NoneType, not a list"),
        ("return []", "returned 0 responses for 1 request"),
        ("return [np.ones(2)]", "returned a list of ndarray, not of InferenceResponse"),
        ("return [pb_utils.InferenceResponse([pb_utils.Tensor('z', np.ones(2))])]", "no output 'y'; .* 'z'"),
        ("return [pb_utils.InferenceResponse([], pb_utils.TritonError('too dark'))]", "^too dark$"),
    ],
)
def test_an_answer_that_is_none_is_the_models_fault(open_model, body, message):
    with pytest.raises(HandlerError, match=message):
        open_model(execute(body)).infer({"x": ROWS}, ["y"])


def test_execute_may_be_a_coroutine_and_sees_which_outputs_are_wanted(open_model):
    body = "names = requests[0].requested_output_names()\n"
    body += "return [pb_utils.InferenceResponse([pb_utils.Tensor(n, np.ones(2)) for n in names])]"
    text = execute(body).replace("def execute", "async def execute")
    model = open_model(text, outputs=(Y, TensorSpec("z", "FP32", (-1, 2))))
    assert list(model.infer({"x": ROWS}, ["z"])) == ["z"]


def test_finalize_is_called_once_when_the_model_is_closed(open_model, tmp_path):
    log = tmp_path / "log"
    finalize = f"    def finalize(self):\n        with open({str(log)!r}, 'a') as log: log.write('done')\n"
    model = open_model(execute("return []") + finalize)
    assert not log.exists()
    model.close()
    model.close()
    assert log.read_text() == "done"


@pytest.mark.parametrize(
    "use",
    [
        "pb_utils.InferenceRequest(model_name='m', requested_output_names=['y'], inputs=[]).exec()",
        "requests[0].get_response_sender()",
        "pb_utils.load_model('m')",
        "pb_utils.MetricFamily(name='n', description='d', kind=pb_utils.MetricFamily.COUNTER)",
    ],
)
def test_what_is_not_supported_yet_says_so(open_model, use):
    with pytest.raises(pb_utils.TritonModelException, match="is not supported by mms-lite yet"):
        open_model(execute(use)).infer({"x": ROWS}, ["y"])


def test_a_decoupled_model_is_refused_when_it_is_loaded(open_model):
    text = COMPLETING.replace(
        "config.set_dynamic_batching()", "config.set_model_transaction_policy({'decoupled': True})"
    )
    with pytest.raises(pb_utils.TritonModelException, match="decoupled mode is not supported"):
        open_model(text)


def test_tensors_have_tritons_types():
    every = list(pb_utils.TRITON_STRING_TO_NUMPY.values())
    numbers = [pb_utils.Tensor("t", np.zeros(1, each)).triton_dtype() for each in every]
    assert numbers == list(range(1, 14))
    assert [np.dtype(pb_utils.triton_to_numpy_type(n)) for n in numbers] == list(map(np.dtype, every))
    assert pb_utils.Tensor("t", np.array(["text"])).triton_dtype() == 13
    assert pb_utils.triton_string_to_numpy("TYPE_INT64") is np.int64
    assert pb_utils.Tensor("t", np.ones((2, 3)).T).as_numpy().flags.c_contiguous


def test_text_and_bytes_survive_serialization():
    raw = pb_utils.serialize_byte_tensor(np.array([["é", b"\x00"]], object))
    assert raw == b"\x02\x00\x00\x00\xc3\xa9\x01\x00\x00\x00\x00"
    assert pb_utils.deserialize_bytes_tensor(raw).tolist() == ["é".encode(), b"\x00"]


def test_tensors_are_exchanged_with_torch_without_a_copy():
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    array = np.arange(3, dtype=np.float32)
    torch.from_dlpack(pb_utils.Tensor("t", array)).add_(1)
    torch.from_dlpack(pb_utils.Tensor("t", array).to_dlpack()).add_(1)
    assert array.tolist() == [2, 3, 4]
    given = torch.from_numpy(array)
    for each in (given, torch.utils.dlpack.to_dlpack(given)):
        assert pb_utils.Tensor.from_dlpack("t", each).as_numpy().tolist() == [2, 3, 4]
