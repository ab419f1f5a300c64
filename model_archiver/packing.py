"""Writing of model archives: what is packed, how the same input gives the same bytes, how output appears.

Apart from `archive` because the server only reads.
"""

import difflib
import gzip
import io
import os
import re
import secrets
import shlex
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from model_archiver.archive import StrPath, digest, open_regular
from model_archiver.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    READY_MADE,
    FileRecord,
    Manifest,
    ManifestModel,
)
from model_archiver.names import name_fault

_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_\-.]*"
_EXCLUDED_FOLDERS = ("__MACOSX", "__pycache__")
_EXCLUDED_SUFFIXES = (".pyc", ".DS_Store", ".mar")
_CHUNK_BYTES = 1024 * 1024
_GZIP_LEVEL = 6  # what zip takes too; on weights the lower ones are no faster
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold
_TAR_TIME_S = 315_532_800  # the same day


class PackError(ValueError):
    """The folder cannot be packed; the message is for the person at the command line."""


class ArchiveFormat(Enum):
    """What to write, by the names of the command's `--archive-format`."""

    MAR = "default"
    TGZ = "tgz"
    FOLDER = "no-archive"


_SUFFIXES = {ArchiveFormat.MAR: ".mar", ArchiveFormat.TGZ: ".tar.gz", ArchiveFormat.FOLDER: ""}


@dataclass(frozen=True, slots=True)
class Member:
    """A file to pack: its name in the archive, with slashes, and where it is."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Packed:
    """What `pack` made: where it is, and the manifest that it holds."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Part:
    """A member that is open: `source` yields `size` bytes."""

    name: str
    size: int
    mode: int
    source: BinaryIO | io.FileIO


def _silent(message: str) -> None:
    """Drop a warning."""


def pack(
    model_path: StrPath | None,
    manifest: Manifest,
    *,
    added: Sequence[Member] = (),
    export_path: StrPath | None = None,
    archive_format: ArchiveFormat = ArchiveFormat.MAR,
    force: bool = False,
    convert: bool = False,
    warn: Callable[[str], None] = _silent,
) -> Packed:
    """Pack a model's folder, or none, and `added` files with a manifest under `export_path` (default: here).

    The output is named after the model, the same input gives the same bytes, and a failure leaves nothing.
    With `manifest.model.model_files` the manifest that is written records every file's size and SHA-256.
    `convert` is MMS's wish to turn ONNX into MXNet; without an .onnx file there is nothing to convert.

    Raises:
        PackError: bad name or folder, output exists without `force`, an .onnx file with `convert`,
            unpackable file, two of one name, a ready-made handler without what it needs, full disk.
    """
    name = manifest.model.name or ""
    export_path = os.getcwd() if export_path is None else os.fspath(export_path)
    _check_arguments(manifest.model, export_path, model_path)
    target = os.path.join(export_path, name + _SUFFIXES[archive_format])
    if os.path.lexists(target):
        if not force:
            raise PackError(
                f"{target} already exists.\n"
                "Please specify --force/-f option to overwrite the model archive output file.\n"
                "See -h/--help for more details."
            )
        warn(f"Overwriting {target} ...")
    if convert and model_path is not None:
        _refuse_conversion(model_path)
    try:
        root = None if model_path is None else os.path.realpath(model_path)
        real_target = os.path.join(os.path.realpath(export_path), os.path.basename(target))
        members = [] if root is None else folder_members(root, output=real_target, warn=warn)
        members = _merged(members, added)
        _check_handler(members, manifest.model, model_path=model_path, warn=warn)
        if manifest.model.model_files:
            manifest = replace(manifest, files=_records(members))
        if archive_format is ArchiveFormat.FOLDER:
            _pack_folder(members, manifest, root=root, target=real_target)
        else:
            _pack_file(_parts(members, manifest), real_target, folder=name, archive_format=archive_format)
    except OSError as err:
        # What cannot be moved to its place is named by that place, not by the scratch file.
        raise PackError(f"{err.filename2 or err.filename or target}: {err.strerror or err}") from err
    return Packed(Path(target), manifest)


def _check_arguments(model: ManifestModel, export_path: str, model_path: StrPath | None) -> None:
    if not re.fullmatch(_NAME_PATTERN, model.name or ""):
        raise PackError(
            "Model name contains special characters.\n"
            f"The allowed regular expression filter for model name is: ^{_NAME_PATTERN}$"
        )
    if not os.path.isdir(os.path.abspath(export_path)):  # "" is the current folder
        # MMS's sentence; the remedy is for those who do not come from there.
        advised = model.model_files and not os.path.lexists(export_path)
        remedy = f" (mkdir -p {shlex.quote(export_path)})" if advised else ""
        raise PackError(
            f"Given export-path {export_path} is not a directory. "
            f"Point to a valid export-path directory.{remedy}"
        )
    if model_path is not None and not os.path.isdir(model_path):
        raise PackError(
            f"Given model-path {model_path} is not a valid directory. Point to a valid model-path directory."
        )


def _refuse_conversion(model_path: StrPath) -> None:
    found = sorted(name for name in os.listdir(model_path) if name.endswith(".onnx"))
    if len(found) > 1:
        raise PackError(
            "model-archiver expects only one .onnx file in the folder. "
            f"Found {len(found)} files {found} in model-path."
        )
    if found:
        raise PackError(
            f"ONNX is not converted to MXNet here. Pack {found[0]} as it is, without -c/--convert, "
            "and have the handler load it."
        )


def folder_members(
    root: str, *, within: str = "", output: str = "", warn: Callable[[str], None] = _silent
) -> list[Member]:
    """List what is packed of a folder, by name; an earlier `output` inside it is not.

    With `within`, the names begin with that folder's.

    Raises:
        PackError: a file cannot be packed.
        OSError: a folder cannot be read.
    """
    members = []
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.path == output or _is_excluded(entry):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_dir():
                    warn(f"{name} is a link to a directory; it is skipped")
                else:
                    _check_file(name, entry.path)
                    members.append(Member(f"{within}/{name}" if within else name, entry.path))
    return sorted(members, key=lambda member: member.name)


def _merged(members: Sequence[Member], added: Sequence[Member]) -> list[Member]:
    """Sort by name; a file that is named twice counts once, two files cannot have one name."""
    merged = {member.name: member for member in members}
    for member in added:
        _check_file(member.name, member.path)
        other = merged.setdefault(member.name, member)
        if not os.path.samefile(other.path, member.path):
            raise PackError(f"Two files would be packed as {member.name}: {other.path} and {member.path}.")
    for name in merged:
        folder = name
        while folder := folder.rpartition("/")[0]:
            if folder in merged:
                raise PackError(f"{folder} would be both a file and the folder of {name}.")
    return sorted(merged.values(), key=lambda member: member.name)


def _records(members: Iterable[Member]) -> dict[str, FileRecord]:
    return {
        member.name: FileRecord(bytes=os.stat(member.path).st_size, sha256=digest(member.path))
        for member in members
    }


def _is_excluded(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir():
        return entry.name in _EXCLUDED_FOLDERS or entry.name.startswith(".")
    return entry.name == "MANIFEST.json" or entry.name.endswith(_EXCLUDED_SUFFIXES)


def _check_file(name: str, path: str) -> None:
    """Refuse here what the reader of the archive would refuse, and what would make us wait."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as err:
        raise PackError(f"{name} is a link to a file that does not exist.") from err
    if not stat.S_ISREG(mode):
        raise PackError(f"{name} is not a regular file; fifos, sockets and devices cannot be packed.")
    if name == MANIFEST_NAME.partition("/")[0]:
        raise PackError(f"{name} is a file, but the archive needs a folder of that name.")
    if fault := name_fault(name):
        raise PackError(f"{name!r} cannot be packed: {fault}.")


def _check_handler(
    members: Sequence[Member],
    model: ManifestModel,
    *,
    model_path: StrPath | None,
    warn: Callable[[str], None],
) -> None:
    handler = model.handler or ""
    file = handler.partition(":")[0]
    stem = os.path.normpath(file).removesuffix(".py")
    stems = (stem, stem.replace(".", "/"))
    wanted = {f"{stem}{suffix}" for stem in stems for suffix in (".py", "/__init__.py")}
    found = [member.name for member in members if member.name in wanted]
    if handler in READY_MADE:
        _check_ready_made(handler, found, has_model_files=bool(model.model_files))
        if model.model_files:
            _check_tokenizer(members, model)
    elif not found:
        if model.model_files:
            _refuse_misspelt(handler)
        place = "among the packed files" if model_path is None else f"in model-path {model_path}"
        warn(
            f"handler file {file} not found {place}; "
            "the module must then be importable where the model is served"
        )


def _check_ready_made(handler: str, found: Sequence[str], *, has_model_files: bool) -> None:
    if has_model_files and found:
        raise PackError(
            f"{handler} is a ready-made handler, but {found[0]} is packed too: "
            f"to have that one, write --handler {found[0]}."
        )
    if not has_model_files and not found:
        raise PackError(
            f"{handler} is a ready-made handler, which serves a model file: name it with --model-file."
        )


def _check_tokenizer(members: Sequence[Member], model: ManifestModel) -> None:
    if model.handler != "text_embedder":
        return
    tokenizer = (model.handler_config or {}).get("tokenizer", "tokenizer.json")
    if tokenizer not in [member.name for member in members]:
        raise PackError(f"text_embedder needs the model's tokenizer: add --extra-file {tokenizer}")


def _refuse_misspelt(handler: str) -> None:
    near = difflib.get_close_matches(handler, READY_MADE, 1, 0.8) if handler.isidentifier() else []
    if near:
        raise PackError(
            f"There is no handler {handler}; did you mean {near[0]}? "
            f"(A module that is installed where the model is served: --handler {handler}:handle.)"
        )


def _parts(members: Iterable[Member], manifest: Manifest) -> Iterator[_Part]:
    """Open one member after the other, the manifest last."""
    for member in members:
        with open_regular(member.path) as source:
            status = os.fstat(source.fileno())
            mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
            yield _Part(member.name, status.st_size, mode, source)
    text = manifest.to_json().encode()
    if len(text) > MAX_MANIFEST_BYTES:
        raise PackError(
            f"The manifest would be larger than {MAX_MANIFEST_BYTES} bytes, which no server reads: "
            "there are too many files, or the handler config is too large."
        )
    yield _Part(MANIFEST_NAME, len(text), 0o644, io.BytesIO(text))


def _copy(part: _Part, sink: Callable[[bytes], object]) -> None:
    copied = 0
    while copied <= part.size and (chunk := part.source.read(_CHUNK_BYTES)):
        sink(chunk)
        copied += len(chunk)
    if copied != part.size:
        raise PackError(f"{part.name} changed while it was packed.")


def _scratch(target: str) -> str:
    """Return a fresh path beside the output; its name makes the server and a later packing pass over it."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.{secrets.token_hex(8)}.mar")


def _pack_file(parts: Iterable[_Part], target: str, *, folder: str, archive_format: ArchiveFormat) -> None:
    scratch = _scratch(target)
    try:
        with open(scratch, "xb") as sink:
            if archive_format is ArchiveFormat.TGZ:
                _write_tgz(parts, sink, folder=folder)
            else:
                _write_zip(parts, sink)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _write_zip(parts: Iterable[_Part], sink: BinaryIO) -> None:
    with zipfile.ZipFile(sink, "w") as archive:
        for part in parts:
            info = zipfile.ZipInfo(part.name, _ZIP_DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # unix, wherever it is packed
            info.external_attr = (stat.S_IFREG | part.mode) << 16
            info.file_size = part.size  # lets zipfile choose zip64 before it has seen the bytes
            with archive.open(info, "w") as entry:
                _copy(part, entry.write)


def _write_tgz(parts: Iterable[_Part], sink: BinaryIO, *, folder: str) -> None:
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=sink, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for part in parts:
            info = tarfile.TarInfo(f"{folder}/{part.name}")
            info.size, info.mode, info.mtime = part.size, part.mode, _TAR_TIME_S
            archive.addfile(info, part.source)


def _pack_folder(members: list[Member], manifest: Manifest, *, root: str | None, target: str) -> None:
    if root is not None and os.path.exists(target) and os.path.samefile(root, target):
        _write_manifest(root, members, manifest)
        return
    if root is not None and root.startswith(target + os.sep):
        raise PackError(f"model-path lies inside the output folder {target}, which would be replaced.")
    if _is_foreign(target):
        raise PackError(f"{target} was not written by model-archiver (no {MANIFEST_NAME}); remove it first.")
    scratch = _scratch(target)
    try:
        for part in _parts(members, manifest):
            path = os.path.join(scratch, part.name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # The umask takes away what the user does not want to give.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 | part.mode & 0o111)
            with os.fdopen(descriptor, "wb") as file:
                _copy(part, file.write)
        _swap_in(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _is_foreign(target: str) -> bool:
    """Tell whether replacing the folder would delete what others put there: --force is for our own output."""
    if os.path.islink(target) or not os.path.isdir(target):
        return False
    return bool(os.listdir(target)) and not os.path.isfile(os.path.join(target, MANIFEST_NAME))


def _write_manifest(root: str, members: Iterable[Member], manifest: Manifest) -> None:
    for member in members:
        place = os.path.join(root, member.name)
        if not os.path.exists(place) or not os.path.samefile(place, member.path):
            raise PackError(
                f"model-path is the output folder too, and {member.path} is not {member.name} in it: "
                "put it there, or choose another --export-path."
            )
    path = os.path.join(root, MANIFEST_NAME)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    scratch = _scratch(path)
    try:
        with open(scratch, "x", encoding="utf-8") as file:
            file.write(manifest.to_json())
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _swap_in(fresh: str, target: str) -> None:
    """Replace the target by the fresh folder in two renames: folders have no portable exchange."""
    if not os.path.lexists(target):
        os.rename(fresh, target)
        return
    old = _scratch(target)
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(old, target)
        raise
    if os.path.islink(old) or not os.path.isdir(old):
        os.unlink(old)
    else:
        shutil.rmtree(old)
