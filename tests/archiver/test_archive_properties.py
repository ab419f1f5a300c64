"""Any tree comes back from pack and extract; any bytes extract inside the folder or are refused."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from model_archiver.archive import ArchiveLimits, InvalidArchive, extract, read_manifest
from model_archiver.manifest import MANIFEST_NAME, Manifest, ManifestError, ManifestModel
from model_archiver.packing import ArchiveFormat, pack

MANIFEST = Manifest(model=ManifestModel(name="net", handler="svc"))
COMPONENT = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/\\:."), min_size=1, max_size=12
).filter(lambda name: name not in ("__MACOSX", "__pycache__", "MAR-INF"))
TREES = st.dictionaries(
    st.lists(COMPONENT, min_size=1, max_size=3).map("/".join), st.binary(max_size=200), max_size=6
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "repeat"]), st.integers(0, 2**16), st.binary(max_size=8)
    ),
    min_size=1,
    max_size=6,
)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def lay_out(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files, leaving out those that stand where another needs a folder."""
    folder.mkdir()
    for name, content in files.items():
        if not any(other.startswith(f"{name}/") for other in files):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@settings(max_examples=50, deadline=None)
@given(files=TREES, manifest_name=st.sampled_from(["net", "a.b-c_1"]))
def test_packing_and_extracting_gives_the_tree_back(files: dict[str, bytes], manifest_name: str) -> None:
    manifest = Manifest(model=ManifestModel(name=manifest_name, handler="svc"))
    with scratch() as folder:
        source = folder / "source"
        lay_out(source, files)
        archive = pack(source, manifest, export_path=folder).path
        extract(archive, folder / "target")
        expected = tree(source) | {MANIFEST_NAME: manifest.to_json().encode()}
        assert tree(folder / "target") == expected
        assert read_manifest(archive) == manifest
        same = pack(source, manifest, export_path=folder, archive_format=ArchiveFormat.FOLDER).path
        assert tree(same) == expected


def mutate(content: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    changed = bytearray(content)
    for kind, position, extra in mutations:
        at = position % (len(changed) + 1)
        if kind == "set":
            changed[at : at + len(extra)] = extra
        elif kind == "cut":
            del changed[at : at + len(extra)]
        elif kind == "insert":
            changed[at:at] = extra
        else:
            changed[at:at] = changed[at : at + 100]
    return bytes(changed)


def packed_sample() -> bytes:
    with scratch() as folder:
        lay_out(folder / "source", {"svc.py": b"x" * 50, "a/b/c": b"y", "weights": bytes(range(64))})
        return pack(folder / "source", MANIFEST, export_path=folder).path.read_bytes()


SAMPLE = packed_sample()


@settings(max_examples=300, deadline=None)
@given(mutations=MUTATIONS)
def test_mutated_archives_stay_inside_or_are_refused(mutations: list[tuple[str, int, bytes]]) -> None:
    with scratch() as folder:
        archive, target = folder / "net.mar", folder / "in" / "target"
        target.parent.mkdir()
        archive.write_bytes(mutate(SAMPLE, mutations))
        try:
            extract(archive, target, limits=ArchiveLimits(max_total_bytes=10_000))
        except InvalidArchive:
            assert not target.exists()
        else:
            assert all(path.is_dir() or path.is_file() for path in target.rglob("*"))
            assert not any(path.is_symlink() for path in target.rglob("*"))
        with suppress(InvalidArchive, ManifestError):
            read_manifest(archive)
        assert {child.name for child in folder.iterdir()} == {"net.mar", "in"}
        assert set(os.listdir(folder / "in")) <= {"target"}
