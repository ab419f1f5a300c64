"""The folder for unpacked archives: made, kept while its server lives, removed after one that was killed."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mms_lite.errors import ConfigError
from mms_lite.work_dir import WorkDir

MAKE_AND_DIE = """
import os, sys
from mms_lite.work_dir import WorkDir
WorkDir(sys.argv[1]).make()
os._exit(9)
"""


def test_it_is_made_for_the_owner_alone_and_removed(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)

    made = work.make()
    assert made.parent == tmp_path
    assert made.stat().st_mode & 0o077 == 0
    (made / "model").mkdir()

    work.remove()
    work.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_is_removed(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", MAKE_AND_DIE, tmp_path], check=False).returncode == 9
    (left,) = tmp_path.iterdir()

    work = WorkDir(tmp_path)
    made = work.make()

    assert list(tmp_path.iterdir()) == [made]
    assert made != left
    work.remove()


def test_what_a_live_server_has_stays(tmp_path: Path) -> None:
    first, second = WorkDir(tmp_path), WorkDir(tmp_path)

    assert {first.make(), second.make()} == set(tmp_path.iterdir())

    first.remove()
    second.remove()


@pytest.mark.parametrize("kind", ["empty folder", "file", "link to itself", "folder with a pipe"])
def test_what_is_not_ours_stays_and_disturbs_nothing(tmp_path: Path, kind: str) -> None:
    other = tmp_path / "mms-lite-4294967296-notes"
    match kind:
        case "empty folder":
            other.mkdir()
        case "file":
            other.touch()
        case "link to itself":
            other.symlink_to(other)
        case "folder with a pipe":
            other.mkdir()
            os.mkfifo(other / "notes")

    work = WorkDir(tmp_path)
    made = work.make()

    assert set(tmp_path.iterdir()) == {made, other}
    work.remove()


def test_its_lock_is_held_for_its_life(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    fd = os.open(work.make() / ".mms-lite-lock", os.O_RDWR)

    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    work.remove()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot make a folder for models in {tmp_path}/no: "):
        WorkDir(tmp_path / "no").make()


def test_without_a_setting_it_is_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    work = WorkDir(None)

    assert work.make().parent == tmp_path
    work.remove()
