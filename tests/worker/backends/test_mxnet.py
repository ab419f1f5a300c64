"""What is MXNet's alone: how its files are made, which arguments are inputs, what tells their shapes."""

import logging
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

backend = pytest.importorskip("mms_lite.worker.backends.mxnet", reason="the mxnet extra is not installed")

from tiny import BIAS, WEIGHT, answer  # noqa: E402
from tiny_mxnet import make, on_device, save, sign  # noqa: E402

from mms_lite.errors import BadTensor, InvalidArchive, OutOfMemory  # noqa: E402
from mms_lite.types import TensorSpec  # noqa: E402
from mms_lite.worker.backends import BackendSettings  # noqa: E402

pytestmark = pytest.mark.mxnet
mx = backend.mx

X = np.arange(15, dtype=np.float32).reshape(5, 3)
PARAMETERS = {"arg:y_weight": WEIGHT.T, "arg:y_bias": BIAS}


def open_files(files: tuple[Path, ...], **settings: object) -> backend.MxnetBackend:
    return backend.MxnetBackend.open(BackendSettings(files=files, **settings))


def dense() -> object:
    return mx.sym.FullyConnected(mx.sym.var("x"), num_hidden=2, name="y")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Half a gigabyte more than the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 29), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_exported_gluon_network_tells_its_channels_and_answers_as_in_gluon(tmp_path):
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.BatchNorm(), mx.gluon.nn.Conv2D(8, 3, activation="relu", groups=2))
    net.add(mx.gluon.nn.BatchNorm(), mx.gluon.nn.GlobalAvgPool2D(), mx.gluon.nn.Dense(4))
    net.initialize(mx.init.Xavier())
    net.hybridize()
    images = np.random.default_rng(0).normal(size=(5, 6, 9, 9)).astype(np.float32)
    expected = net(on_device(images)).asnumpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.export(str(tmp_path / "net"), epoch=3)
    model = open_files((tmp_path / "net-0003.params", tmp_path / "net-symbol.json"))  # in any order
    assert list(model.inputs) == [TensorSpec("data", "FP32", (-1, 6, -1, -1))]
    (output,) = model.outputs
    assert (output.datatype, output.shape) == ("FP32", (-1, 4))
    for rows in (1, 5, 2):
        found = model.infer({"data": images[:rows]}, [output.name])[output.name]
        np.testing.assert_allclose(found, expected[:rows], rtol=1e-4, atol=1e-5)


def test_the_label_of_a_checkpoint_made_for_training_is_no_input(tmp_path):
    symbol = mx.sym.SoftmaxOutput(dense(), mx.sym.var("truth"), name="softmax")
    model = open_files(save(tmp_path, symbol, PARAMETERS), inputs=(TensorSpec("x", "FP32", (-1, 3)),))
    assert [spec.name for spec in model.inputs] == ["x"]
    assert list(model.outputs) == [TensorSpec("softmax_output", "FP32", (-1, 2))]
    for x in (X, X[:2], X):
        powers = np.exp(answer(x) - answer(x).max(1, keepdims=True))
        found = model.infer({"x": x}, ["softmax_output"])["softmax_output"]
        np.testing.assert_allclose(found, powers / powers.sum(1, keepdims=True), rtol=1e-5)


def test_signature_json_states_shapes_its_first_axis_being_the_batch(tmp_path):
    files = save(tmp_path, mx.sym.FullyConnected(mx.sym.var("x"), num_hidden=2, name="y"), PARAMETERS)
    assert open_files(files).inputs[0].shape is None
    sign(tmp_path, x=[32, 3, 0])
    assert open_files(files).inputs[0].shape == (-1, 3, -1)
    sign(tmp_path, image=[0, 3])
    with pytest.raises(InvalidArchive, match=r"signature.json names the input 'image'; the model has: x$"):
        open_files(files)
    (tmp_path / "signature.json").write_text('{"inputs": [3]}')
    with pytest.raises(InvalidArchive, match=r'signature.json is not {"inputs"'):
        open_files(files)


def test_what_the_archive_states_comes_before_signature_json(tmp_path):
    model = open_files(make(tmp_path).files, inputs=(TensorSpec("x", "FP32", (5, 3)),))
    assert (model.inputs[0].shape, model.outputs[0].shape) == ((5, 3), (5, 2))
    with pytest.raises(
        InvalidArchive, match=r"Shape inconsistent, Provided = \[2,3\], inferred shape=\(2,4\)"
    ):
        open_files(make(tmp_path).files, inputs=(TensorSpec("x", "FP32", (-1, 4)),))
    with pytest.raises(InvalidArchive, match="MXNet has no UINT16"):
        open_files(make(tmp_path).files, inputs=(TensorSpec("x", "UINT16", (-1, 3)),))


def test_parameters_tell_the_inputs_datatype(tmp_path):
    doubles = {name: array.astype(np.float64) for name, array in PARAMETERS.items()}
    model = open_files(save(tmp_path, dense(), doubles))
    assert (model.inputs[0].datatype, model.outputs[0].datatype) == ("FP64", "FP64")
    found = model.infer({"x": X.astype(np.float64)}, ["y_output"])["y_output"]
    np.testing.assert_array_equal(found, answer(X.astype(np.float64)))


def test_parameters_that_are_lost_or_were_written_by_save_parameters_are_refused(tmp_path):
    with pytest.raises(InvalidArchive, match=r"lacks: y_bias$"):
        open_files(save(tmp_path, dense(), {"arg:y_weight": WEIGHT.T}))
    with pytest.raises(InvalidArchive, match=r"net.export\(\).*not with save_parameters"):
        open_files(save(tmp_path, dense(), {"weight": WEIGHT.T, "bias": BIAS}))


def test_a_model_is_one_symbol_and_one_file_of_parameters(tmp_path):
    symbol, parameters = make(tmp_path).files
    with pytest.raises(
        InvalidArchive, match=r"one NAME-symbol.json and one NAME-NNNN.params; .*: tiny-symbol"
    ):
        open_files((symbol,))
    with pytest.raises(InvalidArchive, match="one NAME-symbol"):
        open_files((symbol, parameters, parameters))


def test_inputs_that_the_network_refuses_are_the_clients_fault(tmp_path):
    model = open_files(save(tmp_path, dense(), PARAMETERS))  # nothing tells their shape
    with pytest.raises(BadTensor, match=r"cannot take x FP32 \[5,4\]: .*Shape inconsistent[^\n]*$"):
        model.infer({"x": np.ones((5, 4), np.float32)}, ["y_output"])
    with pytest.raises(BadTensor, match=r"'x' is a scalar"):
        model.infer({"x": np.ones((), np.float32)}, ["y_output"])
    np.testing.assert_array_equal(model.infer({"x": X}, ["y_output"])["y_output"], answer(X))


def test_running_out_of_memory_fails_that_request_alone(tmp_path, little_memory):
    rows, columns = (mx.sym.expand_dims(mx.sym.var("x"), axis) for axis in (0, 1))
    model = open_files(save(tmp_path, mx.sym.broadcast_add(rows, columns, name="table") * 2, {}))
    (name,) = (spec.name for spec in model.outputs)
    with pytest.raises(OutOfMemory):
        model.infer({"x": np.ones(20_000, np.float32)}, [name])  # 1.6 GB
    assert model.infer({"x": np.ones(3, np.float32)}, [name])[name].tolist() == [[4, 4, 4]] * 3


def test_options_are_the_flags_of_hybridize(tmp_path):
    files = make(tmp_path).files
    model = open_files(files, options={"static_alloc": False, "subgraph_backend": "NONE"})
    np.testing.assert_array_equal(model.infer({"x": X}, ["y_output"])["y_output"], answer(X))
    with pytest.raises(InvalidArchive, match="Cannot find argument 'static'"):
        open_files(files, options={"static": True})


def test_threads_and_a_gpu_that_mxnet_will_not_use_are_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with caplog.at_level(logging.WARNING):
        model = open_files(make(tmp_path).files, threads=4, device=99)
    assert "MXNet uses OMP_NUM_THREADS=1, not 4 threads" in caplog.text
    assert "GPU 99 is not used" in caplog.text
    np.testing.assert_array_equal(model.infer({"x": X}, ["y_output"])["y_output"], answer(X))
