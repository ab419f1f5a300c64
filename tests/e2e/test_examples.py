"""The run.py of each example, from fetching the weights to the answer, and the commands of its README."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from mms_site import ROOT, Site

pytestmark = pytest.mark.time_limit(600)

RUN_S = 500.0  # where nothing is cached, the weights are fetched
MADE = (".run", "model-archives", "*.onnx", "*.pb", "*.pbtxt", "*.params", "detected.jpg", "__pycache__")


class Example:
    """A copy of one example with what it needs beside it, in the repository's shape."""

    def __init__(self, name: str, root: Path) -> None:
        shutil.copytree(ROOT / "examples", root / "examples", ignore=shutil.ignore_patterns(*MADE))
        self.folder = root / "examples" / name
        self.site = Site(self.folder / ".run")  # where run.py has its server's files

    def run(self) -> "CompletedProcess[str]":
        return self.site.run([sys.executable, "run.py"], cwd=self.folder, timeout_s=RUN_S)


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Callable[..., Example]]:
    """Copy an example, unless the libraries that it needs are missing; end whatever it leaves."""
    made = []

    def copy(name: str, *needs: str) -> Example:
        for module in needs:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
        made.append(Example(name, tmp_path))
        return made[-1]

    yield copy
    for each in made:
        each.site.end()


def answers(printed: str) -> list[Any]:
    """The JSON that curl printed, in order."""
    decode = json.JSONDecoder().raw_decode
    return [decode(part.partition("\n")[2])[0] for part in printed.split("$ curl ")[1:] if "\n[" in part]


def check_espresso(printed: str, probability: float) -> None:
    best, *rest = answers(printed)[0]
    assert best == {"probability": pytest.approx(probability, abs=0.02), "class": "espresso"}
    assert len(rest) == 4
    assert f"The photo shows: espresso ({best['probability']:.0%})." in printed


def check_onnx(printed: str, _folder: Path) -> None:
    check_espresso(printed, 0.942)
    assert printed.endswith("The derived handler says: espresso.\n")


def check_openvino(printed: str, _folder: Path) -> None:
    check_espresso(printed, 0.991)


def check_detector(printed: str, folder: Path) -> None:
    cup = answers(printed)[0][0]
    assert cup["label"] == "cup"
    assert cup["score"] == pytest.approx(0.951, abs=0.02)
    assert cup["box"] == pytest.approx([173, 13, 412, 240], abs=5)
    assert "The photo shows: cup (95%)" in printed
    picture = (folder / "detected.jpg").read_bytes()
    assert picture.startswith(b"\xff\xd8")
    assert picture.endswith(b"\xff\xd9")


def check_embedding(printed: str, _folder: Path) -> None:
    paraphrase, *unrelated = (
        float(each) for each in re.findall(r"^ *(-?\d\.\d{3})  ", printed, re.MULTILINE)
    )
    assert 0.6 < paraphrase < 1
    assert len(unrelated) == 2
    assert all(abs(each) < 0.2 for each in unrelated)


def typed(readme: str) -> list[list[str]]:
    """The commands of a README's block of commands to be typed by hand."""
    text = readme.partition("## By hand")[2].replace("\\\n", "")
    return [shlex.split(line) for line in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0].splitlines()]


def printed_commands(printed: str) -> list[list[str]]:
    """The commands that run.py printed, as they are typed for a server on the usual ports."""
    text = re.sub(r"http://127\.0\.0\.1:\d+/", "http://127.0.0.1:8080/", printed)
    text = text.replace("--mms-config .run/config.properties", "--model-store model-archives")
    text = text.replace("curl --silent --show-error --fail", "curl")
    return [shlex.split(line) for line in re.findall(r"^\$ (?!cd |export )(.*)", text, re.MULTILINE)]


@pytest.mark.parametrize(
    ("name", "needs", "check"),
    [
        ("onnx_classifier", ("onnxruntime", "onnx", "h5py"), check_onnx),
        ("openvino_classifier", ("openvino",), check_openvino),
        ("opencv_detector", ("cv2",), check_detector),
        ("text_embedding", ("onnxruntime", "tokenizers"), check_embedding),
    ],
)
def test_an_example_answers_as_its_network_does_and_its_readme_has_its_commands(
    name: str, needs: tuple[str, ...], check: Callable[[str, Path], None], example: Callable[..., Example]
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    copied = example(name, *needs)

    result = copied.run()

    assert result.returncode == 0, result.stdout
    check(result.stdout, copied.folder)
    assert printed_commands(result.stdout) == typed((copied.folder / "README.md").read_text())
    assert copied.site.processes() == []


def test_an_example_that_fails_while_it_serves_stops_its_server(
    example: Callable[..., Example], tmp_path: Path
) -> None:
    copied = example("openvino_classifier", "openvino")
    curl = tmp_path / "bin" / "curl"
    curl.parent.mkdir()
    curl.write_text("#!/bin/sh\nexit 22\n")
    curl.chmod(0o755)
    copied.site.environ["PATH"] = f"{curl.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"

    result = copied.run()

    assert result.returncode == 22, result.stdout
    assert result.stdout.endswith("$ mms-lite --stop\nModel server stopped.\n")
    assert copied.site.processes() == []


def test_an_example_without_its_library_says_in_one_line_what_to_install(
    example: Callable[..., Example], tmp_path: Path
) -> None:
    copied = example("text_embedding")
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('No module named onnxruntime')\n")
    copied.site.environ["PYTHONPATH"] = str(tmp_path)

    result = copied.run()

    assert result.returncode == 1
    assert result.stdout == (
        "run.py: import onnxruntime failed (No module named onnxruntime): pip install '../..[onnx]'\n"
    )
