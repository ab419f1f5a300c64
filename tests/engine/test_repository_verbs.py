"""Models of a repository by name: load, unload, look again, and the index of what became of them."""

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from asking import begin, body
from triton_site import TENSORS, TritonSite, multiplier

from mms_lite.errors import InvalidRequest, LoadError, ModelNotFound, ModelNotReady, ServingError
from mms_lite.types import InferRequest, LoadOptions

ALL = "version_policy { all {} }"
Wait = Callable[..., Any]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[TritonSite]:
    made = TritonSite(tmp_path)
    yield made
    await made.engine.close(drain_s=5)


class Gate:
    """Lets Python models load: until `open`, their `initialize` waits."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "gate"

    @property
    def initialize(self) -> str:
        return (
            f"import pathlib, time; gate = pathlib.Path({str(self._file)!r})\n"
            "        while not gate.exists(): time.sleep(0.005)"
        )

    def open(self) -> None:
        self._file.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


async def test_a_model_is_loaded_by_name_and_its_highest_version_answers(site: TritonSite) -> None:
    site.onnx("m", "max_batch_size: 8 " + ALL + TENSORS, v2=2.0, v10=10.0)
    await site.engine.load_model("m")
    assert await site.ask("m") == [10, 20, 30]
    assert await site.ask("m", version="2") == [2, 4, 6]
    spec, signature = site.engine.interface("m")
    assert (spec.version, spec.config and spec.config["max_batch_size"]) == ("10", 8)
    assert [str(each) for each in signature.inputs] == ["x FP32 [-1,3]"]


async def test_models_without_a_configuration_and_of_python_are_served_too(site: TritonSite) -> None:
    site.onnx("bare", v1=3.0)
    site.python("code", factor=4.0)
    await asyncio.gather(site.engine.load_model("bare"), site.engine.load_model("code"))
    assert (await site.ask("bare"), await site.ask("code")) == ([3, 6, 9], [4, 8, 12])
    assert str(await site.ask("bare", float("nan"), 1, 2)) == "[nan, 3.0, 6.0]"


async def test_the_index_tells_of_every_model_through_its_life(site: TritonSite) -> None:
    site.onnx("a", ALL, v1=1.0, v2=1.0)
    site.onnx("b", v1=1.0)
    site.onnx("broken", "max_batch_size: -1", v1=1.0)
    assert site.index() == [("a", "", None, ""), ("b", "", None, ""), ("broken", "", None, "")]
    await site.engine.load_model("a")
    with pytest.raises(LoadError):
        await site.engine.load_model("broken")
    assert site.index() == [
        ("a", "1", "READY", ""),
        ("a", "2", "READY", ""),
        ("b", "", None, ""),
        ("broken", "", "UNAVAILABLE", "'max_batch_size' must be non-negative value for broken"),
    ]
    await site.engine.unload_model("a")
    assert site.index()[:2] == [("a", "1", "UNAVAILABLE", "unloaded"), ("a", "2", "UNAVAILABLE", "unloaded")]
    await site.engine.load_model("a")
    assert site.index()[:2] == [("a", "1", "READY", ""), ("a", "2", "READY", "")]


async def test_the_index_says_what_is_on_its_way(site: TritonSite, gate: Gate, wait_until: Wait) -> None:
    site.python("m", initialize=gate.initialize)
    loading = begin(site.engine.load_model("m"))
    await wait_until(lambda: site.index() == [("m", "1", "LOADING", "")])
    gate.open()
    await loading
    assert site.index() == [("m", "1", "READY", "")]


async def test_what_is_not_there_cannot_be_loaded_and_leaves_no_trace(site: TritonSite) -> None:
    for name in ("x", "..", "../m", ""):
        with pytest.raises((ModelNotFound, InvalidRequest)):
            await site.engine.load_model(name)
    with pytest.raises(ModelNotFound) as caught:
        await site.engine.load_model("x")
    assert caught.value.message == "failed to load 'x', failed to poll from model repository"
    assert site.index() == []
    assert site.engine.ready()


async def test_unloading_twice_is_fine_but_not_what_was_never_served(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    with pytest.raises(InvalidRequest, match="Model to be unloaded has not been served"):
        await site.engine.unload_model("m")
    await site.engine.load_model("m")
    await site.engine.unload_model("m", dependents=True)
    await site.engine.unload_model("m")
    with pytest.raises(ModelNotFound):
        await site.ask("m")


async def test_a_load_that_fails_keeps_what_was_served_and_the_index_says_why(site: TritonSite) -> None:
    site.onnx("m", v1=2.0)
    await site.engine.load_model("m")
    site.write("m/1/model.onnx", b"not a model")
    with pytest.raises(
        LoadError, match=r"failed to load 'm', version 1 is at UNAVAILABLE state: model\.onnx"
    ):
        await site.engine.load_model("m")
    assert await site.ask("m") == [2, 4, 6]
    ((name, version, state, reason),) = site.index()
    assert (name, version, state) == ("m", "1", "READY")
    assert "it is not an ONNX model" in reason
    assert site.engine.ready()
    site.onnx("m", v1=5.0)
    await site.engine.load_model("m")
    assert (await site.ask("m"), site.index()) == ([5, 10, 15], [("m", "1", "READY", "")])


async def test_versions_are_loaded_all_or_none(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    await site.engine.load_model("m")
    site.onnx("m", ALL, v1=7.0, v2=2.0)
    site.write("m/3/model.onnx", b"not a model")
    with pytest.raises(LoadError, match="version 3 is at UNAVAILABLE state"):
        await site.engine.load_model("m")
    assert await site.ask("m") == [1, 2, 3]
    assert [entry[:3] for entry in site.index()] == [("m", "1", "READY"), ("m", "3", "UNAVAILABLE")]
    assert not site.engine.ready()
    await site.engine.unload_model("m")
    assert site.engine.ready()


async def test_versions_that_the_policy_serves_no_more_are_unloaded(
    site: TritonSite, wait_until: Wait
) -> None:
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    await site.engine.load_model("m")
    site.write("m/config.pbtxt", "version_policy { specific { versions: 1 } }")
    await site.engine.load_model("m")
    assert await site.ask("m") == [1, 2, 3]
    done = [("m", "1", "READY", ""), ("m", "2", "UNAVAILABLE", "unloaded")]
    await wait_until(lambda: site.index() == done)


async def test_a_client_may_bring_the_configuration_and_the_files(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    await site.engine.load_model("m", config='{"max_batch_size": "8"}')
    spec, _ = site.engine.interface("m")
    assert spec.config is not None and spec.config["max_batch_size"] == 8
    files = {"file:4/model.onnx": multiplier(4.0)}
    await site.engine.load_model("m", config=json.dumps({"backend": "onnxruntime"}), files=files)
    assert await site.ask("m") == [4, 8, 12]
    assert [each.spec.version for each in site.engine.versions("m")] == ["4"]
    assert await site.engine.rescan() is False
    await site.engine.load_model("m")
    assert await site.ask("m") == [1, 2, 3]
    await site.engine.load_model("m", config='{"backend": "onnxruntime"}', files=files)
    await site.engine.unload_model("m")
    await site.engine.close(drain_s=5)
    assert list(site.work.iterdir()) == []


async def test_a_configuration_that_the_client_got_wrong_is_no_fault_of_the_model(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    with pytest.raises(LoadError):
        await site.engine.load_model("m", config="{")
    assert site.index() == [("m", "", None, "")]
    assert site.engine.ready()


async def test_loads_and_unloads_of_one_model_come_one_by_one(
    site: TritonSite, live_workers: Callable[[str], Any], wait_until: Wait
) -> None:
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    order = random.Random(7)
    works: list[Any] = [site.engine.load_model("m")]
    for _ in range(20):
        works.append(order.choice([site.engine.load_model, site.engine.unload_model])("m"))
    works.append(site.engine.load_model("m"))
    assert await asyncio.gather(*works) == [None] * len(works)
    assert await site.ask("m") == [2, 4, 6]
    assert [entry[2] for entry in site.index()] == ["READY", "READY"]
    await wait_until(lambda: len(live_workers("m")) == 2, "the workers of what was replaced to end")


async def test_a_model_that_loads_slowly_keeps_no_other_waiting(site: TritonSite, gate: Gate) -> None:
    site.python("slow", initialize=gate.initialize)
    site.onnx("m", v1=1.0)
    slow = begin(site.engine.load_model("slow"))
    again = begin(site.engine.load_model("slow"))
    await site.engine.load_model("m")
    assert not slow.done() and not again.done()
    gate.open()
    await asyncio.gather(slow, again)
    assert await site.ask("slow") == [2, 4, 6]


async def test_closing_gives_up_what_is_being_loaded(site: TritonSite, gate: Gate, wait_until: Wait) -> None:
    site.python("m", initialize=gate.initialize)
    loading = begin(site.engine.load_model("m"))
    await wait_until(lambda: site.index() == [("m", "1", "LOADING", "")])
    await site.engine.close(drain_s=5)
    gate.open()
    with pytest.raises(ModelNotReady):
        await loading


async def test_a_look_renews_only_what_has_changed(site: TritonSite) -> None:
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    await site.engine.load_model("m")
    before = {each.spec.version: each.workers[0].started_at for each in site.engine.versions("m")}
    assert await site.engine.rescan() is False
    site.onnx("m", v2=5.0, v3=3.0)
    assert await site.engine.rescan() is True
    assert await site.ask("m") == [3, 6, 9]
    assert await site.ask("m", version="2") == [5, 10, 15]
    after = {each.spec.version: each.workers[0].started_at for each in site.engine.versions("m")}
    assert [version for version in before if before[version] == after[version]] == ["1"]
    shutil.rmtree(site.folder / "m/3")
    assert await site.engine.rescan() is True
    assert await site.ask("m") == [5, 10, 15]
    site.write("m/config.pbtxt", 'backend: "onnxruntime" max_batch_size: 3')
    assert await site.engine.rescan() is True
    assert [each.spec.version for each in site.engine.versions("m")] == ["2"]
    assert await site.engine.rescan() is False


async def test_one_bad_model_stops_no_other_and_is_tried_again_when_its_files_change(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        site.onnx(name, "", v1=1.0)
        await site.engine.load_model(name)
    site.onnx("a", v1=2.0)
    site.write("b/config.pbtxt", "nonsense")
    site.onnx("c", v1=2.0)
    assert await site.engine.rescan() is True
    assert [await site.ask(name) for name in "abc"] == [[2, 4, 6], [1, 2, 3], [2, 4, 6]]
    told = "model 'b': failed to read text proto from config.pbtxt: 1:1"
    assert [(state, reason[: len(told)]) for _, _, state, reason in site.index()] == [
        ("READY", ""),
        ("READY", told),
        ("READY", ""),
    ]
    assert await site.engine.rescan() is False
    assert caplog.text.count("Model b stays as it was") == 1
    site.onnx("b", "", v1=3.0)
    assert await site.engine.rescan() is True
    assert (await site.ask("b"), site.index()[1]) == ([3, 6, 9], ("b", "1", "READY", ""))


async def test_without_polling_a_look_concerns_what_was_loaded_by_name(site: TritonSite) -> None:
    site.onnx("a", v1=1.0)
    site.onnx("b", v1=1.0)
    await site.engine.load_model("a")
    await site.engine.load_model("b")
    await site.engine.unload_model("b")
    site.onnx("b", v1=2.0)
    site.onnx("new", v1=1.0)
    shutil.rmtree(site.folder / "a")
    assert await site.engine.rescan() is False
    assert await site.ask("a") == [1, 2, 3]
    assert [entry[:3] for entry in site.index()] == [
        ("a", "1", "READY"),
        ("b", "1", "UNAVAILABLE"),
        ("new", "", None),
    ]


async def test_polling_serves_what_comes_and_unloads_what_goes(site: TritonSite, wait_until: Wait) -> None:
    site.poll_s = 0.01
    site.onnx("a", v1=1.0)
    await site.engine.start(["a"], lambda name, error: None)
    site.onnx("b", v1=1.0)
    await wait_until(lambda: site.engine.has_version("b", "1"))
    site.onnx("b", v2=2.0)
    await wait_until(lambda: site.engine.has_version("b", "2") and not site.engine.has_version("b", "1"))
    shutil.rmtree(site.folder / "a")
    await wait_until(lambda: not site.engine.has_version("a", "1"))
    site.onnx("a", v1=4.0)
    await wait_until(lambda: site.engine.has_version("a", "1"))
    assert await site.ask("a") == [4, 8, 12]


async def test_a_repository_that_cannot_be_seen_for_a_while_unloads_nothing(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.poll_s = 1000.0
    site.onnx("m", v1=1.0)
    await site.engine.load_model("m")
    site.folder.rename(site.folder.with_name("away"))
    assert await site.engine.rescan() is False
    assert "cannot read the model repository" in caplog.text
    assert site.index() == [("m", "1", "READY", "")]
    assert await site.ask("m") == [1, 2, 3]


async def test_what_the_mms_api_unloads_stays_unloaded_until_its_files_change(site: TritonSite) -> None:
    site.poll_s = 1000.0
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    assert await site.engine.rescan() is True
    await site.engine.unload("m")
    assert await site.engine.rescan() is False
    assert [entry[3] for entry in site.index()] == ["unloaded", "unloaded"]
    site.onnx("m", v2=3.0)
    assert await site.engine.rescan() is True
    assert await site.ask("m") == [3, 6, 9]


async def test_the_default_is_the_highest_version_however_versions_come(site: TritonSite) -> None:
    site.onnx("m", ALL, v1=1.0, v2=2.0, v3=3.0)
    for version, default in (("2", "2"), ("1", "2"), ("3", "3")):
        await site.engine.load(LoadOptions(url=f"m/{version}"))
        assert site.engine.describe("m").spec.version == default
    await site.engine.unload("m", "3")
    assert site.engine.describe("m").spec.version == "2"
    assert site.index()[2] == ("m", "3", "UNAVAILABLE", "unloaded")


async def test_at_start_each_model_is_told_of_and_a_failed_one_keeps_the_server_from_ready(
    site: TritonSite,
) -> None:
    site.onnx("good", v1=1.0)
    site.onnx("bad", "max_batch_size: -1", v1=1.0)
    told: list[tuple[str, ServingError | None]] = []
    assert await site.engine.start(["good", "bad", "absent"], lambda *event: told.append(event)) == 2
    assert {name: error and error.message for name, error in told} == {
        "good": None,
        "bad": "'max_batch_size' must be non-negative value for bad",
        "absent": "failed to load 'absent', failed to poll from model repository",
    }
    assert site.engine.startup_models() == {"good"}
    assert not site.engine.ready()
    await site.engine.unload_model("bad")
    assert site.engine.ready()
    assert site.index() == [("bad", "", None, ""), ("good", "1", "READY", "")]


async def test_an_archive_of_the_model_store_is_loaded_by_its_name(
    inline: Any, ask: Callable[..., InferRequest]
) -> None:
    source = (inline.store.add("echo", "plain") / "service.py").read_text()
    manifest = {"model": {"modelName": "other", "handler": "service:handle"}}
    inline.store.put("m.mar", {"service.py": source, "MAR-INF/MANIFEST.json": json.dumps(manifest)})
    engine = inline.engine
    await engine.load_model("m")
    assert body(await engine.infer(ask("m", b"hello"))) == b"hello"
    assert [(entry.name, entry.version) for entry in engine.repository_index()] == [("m", "1"), ("plain", "")]
    assert await engine.rescan() is False
    with pytest.raises(InvalidRequest, match="takes no other configuration"):
        await engine.load_model("m", config="{}")
    with pytest.raises(ModelNotFound, match="failed to load 'x', failed to poll from model repository"):
        await engine.load_model("x")
    await engine.unload_model("m")
    assert engine.models() == []


async def test_loading_by_name_leaves_versions_alone_that_users_loaded_by_hand(inline: Any) -> None:
    await inline.load("echo", version="7")
    manifest = {"model": {"modelName": "echo", "handler": "service:handle"}}
    inline.store.put("echo", {"MAR-INF/MANIFEST.json": json.dumps(manifest)})
    await inline.engine.load_model("echo")
    assert [each.spec.version for each in inline.engine.versions("echo")] == ["7", "1"]
    assert inline.engine.describe("echo").spec.version == "7"
