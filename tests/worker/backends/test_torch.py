"""What is PyTorch's alone: two formats, what they tell of tensors, kinds of results, and no pickles."""

import logging
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from tiny_torch import Tiny, make, script  # noqa: E402

from mms_lite.errors import BadTensor, HandlerError, InvalidArchive, OutOfMemory  # noqa: E402
from mms_lite.types import TensorSpec  # noqa: E402
from mms_lite.worker.backends import BackendSettings  # noqa: E402
from mms_lite.worker.backends.torch import TorchBackend  # noqa: E402

ROW = np.ones((1, 3), np.float32)
STATED = TensorSpec("x", "FP32", (-1, 3))


class Pair(torch.nn.Module):
    def forward(self, x: torch.Tensor, scale: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        return x * scale, x.sum(1)


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"twice": x * 2, "sum": x.sum(1)}


class Nested(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return x, [x]


class Half(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16)


class Huge(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros([x.size(0), 1 << 50])


class HugeThere(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros([x.size(0), 1 << 45], device=x.device)


class Attention(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"half": (x * mask).to(torch.bfloat16), "length": mask.to(torch.int64).sum(1)}


def open_file(path: Path, **settings: object) -> TorchBackend:
    return TorchBackend.open(BackendSettings(files=(path,), **settings))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of torch.export with two inputs, one by keyword, and a dict of two outputs."""
    path = tmp_path_factory.mktemp("exported") / "attention.pt2"
    rows = torch.export.Dim("rows", min=1, max=8)
    program = torch.export.export(
        Attention(),
        (torch.ones(2, 3),),
        {"mask": torch.ones(2, 3, dtype=torch.bool)},
        dynamic_shapes={"x": {0: rows}, "mask": {0: rows}},
    )
    torch.export.save(program, path)
    return path


def test_torchscript_tells_names_and_its_user_the_rest(tmp_path: Path) -> None:
    (path,) = make(tmp_path).files
    backend = open_file(path)
    assert backend.inputs == (TensorSpec("x", "FP32", None),)
    assert backend.outputs == (TensorSpec("output", "FP32", None),)
    assert open_file(path, inputs=(STATED,)).inputs == (STATED,)
    with pytest.raises(InvalidArchive, match="declares the input 'z'; the model has: x"):
        open_file(path, inputs=(TensorSpec("z", "FP32", (-1, 3)),))


def test_a_tuple_is_numbered_or_named_by_the_archive(tmp_path: Path) -> None:
    path = script(Pair(), tmp_path / "m.pt")
    found = open_file(path).infer({"x": ROW}, ["output__0", "output__1"])
    assert {name: array.tolist() for name, array in found.items()} == {
        "output__0": [[2, 2, 2]],
        "output__1": [3],
    }
    stated = (TensorSpec("twice", "FP32", (-1, 3)), TensorSpec("sum", "FP32", (-1,)))
    backend = open_file(path, outputs=stated)
    assert backend.outputs == stated
    assert backend.infer({"x": ROW}, ["sum"])["sum"].tolist() == [3]
    with pytest.raises(InvalidArchive, match="declares 1 outputs; the model returns 2"):
        open_file(path, outputs=stated[:1])


def test_the_names_of_a_dict_have_to_be_declared_in_torchscript(tmp_path: Path) -> None:
    path = script(Named(), tmp_path / "m.pt")
    with pytest.raises(InvalidArchive, match=r'Dict\[str, Tensor\], .*: declare .*\{"outputs": \[\{"name"'):
        open_file(path)
    backend = open_file(path, outputs=(TensorSpec("sum", "FP32", (-1,)), TensorSpec("more", "FP32", (-1,))))
    assert backend.infer({"x": ROW}, ["sum"])["sum"].tolist() == [3]
    with pytest.raises(HandlerError, match="gave no output 'more'; it gave: twice, sum"):
        backend.infer({"x": ROW}, ["more"])


def test_nested_results_are_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArchive, match=r"returns Tuple\[Tensor, List\[Tensor\]\]: only tensors, or one tuple"
    ):
        open_file(script(Nested(), tmp_path / "m.pt"))
    program = torch.export.export(Nested(), (torch.ones(1, 3),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(InvalidArchive, match="'output__1' is list: only tensors are served"):
        open_file(tmp_path / "m.pt2")


def test_torch_export_tells_all_of_its_inputs_and_outputs(exported: Path) -> None:
    backend = open_file(exported)
    assert backend.inputs == (STATED, TensorSpec("mask", "BOOL", (-1, 3)))
    assert backend.outputs == (TensorSpec("half", "FP32", (-1, 3)), TensorSpec("length", "INT64", (-1,)))
    for rows in (1, 5, 2):
        x, mask = np.full((rows, 3), 1.5, np.float32), np.array([[True, False, True]] * rows)
        found = backend.infer({"mask": mask, "x": x}, ["length", "half"])
        assert found["half"].dtype == np.float32  # bfloat16 in the model
        assert found["half"].tolist() == [[1.5, 0, 1.5]] * rows
        assert found["length"].tolist() == [2] * rows


def test_torch_export_says_which_shape_it_does_not_take(exported: Path) -> None:
    backend = open_file(exported)
    for rows, mask_rows in ((9, 9), (2, 3)):  # past the declared end; not of one length
        inputs = {"x": np.ones((rows, 3), np.float32), "mask": np.ones((mask_rows, 3), np.bool_)}
        with pytest.raises(BadTensor, match=r"does not take its inputs: .*size"):
            backend.infer(inputs, ["half"])


def test_the_kind_is_told_by_the_content_not_by_the_name(exported: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "model.pt"
    renamed.write_bytes(exported.read_bytes())
    assert [spec.name for spec in open_file(renamed).inputs] == ["x", "mask"]
    renamed = make(tmp_path).files[0].rename(tmp_path / "model.pt2")
    assert [spec.name for spec in open_file(renamed).inputs] == ["x"]


def test_torchscript_says_in_one_line_what_it_does_not_take(tmp_path: Path) -> None:
    backend = open_file(*make(tmp_path).files)
    with pytest.raises(BadTensor) as caught:
        backend.infer({"x": np.ones((1, 4), np.float32)}, ["output"])
    assert caught.value.message == (
        "the model does not take its inputs: mat1 and mat2 shapes cannot be multiplied (1x4 and 3x2)"
    )


def test_bfloat16_leaves_as_fp32(tmp_path: Path) -> None:
    found = open_file(script(Half(), tmp_path / "m.pt")).infer({"x": ROW / 4}, ["output"])["output"]
    assert found.dtype == np.float32
    assert found.tolist() == [[0.25] * 3]


def test_arrays_that_cannot_be_written_to_are_taken(tmp_path: Path) -> None:
    frozen = np.frombuffer(ROW.tobytes(), np.float32).reshape(1, 3)
    assert open_file(*make(tmp_path).files).infer({"x": frozen}, ["output"])["output"].tolist() == [
        [9.5, 11.5]
    ]


def test_memory_that_is_not_there_is_told_apart_from_bad_inputs(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="the host ran out of memory"):
        open_file(script(Huge(), tmp_path / "m.pt")).infer({"x": ROW}, ["output"])


def test_weights_alone_and_pickled_modules_come_with_advice(tmp_path: Path) -> None:
    torch.save(Tiny().state_dict(), tmp_path / "weights.pt")
    torch.save(torch.nn.Linear(3, 2), tmp_path / "module.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"weight": 1}))
    for name in ("weights.pt", "module.pt", "old.pt"):
        with pytest.raises(
            InvalidArchive, match=rf"^{name} is .*: save the model with torch\.jit\.script"
        ) as caught:
            open_file(tmp_path / name)
        assert str(tmp_path) not in caught.value.message


class Touch:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_no_pickle_of_an_exported_program_is_run(exported: Path, tmp_path: Path) -> None:
    sprung, trap = tmp_path / "sprung", tmp_path / "trap.pt2"
    torch.save(Touch(sprung), tmp_path / "sample.pt")
    with zipfile.ZipFile(exported) as good, zipfile.ZipFile(trap, "w") as bad:
        for name in good.namelist():
            is_sample = name.endswith("sample_inputs/model.pt")
            bad.writestr(name, (tmp_path / "sample.pt").read_bytes() if is_sample else good.read(name))
    with pytest.raises(InvalidArchive, match=r"cannot load trap\.pt2"):
        open_file(trap)
    assert not sprung.exists()
    torch.load(tmp_path / "sample.pt", weights_only=False)
    assert sprung.exists()  # the trap works


def test_pickled_objects_in_an_exported_program_are_refused(exported: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap.pt2"
    trap.write_bytes(exported.read_bytes())
    with zipfile.ZipFile(trap, "a") as archive:
        archive.writestr("attention/data/constants/opaque_obj_0", pickle.dumps(Touch(tmp_path / "sprung")))
    with pytest.raises(InvalidArchive, match="holds pickled objects of Python, which are not loaded"):
        open_file(trap)


def test_a_damaged_program_and_options_are_refused(exported: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(exported) as good, zipfile.ZipFile(damaged, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, b"{}" if name.endswith("models/model.json") else good.read(name))
    with pytest.raises(InvalidArchive, match=r"^PyTorch cannot load damaged\.pt2: "):
        open_file(damaged)
    with pytest.raises(InvalidArchive, match="the backend torch has no options; got: compile"):
        open_file(exported, options={"compile": True})


def test_threads_are_those_of_the_settings(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        open_file(*make(tmp_path).files, threads=2)
        assert torch.get_num_threads() == 2
        assert torch.get_num_interop_threads() == 1  # else branches that are forked double them
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which PyTorch uses")
def test_a_gpu_that_is_not_there_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backend = open_file(*make(tmp_path).files, device=0)
    assert "GPU 0 is not used: this PyTorch has no CUDA or finds no GPU" in caplog.text
    assert backend.infer({"x": ROW}, ["output"])["output"].tolist() == [[9.5, 11.5]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")
def test_both_kinds_run_on_the_gpu(exported: Path, tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated(0)
    scripted = open_file(*make(tmp_path).files, device=0)
    assert torch.cuda.memory_allocated(0) > before
    assert scripted.infer({"x": ROW}, ["output"])["output"].tolist() == [[9.5, 11.5]]
    found = open_file(exported, device=0).infer({"x": ROW, "mask": np.ones((1, 3), np.bool_)}, ["length"])
    assert found["length"].tolist() == [3]
    with pytest.raises(OutOfMemory, match="the GPU"):
        open_file(script(HugeThere(), tmp_path / "huge.pt"), device=0).infer({"x": ROW}, ["output"])
