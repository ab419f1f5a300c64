"""What files of PyTorch hold, checked before PyTorch loads them: loading alone runs what they say.

Apart from the backend because it is about file formats. `torch.export.load` evaluates expressions, names and
guards as Python, and calls functions by name; `torch.jit.load` runs `__setstate__`. So only what PyTorch
writes is let in. It is read with PyTorch's own reader: another may see other members in the same file.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mms_lite.errors import InvalidArchive

_ADVICE = (
    "save the model with torch.jit.script or torch.jit.trace (.pt), or with torch.export.save (.pt2); "
    "weights alone or a pickled module are not run"
)
_LARGEST_TEXT = 1 << 28  # bytes of one member that is not tensors: graphs of language models take some MB
_SCHEMA = 8  # the major version of torch._export.serde.schema whose fields are known here

# Namespaces of operators that compute on tensors and touch nothing else, and their exceptions.
_NAMESPACES = (
    "aten|prim|prims|quantized|_quantized|quantization|quantized_decomposed|mkldnn|mkldnn_prepacked|onednn|"
    "prepacked|sparse|torchvision"
)
_TOUCHES_FILES = "save|from_file"
_CLASSES = ("quantized", "rnn", "xnnpack", "mkldnn")  # of torch.classes, written in C++

# --- torch.export
_MEMBERS = re.compile(
    r"models/model\.json|archive_format|archive_version|byteorder|version|\.data/[\w.]+|extra/.*"
    r"|data/sample_inputs/model\.pt"
    r"|data/weights/(?:weight_\d+|model\.pt|model_weights_config\.json)"
    r"|data/constants/(?:tensor_\d+|model\.pt|model_constants_config\.json)",
    re.A,
)
# Text without parentheses, brackets, quotes and line ends calls and indexes nothing, whatever it is put into.
_PLAIN = re.compile(r"[\w .,:<>+*/-]*", re.A)
_DUNDER = re.compile(r"(?:^|[.])__\w*__(?:[.]|$)")
_IDENTIFIER = re.compile(r"(?:[A-Za-z_]\w*)?", re.A)
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+", re.A)
_OPERATOR = re.compile(rf"torch\.ops\.({_NAMESPACES})\.(\w+)\.(\w+)", re.A)
_FUNCTION = re.compile(
    r"_operator\.(?:add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow|rshift|sub|truediv)"
    r"|math\.[a-z]\w*|torch\._?sym_\w+"
    r"|torch\.ops\.higher_order\.(?:associative_scan|cond|map|map_impl|scan|while_loop"
    r"|wrap_with_autocast|wrap_with_set_grad_enabled)",
    re.A,
)
_INERT = ("custom", "from_node", "nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")  # metadata
_TREES = (
    "builtins.tuple",
    "builtins.list",
    "builtins.dict",
    "collections.OrderedDict",
    "torch.fx.immutable_collections.immutable_list",
    "torch.fx.immutable_collections.immutable_dict",
)

# --- Expressions, in two dialects: of sympy (srepr) and of guards
_EXPRESSION = re.compile(r"[\w ()\[\]'.,=<>!+*/%&|~-]*", re.A)
_QUOTED = re.compile(r"[\w .+-]*", re.A)
_SYMPY = re.compile(
    r"[a-z]+\d+|Symbol|Integer|Float|Rational|Add|Mul|Pow|Mod|Max|Min|Abs|floor|ceiling|Piecewise|And|Or|Not"
    r"|Equality|Unequality|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan|Eq|Ne|Lt|Le|Gt|Ge"
    r"|true|false|oo|int_oo|nan|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv"
    r"|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator"
    r"|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|(?:OpaqueUnaryFn|BitwiseFn)_\w+",
    re.A,
)
_GUARD = re.compile(r"L|math|torch|inf|max|min|abs|round|float|int", re.A)
_GUARD_ATTRIBUTE = re.compile(
    r"math\.[a-z]\w*|torch\._?sym_\w+|.*\.(?:size|stride|storage_offset)", re.A | re.S
)
_NODES = (
    ast.Expression, ast.Load, ast.keyword, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.IfExp,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip

# --- TorchScript
_GAP = r"(?:\s|\\|#[^\n]*\n)*"  # what its lexer skips between tokens
_GETATTR = re.compile(r'\bgetattr\(\s*([\w.]+|\([\w.]+\)),\s*"([^"\\\n]*)"\s*\)')
_FILE_OPERATOR = re.compile(rf"\.{_GAP}({_TOUCHES_FILES})\b")
_OTHER_NAMESPACE = re.compile(rf"(?<![\w.])ops\b(?!{_GAP}\.{_GAP}(?:{_NAMESPACES})\b)(?:{_GAP}\.{_GAP}\w+)*")
_CLASS = re.compile(rf"__torch__(?:{_GAP}\.{_GAP}\w+)*")
_NATIVE_CLASS = "__torch__.torch.classes"


def is_export(path: Path) -> bool:
    """Tell torch.export from TorchScript by what is in the file.

    Raises:
        InvalidArchive: it is neither, or of a format of old.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            starts_as_zip = file.read(4) == b"PK\x03\x04"  # else other readers may see another format
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InvalidArchive(f"{path.name} is damaged or of another kind: {_ADVICE}") from error
    names = {member.filename for member in members}
    last = {name.rpartition("/")[2] for name in names}
    if "serialized_exported_program.json" in last or "version" in names:
        raise InvalidArchive(f"{path.name} is of PyTorch before 2.8: save it anew with torch.export.save")
    if not starts_as_zip or not last & {"archive_format", "constants.pkl"}:
        raise InvalidArchive(f"{path.name} is neither TorchScript nor torch.export: {_ADVICE}")
    for member in members:
        if member.filename.endswith((".json", ".py", "pkl")) and member.file_size > _LARGEST_TEXT:
            raise InvalidArchive(f"{path.name} is damaged: {member.filename} has {member.file_size} bytes")
    return "archive_format" in last


def check_export(path: Path) -> None:
    """Let pass only what torch.export.save writes for a model that computes on tensors.

    Raises:
        InvalidArchive: it holds anything else.
    """
    records = _records(path)
    for name in records:
        if re.search(r"(?:opaque|custom)_obj_\d+$", name):
            raise InvalidArchive(f"{path.name} holds pickled objects of Python, which are not loaded")
        if not _MEMBERS.fullmatch(name):
            raise InvalidArchive(f"{path.name} holds {name[:60]}, which is not of a model that PyTorch runs")
    for name, read in records.items():
        if not name.endswith(".json"):
            continue
        content = json.loads(read())
        if name.startswith("models/") and content["schema_version"]["major"] != _SCHEMA:
            raise InvalidArchive(f"{path.name} is of another schema of torch.export than {_SCHEMA}")
        for key, text in _texts(content):
            _check_text(path, key, text)


def check_script(path: Path) -> None:
    """Let pass only TorchScript whose operators compute on tensors.

    An operator is called by its name alone, in the text of the code; no other part of the file names any.

    Raises:
        InvalidArchive: an operator touches files, or is of an unknown namespace; classes in C++ likewise.
    """
    records = _records(path)
    if "model.json" in (name.lower() for name in records):
        raise InvalidArchive(f"{path.name} is of PyTorch before 1.4: save it anew with torch.jit.save")
    for name, read in records.items():
        if name.lower().endswith(".py"):
            _check_code(path, read().decode("latin-1"))
        elif name.lower().endswith("pkl"):
            # A pickle names a class by a line for the module and another for the class.
            _check_classes(path, read().decode("latin-1").replace("\n", "."))


def check_example(path: Path, program: Any) -> None:
    """Check what else `program.module()` makes the guards of, which are Python.

    Raises:
        InvalidArchive: a key of its example inputs, or a constant among its inputs, could be code.
    """
    constants = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    for text in [*_keys(program.example_inputs), *(each for each in constants if isinstance(each, str))]:
        if not (isinstance(text, int) or (type(text) is str and _PLAIN.fullmatch(text))):
            raise _not_written(path, "a name", repr(text))


def _records(path: Path) -> dict[str, Callable[[], bytes]]:
    reader = torch._C.PyTorchFileReader(str(path))
    names = reader.get_all_records()
    if len({name.lower() for name in names}) != len(names):  # the reader does not tell them apart
        raise InvalidArchive(f"{path.name} is damaged: it holds two members of one name")
    return {name: partial(reader.get_record, name) for name in names}


def _texts(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Give every string with the name of the field that holds it; the names of fields themselves have none.

    PyTorch's reader takes fields by these names, and the maps among them hold no bare strings, the metadata
    of nodes excepted. So the nearest name tells what becomes of a string.
    """
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, list):
        for each in content:
            yield from _texts(each, key)
    elif isinstance(content, dict):
        for name, each in content.items():
            yield "", name
            yield from _texts(each, name)


def _check_text(path: Path, key: str, text: str) -> None:
    if key in _INERT or key in ("as_string", "as_strings"):  # the latter are written with repr
        return
    if key == "expr_str":
        _check_expression(path, text, _SYMPY, None)
    elif key == "guards_code":
        _check_expression(path, text, _GUARD, _GUARD_ATTRIBUTE)
    elif key in ("target", "as_operator"):
        _check_operator(path, text)
    elif key in ("in_spec", "out_spec"):
        _check_tree(path, json.loads(text)[1])
    elif key == "path_name":
        if not _PAYLOAD.fullmatch(text):
            raise InvalidArchive(f"{path.name} holds pickled objects of Python, which are not loaded")
    elif key in ("name", "as_name", "forward_arg_names"):
        if not _IDENTIFIER.fullmatch(text):
            raise _not_written(path, "a name", text)
    elif not _PLAIN.fullmatch(text) or _DUNDER.search(text):
        raise _not_written(path, "a name", text)


def _check_expression(
    path: Path, text: str, names: re.Pattern[str], attributes: re.Pattern[str] | None
) -> None:
    """Check what will be evaluated: arithmetic with these names, their attributes and plain strings."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval"))) if _EXPRESSION.fullmatch(text) else []
        fine = bool(nodes) and all(_is_harmless(node, names, attributes) for node in nodes)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        fine = False
    if not fine:
        raise _not_written(path, "an expression", text)


def _is_harmless(node: ast.AST, names: re.Pattern[str], attributes: re.Pattern[str] | None) -> bool:
    if isinstance(node, ast.Name):
        return bool(names.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) or (
            isinstance(node.value, str) and bool(_QUOTED.fullmatch(node.value))
        )
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name | ast.Attribute)
    if isinstance(node, ast.Attribute):
        return attributes is not None and bool(attributes.fullmatch(ast.unparse(node)))
    if isinstance(node, ast.Subscript):
        return attributes is not None
    return isinstance(node, _NODES)


def _check_operator(path: Path, name: str) -> None:
    """Check a function by name: `torch.os.system` would be called, too."""
    found = _OPERATOR.fullmatch(name)
    if not found and _FUNCTION.fullmatch(name):
        return
    if not found or re.fullmatch(_TOUCHES_FILES, found[2]):
        raise _not_allowed(path, "operator", name)
    operator: Any = torch.ops
    for part in found.groups():
        operator = getattr(operator, part, None)
    if not isinstance(operator, torch._ops.OpOverload):
        raise InvalidArchive(f"{path.name} needs the operator {name[:60]}, which this PyTorch does not have")


def _check_tree(path: Path, tree: Mapping[str, Any]) -> None:
    """Check how inputs or outputs are nested; other types than these import modules by name."""
    context = None if tree["context"] is None else json.loads(tree["context"])
    keys = context if isinstance(context, list) else []
    plain = all(isinstance(key, int) or (isinstance(key, str) and _PLAIN.fullmatch(key)) for key in keys)
    if tree["type"] not in (None, *_TREES) or not plain or not (context is None or isinstance(context, list)):
        raise _not_written(path, "a structure", str(tree["type"]))
    for child in tree["children_spec"]:
        _check_tree(path, child)


def _keys(example: Any) -> Iterator[Any]:
    if isinstance(example, Mapping):
        yield from example
        example = list(example.values())
    if isinstance(example, list | tuple):
        for each in example:
            yield from _keys(each)


def _check_code(path: Path, code: str) -> None:
    text, plain = "", code
    while text != plain:
        text, plain = plain, _GETATTR.sub(r"\1.\2", plain)
    if found := re.search(r"\bgetattr\b", plain):  # a name put together from pieces
        raise _not_written(path, "an expression", plain[found.start() :])
    for text in (code, plain):
        if found := _FILE_OPERATOR.search(text):
            raise _not_allowed(path, "operator", f"aten::{found[1]}")
        if found := _OTHER_NAMESPACE.search(text):
            raise _not_allowed(path, "operator", _joined(found[0]).removeprefix("ops.").replace(".", "::"))
        _check_classes(path, text)


def _check_classes(path: Path, text: str) -> None:
    for found in _CLASS.finditer(text):
        name = _joined(found[0])
        if f"{_NATIVE_CLASS}.".startswith(f"{name}."):  # given another name, it would lead to any class
            raise _not_written(path, "an expression", name)
        if name.startswith(f"{_NATIVE_CLASS}.") and name.split(".")[3] not in _CLASSES:
            raise _not_allowed(path, "class", name.removeprefix("__torch__."))


def _joined(name: str) -> str:
    return re.sub(_GAP, "", name)


def _not_written(path: Path, what: str, text: str) -> InvalidArchive:
    return InvalidArchive(f"{path.name} holds {what} that PyTorch does not write: {text[:60]}")


def _not_allowed(path: Path, what: str, name: str) -> InvalidArchive:
    return InvalidArchive(
        f"{path.name} calls the {what} {name[:60]}; only those are allowed that compute on tensors alone"
    )
