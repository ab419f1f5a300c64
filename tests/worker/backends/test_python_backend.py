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
from mms_lite.worker.backends import BackendSettings, Request
from mms_lite.worker.backends.python import PythonBackend
from mms_lite.worker.compat import triton_python_backend_utils as pb_utils
from mms_lite.worker.predictor import Predictor

UTILS = "triton_python_backend_utils"
X = TensorSpec("x", "FP32", (-1, 3))
Y = TensorSpec("y", "FP32", (-1, 2))
ROWS = np.ones((2, 3), np.float32)
FAILED = r"Failed to process the request\(s\) for model 'model_0_0', message: "
IMPORT = "import numpy as np\nimport triton_python_backend_utils as pb_utils\n\n"


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a model imported, and from where."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name in {"model", "own_module", "beside_the_file", "beside_the_versions", UTILS}:
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
    with pytest.raises(BadTensor, match=r"^inference request batch-size must be <= 4 for 'model'$"):
        Predictor(model).infer({"x": np.ones((5, 3), np.float32)}, ["y"])


@pytest.mark.parametrize(
    ("said", "wrong", "message"),
    [
        (
            '"dims": [3]',
            '"dims": ["three"]',
            r"^the input 'x' has the dims \['three'\], which are no lengths$",
        ),
        ('"dims": [3]', '"dims": 3', r"^the input 'x' has the dims 3, which are no lengths$"),
        ('"dims": [1]', '"dims": [0]', r"^the output 'y' has the dims \[0\], which are no lengths$"),
        ('"name": "y"', '"name": ""', r"^an output of auto_complete_config has the name '', which is none$"),
        (
            '"dims": [3]',
            '"dims": [3], "optional": 1',
            r"^the input 'x' is optional: 1, neither true nor false$",
        ),
        (
            "set_max_batch_size(4)",
            "set_max_batch_size('4')",
            r"^max_batch_size is '4', not a number from 0 to ",
        ),
        (
            "set_max_batch_size(4)",
            "set_max_batch_size(-1)",
            r"^max_batch_size is -1, not a number from 0 to ",
        ),
    ],
)
def test_what_a_model_says_of_itself_is_checked_when_it_is_loaded(open_model, said, wrong, message):
    with pytest.raises((InvalidArchive, ValueError), match=message):
        open_model(COMPLETING.replace(said, wrong), inputs=(), outputs=())


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
        ("return None", f"^{FAILED}Expected a list in the execute return, found type '<class 'NoneType'>'.$"),
        (
            "return []",
            f"^{FAILED}Number of InferenceResponse objects do not match the number of InferenceRequest "
            r"objects. InferenceRequest\(s\) size is:1, and InferenceResponse\(s\) size is:0$",
        ),
        (
            "return [np.ones(2)]",
            f"^{FAILED}Expected an 'InferenceResponse' object .*<class 'numpy.ndarray'>'.$",
        ),
        ("raise ValueError('too dark')", f"^{FAILED}ValueError: too dark$"),
        ("raise pb_utils.TritonModelException('too dark')", f"^{FAILED}TritonModelException: too dark$"),
        ("return [pb_utils.InferenceResponse([pb_utils.Tensor('z', np.ones(2))])]", "no output 'y'; .* 'z'"),
        ("return [pb_utils.InferenceResponse([], pb_utils.TritonError('too dark'))]", "^too dark$"),
    ],
)
def test_an_answer_that_is_none_is_the_models_fault(open_model, body, message):
    with pytest.raises(HandlerError, match=message):
        open_model(execute(body)).infer({"x": ROWS}, ["y"])


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise __import__('asyncio').CancelledError('no')", "CancelledError: no"),
    ],
)
def test_what_would_end_the_worker_is_an_error_of_the_request(open_model, kind, statement, said):
    text = execute(
        "x = requests[0].inputs()[0].as_numpy()\n"
        f"if x.min() < 0: {statement}\n"
        "return [pb_utils.InferenceResponse([pb_utils.Tensor('y', x)])]"
    )
    model = open_model(text.replace("def execute", f"{kind} execute"))
    with pytest.raises(HandlerError, match=f"^{FAILED}{said}$"):
        model.infer({"x": -ROWS}, ["y"])
    assert model.infer({"x": ROWS}, ["y"])["y"].tolist() == ROWS.tolist()
    model.close()


IDENTIFYING = """class TritonPythonModel:
    def initialize(self, args):
        self.executed = []

    def execute(self, requests):
        self.executed.append(len(requests))
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        if x.min() < 0:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("negative"))
        said = __import__("json").loads(request.parameters())
        y = pb_utils.Tensor("y", x[:, :2] * len(x))
        said |= {"id": request.request_id(), "sequence": request.correlation_id(), "flags": request.flags()}
        return pb_utils.InferenceResponse([y], parameters={**said, "timeout": request.timeout()})
"""


def test_execute_is_given_the_requests_of_a_batch_as_they_came_and_answers_each(open_model):
    model = open_model(IDENTIFYING)
    parameters = {"top": 3, "sequence_id": "s", "sequence_start": True, "timeout": 500, "priority": 1}
    first, failed, last = model.infer_requests(
        [
            Request({"x": ROWS}, outputs=["y"], id="first", parameters=parameters),
            Request({"x": -ROWS}, outputs=["y"]),
            Request({"x": ROWS[:1]}, outputs=["y"], parameters={"sequence_id": 7, "sequence_end": True}),
        ]
    )
    assert model._model.executed == [3]
    assert (first["y"].tolist(), last["y"].tolist()) == ([[2, 2], [2, 2]], [[1, 1]])
    assert first.parameters == {"top": 3, "id": "first", "sequence": "s", "flags": 1, "timeout": 500}
    assert last.parameters == {"id": "", "sequence": 7, "flags": 2, "timeout": 0}
    assert (type(failed), failed.message) == (HandlerError, "negative")


@pytest.mark.parametrize(
    ("code", "error", "details"),
    [
        ("UNKNOWN", HandlerError, {"status": 400, "grpc": "UNKNOWN"}),
        ("INTERNAL", HandlerError, {}),
        ("NOT_FOUND", HandlerError, {"status": 404, "grpc": "NOT_FOUND"}),
        ("INVALID_ARG", BadTensor, {}),
        ("UNAVAILABLE", HandlerError, {"status": 503, "grpc": "UNAVAILABLE"}),
        ("UNSUPPORTED", HandlerError, {"status": 501, "grpc": "UNIMPLEMENTED"}),
        ("ALREADY_EXISTS", HandlerError, {"status": 400, "grpc": "ALREADY_EXISTS"}),
        ("CANCELLED", HandlerError, {"status": 400, "grpc": "CANCELLED"}),
    ],
)
def test_the_code_of_a_models_error_becomes_the_statuses_of_tritons_front_ends(
    open_model, code, error, details
):
    body = (
        f"return [pb_utils.InferenceResponse(error=pb_utils.TritonError('no', pb_utils.TritonError.{code}))]"
    )
    (found,) = open_model(execute(body)).infer_requests([Request({"x": ROWS}, outputs=["y"])])
    assert (type(found), found.message, found.details) == (error, "no", details)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("error=pb_utils.TritonError(ValueError('boom'))", "a TritonError's message is no text: boom"),
        ("error=pb_utils.TritonError('half \\ud800')", "half ?"),
        ("error=pb_utils.TritonError('boom', [1])", r"boom (its code is no code of TritonError: [1])"),
        ("error=pb_utils.TritonError('boom', 99)", r"boom (its code is no code of TritonError: 99)"),
        ("[y], parameters={'n': 2**70}", "the answer's parameter 'n' is a number of more than 64 bits"),
        ("[y], parameters={'n': float('nan')}", "the answer's parameter 'n' is not finite: nan"),
        ("[y], parameters={'n': 'half \\ud800'}", "the answer's parameter 'n' is text that is not Unicode"),
        ("[y], parameters={'half \\ud800': 1}", "the name of a parameter of the answer is not Unicode text"),
        ("[y], parameters={5: 1}", "the name of a parameter of the answer is not Unicode text"),
        (
            "[y], parameters={'n': [1]}",
            "the answer's parameter 'n' is neither text, number, true nor false: [1]",
        ),
    ],
)
def test_an_answer_that_cannot_be_sent_fails_its_request_alone(open_model, response, message):
    body = "y = pb_utils.Tensor('y', np.ones((2, 2), np.float32))\n"
    body += f"return [pb_utils.InferenceResponse({response}), pb_utils.InferenceResponse([y])]"
    asked = [Request({"x": ROWS}, outputs=["y"])] * 2
    failed, fine = open_model(execute(body)).infer_requests(asked)
    assert (type(failed), failed.message, failed.details) == (HandlerError, message, {})
    assert fine["y"].tolist() == [[1, 1], [1, 1]]


def test_an_output_may_be_left_out_and_only_what_is_wanted_is_answered(open_model):
    body = "return [pb_utils.InferenceResponse([pb_utils.Tensor(n, np.ones(2)) for n in ('w', 'z')])]"
    more = [TensorSpec(name, "FP32", (-1,)) for name in ("w", "z")]
    model = open_model(execute(body), outputs=(Y, *more))
    (answer,) = model.infer_requests([Request({"x": ROWS}, outputs=["y", "z"])])
    assert list(answer) == ["z"]
    with pytest.raises(HandlerError, match="no output 'y'; it gave: 'z'"):
        model.infer({"x": ROWS}, ["y", "z"])


CONFIG = {
    "name": "scaled",
    "backend": "python",
    "max_batch_size": 8,
    "input": [
        {"name": "x", "data_type": "TYPE_FP32", "dims": [3], "optional": False},
        {"name": "factor", "data_type": "TYPE_BF16", "dims": [1], "optional": True},
    ],
    "output": [{"name": "y", "data_type": "TYPE_STRING", "dims": [-1], "label_filename": ""}],
    "parameters": {"unit": {"string_value": "mm"}},
}
IN_REPOSITORY = """import beside_the_file
from . import beside_the_file as the_same
import beside_the_versions

class TritonPythonModel:
    def initialize(self, args):
        self.said = [args["model_repository"], args["model_version"], args["model_instance_name"]]
        self.said += [args["model_config"], pb_utils.get_model_dir()]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        factor = pb_utils.get_input_tensor_by_name(request, "factor")
        said = self.said if factor is None else [str(factor.as_numpy().dtype), str(factor.triton_dtype())]
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array(said))])
"""


def test_a_model_of_a_repository_gets_its_configuration_and_places(tmp_path):
    folder = tmp_path / "scaled" / "3"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(IMPORT + IN_REPOSITORY)
    (folder / "beside_the_file.py").touch()
    (folder.parent / "beside_the_versions.py").touch()
    model = PythonBackend.open(
        BackendSettings((folder / "model.py",), model="scaled", version="3", instance=2, config=CONFIG)
    )
    assert list(model.inputs) == [TensorSpec("x", "FP32", (-1, 3)), TensorSpec("factor", "BF16", (-1, 1))]
    assert set(model.optional) == {"factor"}
    said = model.infer({"x": ROWS}, ["y"])["y"].tolist()
    assert json.loads(said.pop(3)) == {
        **CONFIG,
        "platform": "",
        "default_model_filename": "model.py",
        "model_transaction_policy": {"decoupled": False},
    }
    assert said == [str(folder.parent), "3", "scaled_0_2", str(folder)]
    factor = np.ones((2, 1), pytest.importorskip("ml_dtypes", reason="has the type of BF16").bfloat16)
    assert model.infer({"x": ROWS, "factor": factor}, ["y"])["y"].tolist() == ["bfloat16", "14"]


def test_a_model_is_given_the_shape_of_reshape_and_told_both(open_model):
    tensor = {"name": "x", "data_type": "TYPE_FP32", "dims": [3], "reshape": {"shape": [3, 1]}}
    output = {"name": "y", "data_type": "TYPE_STRING", "dims": [1], "reshape": {"shape": []}}
    text = "class TritonPythonModel:\n    def initialize(self, args):\n"
    text += "        self.config = args['model_config']\n\n    def execute(self, requests):\n"
    text += "        y = np.array([self.config], object)\n"
    text += "        return [pb_utils.InferenceResponse([pb_utils.Tensor('y', y)])]\n"
    config = {"max_batch_size": 4, "input": [tensor], "output": [output]}
    model = open_model(text, inputs=(), outputs=(), config=config)
    assert list(model.inputs) == [TensorSpec("x", "FP32", (-1, 3, 1))]
    assert list(model.outputs) == [TensorSpec("y", "BYTES", (-1,))]
    said = json.loads(model.infer({"x": np.ones((1, 3, 1), np.float32)}, ["y"])["y"][0])
    assert (said["input"], said["output"]) == ([tensor], [output])


def test_what_a_model_logs_is_printed_warnings_apart(capsys):
    log = pb_utils.Logger
    log.log_info("loaded")
    log.log("seen")
    log.log_warn("slow")
    log.log("broken", log.ERROR)
    log.log_verbose("details")
    assert capsys.readouterr() == ("loaded\nseen\n", "slow\nbroken\n")


def test_a_model_counts_with_metrics_of_its_own():
    counter = pb_utils.MetricFamily("seen", "Photos seen", pb_utils.MetricFamily.COUNTER).Metric(
        {"kind": "a"}
    )
    counter.increment(2)
    counter.increment(0.5)
    assert counter.value() == 2.5
    gauge = pb_utils.MetricFamily("size", "Of the last", pb_utils.MetricFamily.GAUGE).Metric()
    gauge.set(3)
    gauge.increment(-1)
    assert gauge.value() == 2
    family = pb_utils.MetricFamily(name="ms", description="", kind=pb_utils.MetricFamily.HISTOGRAM)
    times = family.Metric(buckets=[1, 10])
    for value in (0.5, 1, 7, 70):
        times.observe(value)
    assert times.value() == [2, 3, 4]
    for wrong in (
        lambda: counter.increment(-1),
        lambda: counter.set(1),
        lambda: gauge.observe(1),
        family.Metric,
    ):
        with pytest.raises(ValueError, match=r"metric|gauge|histogram"):
            wrong()


def test_execute_may_be_a_coroutine_and_sees_which_outputs_are_wanted(open_model):
    body = "names = requests[0].requested_output_names()\n"
    body += "return [pb_utils.InferenceResponse([pb_utils.Tensor(n, np.ones(2)) for n in names])]"
    text = execute(body).replace("def execute", "async def execute")
    model = open_model(text, outputs=(Y, TensorSpec("z", "FP32", (-1, 2))))
    assert list(model.infer({"x": ROWS}, ["z"])) == ["z"]
    assert list(model.infer({"x": ROWS}, ["z"])) == ["z"]
    model.close()


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
    ],
)
def test_what_is_not_supported_yet_says_so(open_model, use):
    with pytest.raises(HandlerError, match=r"TritonModelException: .* is not supported by mms-lite yet$"):
        open_model(execute(use)).infer({"x": ROWS}, ["y"])


def test_a_decoupled_model_is_refused_when_it_is_loaded(open_model):
    text = COMPLETING.replace(
        "config.set_dynamic_batching()", "config.set_model_transaction_policy({'decoupled': True})"
    )
    with pytest.raises(pb_utils.TritonModelException, match="decoupled mode is not supported"):
        open_model(text)
    with pytest.raises(InvalidArchive, match="the model is decoupled"):
        open_model(execute("return []"), config={"model_transaction_policy": {"decoupled": True}})


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
