"""Rotation: when a log file becomes an old one, what that is called, how many stay, what goes wrong."""

import gzip
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mms_lite import rotation
from mms_lite.rotation import RotatingFile

Make = Callable[..., RotatingFile]


def at(month: int, day: int, hour: int = 12) -> float:
    return time.mktime((2026, month, day, hour, 0, 0, 0, 0, -1))


def settle() -> None:
    """Wait until old files are compressed."""
    for thread in threading.enumerate():
        if thread.name == "log-compress":
            thread.join(20)
            assert not thread.is_alive()


def text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def contents(folder: Path) -> dict[str, str]:
    """Return the text of every file, after compression."""
    settle()
    return {path.name: text(path) for path in folder.iterdir()}


def put(path: Path, content: str, written_s: float) -> None:
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    os.utime(path, (written_s, written_s))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Open access_log.log in the test's folder."""
    made: list[RotatingFile] = []

    def opened(**limits: int) -> RotatingFile:
        file = RotatingFile(tmp_path / "access_log.log", **limits)
        file.open()
        made.append(file)
        return file

    yield opened
    for file in made:
        file.close()
    settle()


def test_the_first_line_of_a_day_begins_a_new_file(make: Make, tmp_path: Path) -> None:
    file = make()
    file.write(b"early\n", at(11, 21, 0))
    file.write(b"late\n", at(11, 21, 23))
    file.write(b"next\n", at(11, 22, 0))
    file.write(b"last\n", at(11, 25))
    file.close()
    assert contents(tmp_path) == {
        "access_log.21-Nov.log.gz": "early\nlate\n",
        "access_log.22-Nov.log.gz": "next\n",
        "access_log.log": "last\n",
    }


def test_a_line_that_was_overtaken_at_midnight_goes_to_the_new_day(make: Make, tmp_path: Path) -> None:
    file = make()
    for hour, line in ((at(11, 21), b"a\n"), (at(11, 22, 0), b"b\n"), (at(11, 22, 0) - 0.001, b"c\n")):
        file.write(line, hour)
    file.close()
    assert contents(tmp_path) == {"access_log.21-Nov.log.gz": "a\n", "access_log.log": "b\nc\n"}


def test_a_file_of_another_day_is_rotated_after_a_restart(make: Make, tmp_path: Path) -> None:
    put(tmp_path / "access_log.log", "before\n", at(2, 3))
    file = make()
    file.write(b"same day\n", at(2, 3, 23))
    file.close()
    os.utime(file.path, (at(2, 3, 23),) * 2)
    file = make()
    file.write(b"after\n", at(2, 4))
    file.close()
    assert contents(tmp_path) == {
        "access_log.03-Feb.log.gz": "before\nsame day\n",
        "access_log.log": "after\n",
    }


def test_months_have_english_names(make: Make, tmp_path: Path) -> None:
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    file = make()
    for number, month in enumerate(months, 1):
        file.write(b"x", at(number, 1))
        file.write(b"x", at(number + 1, 1))
        assert f"access_log.01-{month}.log.gz" in contents(tmp_path)


def test_a_full_file_becomes_an_old_one_and_five_are_kept(make: Make, tmp_path: Path) -> None:
    file = make(max_bytes=30)
    for number in range(40):
        file.write(b"line %02d\n" % number, at(11, 21))  # four of them fill a file
    file.close()
    files = contents(tmp_path)
    newest = [f"access_log.21-Nov-{number}.log.gz" for number in range(4, 9)]
    assert files.keys() == {*newest, "access_log.log"}
    assert "".join(files[name] for name in [*newest, "access_log.log"]) == "".join(
        f"line {number:02d}\n" for number in range(16, 40)
    )


def test_a_file_that_was_full_at_the_start_is_rotated(make: Make, tmp_path: Path) -> None:
    put(tmp_path / "access_log.log", "x" * 50, at(11, 21))
    make(max_bytes=50).write(b"y", at(11, 21))
    assert "access_log.21-Nov.log.gz" in contents(tmp_path)


def test_a_day_goes_on_counting_after_the_highest_number(make: Make, tmp_path: Path) -> None:
    for tail in ("", "-3", "-10"):
        put(tmp_path / f"access_log.21-Nov{tail}.log.gz", tail, at(11, 21))
    file = make(max_bytes=1)
    file.write(b"x", at(11, 21))
    file.write(b"y", at(11, 21))
    assert contents(tmp_path)["access_log.21-Nov-11.log.gz"] == "x"


def test_the_oldest_are_deleted_by_time_and_not_by_name(make: Make, tmp_path: Path) -> None:
    days = [(9, 30), (10, 1), (10, 31), (11, 1), (11, 2), (11, 20)]
    for month, day in days:
        name = time.strftime("access_log.%d-", time.localtime(at(month, day)))
        put(tmp_path / f"{name}{rotation._MONTHS[month - 1]}.log.gz", "old", at(month, day))
    put(tmp_path / "access_log.log", "x", at(11, 21))
    make().write(b"y", at(11, 22))
    left = {name.removeprefix("access_log.") for name in contents(tmp_path)}
    assert left == {f"{day}.log.gz" for day in ("31-Oct", "01-Nov", "02-Nov", "20-Nov", "21-Nov")} | {"log"}


def test_only_old_files_of_this_log_are_touched(make: Make, tmp_path: Path) -> None:
    others = {
        "mms_log.21-Nov.log",
        "access_log.backup.log",
        "access_log.21-Nov.log.bak",
        "access_log.log.1",
    }
    for name in others:
        put(tmp_path / name, name, at(1, 1))
    file = make(max_bytes=1)
    for _ in range(10):
        file.write(b"x", at(11, 21))
    files = contents(tmp_path)
    assert {name: files[name] for name in others} == {name: name for name in others}
    assert len(files) == len(others) + rotation.OLD_FILES + 1


def leave_uncompressed(folder: Path) -> None:
    """Leave what a server does that is killed while it compresses."""
    put(folder / "access_log.21-Nov.log", "all of it\n", at(11, 21))
    put(folder / "access_log.21-Nov.log.gz.part", "half", at(11, 21))


def test_a_start_compresses_what_a_killed_server_left(make: Make, tmp_path: Path) -> None:
    leave_uncompressed(tmp_path)
    make()
    files = contents(tmp_path)
    assert files == {"access_log.21-Nov.log.gz": "all of it\n", "access_log.log": ""}
    assert (tmp_path / "access_log.21-Nov.log.gz").stat().st_mtime == at(11, 21)


def test_so_does_the_next_rotation(make: Make, tmp_path: Path) -> None:
    file = make(max_bytes=1)
    file.write(b"x", at(11, 22))
    leave_uncompressed(tmp_path)
    file.write(b"y", at(11, 22))
    file.flush()
    assert contents(tmp_path) == {
        "access_log.21-Nov.log.gz": "all of it\n",
        "access_log.22-Nov.log.gz": "x",
        "access_log.log": "y",
    }


def test_writing_goes_on_while_an_old_file_is_compressed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    real = rotation._compress

    def held(plain: Path) -> None:
        assert go_on.wait(20)
        real(plain)

    monkeypatch.setattr(rotation, "_compress", held)
    file = make(max_bytes=1)
    try:
        for line in (b"a", b"b", b"c"):
            file.write(line, at(11, 21))
        file.flush()
        assert {path.name: text(path) for path in tmp_path.iterdir()} == {
            "access_log.21-Nov.log": "a",
            "access_log.21-Nov-1.log": "b",
            "access_log.log": "c",
        }
    finally:
        go_on.set()
    assert {name for name in contents(tmp_path) if name.endswith(".gz")} == {
        "access_log.21-Nov.log.gz",
        "access_log.21-Nov-1.log.gz",
    }


def test_a_folder_that_forbids_renaming_costs_no_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Made by hand, because root may rename in any folder.
    def forbidden(_from: object, _to: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = make(max_bytes=4)
    with monkeypatch.context() as patch:
        patch.setattr(rotation.os, "rename", forbidden)
        file.write(b"one\n", at(11, 21))
        with pytest.raises(PermissionError):
            file.write(b"two\n", at(11, 21))  # tried again when as much has been written once more
        with pytest.raises(PermissionError):
            file.write(b"3\n", at(11, 22))
        file.write(b"4\n", at(11, 22))
    file.write(b"five\n", at(11, 22))
    file.close()
    assert contents(tmp_path) == {
        "access_log.22-Nov.log.gz": "one\ntwo\n3\n4\n",
        "access_log.log": "five\n",
    }


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_too_full_to_compress_leaves_the_old_file_as_it_is(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "access_log.21-Nov.log"
    put(old, "old\n", at(11, 21))
    (tmp_path / "access_log.21-Nov.log.gz.part").symlink_to("/dev/full")
    make().close()
    assert contents(tmp_path) == {"access_log.21-Nov.log": "old\n", "access_log.log": ""}
    assert caplog.messages == ["Old files of access_log.log stay as they are: No space left on device"]
    make()
    assert contents(tmp_path) == {"access_log.21-Nov.log.gz": "old\n", "access_log.log": ""}


def test_a_link_to_a_device_stays_one(make: Make, tmp_path: Path) -> None:
    link = tmp_path / "access_log.log"
    link.symlink_to(os.devnull)
    file = make(max_bytes=1)
    for day in (21, 22, 23):
        file.write(b"xy", at(11, day))
    assert list(tmp_path.iterdir()) == [link]
    assert link.is_symlink()


def test_a_folder_that_is_gone_costs_lines_until_it_is_back(make: Make, tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "logs" / "access_log.log", max_bytes=1)
    file.path.parent.mkdir()
    file.open()
    file.write(b"x", at(11, 21))
    file.flush()
    file.path.unlink()
    file.path.parent.rmdir()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            file.write(b"lost", at(11, 21))
    file.path.parent.mkdir()
    file.write(b"back", at(11, 21))
    file.close()
    assert contents(file.path.parent) == {"access_log.log": "back"}


def test_two_servers_on_one_file_lose_no_line_at_midnight(make: Make, tmp_path: Path) -> None:
    one, other = make(), make()
    for day in (20, 21):
        for number in range(10):
            for server, name in ((one, "one"), (other, "other")):
                server.write(b"%s %d of %d\n" % (name.encode(), number, day), at(11, day))
                server.flush()
    found = contents(tmp_path)
    assert set(found) == {"access_log.log", "access_log.20-Nov.log.gz"}
    lines = "".join(found.values()).splitlines()
    assert len(lines) == len(set(lines)) == 40


def test_after_a_file_was_renamed_by_others_lines_go_to_a_new_one(make: Make, tmp_path: Path) -> None:
    file = make()
    file.write(b"before\n", at(11, 20))
    file.flush()
    (tmp_path / "access_log.log").rename(tmp_path / "taken")
    file.flush()
    file.write(b"after\n", at(11, 20))
    file.flush()
    assert contents(tmp_path) == {"taken": "before\n", "access_log.log": "after\n"}
