"""What is packed, how it lies on disk, and that the same input gives the same bytes."""

import io
import os
import socket
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_archiver import packing
from model_archiver.manifest import MANIFEST_NAME, Manifest, ManifestModel
from model_archiver.packing import ArchiveFormat, PackError, pack

MANIFEST = Manifest(model=ManifestModel(name="net", handler="svc:handle"))
SUFFIX = {ArchiveFormat.MAR: ".mar", ArchiveFormat.TGZ: ".tar.gz", ArchiveFormat.FOLDER: ""}


def write(path: Path, content: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    write(folder / "svc.py", "def handle(data, context): return data")
    write(folder / "b/weights.params", b"\0\1" * 1000)
    write(folder / "a.txt")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def restored_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def packed(path: Path) -> dict[str, bytes]:
    """Read any of the three formats with the standard library alone."""
    if path.is_dir():
        return tree(path)
    if path.suffix == ".mar":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(path) as archive:
        assert all(member.isreg() for member in archive)
        names = [member.name for member in archive]
        assert all(name.startswith("net/") for name in names)
        return {name[4:]: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]


def test_a_mar_holds_sorted_files_then_the_manifest(model: Path, out: Path) -> None:
    path = pack(model, MANIFEST, export_path=out).path
    assert path == out / "net.mar"
    content = packed(path)
    assert list(content) == ["a.txt", "b/weights.params", "svc.py", MANIFEST_NAME]
    assert content["b/weights.params"] == b"\0\1" * 1000
    assert content[MANIFEST_NAME].decode() == MANIFEST.to_json()
    with zipfile.ZipFile(path) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_DEFLATED}


@pytest.mark.parametrize("archive_format", list(ArchiveFormat))
def test_every_format_holds_the_same_files(model: Path, out: Path, archive_format: ArchiveFormat) -> None:
    path = pack(model, MANIFEST, export_path=out, archive_format=archive_format).path
    assert path == out / f"net{SUFFIX[archive_format]}"
    assert packed(path) == tree(model) | {MANIFEST_NAME: MANIFEST.to_json().encode()}
    assert [child.name for child in out.iterdir()] == [path.name]


def test_the_current_folder_is_the_default_export_path(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out)
    assert pack(model, MANIFEST).path == out / "net.mar"


@pytest.mark.parametrize("archive_format", [ArchiveFormat.MAR, ArchiveFormat.TGZ])
def test_the_same_input_gives_the_same_bytes(
    model: Path,
    out: Path,
    archive_format: ArchiveFormat,
    monkeypatch: pytest.MonkeyPatch,
    restored_umask: None,
) -> None:
    first = pack(model, MANIFEST, export_path=out, archive_format=archive_format).path.read_bytes()
    os.umask(0o077)
    monkeypatch.setattr("time.time", lambda: 2e9)
    for number, path in enumerate(sorted(model.rglob("*"))):
        os.utime(path, (10**9 + number, 10**9 + number))
        if path.is_file():
            path.chmod(0o640)
    again = model.rename(model.with_name("elsewhere"))
    os.mkdir(out / "second")
    second = pack(again, MANIFEST, export_path=out / "second", archive_format=archive_format).path
    assert second.read_bytes() == first


def test_only_the_executable_bit_of_a_mode_is_kept(model: Path, out: Path) -> None:
    (model / "svc.py").chmod(0o700)
    (model / "a.txt").chmod(0o666)
    with zipfile.ZipFile(pack(model, MANIFEST, export_path=out).path) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert modes["svc.py"] == stat.S_IFREG | 0o755
    assert modes["a.txt"] == stat.S_IFREG | 0o644


@pytest.mark.parametrize("archive_format", list(ArchiveFormat))
def test_output_has_the_mode_that_the_umask_gives(
    model: Path, out: Path, archive_format: ArchiveFormat, restored_umask: None
) -> None:
    os.umask(0o027)
    path = pack(model, MANIFEST, export_path=out, archive_format=archive_format).path
    assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)


def test_clutter_is_left_out_and_hidden_files_are_kept(model: Path, out: Path) -> None:
    before = set(tree(model))
    clutter = [
        "__MACOSX/x", "__pycache__/x.py", "b/__pycache__/y", ".git/config", "b/.cache/z", "MANIFEST.json",
        "b/MANIFEST.json", "MAR-INF/MANIFEST.json", "x.pyc", "b/.DS_Store", "old.mar",
    ]  # fmt: skip
    for name in clutter:
        write(model / name)
    write(model / ".hidden")
    (model / "empty").mkdir()
    content = packed(pack(model, MANIFEST, export_path=out).path)
    assert set(content) == before | {".hidden", MANIFEST_NAME}


def test_a_linked_file_is_stored_as_its_content(model: Path, out: Path, tmp_path: Path) -> None:
    (model / "linked.bin").symlink_to(write(tmp_path / "cache/big.bin", "weights"))
    for archive_format in ArchiveFormat:
        path = pack(model, MANIFEST, export_path=out, archive_format=archive_format).path
        assert packed(path)["linked.bin"] == b"weights"
    assert not (out / "net/linked.bin").is_symlink()


def test_a_linked_folder_is_skipped_with_a_warning(model: Path, out: Path) -> None:
    (model / "again").symlink_to(model)
    warnings: list[str] = []
    content = packed(pack(model, MANIFEST, export_path=out, warn=warnings.append).path)
    assert not any(name.startswith("again") for name in content)
    assert warnings == ["again is a link to a directory; it is skipped"]


def test_a_dangling_link_is_an_error_that_names_it(model: Path, out: Path) -> None:
    (model / "b/gone").symlink_to("nowhere")
    with pytest.raises(PackError, match=r"^b/gone is a link to a file that does not exist"):
        pack(model, MANIFEST, export_path=out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("archive_format", list(ArchiveFormat))
def test_a_fifo_is_an_error_and_never_opened(model: Path, out: Path, archive_format: ArchiveFormat) -> None:
    os.mkfifo(model / "pipe")
    with pytest.raises(PackError, match="pipe is not a regular file"):
        pack(model, MANIFEST, export_path=out, archive_format=archive_format)
    assert list(out.iterdir()) == []


def test_sockets_and_linked_devices_are_errors(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "null").symlink_to("/dev/null")
    with pytest.raises(PackError, match="null is not a regular file"):
        pack(model, MANIFEST, export_path=out)
    (model / "null").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(model)  # a socket's address has room for a short path only
        listener.bind("s")
        with pytest.raises(PackError, match="s is not a regular file"):
            pack(model, MANIFEST, export_path=out)


@pytest.mark.parametrize("name", ["back\\slash", "new\nline", "x:0", os.fsdecode(b"latin\xe9")])
def test_a_name_that_no_reader_accepts_is_an_error(model: Path, out: Path, name: str) -> None:
    write(model / name)
    with pytest.raises(PackError, match="cannot be packed: its name"):
        pack(model, MANIFEST, export_path=out)


def test_a_file_in_the_manifest_folders_place_is_an_error(model: Path, out: Path) -> None:
    write(model / "MAR-INF")
    with pytest.raises(PackError, match="MAR-INF is a file"):
        pack(model, MANIFEST, export_path=out)


@pytest.mark.parametrize("archive_format", list(ArchiveFormat))
def test_existing_output_is_kept_without_force_and_replaced_with_it(
    model: Path, out: Path, archive_format: ArchiveFormat
) -> None:
    target = out / f"net{SUFFIX[archive_format]}"
    stale = target
    if archive_format is ArchiveFormat.FOLDER:
        write(target / MANIFEST_NAME, "{}")
        stale = target / "stale"
    write(stale, "stale")
    with pytest.raises(PackError) as caught:
        pack(model, MANIFEST, export_path=out, archive_format=archive_format)
    assert str(caught.value) == (
        f"{target} already exists.\n"
        "Please specify --force/-f option to overwrite the model archive output file.\n"
        "See -h/--help for more details."
    )
    assert stale.read_bytes() == b"stale"
    warnings: list[str] = []
    pack(model, MANIFEST, export_path=out, archive_format=archive_format, force=True, warn=warnings.append)
    assert warnings == [f"Overwriting {target} ..."]
    assert set(packed(target)) == {*tree(model), MANIFEST_NAME}
    assert [child.name for child in out.iterdir()] == [target.name]


def test_packing_a_folder_in_place_writes_the_manifest_only(model: Path) -> None:
    before = tree(model)
    manifest = Manifest(model=ManifestModel(name=model.name, handler="svc"))
    with pytest.raises(PackError, match="already exists"):
        pack(model, manifest, export_path=model.parent, archive_format=ArchiveFormat.FOLDER)
    for _ in range(2):
        pack(model, manifest, export_path=model.parent, archive_format=ArchiveFormat.FOLDER, force=True)
        assert tree(model) == before | {MANIFEST_NAME: manifest.to_json().encode()}


def test_a_folder_that_holds_the_model_is_never_replaced(model: Path) -> None:
    inner = model / "b"
    manifest = Manifest(model=ManifestModel(name=model.name, handler="svc"))
    before = tree(model)
    with pytest.raises(PackError, match="model-path lies inside the output folder"):
        pack(inner, manifest, export_path=model.parent, archive_format=ArchiveFormat.FOLDER, force=True)
    assert tree(model) == before


def test_a_folder_that_is_no_earlier_output_is_never_replaced(model: Path) -> None:
    manifest = Manifest(model=ManifestModel(name="b", handler="svc"))
    before = tree(model)
    with pytest.raises(PackError, match="was not written by model-archiver"):
        pack(model, manifest, export_path=model, archive_format=ArchiveFormat.FOLDER, force=True)
    assert tree(model) == before


def test_an_empty_folder_is_replaced_with_force(model: Path, out: Path) -> None:
    (out / "net").mkdir()
    pack(model, MANIFEST, export_path=out, archive_format=ArchiveFormat.FOLDER, force=True)
    assert "svc.py" in tree(out / "net")


def test_replacing_a_link_to_a_folder_keeps_that_folder(model: Path, out: Path, tmp_path: Path) -> None:
    precious = write(tmp_path / "precious/file")
    (out / "net").symlink_to(precious.parent)
    pack(model, MANIFEST, export_path=out, archive_format=ArchiveFormat.FOLDER, force=True)
    assert precious.exists()
    assert not (out / "net").is_symlink()
    assert "svc.py" in tree(out / "net")


@pytest.mark.parametrize("archive_format", list(ArchiveFormat))
def test_earlier_output_inside_the_model_folder_is_not_packed(
    model: Path, archive_format: ArchiveFormat
) -> None:
    first = packed(pack(model, MANIFEST, export_path=model, archive_format=archive_format).path)
    second = packed(pack(model, MANIFEST, export_path=model, archive_format=archive_format, force=True).path)
    assert second == first


@pytest.mark.parametrize("archive_format", list(ArchiveFormat))
def test_a_failure_leaves_the_earlier_output_and_nothing_else(
    model: Path, out: Path, archive_format: ArchiveFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = pack(model, MANIFEST, export_path=out, archive_format=archive_format).path
    before = packed(target)
    write(model / "a.txt", "changed")
    opened = iter(["ok"])

    def fail_on_second(path: str) -> io.FileIO:
        if next(opened, None) is None:
            raise OSError(28, "No space left on device")
        return io.FileIO(path)

    monkeypatch.setattr(packing, "open_regular", fail_on_second)
    with pytest.raises(PackError, match="No space left on device"):
        pack(model, MANIFEST, export_path=out, archive_format=archive_format, force=True)
    assert packed(target) == before
    assert [child.name for child in out.iterdir()] == [target.name]


@pytest.mark.parametrize("difference", [b"more", b""])
@pytest.mark.parametrize("archive_format", [ArchiveFormat.MAR, ArchiveFormat.FOLDER])
def test_a_file_that_changes_while_it_is_packed_is_an_error(
    model: Path,
    out: Path,
    archive_format: ArchiveFormat,
    difference: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = packing._parts

    def changing(*args: object) -> Iterator[packing._Part]:
        for part in parts(*args):  # type: ignore[arg-type]
            if part.name == "b/weights.params":
                write(model / part.name, difference * 1000)
            yield part

    monkeypatch.setattr(packing, "_parts", changing)
    with pytest.raises(PackError, match=r"weights\.params changed while it was packed"):
        pack(model, MANIFEST, export_path=out, archive_format=archive_format)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("handler", "file"),
    [
        ("svc", "svc.py"),
        ("svc:handle", "svc.py"),
        ("./svc.py:handle", "svc.py"),
        ("code/svc.py:handle", "code/svc.py"),
        ("pkg.svc:handle", "pkg/svc.py"),
        ("pkg:handle", "pkg/__init__.py"),
    ],
)
def test_a_handler_in_the_folder_is_found(tmp_path: Path, out: Path, handler: str, file: str) -> None:
    write(tmp_path / "src" / file)
    warnings: list[str] = []
    manifest = Manifest(model=ManifestModel(name="net", handler=handler))
    pack(tmp_path / "src", manifest, export_path=out, warn=warnings.append)
    assert warnings == []


@pytest.mark.parametrize("file", ["other.py", ".hidden/svc.py", "svc.pyc"])
def test_a_handler_that_is_not_packed_is_a_warning(tmp_path: Path, out: Path, file: str) -> None:
    write(tmp_path / "src" / file)
    warnings: list[str] = []
    assert pack(tmp_path / "src", MANIFEST, export_path=out, warn=warnings.append).path.exists()
    assert warnings == [
        f"handler file svc not found in model-path {tmp_path / 'src'}; "
        "the module must then be importable where the model is served"
    ]
