"""Reading of model archives that a stranger may have made: the one place that decides what reaches the disk.

A zip's own claims are checked before anything is written, and counted again while it is.
"""

import errno
import hashlib
import io
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from model_archiver.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, ManifestError
from model_archiver.names import MAX_COMPONENT_BYTES, name_fault

StrPath = str | os.PathLike[str]

_CHUNK_BYTES = 256 * 1024
# Encrypted, patched data, strong encryption, masked headers.
_FORBIDDEN_FLAGS = 0x0001 | 0x0020 | 0x0040 | 0x2000
_LOCAL_HEADER = struct.Struct("<26xHH")
# What zipfile and zlib raise on bytes that are wrong; RuntimeError includes NotImplementedError.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OverflowError,
    RuntimeError,
    ValueError,
    OSError,
)


class InvalidArchive(ValueError):
    """The file is no archive that may be extracted; the message names the file and the entry, no folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLimits:
    """Bounds on one archive; `max_ratio` (uncompressed to compressed) counts beyond `ratio_free_bytes`."""

    max_entries: int = 10_000
    max_total_bytes: int = 20 * 1024**3
    max_ratio: int = 200
    ratio_free_bytes: int = 64 * 1024**2


DEFAULT_LIMITS = ArchiveLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """An open archive that passed every check: its folders (parents first) and its files by name."""

    label: str
    archive: zipfile.ZipFile
    folders: list[str]
    files: dict[str, zipfile.ZipInfo]
    total_bytes: int


class _ArchiveFile(io.BufferedReader):
    """A file that refuses a huge read: zipfile takes in all entries before anyone can count them."""

    max_read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.max_read_bytes:
            raise zipfile.BadZipFile("its directory of entries is too large")
        return super().read(size)


def extract(
    path: StrPath, target_dir: StrPath, *, folder: str = "", limits: ArchiveLimits = DEFAULT_LIMITS
) -> None:
    """Unpack a zip archive into a folder that is empty, or absent and then created for the owner alone.

    With `folder`, only what the archive has in that folder is unpacked, without the folder itself. On
    failure the target is empty, or absent, again.

    Raises:
        InvalidArchive: the file is no zip, is damaged, hostile, or over a limit.
        OSError: the archive cannot be read, the folder is not empty, or the disk is full.
    """
    target = Path(target_dir)
    with _opened(path, limits) as everything:
        contents = _within(everything, folder) if folder else everything
        created = _claim(target)
        try:
            _require_space(contents, target)
            _write(contents, target)
        except BaseException:
            _clear(target)
            if created:
                target.rmdir()
            raise


def read_manifest(path: StrPath, *, limits: ArchiveLimits = DEFAULT_LIMITS) -> Manifest | None:
    """Read the manifest of a zip archive or of a model's folder, of today or of version 0.x; None without.

    That of 0.x is a MANIFEST.json in any letter case, in the archive itself or one folder down.

    Raises:
        InvalidArchive: the file is no zip, is damaged, hostile, or over a limit.
        ManifestError: the manifest cannot be used.
        OSError: the archive cannot be read.
    """
    if os.path.isdir(path):
        return _manifest(lambda name: _folder_text(path, name), lambda: _folder_names(path))
    with _opened(path, limits) as contents:
        return _manifest(lambda name: _archive_text(contents, name), lambda: contents.files)


def read_files(
    path: StrPath, *, limits: ArchiveLimits = DEFAULT_LIMITS
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the name and the bytes, in chunks, of every file of a zip archive; nothing is written.

    Raises:
        InvalidArchive: as `extract`; from the chunks: that file is damaged, and the next can still be read.
        OSError: the archive cannot be read.
    """
    with _opened(path, limits) as contents:
        for name in contents.files:
            yield name, _chunks(contents, name)


def digest(path: StrPath) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    sha256 = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
    return sha256.hexdigest()


def open_regular(path: StrPath) -> io.FileIO:
    """Open a file to read it, without ever waiting for the other end of a fifo or a device.

    Raises:
        OSError: it cannot be opened, or is no regular file (EINVAL).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return io.FileIO(descriptor, "rb")


def _label(path: StrPath) -> str:
    return os.path.basename(os.path.abspath(path))


@contextmanager
def _opened(path: StrPath, limits: ArchiveLimits) -> Iterator[_Contents]:
    label = _label(path)
    try:
        raw = open_regular(path)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        raise InvalidArchive(f"{label} is not a model archive (zip): {err.strerror}.") from err
    with _ArchiveFile(raw) as file:
        # 1 KiB for each entry is plenty: a name is at most that long, and most are far shorter.
        file.max_read_bytes = max(1024**2, limits.max_entries * 1024)
        try:
            archive = zipfile.ZipFile(file)
        except _DAMAGE as err:
            reason = _hint(raw) or str(err)
            raise InvalidArchive(f"{label} is not a model archive (zip): {reason}") from err
        with archive:
            yield _inspect(archive, raw, label=label, limits=limits)


def _hint(file: io.FileIO) -> str | None:
    start = os.pread(file.fileno(), 2, 0)
    if start == b"\x1f\x8b":
        return "it is a gzip file; the server loads .mar archives or folders; unpack it."
    if start == b"PK" and not zipfile.is_zipfile(file):  # a zip's last bytes say that it is one
        return "it is cut short or damaged."
    return None


def _inspect(archive: zipfile.ZipFile, file: io.FileIO, *, label: str, limits: ArchiveLimits) -> _Contents:
    """Check all that the archive says about itself, before one byte of it is unpacked."""
    entries = archive.infolist()
    for entry in entries:
        if fault := _entry_fault(entry):
            raise _refusal(label, entry.filename, fault)
    folders, files = _tree(entries, label=label, max_entries=limits.max_entries)
    _check_ranges(entries, file, label=label, end_of_entries=archive.start_dir)
    total_bytes = sum(entry.file_size for entry in files.values())
    packed_bytes = sum(entry.compress_size for entry in files.values())
    if total_bytes > limits.max_total_bytes:
        raise InvalidArchive(f"{label} unpacks to more than {limits.max_total_bytes} bytes.")
    if total_bytes > max(limits.ratio_free_bytes, limits.max_ratio * packed_bytes):
        raise InvalidArchive(f"{label} unpacks to more than {limits.max_ratio} times its size.")
    return _Contents(label=label, archive=archive, folders=folders, files=files, total_bytes=total_bytes)


def _refusal(label: str, name: str, fault: str) -> InvalidArchive:
    return InvalidArchive(f"{label}: entry {name[:MAX_COMPONENT_BYTES]!r} is refused: {fault}.")


def _entry_fault(entry: zipfile.ZipInfo) -> str | None:
    # zipfile cuts a name at NUL and may take another from an extra field: neither spelling may be a bad one.
    for name in (entry.orig_filename, entry.filename):
        if fault := name_fault(name.removesuffix("/")):
            return fault
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
        return "it is a link, a device or something else that is not a plain file"
    if entry.flag_bits & _FORBIDDEN_FLAGS:
        return "it is encrypted or patched"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "it is neither stored nor deflated"
    return None


def _tree(
    entries: Iterable[zipfile.ZipInfo], *, label: str, max_entries: int
) -> tuple[list[str], dict[str, zipfile.ZipInfo]]:
    """Return all folders, parents first, and all files; no name may stand for two things."""
    folders: set[str] = set()
    files: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    for entry in entries:
        name = entry.filename.removesuffix("/")
        if name in seen:
            raise _refusal(label, name, "it occurs twice")
        seen.add(name)
        if entry.is_dir():
            folders.add(name)
        else:
            files[name] = entry
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
        # Counted as they come: one long name can stand for hundreds of folders.
        if len(folders) + len(files) > max_entries:
            raise InvalidArchive(f"{label} has more than {max_entries} files and folders.")
    for name in sorted(folders & files.keys()):
        raise _refusal(label, name, "it is both a file and a folder")
    return sorted(folders), files


def _check_ranges(
    entries: Iterable[zipfile.ZipInfo], file: io.FileIO, *, label: str, end_of_entries: int
) -> None:
    """Refuse entries that share bytes: a few kilobytes read many times over make petabytes."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        start = entry.header_offset
        if start < end:
            raise _refusal(label, entry.filename, "its data overlap another entry's")
        if start + _LOCAL_HEADER.size <= end_of_entries:
            header = os.pread(file.fileno(), _LOCAL_HEADER.size, start)
            end = start + len(header) + sum(_LOCAL_HEADER.unpack(header)) + entry.compress_size
        if not start < end <= end_of_entries:
            raise _refusal(label, entry.filename, "its data reach past the end of the entries")


def _chunks(contents: _Contents, name: str) -> Iterator[bytes]:
    """Yield an entry's bytes; they are never more than it declared, and fewer are an error."""
    entry = contents.files[name]
    left = entry.file_size
    try:
        with contents.archive.open(entry) as member:
            while chunk := member.read(_CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    break
                yield chunk
    except _DAMAGE as err:
        raise InvalidArchive(f"{contents.label}: entry {name!r} is damaged: {str(err)[:200]}") from err
    if left != 0:
        raise InvalidArchive(f"{contents.label}: entry {name!r} is not as long as it says.")


def _claim(target: Path) -> bool:
    """Make sure that the folder is there and empty; True if it was made here."""
    try:
        target.mkdir(mode=0o700)
    except FileExistsError:
        if target.is_symlink() or not target.is_dir() or any(target.iterdir()):
            raise FileExistsError(errno.EEXIST, "not an empty folder", os.fspath(target)) from None
        return False
    return True


def _require_space(contents: _Contents, target: Path) -> None:
    if contents.total_bytes > shutil.disk_usage(target).free:
        raise OSError(errno.ENOSPC, f"no space for the {contents.total_bytes} bytes of {contents.label}")


def _write(contents: _Contents, target: Path) -> None:
    for folder in contents.folders:
        target.joinpath(folder).mkdir(mode=0o755)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for name in contents.files:
        with os.fdopen(os.open(target / name, flags, 0o644), "wb") as file:
            for chunk in _chunks(contents, name):
                file.write(chunk)


def _clear(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _within(contents: _Contents, folder: str) -> _Contents:
    prefix = f"{folder}/"
    files = {
        name.removeprefix(prefix): entry for name, entry in contents.files.items() if name.startswith(prefix)
    }
    return replace(
        contents,
        folders=[name.removeprefix(prefix) for name in contents.folders if name.startswith(prefix)],
        files=files,
        total_bytes=sum(entry.file_size for entry in files.values()),
    )


def _manifest(read: Callable[[str], bytes | None], names: Callable[[], Iterable[str]]) -> Manifest | None:
    text = read(MANIFEST_NAME)
    if text is not None:
        return Manifest.parse(text)
    found = [name for name in names() if _is_legacy_manifest(name)]
    if not found:
        return None
    name = min(found, key=lambda name: (name.count("/"), name))  # the outermost; MANIFEST before manifest
    return Manifest.parse_legacy(read(name) or b"", folder=name.rpartition("/")[0])


def _is_legacy_manifest(name: str) -> bool:
    return name.count("/") < 2 and name.rpartition("/")[2].lower() == "manifest.json"


def _archive_text(contents: _Contents, name: str) -> bytes | None:
    if name not in contents.files:
        return None
    text = b""
    for chunk in _chunks(contents, name):
        text += chunk
        if len(text) > MAX_MANIFEST_BYTES:
            break
    return text


def _folder_names(folder: StrPath) -> Iterator[str]:
    """Yield what is in a folder and in the folders in it, as far as they can be read."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry.name
                continue
            with suppress(OSError):
                yield from [f"{entry.name}/{name}" for name in os.listdir(entry.path)]


def _folder_text(folder: StrPath, name: str) -> bytes | None:
    try:
        with open_regular(os.path.join(folder, name)) as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        raise ManifestError(f"{_label(folder)}: {name} is not a regular file.") from err
