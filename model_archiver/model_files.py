"""Model files: one table of kinds, with the backends that load them and the files that belong to them.

Apart from `packing` because none of it matters to a folder with a handler of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model_archiver import content
from model_archiver.manifest import MANIFEST_NAME
from model_archiver.packing import Member, PackError, folder_members

BACKENDS = ("onnxruntime", "openvino", "opencv", "torch", "mxnet", "python")
_SAVED_MODEL = "saved_model.pb"


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of model file. It is served by the first of `backends` unless the user names another.

    One that does not `lead` is never the primary file: it goes with another.
    """

    title: str
    suffixes: tuple[str, ...]
    backends: tuple[str, ...]
    fault: content.Fault
    companions: Callable[[str, Sequence[str]], list[_File]] = lambda path, given: []
    leads: bool = True
    may_be_empty: bool = False


@dataclass(frozen=True, slots=True)
class _File:
    """A file to pack: its name in the archive and its path; `is_model` if the backend opens it."""

    name: str
    path: str
    kind: _Kind
    is_model: bool = True


_WEIGHTS = _Kind("weights", (), (), content.anything, leads=False, may_be_empty=True)

# Companions: given a model file's path and those of all that the user named, return what belongs to it.


def _onnx_data(path: str, given: Sequence[str]) -> list[_File]:
    folder, name = os.path.split(path)
    usual = (f"{name}.data", f"{name}_data", f"{name.removesuffix('.onnx')}.data")
    found = [each for each in usual if os.path.isfile(os.path.join(folder, each))]
    stated = content.onnx_locations(path)
    return [_File(each, _beside(path, each), _WEIGHTS) for each in dict.fromkeys([*stated, *found])]


def _ir_weights(path: str, given: Sequence[str]) -> list[_File]:
    name = _stem(path) + ".bin"
    return [_File(name, _beside(path, name), _WEIGHTS)]


def _paddle_weights(path: str, given: Sequence[str]) -> list[_File]:
    name = _stem(path) + ".pdiparams"
    return [_File(name, _beside(path, name), _WEIGHTS)]


def _caffe_weights(path: str, given: Sequence[str]) -> list[_File]:
    return [] if _named(".caffemodel", given) else [_mate(path, _stem(path) + ".caffemodel")]


def _caffe_layers(path: str, given: Sequence[str]) -> list[_File]:
    return [] if _named(".prototxt", given) else [_mate(path, _stem(path) + ".prototxt")]


def _mxnet_weights(path: str, given: Sequence[str]) -> list[_File]:
    if _named(".params", given):
        return _signature(path)
    folder, name = os.path.split(path)
    prefix = name.removesuffix("-symbol.json")
    numbered = re.compile(re.escape(prefix) + r"-(\d{4,})\.params")
    found = [match for each in os.listdir(folder or ".") if (match := numbered.fullmatch(each))]
    if not found:
        raise _missing(path, f"{prefix}-NNNN.params (as in {prefix}-0000.params)")
    latest = max(found, key=lambda match: int(match[1]))
    return [_mate(path, latest[0]), *_signature(path)]


def _mxnet_graph(path: str, given: Sequence[str]) -> list[_File]:
    if _named("-symbol.json", given):
        return []
    match = re.fullmatch(r"(.+)-\d{4,}\.params", os.path.basename(path))
    if match is None:
        raise PackError(f"{path} does not say what its graph is called: give the -symbol.json too.")
    return [_mate(path, f"{match[1]}-symbol.json"), *_signature(path)]


def _signature(path: str) -> list[_File]:
    beside = os.path.join(os.path.dirname(path), "signature.json")
    return [_File("signature.json", beside, _WEIGHTS, is_model=False)] if os.path.isfile(beside) else []


def _named(suffix: str, given: Sequence[str]) -> bool:
    """Tell whether the user named the other of two files, which may then be called as it likes."""
    return any(path.endswith(suffix) for path in given)


def _mate(path: str, name: str) -> _File:
    return _File(name, _beside(path, name), next(kind for kind in _KINDS if name.endswith(kind.suffixes)))


def _beside(path: str, name: str) -> str:
    beside = os.path.join(os.path.dirname(path), name)
    if not os.path.isfile(beside):
        raise _missing(path, name)
    return beside


def _missing(path: str, name: str) -> PackError:
    return PackError(f"{path} needs {name}, which was not found in {os.path.dirname(path) or 'this folder'}.")


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


_KINDS = (
    _Kind("ONNX", (".onnx",), ("onnxruntime", "openvino", "opencv"), content.binary, _onnx_data),
    _Kind("OpenVINO IR with its .bin", (".xml",), ("openvino",), content.openvino_ir, _ir_weights),
    _Kind("TensorFlow frozen graph", (".pb",), ("openvino", "opencv"), content.binary),
    _Kind("OpenCV's text graph of a .pb", (".pbtxt",), ("opencv",), content.text, leads=False),
    _Kind("TensorFlow Lite", (".tflite",), ("openvino",), content.tflite),
    _Kind("Paddle with its .pdiparams", (".pdmodel",), ("openvino",), content.binary, _paddle_weights),
    _Kind("Caffe with its .prototxt", (".caffemodel",), ("opencv",), content.binary, _caffe_layers),
    _Kind("Caffe's layers", (".prototxt",), ("opencv",), content.text, _caffe_weights, leads=False),
    _Kind("TorchScript or torch.export", (".pt", ".pth", ".pt2", ".torchscript"), ("torch",), content.torch),
    _Kind("MXNet with its .params", ("-symbol.json",), ("mxnet",), content.mxnet_symbol, _mxnet_weights),
    _Kind("MXNet's parameters", (".params",), ("mxnet",), content.mxnet_params, _mxnet_graph, leads=False),
    _Kind("Python code", (".py",), ("python",), content.text),
)
_SUFFIXES = tuple(suffix for kind in _KINDS for suffix in kind.suffixes)
_FOLDER = _Kind("TensorFlow SavedModel", ("a folder",), ("openvino",), content.binary)
_TORCH_ADVICE = "load it into its model and save that with torch.jit, torch.export or torch.onnx"
_KERAS_ADVICE = "save the model as a TensorFlow SavedModel (model.export) or convert it with tf2onnx"
_PICKLE_ADVICE = "convert it to ONNX, or pack it with a handler of your own (--model-path, --handler)"
_ADVICE = {
    ".h5": _KERAS_ADVICE,
    ".hdf5": _KERAS_ADVICE,
    ".keras": _KERAS_ADVICE,
    ".ckpt": f"a checkpoint holds weights without the model: {_TORCH_ADVICE}, or as a SavedModel",
    ".safetensors": f"it holds weights without the model: {_TORCH_ADVICE}",
    ".pdparams": "it holds weights without the model: save the model with paddle.jit.save",
    ".pkl": _PICKLE_ADVICE,
    ".joblib": _PICKLE_ADVICE,
    ".bin": "give the .xml of the OpenVINO model, and the .bin beside it is packed too",
    ".pdiparams": "give the .pdmodel, and the .pdiparams beside it is packed too",
    ".data": "give the .onnx, and the data beside it are packed too",
    ".json": "of JSON files only MXNet's NAME-symbol.json is one; convert newer Paddle's with paddle2onnx",
    ".mar": "it is an archive already: see model-archiver inspect",
}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What is packed of a model: `names` are the backend's files, the primary first."""

    backend: str
    names: tuple[str, ...]
    members: tuple[Member, ...]


def collect(paths: Sequence[str], *, backend: str | None = None) -> ModelFiles:
    """Find out what the named files are, what belongs to them, and which backend loads them all.

    Raises:
        PackError: a file is missing, of no known kind or not what its name says; no backend fits.
    """
    given = [path.rstrip("/") or path for path in paths]
    files: dict[tuple[str, str], _File] = {}  # two names may be links to one file
    for path in given:
        for file in () if _is_companion(path, given) else _with_companions(path, given):
            files.setdefault((file.name, os.path.realpath(file.path)), file)
    ordered = sorted(files.values(), key=lambda file: not file.kind.leads)
    for file in ordered:
        content.check(_sniffed(file), file.kind.fault, may_be_empty=file.kind.may_be_empty)
    return ModelFiles(
        backend=_backend([file for file in ordered if file.kind.backends], backend),
        names=tuple(file.name for file in ordered if file.is_model),
        members=tuple(member for file in ordered for member in _members(file)),
    )


def is_model_file(path: str) -> bool:
    """Tell whether a path is named as a model file, or is the folder of a SavedModel and no packed model."""
    if os.path.isdir(path):
        packed = os.path.lexists(os.path.join(path, MANIFEST_NAME))
        return not packed and os.path.isfile(os.path.join(path, _SAVED_MODEL))
    return path.endswith(_SUFFIXES)


def known_files() -> str:
    """List the kinds of model files with the backends that load them, the one that is guessed first."""
    return "\n".join(
        f"  {', '.join(kind.suffixes).replace('-', 'NAME-')}: {kind.title} ({', '.join(kind.backends)})"
        for kind in (*_KINDS, _FOLDER)
    )


def _kind(path: str) -> _Kind:
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, _SAVED_MODEL)):
            return _FOLDER
        raise PackError(
            f"{path} is a folder without {_SAVED_MODEL}: of folders only a SavedModel is a model."
        )
    if not os.path.lexists(path):
        raise PackError(f"Given model-file {path} does not exist.")
    name = os.path.basename(path)
    if name == _SAVED_MODEL:
        raise PackError(f"{path} is a part of a TensorFlow SavedModel: give its folder.")
    for kind in _KINDS:
        if name.endswith(kind.suffixes):
            return kind
    advice = _ADVICE.get(os.path.splitext(name)[1])
    if advice:
        raise PackError(f"{path} cannot be a model file: {advice}.")
    raise PackError(f"{path} is of no kind that is known. Model files are:\n{known_files()}")


def _is_companion(path: str, given: Sequence[str]) -> bool:
    """Tell whether a file that is no model file itself belongs to another that is named."""
    if path.endswith(_SUFFIXES) or os.path.isdir(path):
        return False
    others = [each for each in given if each.endswith((".xml", ".pdmodel", ".onnx"))]
    companions = [file for other in others for file in _with_companions(other, given)]
    return os.path.realpath(path) in {os.path.realpath(file.path) for file in companions}


def _with_companions(path: str, given: Sequence[str]) -> list[_File]:
    kind = _kind(path)
    return [_File(os.path.basename(os.path.abspath(path)), path, kind), *kind.companions(path, given)]


def _sniffed(file: _File) -> str:
    return os.path.join(file.path, _SAVED_MODEL) if file.kind is _FOLDER else file.path


def _members(file: _File) -> list[Member]:
    if file.kind is not _FOLDER:
        return [Member(file.name, file.path)]
    members = folder_members(file.path, within=file.name)
    for member in members:
        content.check(member.path, content.anything, may_be_empty=True)
    return members


def _backend(files: Sequence[_File], wanted: str | None) -> str:
    """Return the backend that loads all files; Python code may bring files of any kind along."""
    primary = files[0]
    if not primary.kind.leads:
        raise PackError(f"{primary.name} is not a model of its own ({primary.kind.title}): give both files.")
    for backend in (wanted,) if wanted else primary.kind.backends:
        unfit = [file for file in files if backend not in file.kind.backends]
        if not unfit or (backend == "python" and primary not in unfit):
            return backend
        if wanted:
            raise PackError(
                f"{unfit[0].name} is loaded by {_any_of(unfit[0].kind.backends)}, not by {wanted}."
            )
    names = " and ".join(file.name for file in files)
    raise PackError(f"No backend loads all of {names}. Model files and their backends are:\n{known_files()}")


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
