"""The verbs `inspect` and `verify`: what an archive or a model's folder says of itself, and whether it holds.

Nothing is unpacked: each file is read once, in chunks.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from model_archiver.archive import InvalidArchive, open_regular, read_files, read_manifest
from model_archiver.manifest import MANIFEST_NAME, FileRecord, Manifest, ManifestError
from model_archiver.packing import PackError, folder_members

VERBS = ("inspect", "verify")
_CHUNK_BYTES = 1024 * 1024
_MAX_NAMED = 5


def main(arguments: Sequence[str]) -> int:
    """Run a verb, the first of the arguments; return the exit code: 1 for a bad archive.

    Raises:
        SystemExit: 2 for arguments that cannot be read, 0 after --help.
    """
    given = _parser().parse_args(arguments)
    label = os.path.basename(os.path.abspath(given.archive))
    try:
        if given.verb == "verify":
            return _verify(given.archive, label)
        _inspect(given.archive, label, as_json=given.json)
    except InvalidArchive as err:
        _complain(str(err))  # it names the archive
        return 1
    except (ManifestError, PackError) as err:
        _complain(f"{label}: {err}")
        return 1
    except OSError as err:
        _complain(f"{given.archive}: {err.strerror or err}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="model-archiver")
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("inspect", description="Show what an archive says of itself, and its files.")
    show.add_argument("archive", help="a .mar archive or a model's folder")
    show.add_argument("--json", action="store_true", help="the same as JSON")
    verify = verbs.add_parser("verify", description="Read every byte and compare with what was recorded.")
    verify.add_argument("archive", help="a .mar archive or a model's folder")
    return parser


def _inspect(path: str, label: str, *, as_json: bool) -> None:
    manifest = _read_manifest(path, label)
    facts = _facts(manifest) if manifest else {}
    files = {name: _record(chunks) for name, chunks in _files(path)}
    total_bytes = sum(record.bytes for record in files.values())
    if as_json:
        records = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}
        print(json.dumps({"archive": label, **facts, "files": records, "bytes": total_bytes}, indent=2))
        return
    say(label)
    for key, value in facts.items():
        if value not in (None, [], ""):
            say(f"  {_TITLES[key]:<16}{_in_words(value)}")
    if manifest is None:
        say("  no manifest: whoever loads it has to name the model and its handler")
    say("")
    _show_table(files, total_bytes)


_TITLES = {
    "name": "name",
    "version": "version",
    "description": "description",
    "backend": "backend",
    "handler": "handler",
    "handlerConfig": "handler config",
    "modelFiles": "model files",
    "labels": "labels",
    "samples": "samples",
    "runtime": "runtime",
    "specificationVersion": "specification",
}


def _facts(manifest: Manifest) -> dict[str, Any]:
    model = manifest.model
    return {
        "name": model.name,
        "version": model.version,
        "description": model.description or manifest.description,
        "backend": model.backend,
        "handler": model.handler,
        "handlerConfig": model.handler_config,
        "modelFiles": list(model.model_files),
        "labels": model.labels,
        "samples": list(model.samples),
        "runtime": manifest.runtime,
        "specificationVersion": manifest.specification_version,
    }


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _show_table(files: Mapping[str, FileRecord], total_bytes: int) -> None:
    width = max(len("bytes"), len(f"{total_bytes:,}"))
    say(f"  {'bytes':>{width}}  {'sha256':<64}  file")
    for name, record in files.items():
        say(f"  {record.bytes:>{width},}  {record.sha256}  {name}")
    say(f"  {total_bytes:>{width},}  in {count(len(files))}, besides the manifest")


def _verify(path: str, label: str) -> int:
    """Compare every file with its record; without records the archive's own checksums are all there is."""
    manifest = _read_manifest(path, label)
    recorded = manifest.files if manifest else {}
    faults, found = [], set()
    for name, chunks in _files(path):
        found.add(name)
        try:
            record = _record(chunks)
        except InvalidArchive as err:
            faults.append(str(err))  # it names the archive
            continue
        if recorded and (fault := _difference(record, recorded.get(name))):
            faults.append(f"{label}: {name} {fault}")
    faults += [f"{label}: {name} is missing" for name in recorded if name not in found]
    for fault in faults:
        _complain(fault)
    if faults:
        return 1
    files = count(len(found))
    if recorded:
        say(f"{label}: {files}, all as recorded")
    elif os.path.isdir(path):
        say(f"{label}: {files}; no digests are recorded, so nothing could be compared")
    else:
        say(f"{label}: {files}; no digests are recorded, so only CRCs were checked")
    return 0


def _read_manifest(path: str, label: str) -> Manifest | None:
    """Read the manifest; a model may lack one, but a folder of archives, or an empty one, is no model."""
    manifest = read_manifest(path)
    if manifest is None and os.path.isdir(path):
        names = sorted(os.listdir(path))
        archives = [name for name in names if name.endswith(".mar")]
        if archives or not names:
            held = f"; it holds the archives {_first(archives)}" if archives else ""
            raise InvalidArchive(f"{label} is no model: it has no {MANIFEST_NAME}{held}")
    return manifest


def _first(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _difference(found: FileRecord, recorded: FileRecord | None) -> str | None:
    if recorded is None:
        return "is not recorded"
    if found.bytes != recorded.bytes:
        return f"has {found.bytes} bytes, recorded are {recorded.bytes}"
    if found.sha256 != recorded.sha256:
        return f"has the SHA-256 {found.sha256}, recorded is {recorded.sha256}"
    return None


def _files(path: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield every file but the manifest; of a folder, what would be packed of it."""
    if os.path.isdir(path):
        for member in folder_members(path):
            yield member.name, _chunks(member.path)
        return
    for name, chunks in read_files(path):
        if name != MANIFEST_NAME:
            yield name, chunks


def _chunks(path: str) -> Iterator[bytes]:
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _record(chunks: Iterable[bytes]) -> FileRecord:
    size, sha256 = 0, hashlib.sha256()
    for chunk in chunks:
        size += len(chunk)
        sha256.update(chunk)
    return FileRecord(bytes=size, sha256=sha256.hexdigest())


def count(number: int) -> str:
    """Return a number of files in words."""
    return f"{number} file" if number == 1 else f"{number} files"


def _complain(message: str) -> None:
    say(f"ERROR - {message}", to_error=True)


def say(line: str, *, to_error: bool = False) -> None:
    """Print a line of which strangers wrote parts: no escape sequences, nothing that the terminal lacks."""
    stream = sys.stderr if to_error else sys.stdout
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
    encoding = stream.encoding or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream)
