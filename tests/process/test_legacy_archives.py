"""Archives of MMS 0.x, in every form in which they lie in a model store, served by real worker processes.

MMS reference, sections 7.1 to 7.3.
"""

import asyncio
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import begin, body

from mms_lite.errors import InvalidArchive, LoadError
from mms_lite.types import InferRequest, LoadOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups and /proc as on Linux")

Ask = Callable[..., InferRequest]
Bench = Any
LEGACY = Path(__file__).parent.parent / "handlers" / "legacy"
FILES = {path.name: path.read_text() for path in LEGACY.iterdir() if path.is_file()}
MANIFEST = json.loads(FILES["MANIFEST.json"])


def manifest(**model: str | None) -> str:
    """Return a manifest of 0.x with these entries of Model changed, or without those that are None."""
    entries = {**MANIFEST["Model"], **{key.replace("_", "-"): value for key, value in model.items()}}
    return json.dumps({"Model": {key: value for key, value in entries.items() if value is not None}})


async def answer(bench: Bench, ask: Ask, url: str, data: str = "photo") -> Any:
    status = await bench.engine.load(LoadOptions(url=url, name="m"))
    assert status.spec.version == "snapshot"
    return json.loads(body(await asyncio.wait_for(bench.engine.infer(ask("m", data)), 10)))


@pytest.mark.parametrize("name", ["MANIFEST.json", "Manifest.JSON"])
@pytest.mark.parametrize("folder", ["", "old_net/"])
@pytest.mark.parametrize("url", ["old.model", "old"])
async def test_a_service_of_0_x_is_served_from_every_layout(
    processes: Bench, ask: Ask, still_serves: Any, url: str, folder: str, name: str
) -> None:
    files = {folder + ("x" if each == "MANIFEST.json" else each): text for each, text in FILES.items()}
    files[folder + name] = files.pop(f"{folder}x")
    processes.store.put(url, files)
    status = await processes.engine.load(LoadOptions(url=url))
    assert (status.spec.name, status.spec.version, status.spec.handler) == (
        "old_net",
        "snapshot",
        "old_service.py",
    )
    assert status.spec.owns_path == url.endswith(".model")
    told = json.loads(body(await processes.engine.infer(ask("old_net", "photo"))))
    assert told == {
        "data": "photo",
        "mxnet": False,
        "name": "old_net",
        "dir": status.spec.path,
        "gpu": None,
        "manifest": MANIFEST,
        "same_manifest": True,
        "files": sorted([name, "old_service.py", "signature.json"]),
    }
    await still_serves(processes, "old_net")


@pytest.mark.parametrize("folder", ["", "old_net/"])
async def test_what_was_unpacked_of_a_legacy_archive_is_deleted_with_the_model(
    processes: Bench, folder: str
) -> None:
    processes.store.put("old.mar", {folder + name: text for name, text in FILES.items()})
    before = set(processes.work.iterdir())
    await processes.engine.load(LoadOptions(url="old.mar"))
    assert set(processes.work.iterdir()) != before
    await processes.engine.unload("old_net")
    assert set(processes.work.iterdir()) == before


async def test_a_service_of_0_x_answers_every_request_of_a_batch(processes: Bench, ask: Ask) -> None:
    processes.store.put("old.mar", FILES)
    await processes.engine.load(LoadOptions(url="old.mar", batch_size=2, max_batch_delay_ms=1_000))
    asked = [begin(processes.engine.infer(ask("old_net", each))) for each in ("a", "b")]
    assert [json.loads(body(await asyncio.wait_for(each, 10)))["data"] for each in asked] == ["a", "b"]


LIST = """
from mms.model_service.model_service import SingleNodeService
class Service(SingleNodeService):
    def inference(self, data): return [["already", "a list"]]
"""
FIRST_OF_TWO = """
from mms.model_service.model_service import ModelService
class Zebra(ModelService):
    def inference(self, data): return "zebra"
class Ant(ModelService):
    def inference(self, data): return {"first": "by name"}
"""
FUNCTION = """
def handle(data, context):
    return None if data is None else [[context.manifest["Model"]["Model-Name"]] for _ in data]
"""
CLASS = """
class Service:
    def initialize(self, context): self.name = context.manifest["Model"]["Model-Name"]
    def handle(self, data, context): return [[self.name] for _ in data]
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (LIST, ["already", "a list"]),
        (FIRST_OF_TWO, {"first": "by name"}),
        (FUNCTION, ["old_net"]),
        (CLASS, ["old_net"]),
    ],
)
async def test_a_legacy_archive_may_hold_any_kind_of_service(
    processes: Bench, ask: Ask, source: str, expected: Any
) -> None:
    processes.store.put("old.mar", {**FILES, "old_service.py": source})
    assert await answer(processes, ask, "old.mar") == expected


async def test_a_service_may_be_named_without_its_suffix(processes: Bench, ask: Ask) -> None:
    processes.store.put("old.mar", {**FILES, "MANIFEST.json": manifest(Service="old_service")})
    assert (await answer(processes, ask, "old.mar"))["data"] == "photo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "Missing Model entry in manifest file."),
        ('{"Model": null}', "Missing Model entry in manifest file."),
        (manifest(Service=None), "Missing Service entry in MANIFEST.json"),
        (manifest(Service=""), "Missing Service entry in MANIFEST.json"),
        ('{"Model": []}', "The manifest's Model is not an object."),
        (json.dumps({**MANIFEST, "Engine": 3}), "The manifest's Engine is not an object."),
        ("not JSON", "The manifest is not valid JSON"),
    ],
)
@pytest.mark.parametrize("folder", ["", "old_net/"])
@pytest.mark.parametrize("url", ["old.mar", "old"])
async def test_a_legacy_manifest_that_cannot_be_used_is_an_invalid_archive(
    processes: Bench, url: str, folder: str, text: str, message: str
) -> None:
    processes.store.put(url, {folder + "MANIFEST.json": text, folder + "old_service.py": FUNCTION})
    with pytest.raises(InvalidArchive, match=f"^{re.escape(message)}"):
        await processes.engine.load(LoadOptions(url=url, name="m", handler="old_service:handle"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signature.json": None}, "Signature file is not found."),
        ({"MANIFEST.json": manifest(Signature=None)}, "Signature file is not found."),
        ({"old_service.py": None}, "neither in the archive nor installed"),
        ({"old_service.py": "import no_such_framework"}, "No module named 'no_such_framework'"),
        ({"old_service.py": "x = 1"}, "no function 'handle', and these classes: none"),
    ],
)
async def test_a_legacy_service_that_cannot_be_loaded_says_why(
    processes: Bench, change: dict[str, str | None], message: str
) -> None:
    processes.store.put(
        "old.mar", {name: text for name, text in {**FILES, **change}.items() if text is not None}
    )
    with pytest.raises(LoadError, match=re.escape(message)):
        await processes.engine.load(LoadOptions(url="old.mar"))


async def test_todays_manifest_counts_where_an_archive_has_both(processes: Bench, ask: Ask) -> None:
    today = {"model": {"modelName": "new", "handler": "new_service"}}
    source = "def handle(data, context): return data and [context.manifest]"
    processes.store.put(
        "both.mar", {**FILES, "MAR-INF/MANIFEST.json": json.dumps(today), "new_service.py": source}
    )
    await processes.engine.load(LoadOptions(url="both.mar"))
    assert json.loads(body(await processes.engine.infer(ask("new")))) == today
