"""What is ONNX Runtime's alone: names and types, what files say, its options, its faults, and the GPU."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

onnx = pytest.importorskip("onnx", reason="onnx, which writes the models of these tests, is not installed")
ort = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from onnx import TensorProto, helper  # noqa: E402
from tiny import WEIGHT, answer  # noqa: E402
from tiny_onnx import GEMM, WEIGHTS, X, Y, build, reaching_outside, save  # noqa: E402
from tiny_onnxruntime import make  # noqa: E402

from mms_lite.errors import BadTensor, InvalidArchive, OutOfMemory  # noqa: E402
from mms_lite.types import TensorSpec  # noqa: E402
from mms_lite.worker.backends import BackendSettings  # noqa: E402
from mms_lite.worker.backends.onnxruntime import OnnxRuntimeBackend  # noqa: E402

ROW = np.ones((1, 3), np.float32)


def open_file(path: Path, **settings: Any) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend.open(BackendSettings(files=(path,), **settings))


def test_metadata_are_the_files_own_and_a_weight_that_is_listed_as_an_input_is_none(tmp_path: Path) -> None:
    weight = {"W": (TensorProto.FLOAT, [3, 2])}
    model = build([GEMM], {**X, **weight}, Y, WEIGHTS)
    model.producer_name, model.doc_string = "a tool", "what it is for"
    model.metadata_props.add(key="character", value="a\nb")
    backend = open_file(save(model, tmp_path / "m.onnx"))
    assert backend.inputs == (TensorSpec("x", "FP32", (-1, 3)),)
    assert backend.metadata == {
        "producer": "a tool",
        "graph": "tiny",
        "description": "what it is for",
        "character": "a\nb",
    }


@pytest.mark.parametrize(
    ("element", "datatype", "values"),
    [
        (TensorProto.BOOL, "BOOL", np.array([True, False])),
        (TensorProto.UINT8, "UINT8", np.array([0, 255], np.uint8)),
        (TensorProto.INT64, "INT64", np.array([-1, 2**62])),
        (TensorProto.FLOAT16, "FP16", np.array([0.5, -2], np.float16)),
        (TensorProto.DOUBLE, "FP64", np.array([1e-300, 1.0])),
        (TensorProto.STRING, "BYTES", np.array(["né".encode(), b""], np.object_)),
    ],
)
def test_arrays_of_each_kind_go_through(
    tmp_path: Path, element: int, datatype: str, values: np.ndarray
) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    model = build([node], {"x": (element, ["N"])}, {"y": (element, ["N"])})
    backend = open_file(save(model, tmp_path / "m.onnx"))
    assert backend.inputs == (TensorSpec("x", datatype, (-1,)),)
    found = backend.infer({"x": values}, ["y"])["y"]
    assert found.tolist() == (["né", ""] if datatype == "BYTES" else values.tolist())


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    text = (TensorProto.STRING, ["N"])
    model = build([helper.make_node("Identity", ["x"], ["y"])], {"x": text}, {"y": text})
    backend = open_file(save(model, tmp_path / "m.onnx"))
    with pytest.raises(BadTensor, match="input 'x' has text that is not UTF-8"):
        backend.infer({"x": np.array([b"\xff"], np.object_)}, ["y"])


def test_tensors_that_arrays_cannot_hold_are_refused_at_load(tmp_path: Path) -> None:
    model = build(
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": (TensorProto.BFLOAT16, ["N"])},
        {"y": (TensorProto.BFLOAT16, ["N"])},
    )
    with pytest.raises(
        InvalidArchive, match=r"the model's 'x' is a tensor\(bfloat16\), which cannot be served"
    ):
        open_file(save(model, tmp_path / "m.onnx"))


def test_outputs_that_are_no_tensors_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in scikit-learn's classifiers, whose probabilities are a sequence of maps."""
    model = build([GEMM], X, Y, WEIGHTS)
    zipped = helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    model.graph.node.append(zipped)
    maps = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    model.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(maps)))
    backend = open_file(save(model, tmp_path / "m.onnx"))
    assert [spec.name for spec in backend.outputs] == ["y"]
    assert "output z is a seq(map(int64,tensor(float))) and is left out" in caplog.text
    assert backend.infer({"x": ROW}, ["y"])["y"].tolist() == answer(ROW).tolist()


def test_weights_lie_beside_the_file_and_are_missed_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(
        build([GEMM], X, Y, WEIGHTS), path, save_as_external_data=True, location="m.data", size_threshold=1
    )
    assert open_file(path).infer({"x": ROW}, ["y"])["y"].tolist() == answer(ROW).tolist()
    (tmp_path / "m.data").unlink()
    with pytest.raises(InvalidArchive, match=r"m\.data") as caught:
        open_file(path)
    assert str(tmp_path) not in caught.value.message


@pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24),
    reason="this ONNX Runtime reads weights from outside of the model's folder",
)
def test_weights_outside_the_folder_are_refused_without_telling_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidArchive, match="External data path escapes model directory") as caught:
        open_file(reaching_outside(tmp_path / "m"))
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    ("side", "stated"),
    [
        ("inputs", TensorSpec("x", "INT64", (-1, 3))),
        ("inputs", TensorSpec("x", "FP32", (-1,))),
        ("inputs", TensorSpec("x", "FP32", (-1, 4))),
        ("outputs", TensorSpec("y", "INT64", (-1, 2))),
        ("outputs", TensorSpec("y", "FP32", (7,))),
    ],
)
def test_a_declaration_that_no_request_could_meet_is_refused(
    tmp_path: Path, side: str, stated: TensorSpec
) -> None:
    path = make(tmp_path).files[0]
    with pytest.raises(InvalidArchive) as caught:
        open_file(path, **{side: (stated,)})
    own = {"inputs": "x FP32 [-1,3]", "outputs": "y FP32 [-1,2]"}[side]
    message = f"the handler config declares the {side[:-1]} {stated}; the file says {own}"
    assert caught.value.message == message


def test_a_declaration_may_fix_lengths_and_say_what_a_file_leaves_open(tmp_path: Path) -> None:
    """The file does not say how many axes its output has, nor how long those of its input are."""
    float_ = TensorProto.FLOAT
    model = build([helper.make_node("Abs", ["x"], ["y"])], {"x": (float_, ["N", "M"])}, {"y": (float_, None)})
    stated = TensorSpec("x", "FP32", (-1, 3)), TensorSpec("y", "FP32", (-1, 3))
    backend = open_file(save(model, tmp_path / "m.onnx"), inputs=stated[:1], outputs=stated[1:])
    assert (*backend.inputs, *backend.outputs) == stated


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("ir", "Unsupported model IR version: 99, max supported IR version"),
        ("opset", "Opset 99 .* till opset"),
    ],
)
def test_a_model_from_the_future_is_told_apart_from_a_damaged_one(
    tmp_path: Path, version: str, says: str
) -> None:
    model = build([GEMM], X, Y, WEIGHTS)
    if version == "ir":
        model.ir_version = 99
    else:
        model.opset_import[0].version = 99
    with pytest.raises(InvalidArchive, match=says) as caught:
        open_file(save(model, tmp_path / "m.onnx"))
    assert ort.__version__ in caught.value.message
    assert "/" not in caught.value.message


def test_values_that_the_model_cannot_take_are_the_clients_fault(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    x, y = {"x": (TensorProto.INT64, ["N"])}, {"y": (TensorProto.FLOAT, ["N", 2])}
    backend = open_file(save(build([node], x, y, {"table": WEIGHT}), tmp_path / "m.onnx"))
    with pytest.raises(BadTensor, match="idx=7 must be within the inclusive range"):
        backend.infer({"x": np.array([7])}, ["y"])
    assert backend.infer({"x": np.array([2])}, ["y"])["y"].tolist() == [[5, 6]]


def test_an_allocation_that_fails_is_out_of_memory(tmp_path: Path) -> None:
    node = helper.make_node("ConstantOfShape", ["x"], ["y"])
    model = build([node], {"x": (TensorProto.INT64, [2])}, {"y": (TensorProto.FLOAT, ["H", "W"])})
    backend = open_file(save(model, tmp_path / "m.onnx"))
    with pytest.raises(OutOfMemory):
        backend.infer({"x": np.array([1 << 22, 1 << 22])}, ["y"])  # 64 TiB
    assert backend.infer({"x": np.array([1, 2])}, ["y"])["y"].tolist() == [[0, 0]]


def test_a_session_has_the_threads_that_it_is_given(tmp_path: Path) -> None:
    (path,) = make(tmp_path).files
    before = psutil.Process().num_threads()
    backend = open_file(path, threads=4)
    assert psutil.Process().num_threads() == before + 3  # and the one that calls
    backend.close()
    assert psutil.Process().num_threads() == before


def test_options_are_the_runtimes_own_and_others_are_refused(tmp_path: Path) -> None:
    (path,) = make(tmp_path).files
    open_file(path, options={"session": {"session.intra_op.allow_spinning": True}, "cuda": {"a": 1}}).close()
    with pytest.raises(InvalidArchive, match="no option 'threads'; there are: session, cuda"):
        open_file(path, options={"threads": 2})
    for entries in (["a"], {"a": ["b"]}, {"a": None}):
        with pytest.raises(InvalidArchive, match=r"'session' .* is not an object of plain values"):
            open_file(path, options={"session": entries})


def test_without_cuda_the_cpu_answers_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with caplog.at_level(logging.WARNING):
        backend = open_file(*make(tmp_path).files, device=1)
    assert "GPU 1 is not used: this ONNX Runtime has no CUDA provider" in caplog.text
    assert backend.infer({"x": ROW}, ["y"])["y"].tolist() == answer(ROW).tolist()


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers() or not Path("/dev/nvidia0").exists(),
    reason="no NVIDIA GPU with onnxruntime-gpu here",
)
def test_a_gpu_answers_as_the_cpu_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = make(tmp_path).files
    backend = open_file(path, device=0, options={"cuda": {"gpu_mem_limit": 1 << 30}})
    assert "is not used" not in caplog.text
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    np.testing.assert_allclose(backend.infer({"x": x}, ["y"])["y"], answer(x), rtol=1e-3)  # TF32
    with pytest.raises(InvalidArchive, match="gpu_memory"):
        open_file(path, device=0, options={"cuda": {"gpu_memory": 1}})
