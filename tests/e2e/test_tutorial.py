"""The tutorial of examples/mxnet_resnet50, command by command as its README has them."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from mms_site import BIN, ROOT, Site, copy_tutorial

pytestmark = [pytest.mark.mxnet, pytest.mark.time_limit(600)]

FETCH_S = 500.0  # where nothing is cached, the weights are fetched and ported


def commands() -> tuple[list[str], list[str]]:
    """The lines of the README's two blocks of commands: ResNet-50, and what SqueezeNet changes."""
    text = (ROOT / "examples" / "mxnet_resnet50" / "README.md").read_text()
    first, second = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return first.splitlines(), second.splitlines()


class Tutorial:
    """A copy of the example, and a shell whose working folder it is."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.folder = copy_tutorial(site)

    def run(self, line: str) -> str:
        """Run one line of the README; it must succeed."""
        if line.startswith("curl"):
            host, port = self.site.host()
            line = line.replace("127.0.0.1:8080", f"{host}:{port}").replace("curl", "curl -sS --fail", 1)
        timeout_s = FETCH_S if "fetch_weights" in line else 60.0
        result = self.site.run(shlex.split(line), cwd=self.folder, timeout_s=timeout_s)
        assert result.returncode == 0, f"{line}\n{result.stdout}"
        return result.stdout


@pytest.fixture
def tutorial(site: Site) -> Tutorial:
    return Tutorial(site)


def need_curl() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")


def check_espresso(answer: str) -> None:
    top = json.loads(answer)
    assert [len(entry) for entry in top] == [1] * 5
    assert list(top[0]) == ["espresso"]
    assert 0.9 < float(top[0]["espresso"]) <= 1
    assert answer.startswith('[\n  {\n    "espresso": "0.')


def resnet50_is_here() -> bool:
    if os.environ.get("MMS_LITE_E2E_RESNET50") == "1":
        return True
    found = subprocess.run(
        [BIN / "python", "-c", "import fetch_weights; print(fetch_weights.default_cache())"],
        cwd=ROOT / "examples" / "mxnet_resnet50",
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        text=True,
        capture_output=True,
        check=True,
        timeout=30,
    )
    return any(Path(found.stdout.strip(), "weights").glob("resnet50_v1-*/*.params"))


async def test_squeezenet_as_the_readme_has_it(tutorial: Tutorial) -> None:
    need_curl()
    _, _, start, ask, stop = commands()[0]
    fetch, pack = commands()[1]

    assert tutorial.run(fetch).endswith("squeezenet1_1 is in mxnet_squeezenet\n")
    tutorial.run(pack)
    assert (tutorial.folder.parent / "model-archives" / "squeezenet.mar").is_file()
    printed = tutorial.run(start)
    assert "Model squeezenet: ready after " in printed
    assert "Model server started." in printed.splitlines()

    upload = ask.replace("/mxnet_resnet50", "/squeezenet")
    check_espresso(tutorial.run(upload))
    check_espresso(tutorial.run(upload.replace("-T ../", "-F data=@../")))
    check_espresso(tutorial.run(upload.replace("-T ../", "-H Content-Type:image/png --data-binary @../")))

    assert tutorial.run(stop).splitlines()[-1] == "Model server stopped."
    assert tutorial.site.processes() == []


async def test_resnet50_as_the_readme_has_it(tutorial: Tutorial) -> None:
    need_curl()
    if not resnet50_is_here():
        pytest.skip("ResNet-50 is not in the cache of weights; MMS_LITE_E2E_RESNET50=1 fetches it (95 MB)")
    for line in commands()[0]:
        printed = tutorial.run(line)
        if line.startswith("curl"):
            check_espresso(printed)
    assert tutorial.site.processes() == []


async def test_an_archive_without_weights_says_how_to_get_them(tutorial: Tutorial) -> None:
    (tutorial.folder.parent / "model-archives").mkdir()
    _, pack, start, _, _ = commands()[0]
    tutorial.run(pack)

    result = tutorial.site.run(shlex.split(start), cwd=tutorial.folder)

    assert result.returncode == 3
    assert ": FAILED: FileNotFoundError: " in result.stdout
    assert "run fetch_weights.py" in result.stdout
    assert tutorial.site.processes() == []
