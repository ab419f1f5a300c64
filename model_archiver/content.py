"""What a file's first bytes say: that it is what its name promises, or a pointer, a web page, another format.

Only the head of a file is read (all of a graph in JSON and of labels). Apart from `model_files`, which knows
names and rules and opens nothing.
"""

import codecs
import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import PurePath

from model_archiver.archive import open_regular
from model_archiver.packing import PackError

Fault = Callable[[str, bytes], str | None]
"""Given a file's path and head, say what is wrong with it ("is ...", "has no ..."), or None."""

_HEAD_BYTES = 64 * 1024
_MAX_TEXT_BYTES = 64 * 1024**2
_MAX_GRAPH_BYTES = 16 * 1024**2  # an .onnx with its weights elsewhere is far smaller
_MXNET_MAGIC = struct.pack("<Q", 0x112)
_MAGICS = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, _MXNET_MAGIC, "a file of MXNet parameters"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\x80\x02", "a pickle"),
    (0, b"\x80\x03", "a pickle"),
    (0, b"\x80\x04", "a pickle"),
    (0, b"\x80\x05", "a pickle"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GGUF", "a GGUF file"),
)
# TensorProto.external_data (13) = StringStringEntryProto {key (1): "location", value (2): NAME}, onnx.proto.
_ONNX_LOCATION = re.compile(rb"\x6a[\x0d-\x7f]\x0a\x08location\x12([\x01-\x7f])", re.DOTALL)
_WEIGHTS_ONLY = (
    "holds weights without the model's code, which cannot be served: load them into their model and save it "
    "with torch.jit.script or torch.jit.trace (TorchScript), torch.export.save (.pt2), or as ONNX"
)


def check(path: str, fault: Fault, *, may_be_empty: bool = False) -> None:
    """Check that a file holds what is expected of it, and is no stand-in for it.

    Raises:
        PackError: it is not regular, empty, a Git LFS pointer, a web page, or `fault` finds one.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
    except OSError as err:
        raise PackError(f"{path}: {err.strerror}.") from err
    found = None if may_be_empty and not head else _stand_in(path, head) or fault(path, head)
    if found:
        raise PackError(f"{path} {found}.")


def _stand_in(path: str, head: bytes) -> str | None:
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    start = head[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")) and PurePath(path).suffix not in (".html", ".htm"):
        return "is a web page (HTML): the download of the file went wrong"
    return None


def anything(path: str, head: bytes) -> str | None:
    """Accept any content."""
    return None


def binary(path: str, head: bytes) -> str | None:
    """Expect a protobuf message, which has no magic number: not text, and nothing that is known."""
    found = _known(head)
    return f"is not what its name says: it is {found}" if found else None


def text(path: str, head: bytes) -> str | None:
    """Expect plain text."""
    return None if _is_text(head) else f"is not text: it is {_known(head) or 'binary'}"


def openvino_ir(path: str, head: bytes) -> str | None:
    """Expect OpenVINO's XML."""
    return None if b"<net" in head else "is not an OpenVINO model: it has no <net> element"


def tflite(path: str, head: bytes) -> str | None:
    """Expect TensorFlow Lite's flatbuffer."""
    return None if head[4:8] == b"TFL3" else "is not a TensorFlow Lite model: it has no TFL3 at byte 4"


def mxnet_params(path: str, head: bytes) -> str | None:
    """Expect a list of arrays as MXNet saves it."""
    return None if head.startswith(_MXNET_MAGIC) else "is not a file of MXNet parameters (0x112 at its start)"


def mxnet_symbol(path: str, head: bytes) -> str | None:
    """Expect MXNet's graph in JSON."""
    try:
        graph = json.loads(_read(path, _MAX_TEXT_BYTES))
    except (ValueError, RecursionError) as err:
        return f"is not an MXNet symbol: it is not valid JSON ({err})"
    if not isinstance(graph, dict) or not isinstance(graph.get("nodes"), list):
        return 'is not an MXNet symbol: it has no list "nodes"'
    return None


def torch(path: str, head: bytes) -> str | None:
    """Expect TorchScript or what torch.export saves: zips that hold the model's code too."""
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"is a pickle, which {_WEIGHTS_ONLY}"
    if not head.startswith(b"PK\x03\x04"):
        return f"is neither TorchScript nor a torch.export archive: it is {_known(head) or 'no zip'}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError) as err:
        return f"is damaged or incomplete ({err})"
    if any(_is_torch_model(name) for name in names):
        return None
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return _WEIGHTS_ONLY
    return "is a zip, but neither TorchScript nor a torch.export archive"


def _is_torch_model(name: str) -> bool:
    """Tell TorchScript (ROOT/code/) and torch.export (ROOT/archive_format; once a single JSON) by a name."""
    parts = name.split("/")
    return "code" in parts[1:2] or parts[-1] in ("archive_format", "serialized_exported_program.json")


def check_labels(path: str) -> None:
    """Check that a file holds labels: one a line in UTF-8, or as a .json a list of strings.

    Raises:
        PackError: it does not.
    """
    content = read_text(path)
    try:
        labels = json.loads(content) if path.endswith(".json") else content.split("\n")
    except (ValueError, RecursionError) as err:
        raise PackError(f"{path} cannot be read as labels: {err}.") from err
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise PackError(f"{path} is not a JSON list of strings.")
    if not any(label.strip() for label in labels):
        raise PackError(f"{path} holds no labels.")


def read_text(path: str) -> str:
    """Return a small file's text.

    Raises:
        PackError: it cannot be read, is empty, a stand-in, or not text in UTF-8.
    """
    check(path, text)
    try:
        return _read(path, _MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise PackError(f"{path} is not text in UTF-8: {err}.") from err


def onnx_locations(path: str) -> list[str]:
    """Return the files that hold an ONNX model's external data, as the model names them, sorted.

    A model too large to be looked through has its weights within, as a rule: none are returned.
    """
    content = _read(path, _MAX_GRAPH_BYTES + 1)
    if len(content) > _MAX_GRAPH_BYTES:
        return []
    found = {content[match.end() : match.end() + match[1][0]] for match in _ONNX_LOCATION.finditer(content)}
    return sorted(name.decode("utf-8", "replace") for name in found)


def _known(head: bytes) -> str | None:
    for offset, magic, title in _MAGICS:
        if head.startswith(magic, offset):
            return title
    if not _is_text(head):
        return None
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    return {b"<": "XML", b"{": "JSON"}.get(start, "text")


def _is_text(head: bytes) -> bool:
    try:
        decoded = codecs.getincrementaldecoder("utf-8")().decode(head)  # the head may end inside a character
    except UnicodeDecodeError:
        return False
    return not re.search("[\x00-\x08\x0e-\x1f]", decoded)


def _read(path: str, max_bytes: int) -> bytes:
    with open_regular(path) as file:
        content = b""
        while len(content) < max_bytes and (chunk := file.read(max_bytes - len(content))):
            content += chunk
    return content
