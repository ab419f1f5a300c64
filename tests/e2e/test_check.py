"""`mms-lite check`: what the person who packed a model sees before anybody serves it."""

import json
import zipfile

import pytest
from mms_site import Site

pytestmark = pytest.mark.time_limit(60)

SHOUT = """
    from mms_lite.errors import InvalidRequest

    def handle(data, context):
        if data is None:
            print("loading words")
            return None
        texts = [each["body"] for each in data]
        return [text.upper() if text != "quiet" else InvalidRequest("too quiet") for text in texts]
"""


def with_samples(site: Site, **texts: str) -> None:
    """Make shout.mar, with these samples."""
    path = site.archive("shout", SHOUT)
    names = [f"samples/{name}.txt" for name in texts]
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files["MAR-INF/MANIFEST.json"])
    manifest["model"] |= {"modelFiles": ["service.py"], "backend": "python", "samples": names}
    files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, **dict(zip(names, map(str.encode, texts.values()), strict=True))}.items():
            archive.writestr(name, data)


async def check(site: Site, *arguments: str) -> tuple[int, str]:
    result = await site.mms("check", *arguments)
    assert site.processes() == []
    assert list(site.folder.glob("mms-lite-check-*")) == []
    return result.returncode, result.stdout


async def test_a_good_archive_answers_its_samples_and_further_files(site: Site) -> None:
    with_samples(site, one="hello")
    (site.folder / "two.txt").write_text("world")
    code, printed = await check(site, "store/shout.mar", "two.txt")
    assert code == 0
    lines = printed.splitlines()
    assert "  | loading words" in lines
    assert "shout.mar: shout, version 1 (python, handler service:handle)" in lines
    assert lines[lines.index("  HELLO") - 1].startswith("samples/one.txt: answered with 200 in ")
    assert lines[lines.index("  WORLD") - 1].startswith("two.txt: answered with 200 in ")
    assert lines[-1] == "all answered: 2"


async def test_a_sample_that_fails_fails_the_load_and_says_which(site: Site) -> None:
    with_samples(site, one="hello", two="quiet")
    code, printed = await check(site, "store/shout.mar")
    assert code == 1
    assert printed.splitlines()[-1] == ("shout.mar: the model fails on its sample samples/two.txt: too quiet")


async def test_a_file_that_fails_is_the_exit_code(site: Site) -> None:
    with_samples(site, one="hello")
    (site.folder / "two.txt").write_text("quiet")
    code, printed = await check(site, "store/shout.mar", "two.txt")
    assert code == 1
    assert printed.splitlines()[-2:] == ["two.txt: failed: too quiet", "1 of 2 failed"]


async def test_a_model_that_cannot_load_shows_its_traceback_once(site: Site) -> None:
    site.archive("broken", "def handle(data, context):\n    raise ValueError('no weights')")
    code, printed = await check(site, "store/broken.mar")
    assert code == 1
    assert printed.count("Traceback (most recent call last)") == 1
    assert printed.splitlines()[-1] == "broken.mar: ValueError: no weights"


async def test_what_is_no_archive_is_told_in_one_line(site: Site) -> None:
    (site.folder / "notes.txt").write_text("hello")
    code, printed = await check(site, "notes.txt")
    assert (code, len(printed.splitlines())) == (1, 1)
    assert "notes.txt is not a model archive" in printed
    code, printed = await check(site, "nowhere.mar")
    assert code == 2
    assert "nowhere.mar" in printed
