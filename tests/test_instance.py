"""The claim on the temporary folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mms_lite.errors import ConfigError
from mms_lite.instance import Instance


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


def test_a_claim_is_exclusive_and_names_the_process(folder: str) -> None:
    first, second = Instance(folder), Instance(folder)

    assert first.running() is None
    assert first.claim()
    assert not second.claim()

    assert first.pid_file.read_text() == f"{os.getpid()}\n"
    assert second.running() == os.getpid()


def test_a_refused_claim_leaves_the_files_alone(folder: str) -> None:
    first, second = Instance(folder), Instance(folder)
    first.claim()
    first.describe({"inference_address": "http://127.0.0.1:1"})

    second.claim()
    second.release()

    assert second.running() == os.getpid()
    assert second.state() == {"inference_address": "http://127.0.0.1:1"}


def test_release_removes_both_files_and_lets_the_next_claim(folder: str, tmp_path: Path) -> None:
    first, second = Instance(folder), Instance(folder)
    first.claim()
    first.describe({"pid": 1})

    first.release()
    first.release()

    assert list(tmp_path.iterdir()) == []
    assert second.running() is None
    assert second.state() == {}
    assert second.claim()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"no number\n",
        b"-1\n",
        b"\xff\xfe\x00",
        b"99999999999999999999999\n",
        b"%d\n" % os.getpid(),
    ],
    ids=["empty", "blank", "text", "negative", "bytes", "huge", "a live stranger's pid"],
)
def test_a_pid_file_that_nobody_holds_is_no_running_server(folder: str, content: bytes) -> None:
    instance = Instance(folder)
    instance.pid_file.write_bytes(content)

    assert instance.running() is None
    assert instance.claim()
    assert instance.pid_file.read_text() == f"{os.getpid()}\n"


def test_the_claim_ends_with_the_process(folder: str) -> None:
    code = (
        "import sys, os; from mms_lite.instance import Instance; Instance(sys.argv[1]).claim(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 9
    instance = Instance(folder)

    assert instance.pid_file.exists()
    assert instance.running() is None
    assert instance.claim()


def test_a_child_does_not_inherit_the_claim(folder: str) -> None:
    first, second = Instance(folder), Instance(folder)
    first.claim()
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, close_fds=False
    )
    try:
        first.release()
        assert second.claim()
    finally:
        child.communicate(b"\n")


@pytest.mark.parametrize("target", ["another", "nowhere"])
def test_a_symbolic_link_is_not_followed(folder: str, tmp_path: Path, target: str) -> None:
    (tmp_path / "another").write_text("precious")
    instance = Instance(folder)
    instance.pid_file.symlink_to(tmp_path / target)

    with pytest.raises(ConfigError, match="cannot use the pid file"):
        instance.claim()
    assert (tmp_path / "another").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_linked_pid_file_is_no_running_server(folder: str, tmp_path: Path) -> None:
    (tmp_path / "another").write_text(f"{os.getpid()}\n")
    instance = Instance(folder)
    instance.pid_file.symlink_to(tmp_path / "another")

    with pytest.raises(ConfigError, match="cannot use the pid file"):
        instance.running()


def test_a_pid_file_that_is_a_folder_is_named(folder: str) -> None:
    instance = Instance(folder)
    instance.pid_file.mkdir()

    with pytest.raises(ConfigError, match=r"\.model_server\.pid: Is a directory"):
        instance.claim()


@pytest.mark.time_limit(10)
def test_a_pid_file_that_is_a_pipe_does_not_hang(folder: str) -> None:
    instance = Instance(folder)
    os.mkfifo(instance.pid_file)

    assert instance.running() is None


def test_a_claim_on_a_file_that_was_removed_meanwhile_is_none(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One opens the file, its holder leaves and removes it, another makes a new one: one may hold it."""
    leaving, late, quick = Instance(folder), Instance(folder), Instance(folder)
    leaving.claim()
    opened = Instance._open

    def open_then_lose_the_file(self: Instance, flags: int) -> int:
        fd = opened(self, flags)
        monkeypatch.setattr(Instance, "_open", opened)
        leaving.release()
        assert quick.claim()
        return fd

    monkeypatch.setattr(Instance, "_open", open_then_lose_the_file)

    assert not late.claim()
    assert late.running() == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_state_file_that_is_none_counts_as_empty(folder: str, content: str) -> None:
    instance = Instance(folder)
    instance.state_file.write_text(content)

    assert instance.state() == {}


def test_a_pid_file_that_cannot_be_written_is_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    instance = Instance(folder)
    monkeypatch.setattr(os, "write", full)

    with pytest.raises(ConfigError, match=r"^cannot write the pid file .*: No space left on device$"):
        instance.claim()
    instance.release()
    assert Instance(folder).running() is None
