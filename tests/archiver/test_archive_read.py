"""Archives from strangers: what extracts, and what is refused before or while it does."""

import gzip
import hashlib
import os
import shutil
import stat
import struct
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from model_archiver.archive import ArchiveLimits, InvalidArchive, digest, extract, read_manifest
from model_archiver.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, ManifestError

Entry = tuple[str, bytes]


def build(
    path: Path,
    *entries: Entry,
    mode: int = 0o644,
    method: int = zipfile.ZIP_DEFLATED,
    tamper: Callable[[list[zipfile.ZipInfo]], None] | None = None,
) -> Path:
    """Write a zip; `tamper` changes the central directory after the local headers and data are written."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.filename = name  # the constructor cuts at NUL
            info.compress_type = method
            info.external_attr = mode << 16
            archive.writestr(info, content)
        if tamper is not None:
            tamper(archive.filelist)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.mar"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def refused(path: Path, target: Path, match: str, *, limits: ArchiveLimits | None = None) -> str:
    """Extract, expect refusal, and check what every refusal has in common."""
    around = {child.name for child in path.parent.iterdir()}
    with pytest.raises(InvalidArchive, match=match) as caught:
        extract(path, target, limits=limits or ArchiveLimits())
    message = str(caught.value)
    assert message.startswith("net.mar")
    assert str(path.parent) not in message
    assert {child.name for child in path.parent.iterdir()} == around
    return message


def test_files_and_folders_are_extracted(path: Path, target: Path) -> None:
    build(path, ("a.py", b"x"), ("b/c/d.bin", b"\0" * 100_000), ("empty/", b""), mode=0)
    extract(path, target)
    assert (target / "a.py").read_bytes() == b"x"
    assert (target / "b/c/d.bin").stat().st_size == 100_000
    assert (target / "empty").is_dir()


def test_the_folder_is_private_and_file_modes_are_ours(path: Path, target: Path) -> None:
    before = os.umask(0o022)
    try:
        extract(build(path, ("a", b"x"), mode=stat.S_IFREG | 0o6777), target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o644


def test_stored_entries_and_comments_before_and_after_are_fine(path: Path, target: Path) -> None:
    build(path, ("a", b"x" * 1000), method=zipfile.ZIP_STORED)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    extract(path, target)
    assert (target / "a").read_bytes() == b"x" * 1000


def test_an_empty_existing_folder_is_filled(path: Path, target: Path) -> None:
    target.mkdir()
    extract(build(path, ("a", b"x")), target)
    assert (target / "a").exists()


def test_a_folder_with_content_or_a_link_is_not_touched(path: Path, target: Path, tmp_path: Path) -> None:
    build(path, ("a", b"x"))
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(FileExistsError):
        extract(path, target)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        extract(path, tmp_path / "link")
    assert [child.name for child in target.iterdir()] == ["mine"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "a/../../evil", "/etc/evil", "//evil", "a//b", "./a", "a/.", "..", "a/..", "", "/",
        "C:/evil", "c:evil", "a\\..\\b", "a\0b", "a\nb", "a\x7fb", "a\x85b", "../", "x" * 256, "é" * 128,
        "a/" * 600 + "b",
    ],
)  # fmt: skip
def test_a_bad_name_is_refused(path: Path, target: Path, name: str) -> None:
    refused(build(path, ("good", b"x"), (name, b"x")), target, "its name")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_devices_are_refused(path: Path, target: Path, kind: int) -> None:
    refused(build(path, ("a", b"/etc/passwd"), mode=kind | 0o777), target, "'a' is refused: it is a link")
    refused(build(path, ("a/", b""), mode=kind | 0o777), target, "it is a link")


def test_a_file_that_says_it_is_a_folder_is_refused(path: Path, target: Path) -> None:
    refused(build(path, ("a", b""), mode=stat.S_IFDIR | 0o755), target, "not a plain file")
    refused(build(path, ("a/", b""), mode=stat.S_IFREG | 0o755), target, "not a plain file")


def rename(new: str) -> Callable[[list[zipfile.ZipInfo]], None]:
    def tamper(entries: list[zipfile.ZipInfo]) -> None:
        entries[-1].filename = new

    return tamper


def test_names_that_occur_twice_are_refused(path: Path, target: Path) -> None:
    refused(
        build(path, ("a", b"x"), ("b", b"y"), tamper=rename("a")), target, "'a' is refused: it occurs twice"
    )
    refused(build(path, ("a/", b""), ("a", b"y"), mode=0), target, "occurs twice")


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a", "a/b/")])
def test_a_name_for_both_a_file_and_a_folder_is_refused(
    path: Path, target: Path, names: tuple[str, str]
) -> None:
    entries = [(name, b"") for name in names]
    refused(build(path, *entries, mode=0), target, "both a file and a folder")


@pytest.mark.parametrize("flag", [0x01, 0x20, 0x40, 0x2000])
def test_encrypted_and_patched_entries_are_refused(path: Path, target: Path, flag: int) -> None:
    def tamper(entries: list[zipfile.ZipInfo]) -> None:
        entries[0].flag_bits |= flag

    refused(build(path, ("a", b"x"), tamper=tamper), target, "encrypted or patched")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_methods_are_refused(path: Path, target: Path, method: int) -> None:
    refused(build(path, ("a", b"x"), method=method), target, "neither stored nor deflated")


def test_a_wrong_checksum_is_refused_and_nothing_remains(path: Path, target: Path) -> None:
    def tamper(entries: list[zipfile.ZipInfo]) -> None:
        entries[1].CRC ^= 1

    build(path, ("a/b", b"x"), ("c", b"y"), tamper=tamper)
    refused(path, target, "'c' is damaged")
    target.mkdir()
    refused(path, target, "'c' is damaged")
    assert list(target.iterdir()) == []


def test_a_name_that_differs_from_its_local_header_is_refused(path: Path, target: Path) -> None:
    refused(build(path, ("a", b"x"), tamper=rename("b")), target, "'b' is damaged")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [0, 10, 999, 1001, 100_000])
def test_an_entry_that_lies_about_its_size_is_refused(
    path: Path, target: Path, size: int, method: int
) -> None:
    def tamper(entries: list[zipfile.ZipInfo]) -> None:
        entries[0].file_size = size

    refused(
        build(path, ("a", b"x" * 1000), method=method, tamper=tamper), target, "'a' is (damaged|not as long)"
    )


def test_damaged_data_are_refused(path: Path, target: Path) -> None:
    build(path, ("a", os.urandom(1000)))
    content = bytearray(path.read_bytes())
    content[40:60] = b"\xff" * 20
    path.write_bytes(content)
    refused(path, target, "'a' is damaged")


def test_entries_that_share_their_data_are_refused(path: Path, target: Path) -> None:
    def same(entries: list[zipfile.ZipInfo]) -> None:
        entries[1].header_offset = entries[0].header_offset

    def longer(entries: list[zipfile.ZipInfo]) -> None:
        entries[0].compress_size += 10

    for tamper in (same, longer):
        refused(build(path, ("a", b"x" * 99), ("b", b"y"), tamper=tamper), target, "overlap another entry's")


def test_data_outside_the_file_are_refused(path: Path, target: Path) -> None:
    def size(entries: list[zipfile.ZipInfo]) -> None:
        entries[0].compress_size = 2**31

    def huge_offset(entries: list[zipfile.ZipInfo]) -> None:
        entries[0].header_offset = 2**63 + 5

    for tamper in (size, huge_offset):
        refused(build(path, ("a", b"x"), tamper=tamper), target, "reach past the end")


def test_too_many_entries_are_refused(path: Path, target: Path) -> None:
    limits = ArchiveLimits(max_entries=3)
    extract(build(path, ("a", b""), ("b/c", b"")), target, limits=limits)
    shutil.rmtree(target)
    refused(build(path, ("a", b""), ("b/c", b""), ("d", b"")), target, "more than 3 files", limits=limits)


def test_folders_that_only_a_long_name_implies_are_counted(path: Path, target: Path) -> None:
    limits = ArchiveLimits(max_entries=100)
    refused(build(path, ("a/" * 100 + "b", b"")), target, "more than 100 files and folders", limits=limits)


def test_a_huge_directory_of_entries_is_refused_before_it_is_read(path: Path, target: Path) -> None:
    def tamper(entries: list[zipfile.ZipInfo]) -> None:
        for entry in entries:
            entry.comment = b"x" * 65_000

    build(path, *((str(number), b"") for number in range(20)), tamper=tamper)
    refused(path, target, "directory of entries is too large", limits=ArchiveLimits(max_entries=50))


def test_a_total_over_the_limit_is_refused(path: Path, target: Path) -> None:
    build(path, ("a", os.urandom(600)), ("b", os.urandom(600)))
    extract(path, target, limits=ArchiveLimits(max_total_bytes=1200))
    shutil.rmtree(target)
    refused(path, target, "more than 1199 bytes", limits=ArchiveLimits(max_total_bytes=1199))


def test_the_ratio_counts_only_beyond_a_size(path: Path, target: Path) -> None:
    build(path, ("zeros", bytes(1024**2)))
    extract(path, target)  # about 1000 to 1, but small
    shutil.rmtree(target)
    refused(path, target, "more than 200 times", limits=ArchiveLimits(ratio_free_bytes=1024**2 - 1))


def test_a_full_disk_is_found_out_before_writing(
    path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 0, 9))
    with pytest.raises(OSError, match=r"no space for the 10 bytes of net\.mar"):
        extract(build(path, ("a", b"0123456789")), target)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06", b"PK\x03\x04" + bytes(100), bytes(100)])
def test_what_is_not_a_zip_is_refused(path: Path, target: Path, content: bytes) -> None:
    path.write_bytes(content)
    refused(path, target, r"^net\.mar is not a model archive \(zip\): ")


def test_a_tar_gz_gets_a_hint(path: Path, target: Path) -> None:
    path.write_bytes(gzip.compress(b"tar"))
    refused(path, target, r"it is a gzip file; the server loads \.mar archives or folders; unpack it")


def test_a_zip_without_its_end_is_said_to_be_cut_short(path: Path, target: Path) -> None:
    content = build(path, ("a", os.urandom(1000))).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, target, r"^net\.mar is not a model archive \(zip\): it is cut short or damaged\.$")
    path.write_bytes(b"hello")
    refused(path, target, r"^net\.mar is not a model archive \(zip\): File is not a zip file$")


def test_every_truncation_is_refused(path: Path, target: Path) -> None:
    content = build(path, ("a", b"x" * 100), ("b", b"y")).read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path, target, "not a model archive")


def test_a_zip64_offset_that_no_file_has_is_refused(path: Path, target: Path) -> None:
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 46, 2**64 - 50)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(record + locator + end)
    refused(path, target, "not a model archive")


def test_a_fifo_or_folder_is_no_archive_and_does_not_hang(path: Path, target: Path) -> None:
    os.mkfifo(path)
    refused(path, target, "not a regular file")
    path.unlink()
    path.mkdir()
    refused(path, target, "not a regular file")


def test_a_missing_archive_is_an_os_error(path: Path, target: Path) -> None:
    with pytest.raises(FileNotFoundError):
        extract(path, target)


def test_the_manifest_is_read_from_an_archive_and_from_a_folder(path: Path, target: Path) -> None:
    build(path, ("a", b"x"), (MANIFEST_NAME, b'{"model": {"modelName": "net"}}'))
    extract(path, target)
    for place in (path, target):
        manifest = read_manifest(place)
        assert manifest is not None
        assert manifest.model.name == "net"


def test_no_manifest_is_none(path: Path, target: Path) -> None:
    build(path, ("a/b/MANIFEST.json", b"{}"), ("MAR-INF", b""), ("my-manifest.json", b"{}"))
    extract(path, target)
    assert read_manifest(path) is None
    assert read_manifest(target) is None


LEGACY = b'{"Model": {"Model-Name": "old", "Service": "service.py"}}'


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["MANIFEST.json"], ""),
        (["Manifest.JSON"], ""),
        (["old/manifest.json"], "old"),
        (["b/MANIFEST.json", "a/MANIFEST.json"], "a"),
        (["a/MANIFEST.json", "manifest.json"], ""),
    ],
)
def test_a_manifest_of_version_0_lies_at_the_root_or_one_folder_down(
    path: Path, target: Path, names: list[str], folder: str
) -> None:
    build(path, *[(name, LEGACY) for name in names])
    extract(path, target)
    for place in (path, target):
        manifest = read_manifest(place)
        assert manifest is not None
        assert (manifest.model.name, manifest.folder) == ("old", folder)


def test_of_two_spellings_of_a_legacy_manifest_the_one_of_mms_counts(path: Path) -> None:
    build(path, ("Manifest.json", b"{}"), ("MANIFEST.json", LEGACY))
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest.model.name == "old"


def test_a_folder_of_an_archive_is_unpacked_alone_and_without_its_name(path: Path, target: Path) -> None:
    build(path, ("old/a", b"1"), ("old/sub/b", b"2"), ("older/c", b"3"), ("d", b"4"))
    extract(path, target, folder="old")
    assert {str(each.relative_to(target)) for each in target.rglob("*")} == {"a", "sub", "sub/b"}
    assert (target / "sub/b").read_bytes() == b"2"


def test_a_folder_of_a_model_that_cannot_be_listed_is_passed_over(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target / "a").mkdir(parents=True)

    def refuse(folder: str) -> list[str]:
        raise PermissionError(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    assert read_manifest(target) is None


def test_a_huge_manifest_is_refused(path: Path, target: Path) -> None:
    build(path, (MANIFEST_NAME, b" " * (MAX_MANIFEST_BYTES + 1)))
    extract(path, target)
    for place in (path, target):
        with pytest.raises(ManifestError, match="larger than"):
            read_manifest(place)


def test_a_fifo_as_manifest_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "MAR-INF").mkdir()
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with pytest.raises(ManifestError, match="not a regular file"):
        read_manifest(tmp_path)


def test_a_hostile_archive_is_refused_for_its_manifest_too(path: Path) -> None:
    with pytest.raises(InvalidArchive, match="its name"):
        read_manifest(build(path, (MANIFEST_NAME, b"{}"), ("../evil", b"")))


def test_the_digest_is_sha256(path: Path) -> None:
    content = b"x" * 1_000_000
    path.write_bytes(content)
    assert digest(path) == hashlib.sha256(content).hexdigest()
