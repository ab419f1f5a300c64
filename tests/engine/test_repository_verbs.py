"""Models of a repository by name: load, unload, look again, and the index of what became of them."""

import asyncio
import json
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import begin, body
from triton_site import TENSORS, TritonSite, multiplier

from mms_lite.engine.repository import Stamp
from mms_lite.engine.repository.triton import TritonRepository
from mms_lite.errors import (
    InvalidRequest,
    LoadError,
    ModelNotFound,
    ModelNotReady,
    ServingError,
    VersionNotFound,
)
from mms_lite.tensors import to_array, to_tensor
from mms_lite.types import InferRequest, LoadOptions, VersionState

ALL = "version_policy { all {} }"
JOINED = """
dynamic_batching { max_queue_delay_microseconds: 5000000 }
input [{ name: "x" data_type: TYPE_FP32 dims: [ 3 ] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [ 3 ] }, { name: "z" data_type: TYPE_FP32 dims: [ 3 ] }]
"""
SCALED = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            by = np.float32(json.loads(request.parameters())["by"])
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            tensors = {"y": x * by, "z": -x * by}
            outputs = [pb_utils.Tensor(name, tensors[name]) for name in request.requested_output_names()]
            answers.append(pb_utils.InferenceResponse(outputs))
        return answers
"""
FAILING = """
        from pathlib import Path
        from mms_lite.errors import InvalidArchive
        if Path({file!r}).exists(): raise InvalidArchive("no licence")
"""
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
    assert await site.index() == [("a", "", None, ""), ("b", "", None, ""), ("broken", "", None, "")]
    await site.engine.load_model("a")
    with pytest.raises(LoadError):
        await site.engine.load_model("broken")
    assert await site.index() == [
        ("a", "1", "READY", ""),
        ("a", "2", "READY", ""),
        ("b", "", None, ""),
        ("broken", "", "UNAVAILABLE", "'max_batch_size' must be non-negative value for broken"),
    ]
    await site.engine.unload_model("a")
    assert (await site.index())[:2] == [
        ("a", "1", "UNAVAILABLE", "unloaded"),
        ("a", "2", "UNAVAILABLE", "unloaded"),
    ]
    await site.engine.load_model("a")
    assert (await site.index())[:2] == [("a", "1", "READY", ""), ("a", "2", "READY", "")]


async def test_the_index_says_what_is_on_its_way(site: TritonSite, gate: Gate, wait_until: Wait) -> None:
    site.python("m", initialize=gate.initialize)
    loading = begin(site.engine.load_model("m"))
    await wait_until(lambda: site.entries() == [("m", "1", "LOADING", "")])
    gate.open()
    await loading
    assert await site.index() == [("m", "1", "READY", "")]


async def test_what_is_not_there_cannot_be_loaded_and_leaves_no_trace(site: TritonSite) -> None:
    for name in ("x", ".", "..", "../m", "", ".hidden"):
        with pytest.raises((ModelNotFound, InvalidRequest)):
            await site.engine.load_model(name)
    for name in (".", "..", "../m", "", ".hidden"):
        with pytest.raises((ModelNotFound, InvalidRequest)):
            files = {"1/model.onnx": multiplier(1.0)}
            await site.engine.load_model(name, config='{"backend": "onnxruntime"}', files=files)
    with pytest.raises(ModelNotFound) as caught:
        await site.engine.load_model("x")
    assert caught.value.message == "failed to load 'x', failed to poll from model repository"
    assert await site.index() == []
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
    ((name, version, state, reason),) = await site.index()
    assert (name, version, state) == ("m", "1", "READY")
    assert "it is not an ONNX model" in reason
    assert site.engine.ready()
    site.onnx("m", v1=5.0)
    await site.engine.load_model("m")
    assert (await site.ask("m"), (await site.index())) == ([5, 10, 15], [("m", "1", "READY", "")])


async def test_versions_are_loaded_all_or_none(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    await site.engine.load_model("m")
    site.onnx("m", ALL, v1=7.0, v2=2.0)
    site.write("m/3/model.onnx", b"not a model")
    with pytest.raises(LoadError, match="version 3 is at UNAVAILABLE state"):
        await site.engine.load_model("m")
    assert await site.ask("m") == [1, 2, 3]
    assert [entry[:3] for entry in (await site.index())] == [("m", "1", "READY"), ("m", "3", "UNAVAILABLE")]
    assert site.engine.ready()  # the model is served
    await site.engine.unload_model("m")
    assert [entry[3] for entry in (await site.index())] == ["unloaded", "unloaded"]
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
    await wait_until(lambda: site.entries() == done)


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
    assert await site.index() == [("m", "", None, "")]
    assert site.engine.ready()


async def test_loads_and_unloads_of_one_model_come_one_by_one(
    site: TritonSite, live_workers: Callable[[str], Any], wait_until: Wait
) -> None:
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    order = random.Random(7)
    works: list[Any] = [site.engine.load_model("m")]
    for _ in range(20):
        works.append(order.choice([site.engine.load_model, site.engine.unload_model])("m"))
    works += [site.engine.load_model("m") for _ in range(3)]
    told = await asyncio.gather(*works, return_exceptions=True)
    assert {str(each) for each in told[:-3]} == {"None", "failed to load 'm', model m is being unloaded"}
    assert told[-3:] == [None] * 3
    assert await site.ask("m") == [2, 4, 6]
    assert [entry[2] for entry in (await site.index())] == ["READY", "READY"]
    await wait_until(lambda: len(live_workers("m")) == 2, "the workers of what was replaced to end")


async def test_an_unload_gives_up_what_hangs_while_it_loads_and_frees_its_name(
    site: TritonSite, gate: Gate, wait_until: Wait
) -> None:
    site.python("m", initialize=gate.initialize)
    loading = begin(site.engine.load_model("m"))
    await wait_until(lambda: site.entries() == [("m", "1", "LOADING", "")])
    files = {"1/model.onnx": multiplier(1.0)}
    queued = begin(site.engine.load_model("m", config='{"backend": "onnxruntime"}', files=files))
    await asyncio.sleep(0)
    await site.engine.unload_model("m")
    gate.open()  # for its thread
    for load in (loading, queued):
        with pytest.raises(LoadError, match="model m is being unloaded"):
            await load
    assert await site.index() == [("m", "1", "UNAVAILABLE", "unloaded")]
    assert (site.engine.ready(), list(site.work.iterdir())) == (True, [])
    site.python("m", factor=3.0)
    await site.engine.load_model("m")
    assert await site.ask("m") == [3, 6, 9]


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
    await wait_until(lambda: site.entries() == [("m", "1", "LOADING", "")])
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


async def test_one_bad_model_stops_no_other_and_a_look_that_was_asked_for_says_so(
    site: TritonSite,
) -> None:
    for name in ("a", "b", "c"):
        site.onnx(name, "", v1=1.0)
        await site.engine.load_model(name)
    site.onnx("a", v1=2.0)
    site.write("b/config.pbtxt", "nonsense")
    site.onnx("c", v1=2.0)
    with pytest.raises(LoadError, match=r"^b: model 'b': failed to read text proto") as caught:
        await site.engine.rescan()
    assert caught.value.details["models"] == ["b"]
    assert [await site.ask(name) for name in "abc"] == [[2, 4, 6], [1, 2, 3], [2, 4, 6]]
    told = "model 'b': failed to read text proto from config.pbtxt: 1:1"
    assert [(state, reason[: len(told)]) for _, _, state, reason in (await site.index())] == [
        ("READY", ""),
        ("READY", told),
        ("READY", ""),
    ]
    with pytest.raises(LoadError, match=r"^b: model 'b': failed to read text proto"):
        await site.engine.rescan()  # as long as it is so
    site.onnx("b", "", v1=3.0)
    assert await site.engine.rescan() is True
    assert (await site.ask("b"), (await site.index())[1]) == ([3, 6, 9], ("b", "1", "READY", ""))


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
    assert [entry[:3] for entry in (await site.index())] == [
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


async def test_a_repository_that_cannot_be_seen_for_a_while_unloads_nothing(site: TritonSite) -> None:
    site.poll_s = 1000.0
    site.onnx("m", v1=1.0)
    await site.engine.load_model("m")
    site.folder.rename(site.folder.with_name("away"))
    with pytest.raises(LoadError, match="cannot read the model repository"):
        await site.engine.rescan()
    assert await site.index() == [("m", "1", "READY", "")]
    assert await site.ask("m") == [1, 2, 3]


async def test_what_the_mms_api_unloads_stays_unloaded_until_its_files_change(site: TritonSite) -> None:
    site.poll_s = 1000.0
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    assert await site.engine.rescan() is True
    await site.engine.unload("m")
    assert await site.engine.rescan() is False
    assert [entry[3] for entry in (await site.index())] == ["unloaded", "unloaded"]
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
    assert (await site.index())[2] == ("m", "3", "UNAVAILABLE", "unloaded")


async def test_a_version_that_has_lost_its_workers_hands_over_to_the_next(site: TritonSite) -> None:
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    await site.engine.load_model("m")
    await site.engine.scale("m", 0, 0, version="2")
    assert await site.ask("m") == [1, 2, 3]
    assert [each.spec.version for each in site.engine.versions("m") if each.is_default] == ["1"]
    await site.engine.scale("m", 1, 1, version="2")
    assert await site.ask("m") == [2, 4, 6]


async def test_a_look_that_was_asked_for_tries_again_what_has_given_up_since(
    site: TritonSite, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    site.python("m", initialize=FAILING.format(file=str(broken)))
    await site.engine.load_model("m")
    broken.touch()
    await site.engine.scale("m", 0, 0)
    with pytest.raises(LoadError, match="no licence"):
        await site.engine.scale("m", 1, 1)
    with pytest.raises(
        LoadError, match="m: failed to load 'm', version 1 is at UNAVAILABLE state: no licence"
    ):
        await site.engine.rescan()
    broken.unlink()
    assert await site.engine.rescan() is True
    assert await site.ask("m") == [2, 4, 6]
    assert await site.engine.rescan() is False


async def test_a_name_of_no_folder_leaves_nothing_behind_when_its_load_fails(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    config, files = '{"backend": "onnxruntime"}', {"1/model.onnx": b"not a model"}
    with pytest.raises(LoadError, match="it is not an ONNX model"):
        await site.engine.load_model("made_up", config=config, files=files)
    assert (await site.index(), site.engine.ready()) == ([("m", "", None, "")], True)
    with pytest.raises(LoadError):
        await site.engine.load_model("m", config=config, files=files)
    ((name, version, state, reason),) = await site.index()
    assert (name, version, state) == ("m", "1", "UNAVAILABLE") and "it is not an ONNX model" in reason
    assert not site.engine.ready()


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
    assert site.engine.health() == (3, 1)
    await site.engine.unload_model("bad")
    assert not site.engine.ready()  # for what is absent was asked for too
    await site.engine.unload_model("absent")
    assert site.engine.ready()
    assert await site.index() == [("bad", "", None, ""), ("good", "1", "READY", "")]


async def test_what_failed_is_described_listed_and_measured_until_it_is_loaded_or_unloaded(
    site: TritonSite,
) -> None:
    site.onnx("good", v1=1.0)
    site.onnx("bad", "max_batch_size: -1", v1=1.0)
    site.onnx("broken", ALL, v2=1.0)
    site.write("broken/3/model.onnx", b"not a model")
    await site.engine.start(["good", "bad", "broken"], lambda *_: None)
    told = {"bad": "'max_batch_size' must be non-negative value for bad", "broken": "it is not an ONNX model"}
    for name, version in (("bad", ""), ("broken", "3")):
        status = site.engine.describe(name)
        assert (status.spec.version, status.state, status.is_default) == (version, VersionState.FAILED, True)
        assert told[name] in (status.detail or "")
        assert status.spec.at_startup and site.engine.versions(name) == [status]
    assert site.engine.describe("broken", "3") == site.engine.describe("broken")
    with pytest.raises(VersionNotFound):
        site.engine.describe("good", "9")
    with pytest.raises(ModelNotFound):
        site.engine.describe("broken", "9")
    assert [each.spec.name for each in site.engine.models()] == ["bad", "broken", "good"]
    seen = {(each.spec.name, each.spec.version): each.state for each, _ in site.engine.metrics().versions}
    failed = VersionState.FAILED
    assert seen == {("bad", ""): failed, ("broken", "3"): failed, ("good", "1"): VersionState.READY}
    with pytest.raises(ModelNotFound):  # as Triton has it
        await site.ask("broken")

    site.onnx("bad", "", v1=1.0)
    await site.engine.load_model("bad")
    await site.engine.unload("broken")
    assert [each.state for each in site.engine.versions("bad")] == [VersionState.READY]
    with pytest.raises(ModelNotFound):
        site.engine.describe("broken")
    with pytest.raises(ModelNotFound):
        await site.engine.unload("broken")
    assert site.engine.ready() and site.engine.health() == (2, 2)


async def test_a_new_version_that_failed_beside_one_that_is_served_is_described_and_not_the_default(
    site: TritonSite,
) -> None:
    site.onnx("m", v1=1.0)
    await site.engine.load_model("m")
    site.write("m/2/model.onnx", b"not a model")
    with pytest.raises(LoadError):
        await site.engine.load_model("m")
    described = site.engine.versions("m")
    assert [(each.spec.version, each.state, each.is_default) for each in described] == [
        ("1", VersionState.READY, True),
        ("2", VersionState.FAILED, False),
    ]
    assert site.engine.describe("m").spec.version == "1"
    assert "it is not an ONNX model" in (site.engine.describe("m", "2").detail or "")
    assert site.engine.health() == (1, 1)


async def test_a_version_without_workers_is_said_to_have_none_and_keeps_nobody_from_ready(
    site: TritonSite,
) -> None:
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    await site.engine.load(LoadOptions(url="m/1", workers=0))
    assert site.entries() == [("m", "1", "UNAVAILABLE", "no workers")]
    assert site.engine.describe("m").detail == "no workers"
    assert (site.engine.ready(), site.engine.health()) == (True, (0, 0))
    await site.engine.scale("m", 1, 1)
    await site.engine.load(LoadOptions(url="m/2"))
    assert (site.entries()[0], site.engine.describe("m", "1").detail) == (("m", "1", "READY", ""), None)
    await site.engine.scale("m", 0, 0, version="2")
    assert site.engine.ready_versions("m") == ["1"]


async def test_a_failure_is_forgotten_once_the_version_is_loaded_by_hand(site: TritonSite) -> None:
    site.write("m/1/model.onnx", b"not a model")
    with pytest.raises(LoadError):
        await site.engine.load_model("m")
    site.onnx("m", v1=1.0)
    await site.engine.load(LoadOptions(url="m"))
    assert site.entries() == [("m", "1", "READY", "")]
    assert site.engine.describe("m").state is VersionState.READY


async def test_what_was_loaded_at_start_says_so_also_when_it_was_renewed(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    site.onnx("later", v1=1.0)
    await site.engine.start(["m"], lambda *_: None)
    await site.engine.load_model("later")
    site.onnx("m", v1=2.0)
    assert await site.engine.rescan() is True
    told = {each.spec.name: each.spec.at_startup for each in site.engine.models()}
    assert told == {"m": True, "later": False}


async def test_the_log_names_the_version_that_went_and_what_never_was_served(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    site.onnx("m", v1=1.0)
    site.write("bad/1/model.onnx", b"not a model")
    await site.engine.start(["m", "bad"], lambda *_: None)
    site.onnx("m", v2=2.0)
    with pytest.raises(LoadError):
        await site.engine.rescan()
    await site.engine.close(drain_s=5)
    assert "Model m version 1 unregistered." in caplog.messages  # version 2 was served
    assert "Model m unregistered." in caplog.messages
    assert "Model bad is not served: failed to load 'bad'" in caplog.text


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (TENSORS.replace('"x"', '"X"'), "config.pbtxt declares the input 'X'; the model has: x"),
        (TENSORS.replace("FP32", "FP64"), "config.pbtxt declares the input x FP64 [-1,3]; the file says x"),
    ],
)
async def test_what_the_file_does_not_have_is_said_to_be_declared_in_config_pbtxt(
    site: TritonSite, config: str, told: str
) -> None:
    site.onnx("m", "max_batch_size: 8" + config, v1=1.0)
    with pytest.raises(LoadError) as caught:
        await site.engine.load_model("m")
    assert told in caught.value.message


async def test_an_archive_of_the_model_store_is_loaded_by_its_name(
    inline: Any, ask: Callable[..., InferRequest]
) -> None:
    source = (inline.store.add("echo", "plain") / "service.py").read_text()
    manifest = {"model": {"modelName": "other", "handler": "service:handle"}}
    inline.store.put("m.mar", {"service.py": source, "MAR-INF/MANIFEST.json": json.dumps(manifest)})
    engine = inline.engine
    await engine.load_model("m")
    assert body(await engine.infer(ask("m", b"hello"))) == b"hello"
    index = await engine.repository_index()
    assert [(entry.name, entry.version) for entry in index] == [("m", "1"), ("plain", "")]
    assert [entry.name for entry in engine.version_entries()] == ["m"]
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


async def test_a_failed_renewal_is_not_taken_for_what_is_served(site: TritonSite) -> None:
    site.onnx("m", ALL, v1=1.0)
    await site.engine.load_model("m")
    site.onnx("m", v1=7.0)
    site.write("m/2/model.onnx", b"not a model")
    with pytest.raises(LoadError):
        await site.engine.rescan()
    site.onnx("m", v2=2.0)  # and 1 is as it was when that failed
    assert await site.engine.rescan() is True
    assert await site.ask("m", version="1") == [7, 14, 21]


async def test_what_the_mms_api_unloads_while_it_is_loaded_stays_unloaded(
    site: TritonSite, gate: Gate, wait_until: Wait
) -> None:
    site.python("m", initialize=gate.initialize)
    loading = begin(site.engine.load_model("m"))
    await wait_until(lambda: site.entries() == [("m", "1", "LOADING", "")])
    await site.engine.unload("m")
    gate.open()  # for its thread
    with pytest.raises(LoadError, match="model m is being unloaded"):
        await loading
    assert site.engine.models() == []
    assert await site.engine.rescan() is False
    assert await site.index() == [("m", "1", "UNAVAILABLE", "unloaded")]


async def test_polling_waits_for_no_model(site: TritonSite, gate: Gate, wait_until: Wait) -> None:
    site.poll_s = 0.01
    site.onnx("m", v1=1.0)
    await site.engine.start(["m"], lambda name, error: None)
    site.python("slow", initialize=gate.initialize)
    await wait_until(lambda: ("slow", "1", "LOADING", "") in site.entries())
    site.onnx("m", v2=2.0)
    await wait_until(lambda: site.engine.has_version("m", "2"))
    assert not site.engine.has_version("slow", "1")
    gate.open()
    await wait_until(lambda: site.engine.has_version("slow", "1"))


async def test_polling_leaves_files_alone_that_are_still_being_written(
    site: TritonSite, wait_until: Wait, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.poll_s = 0.005
    site.onnx("m", v1=1.0)
    looks: list[str] = []
    growing = True
    stamp = TritonRepository.stamp

    def look(self: TritonRepository, name: str) -> Stamp | None:
        looks.append(name)
        return {**(stamp(self, name) or {}), "growing": len(looks) if growing else 0}

    await site.engine.start(["m"], lambda name, error: None)
    monkeypatch.setattr(TritonRepository, "stamp", look)
    site.write("m/1/model.onnx", b"half a mo")
    await wait_until(lambda: len(looks) > 5)
    assert site.entries() == [("m", "1", "READY", "")]
    assert "stays as it was" not in caplog.text
    site.onnx("m", v1=5.0)
    growing = False
    before = site.engine.describe("m").workers[0].started_at
    await wait_until(lambda: site.engine.describe("m").workers[0].started_at != before)
    assert await site.ask("m") == [5, 10, 15]


async def test_polling_tries_the_same_files_once_and_a_served_model_keeps_the_server_ready(
    site: TritonSite, wait_until: Wait, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.poll_s = 0.005
    site.onnx("m", v1=1.0)
    await site.engine.start(["m"], lambda name, error: None)
    site.write("m/2/model.onnx", b"not a model")
    await wait_until(lambda: ("m", "2", "UNAVAILABLE") in [entry[:3] for entry in site.entries()])
    looks: list[str] = []
    names = TritonRepository.names
    monkeypatch.setattr(TritonRepository, "names", lambda self: looks.append("") or names(self))
    await wait_until(lambda: len(looks) > 5)
    assert caplog.text.count("Model m stays as it was") == 1
    assert site.engine.ready()
    assert await site.ask("m") == [1, 2, 3]


async def test_what_cannot_be_read_is_told_of_once_and_in_the_index(
    site: TritonSite, wait_until: Wait, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.poll_s = 0.005
    site.onnx("m", v1=1.0)
    await site.engine.start(["m"], lambda name, error: None)
    before = site.engine.describe("m").workers[0].started_at
    stamp = TritonRepository.stamp
    looks: list[str] = []

    def unreadable(self: TritonRepository, name: str) -> Stamp | None:
        looks.append(name)
        raise LoadError("cannot read the model 'm': Permission denied")

    monkeypatch.setattr(TritonRepository, "stamp", unreadable)
    told = "cannot read the model 'm': Permission denied"
    await wait_until(lambda: len(looks) > 5 and site.entries() == [("m", "1", "READY", told)])
    assert caplog.text.count(told) == 1
    monkeypatch.setattr(TritonRepository, "stamp", stamp)
    await wait_until(lambda: site.entries() == [("m", "1", "READY", "")])
    assert site.engine.describe("m").workers[0].started_at == before


async def test_what_was_unloaded_is_remembered_up_to_a_number_of_versions(inline: Any) -> None:
    await inline.load("echo", "first", workers=0)
    await inline.engine.unload("first")
    for number in range(1005):
        await inline.load("echo", version=str(number), workers=0)
        await inline.engine.unload("echo")
    entries = inline.engine.version_entries()
    assert len(entries) == 1000
    assert (entries[0].version, entries[-1].version) == ("5", "1004")


async def test_an_archive_that_is_loaded_again_by_name_keeps_what_users_said_of_it(inline: Any) -> None:
    manifest = {"model": {"modelName": "m", "handler": "service:absent"}}
    source = (inline.store.add("echo", "plain") / "service.py").read_text()
    inline.store.put("m.mar", {"service.py": source, "MAR-INF/MANIFEST.json": json.dumps(manifest)})
    said = {"batch_size": 4, "max_batch_delay_ms": 7, "response_timeout_s": 3.0}
    await inline.engine.load(LoadOptions(url="m.mar", handler="service:handle", **said))
    await inline.engine.scale("m", 2, 3)
    await inline.engine.load_model("m")
    spec = inline.engine.describe("m").spec
    assert {name: getattr(spec, name) for name in said} == said
    assert (spec.handler, spec.min_workers, spec.max_workers) == ("service:handle", 2, 3)


async def test_an_archive_that_is_loaded_again_by_name_has_its_own_new_handler(inline: Any) -> None:
    def put(handler: str, source: str) -> None:
        manifest = {"model": {"modelName": "m", "handler": handler}}
        inline.store.put("m", {"MAR-INF/MANIFEST.json": json.dumps(manifest), "code.py": source})

    put("code:old", "def old(data, context): return data")
    await inline.engine.load(LoadOptions(url="m"))
    put("code:new", "def new(data, context): return data")
    await inline.engine.load_model("m")
    assert inline.engine.describe("m").spec.handler == "code:new"


async def test_the_files_of_a_triton_model_decide_about_its_workers_when_it_is_loaded_again(
    site: TritonSite,
) -> None:
    site.onnx("m", "instance_group { count: 1 kind: KIND_CPU }", v1=1.0)
    await site.engine.load_model("m")
    await site.engine.scale("m", 2, 2)
    await site.engine.load_model("m")
    assert site.engine.describe("m").spec.min_workers == 1


async def test_no_other_version_than_the_highest_can_be_made_the_default(site: TritonSite) -> None:
    site.onnx("m", ALL, v1=1.0, v2=2.0)
    await site.engine.load_model("m")
    with pytest.raises(InvalidRequest, match="the highest version of a model that can answer is the default"):
        site.engine.set_default("m", "1")
    assert await site.ask("m") == [2, 4, 6]


async def test_the_versions_that_can_answer_come_in_ascending_order(site: TritonSite) -> None:
    site.onnx("m", ALL, v2=2.0, v10=1.0, v1=1.0)
    await site.engine.load_model("m")
    await site.engine.load_model("m")
    assert site.engine.ready_versions("m") == ["1", "2", "10"]


async def test_the_index_reads_the_repository_on_a_thread(
    site: TritonSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(
        TritonRepository, "names", lambda self: threads.append(threading.current_thread()) or ["m"]
    )
    assert await site.index() == [("m", "", None, "")]
    assert site.entries() == []
    assert [each is threading.main_thread() for each in threads] == [False]


async def test_requests_with_other_parameters_and_outputs_share_a_batch_of_a_triton_model(
    site: TritonSite,
) -> None:
    site.write("m/config.pbtxt", 'backend: "python" max_batch_size: 2' + JOINED)
    site.write("m/1/model.py", SCALED)
    await site.engine.load_model("m")
    x = to_tensor("x", np.ones((1, 3), np.float32))
    first, other = await asyncio.gather(
        site.engine.infer(InferRequest("1", "m", inputs=[x], parameters={"by": 2, "sequence_id": 7})),
        site.engine.infer(InferRequest("2", "m", inputs=[x], parameters={"by": 3}, outputs=["z"])),
    )
    told = [{each.name: to_array(each).tolist() for each in answer.outputs} for answer in (first, other)]
    assert told == [{"y": [[2, 2, 2]], "z": [[-2, -2, -2]]}, {"z": [[-3, -3, -3]]}]
    ((_, metrics),) = site.engine.statistics("m")
    assert {rows: count for rows, (count, _) in metrics.batches.items()} == {2: 1}


async def test_an_archive_that_cannot_be_read_at_start_keeps_the_server_from_ready_until_it_is_mended(
    inline: Any,
) -> None:
    inline.store.add("echo")
    inline.store.put("other.mar", {"MAR-INF/MANIFEST.json": "{"})
    entries = [
        LoadOptions(url=url, handler="service:handle", at_startup=True) for url in ("echo", "other.mar")
    ]
    assert await inline.engine.start(entries, lambda *_: None) == 1
    assert not inline.engine.ready()
    failed = inline.engine.describe("other")
    assert (failed.state, failed.spec.url) == (VersionState.FAILED, "other.mar")
    assert str(failed.detail).startswith("The manifest is not valid JSON")
    (entry,) = [each for each in await inline.engine.repository_index() if each.name == "other"]
    assert entry.state is not None and entry.state.value == "UNAVAILABLE"
    assert [status.spec.name for status in inline.engine.models()] == ["echo"]  # MMS knows nothing of it

    inline.store.put("other.mar", {"service.py": "def handle(data, context): return data"})
    await inline.engine.load(LoadOptions(url="other.mar", handler="service:handle", name="named"))
    assert inline.engine.ready()
    with pytest.raises(ModelNotFound):
        inline.engine.describe("other")


async def test_an_archive_that_failed_at_start_may_be_given_up(inline: Any) -> None:
    inline.store.add("echo")
    entries = [
        LoadOptions(url=url, handler="service:handle", at_startup=True) for url in ("echo", "absent.mar")
    ]
    assert await inline.engine.start(entries, lambda *_: None) == 1
    assert not inline.engine.ready()
    await inline.engine.unload("absent")
    assert inline.engine.ready()
