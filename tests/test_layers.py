"""Who may import whom (docs/design.md): the rule is a test, not a hope."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {"address", "errors", "shared", "types", "protos"}
TOOLS = {"metrics", "logs"}
IN_THE_CHILD = {"errors", "memory", "shared", "types", "tensors", "transport", "wire", "worker"}
TENSOR_PROTOCOL = {"engine.engine", "tensors", "json_arrays"} | {
    f"frontends.{name}" for name in ("message", "call", "fields", "json_bodies", "tensor_calls")
}
ENGINE = {"engine", "transport", "wire", "machine"} | GROUND | TOOLS
ALONE = {"client", "bench", "optimizer"}
# What a module may import of mms_lite, by its place: the longest matching prefix counts.
ALLOWED = {
    "": None,  # cli, server and what else composes the whole: anything
    "address": GROUND,
    "arguments": set(),
    "errors": GROUND,
    "shared": set(),
    "types": GROUND,
    "tensors": GROUND,
    "json_arrays": GROUND | {"tensors"},
    "protos": GROUND,
    "config": GROUND | {"properties"},
    "config_report": GROUND | {"config", "machine"},
    "properties": GROUND,
    "metrics": GROUND,
    "logs": GROUND | {"rotation"},
    "rotation": GROUND,
    "host_metrics": GROUND | {"logs"},
    "tls": GROUND | {"config"},
    "transport": GROUND,
    "wire": GROUND | {"transport"},
    "engine": ENGINE,
    "engine.repository": ENGINE | {"model_archiver"},
    "worker": IN_THE_CHILD,
    "handlers": IN_THE_CHILD | {"handlers", "json_arrays"},
    "frontends": GROUND | TOOLS | {"engine.engine", "frontends.message"},
    # Two readers of HTTP and what they share; protocols see none of them.
    "frontends.head": GROUND | {"frontends.message"},
    "frontends.hot": GROUND | {"frontends.head", "frontends.message"},
    "frontends.http": GROUND | TOOLS | {"frontends.listener", "frontends.message"},
    "frontends.listener": GROUND | TOOLS | {"frontends.hot", "frontends.http", "frontends.message"},
    "frontends.rpc": GROUND | TOOLS | {"frontends.call", "frontends.message", "frontends.rpc_services"},
    "frontends.rpc_services": GROUND | TOOLS | {"frontends.call", "frontends.message"},
    "frontends.tensor_calls": GROUND | {"engine.engine", "tensors"},
    "frontends.kserve": GROUND | TOOLS | TENSOR_PROTOCOL | {"frontends.kserve"},
    "frontends.tfserving": GROUND | TOOLS | TENSOR_PROTOCOL | {"frontends.tfserving"},
    "frontends.mms": GROUND | TOOLS | {"engine.engine", "frontends.message", "frontends.mms"},
    "instance": GROUND,
    "machine": GROUND,
    "memory": GROUND,
    "work_dir": GROUND,
    "client": GROUND | {"client"},
    "bench": GROUND | {"client", "bench"},
    "optimizer": GROUND | {"optimizer"},
    "__init__": set(),  # lazy: importing the package imports nothing else
}
HEAVY = {
    "onnxruntime",
    "onnx",
    "openvino",
    "torch",
    "mxnet",
    "gluoncv",
    "ray",
    "grpc",
    "cv2",
    "tensorflow",
    "pandas",
}
# Imported once a tensor or a model without code is at hand.
WITH_ARRAYS = ("worker.backends", "worker.predictor")
SOURCES = sorted((ROOT / "mms_lite").rglob("*.py")) + sorted((ROOT / "model_archiver").rglob("*.py"))


def imports(source: Path) -> Iterator[tuple[str, bool]]:
    """Yield every imported module and whether it is imported when the module is."""
    tree = ast.parse(source.read_text())
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for n in ast.walk(f)
    }
    typing = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
        for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        at_start = id(node) not in inside and id(node) not in typing
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_start) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and id(node) not in typing:
            assert node.level == 0, f"{source}: a relative import"
            whole = {"mms_lite", "mms_lite.engine", "mms_lite.frontends", "mms_lite.worker"}
            names = (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module in whole
                else [str(node.module)]
            )
            yield from ((name, at_start) for name in names)


def place(source: Path) -> str:
    return ".".join(source.relative_to(ROOT).with_suffix("").parts)


def fits(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("source", SOURCES, ids=place)
def test_a_module_imports_only_what_its_layer_may(source: Path) -> None:
    package, _, own = place(source).partition(".")
    found = dict.fromkeys(imports(source))
    outside = {name.partition(".")[0] for name, _ in found} - {package} - set(sys.stdlib_module_names)
    if package == "model_archiver":
        assert outside == set()
        return
    here = max((p for p in ALLOWED if p == "" or fits(own, {p})), key=len)
    allowed = ALLOWED[here]
    ours = {name.removeprefix("mms_lite.") for name, _ in found if name.startswith("mms_lite.")}
    if allowed is not None:
        assert {name for name in ours if not fits(name, allowed)} == set()
    if here != "":
        assert "model_archiver" not in outside or here == "engine.repository"
        assert not any(fits(name, ALONE) for name in ours) or here in ALONE
    if here in {"worker", "errors", "shared", "types", "transport", "wire"} and not own.startswith(
        WITH_ARRAYS
    ):
        at_start = {name.partition(".")[0] for name, start in found if start} - {"mms_lite"}
        compat = {"mms", "numpy", "mxnet"} if own.startswith("worker.compat") else set()
        assert at_start - set(sys.stdlib_module_names) <= compat
    if own.startswith("frontends"):
        readers = {"frontends.http": {"aiohttp"}, "frontends.head": {"httptools"}}
        assert outside & {"aiohttp", "httptools"} == readers.get(own, set())


@pytest.mark.parametrize("source", SOURCES, ids=place)
def test_heavy_libraries_are_imported_only_where_they_are_used(source: Path) -> None:
    if place(source).startswith(
        (
            "mms_lite.worker.backends.",
            "mms_lite.handlers.",
            "mms_lite.worker.compat.",
            "mms_lite.optimizer.",
            "mms_lite.frontends.rpc",
            "mms_lite.engine.ray_launcher",
        )
    ):
        return  # a string table names these modules; nothing imports them at start
    assert {name for name, start in imports(source) if start and name.partition(".")[0] in HEAVY} == set()
