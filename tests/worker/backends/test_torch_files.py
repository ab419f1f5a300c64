"""Files of PyTorch that would run code or touch files while they load or answer are refused unloaded."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from tiny_torch import make, rewritten, script  # noqa: E402

from mms_lite.errors import InvalidArchive  # noqa: E402
from mms_lite.worker.backends import BackendSettings  # noqa: E402
from mms_lite.worker.backends.torch import TorchBackend  # noqa: E402

GRAPH = "models/model.json"
IMAGE = torch.zeros(2, 3, 64, 80)


def open_file(path: Path) -> TorchBackend:
    return TorchBackend.open(BackendSettings(files=(path,)))


class Strided(torch.nn.Module):
    """Lengths that are floor divisions, maxima and roundings of the input's."""

    def __init__(self) -> None:
        super().__init__()
        conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.layers = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.MaxPool2d(3, 2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.nn.functional.interpolate(self.layers(x), scale_factor=2.5)
        return y, y.flatten(1, 2).mean(-1)


class Selected(torch.nn.Module):
    """Lengths that depend on values, and a subgraph for each side of a condition."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        halved = torch.cond(x.shape[0] > 4, lambda x: x / 2, lambda x: x * 2, (x,))
        return x[(x > 0.5).nonzero().squeeze(1)], halved


class Keyed(torch.nn.Module):
    def forward(self, x: dict[str, torch.Tensor], *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"the sum": torch.einsum("bi,i->b", x["in put"], scale)}


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doubled") / "doubled.pt2"
    rows = torch.export.Dim("rows", min=1, max=100)
    program = torch.export.export(Doubled(), (torch.zeros(2, 3),), dynamic_shapes={"x": {0: rows}})
    torch.export.save(program, path)
    return path


AUTO = torch.export.Dim.AUTO
GOOD = {
    "strided": (Strided(), (IMAGE,), {}, {"x": {0: AUTO, 2: AUTO, 3: AUTO}}),
    "multiples": (
        Strided(),
        (IMAGE,),
        {},
        {"x": {2: 16 * torch.export.Dim("high", max=9), 3: 16 * torch.export.Dim("wide", max=9)}},
    ),
    "fixed": (Strided(), (IMAGE,), {}, None),
    "selected": (Selected(), (torch.ones(8),), {}, {"x": {0: AUTO}}),
    "keyed": (Keyed(), ({"in put": torch.ones(2, 3)},), {"scale": torch.ones(3)}, None),
}


@pytest.mark.parametrize("kind", GOOD)
def test_what_torch_export_writes_is_loaded(kind: str, tmp_path: Path) -> None:
    module, args, kwargs, shapes = GOOD[kind]
    program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "m.pt2")
    assert open_file(tmp_path / "m.pt2").outputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of quantizing
def test_what_torchscript_writes_is_loaded(tmp_path: Path) -> None:
    backend = open_file(script(Strided(), tmp_path / "m.pt"))  # its layers have numbers for names
    found = backend.infer({"x": IMAGE.numpy()}, ["output__1"])["output__1"]
    assert found.shape == (2, 148)
    quantized = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    quantized = torch.ao.quantization.quantize_dynamic(quantized, {torch.nn.Linear})
    backend = open_file(script(quantized, tmp_path / "q.pt"))  # with __setstate__ and classes in C++
    (name,) = [spec.name for spec in backend.inputs]
    assert backend.infer({name: np.ones((1, 3), np.float32)}, ["output"])["output"].shape == (1, 2)


def test_no_expression_of_an_exported_program_is_run(doubled: Path, tmp_path: Path) -> None:
    import sympy

    sprung = tmp_path / "sprung"
    evil = f"__import__('pathlib').Path('{sprung}').touch() or 1"
    bad = rewritten(
        doubled,
        tmp_path / "m.pt2",
        GRAPH,
        lambda graph: re.sub(rb'"expr_str": ?"[^"]*"', f'"expr_str": "{evil}"'.encode(), graph),
    )
    with pytest.raises(
        InvalidArchive, match=r"^m\.pt2 holds an expression .* does not write: __import__\('p"
    ):
        open_file(bad)
    assert not sprung.exists()
    sympy.sympify(evil)
    assert sprung.exists()  # the trap works


def changed(graph: bytes, change: Callable[[dict], None]) -> bytes:
    content = json.loads(graph)
    change(content)
    return json.dumps(content).encode()


def node(content: dict) -> dict:
    return content["graph_module"]["graph"]["nodes"][0]


def signature(content: dict) -> dict:
    return content["graph_module"]["module_call_graph"][0]["signature"]


def tree(kind: str, context: object) -> str:
    inner = {"type": kind, "context": json.dumps(context), "children_spec": []}
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [inner]}])


FACTORY = {"default_factory_module": "os", "default_factory_name": "system", "dict_context": []}
EVIL = {
    "a function": (lambda c: node(c).update(target="torch.os.system"), "the operator torch.os.system"),
    "a file": (
        lambda c: node(c).update(target="torch.ops.aten.from_file.default"),
        "the operator torch.ops.aten.from_file",
    ),
    "a method": (lambda c: node(c).update(target="torch.ops.aten.add.overloads"), "does not have"),
    "a call by a subgraph": (
        lambda c: node(c)["inputs"][0].update(arg={"as_operator": "torch.hub.load"}),
        "the operator torch.hub.load",
    ),
    "a guard": (lambda c: c.update(guards_code=["__import__('os').getpid()"]), "an expression"),
    "a guard's method": (lambda c: c.update(guards_code=["L['x'].__class__()"]), "an expression"),
    "a guard's comment": (lambda c: c.update(guards_code=["1 == 1)#\n(1"]), "an expression"),
    "a node": (lambda c: node(c).update(name="x = None\n    evil"), "a name"),
    "an argument": (lambda c: signature(c).update(forward_arg_names=["x=print()"]), "a name"),
    "a weight": (lambda c: c["graph_module"].update(more={"parameter_name": 'w"+print()+"'}), "a name"),
    "an attribute": (lambda c: c["graph_module"].update(more={"fqn": "a.__class__.b"}), "a name"),
    "a constant's bound": (
        lambda c: c["range_constraints"].update(s0={"min_val": "print()", "max_val": None}),
        "a name",
    ),
    "a default": (
        lambda c: signature(c).update(in_spec=tree("collections.defaultdict", FACTORY)),
        "a structure",
    ),
    "an enum": (
        lambda c: signature(c).update(in_spec=tree("builtins.dict", [{"__enum__": True, "fqn": "os:x"}])),
        "a structure",
    ),
    "a keyword": (
        lambda c: signature(c).update(in_spec=tree("builtins.dict", ["a':print(),'b"])),
        "a structure",
    ),
    "another schema": (
        lambda c: c["schema_version"].update(major=9),
        "of another schema of torch.export than 8",
    ),
}


@pytest.mark.parametrize("what", EVIL)
def test_an_exported_program_runs_only_operators_on_tensors(what: str, doubled: Path, tmp_path: Path) -> None:
    change, told = EVIL[what]
    bad = rewritten(doubled, tmp_path / "m.pt2", GRAPH, lambda graph: changed(graph, change))
    with pytest.raises(InvalidArchive, match=rf"^m\.pt2 .*{re.escape(told)}"):
        open_file(bad)


def test_no_key_of_the_example_inputs_is_run(doubled: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    key = f"+str(__import__('pathlib').Path('{sprung}').touch()))#"  # guards quote it
    torch.save((({key: torch.ones(2, 3)},), {}), tmp_path / "sample.pt")
    sample = (tmp_path / "sample.pt").read_bytes()
    bad = rewritten(doubled, tmp_path / "m.pt2", "sample_inputs/model.pt", lambda _: sample)
    with pytest.raises(InvalidArchive, match=r"^m\.pt2 holds a name .* does not write: .*__import__"):
        open_file(bad)
    assert not sprung.exists()
    with bad.open("rb") as file:
        torch.export.load(file).module()(torch.ones(2, 3))
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    ("member", "told"),
    [
        ("doubled/data/aotinductor/model/m.so", "holds data/aotinductor/model/m.so"),
        ("doubled/data/constants/custom_obj_0", "pickled objects"),
        ("doubled/MODELS/model.json", "two members of one name"),
        ("version", "before 2.8"),
    ],
)
def test_members_that_are_no_part_of_a_program_are_refused(
    member: str, told: str, doubled: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "m.pt2"
    bad.write_bytes(doubled.read_bytes())
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr(member, pickle.dumps(1))
    with pytest.raises(InvalidArchive, match=rf"^m\.pt2 .*{re.escape(told)}"):
        open_file(bad)


class Restored(torch.nn.Module):
    """A module that saves a file while it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchscript_writes_no_file_while_it_loads(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    path = script(Restored(str(sprung)), tmp_path / "m.pt")
    sprung.unlink(missing_ok=True)  # saving may copy the module, and so restore it
    with pytest.raises(InvalidArchive, match=r"^m\.pt calls the operator aten::save; only those"):
        open_file(path)
    assert not sprung.exists()
    with pytest.warns(DeprecationWarning):
        torch.jit.load(path)
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ('torch.save(x, "/nowhere/x")', "the operator aten::save"),
        ('x.save("/nowhere/x")', "the operator aten::save"),
        ('(torch. # so\n save)(x, "/nowhere/x")', "the operator aten::save"),
        ('torch.\\\nfrom_file("/nowhere/x")', "the operator aten::from_file"),
        ('getattr(torch, "from_file")("/nowhere/x")', "the operator aten::from_file"),
        ('getattr(torch, "from_" "file")("/nowhere/x")', "an expression"),
        ('getattr(torch, "from\\x5ffile")("/nowhere/x")', "an expression"),
        ("ops.c10d.barrier()", "the operator c10d::barrier"),
        ("o = ops", "the operator ops"),
        ("__torch__.torch.classes.c10d.Store()", "the class torch.classes.c10d.Store"),
        ("t = __torch__.torch", "an expression"),
    ],
)
def test_torchscript_calls_only_operators_on_tensors(statement: str, told: str, tmp_path: Path) -> None:
    (good,) = make(tmp_path).files
    line = f"    {statement}\n    return".encode()
    bad = rewritten(good, tmp_path / "m.pt", ".py", lambda code: code.replace(b"    return", line))
    with pytest.raises(InvalidArchive, match=rf"^m\.pt .*{re.escape(told)}"):
        open_file(bad)


def test_a_class_in_cpp_that_a_pickle_names_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/data.pkl", b"\x80\x02c__torch__.torch\nclasses.c10d.Store\n)\x81}b.")
        archive.writestr("m/version", b"3\n")
    with pytest.raises(InvalidArchive, match=r"calls the class torch\.classes\.c10d\.Store"):
        open_file(tmp_path / "m.pt")


def test_a_zip_that_starts_as_something_else_is_refused(doubled: Path, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"    PTMF" + doubled.read_bytes())
    with pytest.raises(InvalidArchive, match=r"neither TorchScript nor torch\.export"):
        open_file(tmp_path / "m.pt2")
