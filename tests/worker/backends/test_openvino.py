"""What is OpenVINO's alone: names of ports, shapes that are declared, properties, devices, its faults."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="the openvino extra is not installed")

from openvino import opset13 as ops  # noqa: E402
from tiny import answer  # noqa: E402
from tiny_openvino import make, named, save  # noqa: E402

from mms_lite.errors import BadTensor, InvalidArchive, OutOfMemory  # noqa: E402
from mms_lite.types import TensorSpec  # noqa: E402
from mms_lite.worker.backends import BackendSettings  # noqa: E402
from mms_lite.worker.backends.openvino import OpenVinoBackend, _device  # noqa: E402

ROW = np.ones((1, 3), np.float32)


def open_file(path: Path, **settings: Any) -> OpenVinoBackend:
    return OpenVinoBackend.open(BackendSettings(files=(path,), **settings))


def identity(path: Path, *names: str, shape: Any = (-1, 3), kind: Any = np.float32) -> Path:
    """Write a model whose one output, of these names (`y`), is its one input, called `x`."""
    x = ops.parameter(ov.PartialShape(list(shape)) if isinstance(shape, tuple) else shape, kind, name="x")
    y = ops.reshape(x, ops.constant([-1]), False) if kind is ov.Type.string else ops.convert_like(x, x)
    return save(ov.Model([named(y, *(names or ("y",)))], [named(x, "x")], "m"), path)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("Identity:0",), "Identity"),
        (("StatefulPartitionedCall/model/add:0", "scores:0"), "scores"),  # the shortest
        (("b", "a"), "a"),  # whatever the order
    ],
)
def test_a_port_has_one_friendly_name_that_does_not_change(
    tmp_path: Path, names: tuple[str, ...], found: str
) -> None:
    backend = open_file(identity(tmp_path / "m.xml", *names))
    assert [spec.name for spec in backend.outputs] == [found]
    assert backend.infer({"x": ROW}, [found])[found].tolist() == ROW.tolist()


def test_a_port_without_names_is_called_as_its_node_is(tmp_path: Path) -> None:
    x = named(ops.parameter([1], np.float32), "x")
    result = ops.result(ops.abs(x))
    result.set_friendly_name("prob/sink_port_0")
    path = save(ov.Model([result], [x], "m"), tmp_path / "m.xml")
    for _ in range(2):
        assert [spec.name for spec in open_file(path).outputs] == ["prob"]


def test_names_keep_their_suffix_where_it_tells_them_apart(tmp_path: Path) -> None:
    x = named(ops.parameter([1], np.float32), "x")
    one, two = named(ops.abs(x), "y:0"), named(ops.negative(x), "y")
    backend = open_file(save(ov.Model([one, two], [x], "m"), tmp_path / "m.xml"))
    assert [spec.name for spec in backend.outputs] == ["y:0", "y"]
    found = backend.infer({"x": np.array([-2], np.float32)}, ["y", "y:0"])
    assert {name: array.tolist() for name, array in found.items()} == {"y": [2], "y:0": [2]}


def test_shapes_are_as_free_as_the_model_is_once_it_has_a_rank(tmp_path: Path) -> None:
    bounded = (ov.Dimension(1, 8), -1, 3)
    assert open_file(identity(tmp_path / "a.xml", shape=bounded)).inputs[0].shape == (-1, -1, 3)
    free = identity(tmp_path / "b.xml", shape=ov.PartialShape.dynamic())
    with pytest.raises(InvalidArchive, match="how many axes its input 'x' has: declare its shape"):
        open_file(free)
    stated = TensorSpec("x", "FP32", (-1, 3))
    assert open_file(free, inputs=(stated,)).infer({"x": ROW}, ["y"])["y"].tolist() == ROW.tolist()


@pytest.mark.parametrize("threads", [1, 2])
def test_inputs_that_do_not_suit_each_other_harm_no_later_answer(tmp_path: Path, threads: int) -> None:
    """With one thread OpenVINO's `infer` answers such inputs, and those after them, with what was before."""
    a, b = (named(ops.parameter([-1, -1], np.float32), name) for name in "ab")
    total = named(ops.add(ops.abs(a), ops.negative(b), "none"), "y")
    path = save(ov.Model([total], [a, b], "m"), tmp_path / "m.xml")
    backend = open_file(path, threads=threads)
    four, one = np.full((2, 3), 4, np.float32), np.ones((2, 3), np.float32)
    assert backend.infer({"a": four, "b": one}, ["y"])["y"].tolist() == [[3] * 3] * 2
    with pytest.raises(BadTensor, match=r"the model refuses the inputs: .*mismatch"):
        backend.infer({"a": four, "b": np.ones((2, 4), np.float32)}, ["y"])
    assert backend.infer({"a": one, "b": one}, ["y"])["y"].tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64, np.float16, np.float64])
def test_arrays_of_each_kind_go_through(tmp_path: Path, kind: type) -> None:
    backend = open_file(identity(tmp_path / "m.xml", kind=kind))
    found = backend.infer({"x": np.ones((2, 3), kind)}, ["y"])["y"]
    assert (found.dtype, found.tolist()) == (np.dtype(kind), np.ones((2, 3), kind).tolist())


def test_text_goes_through_if_it_is_utf8(tmp_path: Path) -> None:
    backend = open_file(identity(tmp_path / "m.xml", kind=ov.Type.string))
    assert backend.inputs == (TensorSpec("x", "BYTES", (-1, 3)),)
    sent = np.array([["né".encode(), b"", b"b"]], np.object_)
    assert backend.infer({"x": sent}, ["y"])["y"].tolist() == ["né", "", "b"]
    with pytest.raises(BadTensor, match="input 'x' has text that is not UTF-8"):
        backend.infer({"x": np.array([[b"\xff", b"", b""]], np.object_)}, ["y"])


@pytest.mark.parametrize("kind", ["bf16", "u1", "i4"])
def test_types_that_arrays_cannot_hold_are_refused_at_load(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InvalidArchive, match=f"the model's 'x' is of type {kind}, which cannot be served"):
        open_file(identity(tmp_path / "m.xml", kind=getattr(ov.Type, kind)))


def test_a_declared_shape_frees_a_batch_that_the_file_fixes(tmp_path: Path) -> None:
    path = identity(tmp_path / "m.xml", "y", shape=(1, 3))
    assert open_file(path).outputs == (TensorSpec("y", "FP32", (1, 3)),)
    backend = open_file(path, inputs=(TensorSpec("x", "FP32", (-1, 3)),))
    assert backend.inputs == (TensorSpec("x", "FP32", (-1, 3)),)
    assert backend.outputs == (TensorSpec("y", "FP32", (-1, 3)),)
    assert backend.infer({"x": np.ones((4, 3), np.float32)}, ["y"])["y"].shape == (4, 3)


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        (TensorSpec("x", "FP32", (-1, 4)), "cannot have the declared input shapes: .*dimension=4"),
        (TensorSpec("x", "FP64", (-1, 3)), r"declares the input x FP64 \[-1,3\]; the model says x FP32"),
        (TensorSpec("x", "FP32", (-1,)), r"declares the input x FP32 \[-1\]; the model says x FP32 \[-1,3\]"),
        (TensorSpec("z", "FP32", (-1, 3)), "declares the input 'z'; the model has: x"),
    ],
)
def test_a_declaration_that_does_not_suit_the_model_is_refused(
    tmp_path: Path, stated: TensorSpec, says: str
) -> None:
    with pytest.raises(InvalidArchive, match=says):
        open_file(make(tmp_path).files[0], inputs=(stated,))


@pytest.mark.parametrize("stated", [TensorSpec("y", "INT64", (-1, 2)), TensorSpec("y", "FP32", (7,))])
def test_an_output_is_not_declared_of_another_datatype_or_rank(tmp_path: Path, stated: TensorSpec) -> None:
    with pytest.raises(InvalidArchive, match=r"declares the output y .*; the model says y FP32 \[-1,2\]"):
        open_file(make(tmp_path).files[0], outputs=(stated,))


def test_what_is_kept_for_shapes_that_came_is_bounded_unless_the_archive_says_otherwise(
    tmp_path: Path,
) -> None:
    path = make(tmp_path).files[0]
    for options, wanted in (({}, 1000), ({"CPU_RUNTIME_CACHE_CAPACITY": 5}, 5)):
        _, properties = _device(ov.Core(), BackendSettings(files=(path,), options=options))
        assert properties["CPU_RUNTIME_CACHE_CAPACITY"] == wanted
        open_file(path, options=options).close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"SPEED": "high"}, "Unsupported property SPEED"),
        ({"PERFORMANCE_HINT": "FASTEST"}, "PERFORMANCE_HINT. Expected only"),
        ({"NUM_STREAMS": [1]}, "option 'NUM_STREAMS' .* is not text, a number, true or false"),
    ],
)
def test_properties_that_openvino_does_not_know_are_refused(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    path = make(tmp_path).files[0]
    open_file(path, options={"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}).close()
    with pytest.raises(InvalidArchive, match=says):
        open_file(path, options=options)


def test_weights_that_are_missing_are_told_of(tmp_path: Path) -> None:
    path, weights = make(tmp_path).files
    weights.unlink()
    with pytest.raises(InvalidArchive, match=r"tiny\.xml cannot be read by OpenVINO: .*bin file"):
        open_file(path)


def test_onnx_files_are_read_too_with_their_metadata(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx, which writes this test's model, is not installed")
    import tiny_onnx

    model = onnx.load(tiny_onnx.tiny(tmp_path))
    model.metadata_props.add(key="character", value="a\nb")
    backend = open_file(tiny_onnx.save(model, tmp_path / "m.onnx"))
    assert backend.metadata["character"] == "a\nb"
    assert backend.infer({"x": ROW}, ["y"])["y"].tolist() == answer(ROW).tolist()


def test_onnx_files_that_reach_outside_are_refused_without_telling_where_they_are(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx, which writes this test's model, is not installed")
    import tiny_onnx

    with pytest.raises(InvalidArchive, match=r"cannot be read by OpenVINO: .*outside") as caught:
        open_file(tiny_onnx.reaching_outside(tmp_path / "m"))
    assert str(tmp_path) not in caught.value.message


def test_an_allocation_that_fails_is_out_of_memory(tmp_path: Path) -> None:
    shape = named(ops.parameter([2], np.int64), "x")
    zeros = named(ops.broadcast(ops.constant(np.float32(0)), shape), "y")
    backend = open_file(save(ov.Model([zeros], [shape], "m"), tmp_path / "m.xml"))
    with pytest.raises(OutOfMemory):
        backend.infer({"x": np.array([1 << 20, 1 << 20])}, ["y"])  # 4 TiB
    assert backend.infer({"x": np.array([1, 2])}, ["y"])["y"].tolist() == [[0, 0]]


def test_without_such_a_gpu_the_cpu_answers_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = open_file(make(tmp_path).files[0], device=77)
    assert "GPU 77 is not used: OpenVINO finds no such device" in caplog.text
    assert backend.infer({"x": ROW}, ["y"])["y"].tolist() == answer(ROW).tolist()
