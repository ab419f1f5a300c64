"""The `mms` import names, as handlers of Multi Model Server use them."""

import importlib
import json
import logging
import math
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mms_lite
from mms_lite.worker import context, metrics_store

ROOT = Path(mms_lite.__file__).resolve().parent.parent
COMPAT = ROOT / "mms_lite" / "worker" / "compat"
FILES = sorted((COMPAT / "mms").rglob("*.py"))
MODULES = [
    ".".join(file.relative_to(COMPAT).with_suffix("").parts).removesuffix(".__init__") for file in FILES
]


@pytest.fixture
def mms(monkeypatch):
    """Return a function that imports a module of the compat folder, as a worker would."""
    monkeypatch.syspath_prepend(str(COMPAT))
    yield importlib.import_module
    for name in [name for name in sys.modules if name == "mms" or name.startswith("mms.")]:
        del sys.modules[name]


def test_all_names_import_in_a_bare_interpreter_and_bring_no_third_party_module():
    program = f"""
import sys
sys.path[:0] = {[str(COMPAT), str(ROOT)]!r}
for name in {MODULES!r}:
    __import__(name)
known = set(sys.stdlib_module_names) | {{"mms", "mms_lite", "__main__"}}
foreign = {{name.partition(".")[0] for name in sys.modules}} - known
assert not foreign, foreign
print(sys.modules["mms"].__file__, sys.modules["mms"].__version__)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(COMPAT / "mms" / "__init__.py"), "1.1.11"]


def test_every_folder_is_a_package():
    found = {m.name for m in pkgutil.walk_packages([str(COMPAT / "mms")], "mms.", onerror=lambda _: None)}
    assert {name for name in MODULES if name.count(".") == 1} <= found
    assert "mms.utils.mxnet.image" in MODULES


def test_the_names_are_ours_under_mms_names(mms):
    assert mms("mms.context").Context is context.Context
    assert mms("mms.context").RequestProcessor is context.RequestProcessor
    assert mms("mms.service").PredictionException is context.PredictionException
    assert mms("mms.metrics.dimension").Dimension is metrics_store.Dimension
    assert mms("mms.metrics.metric").Metric is metrics_store.Metric
    assert mms("mms.metrics.metrics_store").MetricsStore is metrics_store.MetricsStore
    assert mms("mms.metrics.unit").Units is metrics_store.Units


def test_a_service_calls_its_entry_point_with_a_fresh_batch(mms):
    def entry(data, ctx):
        return [(item, ctx.get_request_id(i), ctx.get_all_request_header(i)) for i, item in enumerate(data)]

    service = mms("mms.service").Service("echo", "/m", None, entry, None, 2)
    assert service.context.system_properties["server_version"] == "1.1.11"
    answers = service.predict([{"body": b"1"}, {"body": b"2"}])
    assert [(item, headers) for item, _, headers in answers] == [({"body": b"1"}, {}), ({"body": b"2"}, {})]
    assert len({request_id for _, request_id, _ in answers}) == 2


def test_emitted_metrics_are_logged_with_the_mark_of_metrics(mms, caplog):
    service = mms("mms.service")
    with caplog.at_level(logging.INFO):
        service.emit_metrics([metrics_store.Metric("m", 1, "ms", [])])
        service.emit_metrics(None)
    assert [r.getMessage().partition("|")[0] for r in caplog.records] == ["[METRICS]m.Milliseconds:1"]


def test_prediction_exception_carries_message_and_code(mms):
    error_class = mms("mms.service").PredictionException
    error = error_class("too dark", 422)
    assert (error.message, error.error_code, str(error)) == ("too dark", 422, "too dark : 422")
    assert error_class("x").error_code == 500


def test_a_request_processor_has_the_methods_of_mms():
    processor = context.RequestProcessor({"Content-Type": "a/b"})
    assert processor.get_request_property("content-type") == "a/b"
    assert processor.get_request_properties() == {"Content-Type": "a/b"}
    assert (processor.get_response_status_code(), processor.get_response_status_phrase()) == (200, None)
    processor.report_status(400, reason_phrase="bad")
    assert (processor.get_response_status_code(), processor.get_response_status_phrase()) == (400, "bad")
    processor.add_response_property("k", "v")
    assert processor.get_response_headers() == {"k": "v"}
    assert processor.get_response_header("K") == "v"
    assert processor.get_response_header("other") is None


def test_a_metric_prints_as_mms_workers_print_it(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "vm")
    monkeypatch.setattr("time.time", lambda: 1795243439.9)
    dimensions = [metrics_store.Dimension("Level", "Host")]
    host = metrics_store.Metric("m", 1, "ms", dimensions)
    assert str(host) == "m.Milliseconds:1|#Level:Host|#hostname:vm,1795243439"
    assert str(metrics_store.Metric("m", math.nan, "ms", dimensions, "a,b")) == (
        "m.Milliseconds:nan|#Level:Host|#hostname:vm,1795243439,a,b"
    )


def test_a_metric_is_plain_data_on_demand():
    metric = metrics_store.Metric("m", 1, "ms", [metrics_store.Dimension("k", "v")], "a", "counter")
    metric.update(2)
    data = metric.to_dict()
    assert list(data) == ["MetricName", "Value", "Unit", "Dimensions", "Timestamp", "HostName", "RequestId"]
    assert (data["MetricName"], data["Value"], data["Unit"], data["RequestId"]) == (
        "m",
        3,
        "Milliseconds",
        "a",
    )
    assert data["Dimensions"][0].to_dict() == {"Name": "k", "Value": "v"}
    assert isinstance(data["Timestamp"], int)


def test_metrics_encode_as_json(mms):
    encoder = mms("mms.metrics.metric_encoder").MetricEncoder
    metric = metrics_store.Metric("m", 1, "ms", [metrics_store.Dimension("k", "v")])
    assert json.loads(json.dumps(metric, cls=encoder))["Dimensions"] == [{"Name": "k", "Value": "v"}]
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(object(), cls=encoder)


def test_system_metrics_are_those_of_the_host(mms, caplog):
    pytest.importorskip("psutil")
    module = mms("mms.metrics.system_metrics")
    with caplog.at_level(logging.INFO):
        metrics = module.collect_all(module)
    assert [(m.name, m.unit) for m in metrics] == [
        ("CPUUtilization", "Percent"),
        ("DiskAvailable", "Gigabytes"),
        ("DiskUsage", "Gigabytes"),
        ("DiskUtilization", "Percent"),
        ("MemoryAvailable", "Megabytes"),
        ("MemoryUsed", "Megabytes"),
        ("MemoryUtilization", "Percent"),
    ]
    assert all(m.value >= 0 and "|#Level:Host|#hostname:" in str(m) for m in metrics)
    assert len(caplog.records) == 7


def test_timeit_prints_the_time_and_returns_the_result(mms, capsys):
    @mms("mms.utils.timeit_decorator").timeit
    def add(a, b=1):
        return a + b

    assert add(1, b=2) == 3
    assert add.__name__ == "add"
    assert capsys.readouterr().out.startswith("func: 'add' took a total of 0.0")


# --- services of MMS 0.x


def legacy_model(folder, input_type="image/jpeg"):
    shape = {"data_name": "img", "data_shape": [0, 3, 8, 8]}
    signature = {"input_type": input_type, "inputs": [shape], "outputs": [{"data_name": "p"}]}
    (folder / "signature.json").write_text(json.dumps(signature))
    return {
        "Model": {"Signature": "signature.json", "Symbol": "net-symbol.json", "Parameters": "net-0003.params"}
    }


def legacy_service(mms, folder, input_type="image/jpeg", base="SingleNodeService"):
    manifest = legacy_model(folder, input_type)
    service = getattr(mms("mms.model_service.model_service"), base)("net", str(folder), manifest)
    service.initialize(context.Context("net", str(folder), manifest, 1, None, "1.1.11"))
    return service


@pytest.mark.parametrize("name", ["img", "body", "data"])
def test_a_legacy_service_serves_the_first_request_only(mms, tmp_path, name):
    service = legacy_service(mms, tmp_path)
    assert service.handle([{name: b"1"}, {name: b"2"}], None) == [b"1"]
    assert service.signature()["input_type"] == "image/jpeg"
    assert service.ping() is None


def test_a_legacy_service_runs_three_steps_and_wraps_what_is_no_list(mms, tmp_path, caplog):
    service = legacy_service(mms, tmp_path)
    service._preprocess = lambda data: data[0] + b"p"
    service._inference = lambda data: data + b"i"
    service._postprocess = lambda data: data + b"q"
    with caplog.at_level(logging.INFO):
        assert service.handle([{"body": b"-"}], None) == [b"-piq"]
    assert [r.getMessage().split(" time")[0] for r in caplog.records] == [
        "preprocess",
        "inference",
        "postprocess",
    ]


@pytest.mark.parametrize("text", ['{"a": [1, null]}', "{'a': [1, None]}"])
def test_a_legacy_service_reads_json_and_python_literals(mms, tmp_path, text):
    service = legacy_service(mms, tmp_path, "application/json")
    assert service.handle([{"body": bytearray(text.encode())}], None) == [{"a": [1, None]}]


def test_a_legacy_service_needs_its_signature_and_its_inference(mms, tmp_path):
    service = legacy_service(mms, tmp_path, base="ModelService")
    with pytest.raises(NotImplementedError):
        service.handle([{"body": b""}], None)
    (tmp_path / "signature.json").unlink()
    with pytest.raises(ValueError, match=r"Signature file is not found\."):
        service.initialize(context.Context("net", str(tmp_path), legacy_manifest(), 1, None, "1.1.11"))


def legacy_manifest():
    return {"Model": {"Signature": "signature.json"}}


def test_sentences_become_numbers(mms):
    encode = mms("mms.utils.mxnet.nlp").encode_sentences
    coded, vocab = encode([["a", "b"], ["b", "c"]])
    assert coded == [[0, 1], [1, 2]]
    assert vocab == {"\n": -1, "a": 0, "b": 1, "c": 2}
    assert encode([["c", "z"]], vocab) == ([[2, -1]], vocab)
    assert "z" not in vocab
    assert encode([["a", "b"]], invalid_label=1)[0] == [[0, 2]]


def test_a_sentence_longer_than_every_bucket_is_refused(mms):
    with pytest.raises(ValueError, match="no bucket holds 3 words"):
        mms("mms.utils.mxnet.nlp").pad_sentence([1, 2, 3], [1, 2])


# --- with MXNet itself, in a process of its own: its import is slow and warns

MXNET_PROGRAM = """
import base64, io, json, os, sys
import mxnet as mx
from PIL import Image
from mms.model_service.gluon_vision_service import GluonVisionService
from mms.model_service.mxnet_model_service import MXNetBaseService, check_input_shape
from mms.model_service.mxnet_vision_service import MXNetVisionService
from mms.utils.mxnet import image, ndarray, nlp

folder, manifest = sys.argv[1], json.loads(sys.argv[2])
file = io.BytesIO()
Image.new("RGB", (16, 12), (200, 10, 10)).save(file, "png")
png = bytearray(file.getvalue())

array = image.read(png)
assert array.shape == (12, 16, 3)
assert image.read(png, 0).shape == (12, 16, 1)
assert image.read(png)[0, 0].asnumpy().tolist() == [200, 10, 10]
assert image.read(png, to_rgb=False)[0, 0].asnumpy().tolist() == [10, 10, 200]
assert image.resize(array, 8, 4).shape == (4, 8, 3)
assert image.fixed_crop(array, 1, 2, 5, 6).shape == (6, 5, 3)
assert image.fixed_crop(array, 1, 2, 5, 6, (3, 4)).shape == (4, 3, 3)
assert image.random_crop(array, (5, 6))[0].shape == (6, 5, 3)
assert image.transform_shape(array).shape == (1, 3, 12, 16)
assert image.transform_shape(array, "NHWC").shape == (1, 12, 16, 3)
assert image.color_normalize(array, mx.nd.array([200, 10, 10])).asnumpy().max() == 0
for text in (image.write(array, format="png", dim_order="HWC"),
             image.write(array.transpose((2, 0, 1)), format="png")):
    assert image.read(base64.b64decode(text))[0, 0].asnumpy().tolist() == [200, 10, 10]
grey = image.write(image.read(png, 0), flag=0, dim_order="HWC")
assert Image.open(io.BytesIO(base64.b64decode(grey))).mode == "L"
for wrong in (lambda: image.write(array, dim_order="X"), lambda: image.transform_shape(array, "X")):
    try:
        wrong()
    except ValueError:
        continue
    raise SystemExit("accepted a wrong dim_order")

scores = mx.nd.array([[0.1, 0.7, 0.2]])
best = ndarray.top_probability(scores, ["a", "b", "c"], top=2)
assert [each["class"] for each in best] == ["b", "c"] and abs(best[0]["probability"] - 0.7) < 1e-6
assert ndarray.top_probability(scores.reshape((1, 3, 1, 1)), ["a", "b", "c"], top=2) == best

batch = nlp.pad_sentence([4, 5], [1, 3, 9])
assert batch.data[0].asnumpy().tolist() == [[4, 5, -1]] and batch.bucket_key == 3 and batch.pad == 0
assert tuple(batch.provide_data[0].shape) == (1, 3)
assert tuple(nlp.pad_sentence([4, 5], [3], layout="TN").provide_data[0].shape) == (3, 1)

net = mx.sym.softmax(mx.sym.mean(mx.sym.Variable("img"), axis=(2, 3)) * 0.01, name="p")
net = mx.sym.broadcast_add(net, mx.sym.Variable("bias", shape=(1, 3)))
mx.model.save_checkpoint(os.path.join(folder, "net"), 3, net, {"bias": mx.nd.zeros((1, 3))}, {})
open(os.path.join(folder, "synset.txt"), "w").write("red\\ngreen\\nblue\\n")
from mms.context import Context
context = Context("net", folder, manifest, 1, None, "1.1.11")
service = MXNetVisionService("net", folder, manifest)
service.initialize(context)
[answer] = service.handle([{"img": png}], context)
assert answer[0]["class"] == "red" and len(answer) == 3, answer
assert service.ping() == mx.__version__ and service.signature["inputs"][0]["data_name"] == "img"
base = MXNetBaseService("net", folder, manifest)
assert base.inference([[[[[0.0] * 8] * 8] * 3]])[0].startswith("[[0.33")
for inputs in ([], [mx.nd.zeros((1, 3, 8))], [mx.nd.zeros((1, 3, 8, 9))]):
    try:
        check_input_shape(inputs, service.signature)
    except ValueError:
        continue
    raise SystemExit("accepted a wrong shape")

class Net(mx.gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        self.weight = self.params.get("weight", shape=(1, 3), init="ones")

    def hybrid_forward(self, F, x, weight):
        return F.broadcast_mul(F.mean(x, axis=(2, 3)), weight)

trained = Net()
trained.initialize()
trained.save_parameters(os.path.join(folder, "net-0003.params"))
gluon = GluonVisionService("net", folder, manifest, net=Net())
gluon.initialize(context)
[answer] = gluon.handle([{"body": png}], context)
assert answer[0]["class"] == "red" and abs(sum(e["probability"] for e in answer) - 1) < 1e-5
print("ok")
"""


@pytest.mark.mxnet
def test_the_mxnet_modules_do_what_mms_did_with_images_scores_sentences_and_models(tmp_path):
    if importlib.util.find_spec("mxnet") is None:
        pytest.skip("mxnet is not installed")
    program = f"import sys; sys.path[:0] = {[str(COMPAT), str(ROOT)]!r}\n{MXNET_PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), json.dumps(legacy_model(tmp_path))],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "ok"
