"""Handlers as users of MMS have them, in real worker processes (MMS reference, sections 7.3 and 8)."""

import asyncio
import inspect
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import begin, body
from mms_names import FUNCTIONS, MODULES, PROPERTIES

from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.errors import HandlerError, InvalidArchive, LoadError, WorkerDied
from mms_lite.types import InferRequest, LoadOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups and /proc as on Linux")

Ask = Callable[..., InferRequest]
Bench = Any
HANDLERS = Path(__file__).parent.parent / "handlers"
FACTS = """
import sys
def handle(data, context):
    return data and [{"manifest": context.manifest, "file": __file__, "python": sys.executable}]
"""


async def ask_json(bench: Bench, request: InferRequest) -> Any:
    return json.loads(body(await asyncio.wait_for(bench.engine.infer(request), 20)))


# --- what handlers import (8.2 to 8.4)


async def test_every_name_that_handlers_import_of_mms_is_there_and_takes_what_it_took(
    processes: Bench, ask: Ask
) -> None:
    await processes.load("names")
    told = await ask_json(processes, ask("names", json.dumps([*FUNCTIONS, *PROPERTIES])))
    for name, parameters in FUNCTIONS.items():
        wanted = inspect.signature(eval(f"lambda {parameters}: 0")).parameters.values()
        ours = told[name]
        for parameter, (own_name, own_default) in zip(wanted, ours, strict=False):
            assert own_name == parameter.name, name
            if parameter.default is not parameter.empty:
                assert own_default == repr(parameter.default), name
        assert len(ours) >= len(wanted), name
        assert all(default is not None for _, default in ours[len(wanted) :]), name
    assert {told[name] for name in PROPERTIES} == {"property"}


async def test_every_module_that_handlers_import_of_mms_is_there(processes: Bench, ask: Ask) -> None:
    await processes.load("names")
    told = await ask_json(processes, ask("names", json.dumps([f"{module}:__doc__" for module in MODULES])))
    assert set(told.values()) == {"str"}


async def test_the_parts_of_a_package_are_its_attributes_as_in_mms(processes: Bench, ask: Ask) -> None:
    await processes.load("names")
    names = [
        "mms:__version__",
        "mms.metrics:dimension.Dimension",
        "mms.metrics.metric:MetricUnit.units",
        "mms.model_service:mxnet_model_service.SingleNodeService",
        "mms.service:PREDICTION_METRIC",
        "mms.utils:timeit_decorator.timeit",
    ]
    told = await ask_json(processes, ask("names", json.dumps(names)))
    assert [told[name] for name in names][:3] == ["str", "type", "dict"]


# --- the template of MMS's examples (8.3)


async def test_a_handler_like_mms_template_serves_and_tells_its_own_errors(
    processes: Bench, ask: Ask, still_serves: Any
) -> None:
    await processes.load("template")
    answer = await processes.engine.infer(ask("template", "hello"))
    assert (answer.status, body(answer)) == (200, b"HELLO")
    answer = await processes.engine.infer(ask("template", b"\xff"))
    assert (answer.status, answer.reason) == (500, "Unknown inference error")
    assert b"'ascii' codec can't decode" in body(answer)
    await still_serves(processes, "template")


async def test_a_handler_that_takes_whole_batches_only_serves_whole_batches(
    processes: Bench, ask: Ask
) -> None:
    await processes.load("template", batch_size=2, max_batch_delay_ms=2_000)
    asked = [begin(processes.engine.infer(ask("template", each))) for each in ("a", "b")]
    assert [body(await asyncio.wait_for(each, 10)) for each in asked] == [b"A", b"B"]
    with pytest.raises(HandlerError, match=r"^number of batch response mismatched$"):
        await asyncio.wait_for(processes.engine.infer(ask("template", "alone")), 10)


# --- errors (8.3)


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        ("PredictionException('no such customer', 404)", 404, "no such customer"),
        ("PredictionException('full', 507)", 507, "full"),
        ("PredictionException('odd', 599)", 599, "odd"),
        ("PredictionException('default')", 500, "default"),
        ("PredictionException('beyond HTTP', 1000)", 500, "beyond HTTP"),
        ("PredictionException('no error', 200)", 500, "no error"),
        ("PredictionException('text', '422')", 422, "text"),
        ("PredictionException('none', None)", 500, "none"),
        ("PredictionException(None, 404)", 404, "Prediction failed"),
        ("PredictionException({'a': 1}, 400)", 400, "{'a': 1}"),
    ],
)
async def test_a_prediction_exception_of_mms_service_chooses_message_and_status(
    processes: Bench, ask: Ask, still_serves: Any, raised: str, status: int, message: str
) -> None:
    source = "from mms.service import PredictionException\ndef handle(data, context):\n    "
    source += f"if data and data[0]['body'] != b'good': raise {raised}\n    return data and ['fine']"
    processes.store.put("m", {"service.py": source})
    await processes.engine.load(LoadOptions(url="m", name="m", handler="service:handle"))
    with pytest.raises(HandlerError) as caught:
        await asyncio.wait_for(processes.engine.infer(ask("m", "bad")), 10)
    assert (caught.value.details["status"], caught.value.message) == (status, message)
    await still_serves(processes, "m")


@pytest.mark.parametrize(
    ("raised", "text"), [("SystemExit(5)", "exit code 5"), ("KeyboardInterrupt", "SIGINT")]
)
async def test_an_exit_or_interrupt_in_a_handler_ends_its_worker(
    processes: Bench, ask: Ask, still_serves: Any, raised: str, text: str
) -> None:
    source = f"def handle(data, context):\n    if data and data[0]['body'] != b'good': raise {raised}\n"
    processes.store.put("m", {"service.py": source + "    return data and ['fine']"})
    await processes.engine.load(LoadOptions(url="m", name="m", handler="service:handle"))
    with pytest.raises(WorkerDied, match=text):
        await asyncio.wait_for(processes.engine.infer(ask("m", "bad")), 10)
    await still_serves(processes, "m")


# --- the end (8.1, last line)


async def test_at_a_normal_end_a_models_destructors_run_and_can_log(
    processes: Bench, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mms_lite.model"):
        await processes.load("farewell")
        await processes.engine.infer(ask("farewell"))
        assert "goodbye" not in caplog.text
        await processes.engine.unload("farewell")
    lines = [record.getMessage() for record in caplog.records]
    assert "goodbye: logged by farewell" in lines
    assert "goodbye: printed" in lines


# --- default_service_handler (2 and 7.3)


@pytest.mark.parametrize("url", ["plain", "plain.mar"])
@pytest.mark.parametrize("handler", ["service:handle", "service.py:handle", "service"])
async def test_the_default_handler_serves_a_model_without_manifest(
    processes: Bench, ask: Ask, url: str, handler: str
) -> None:
    processes.defaults["handler"] = handler
    processes.store.put(url, {"service.py": FACTS})
    status = await processes.engine.load(LoadOptions(url=url, name="m"))
    assert status.spec.handler == handler
    told = await ask_json(processes, ask("m"))
    assert (told["manifest"], told["file"]) == (None, os.path.join(status.spec.path, "service.py"))


@pytest.mark.parametrize(
    ("handler", "manifest", "winner"),
    [
        ("asked:handle", {"modelName": "m", "handler": "named:handle"}, "asked"),
        (None, {"modelName": "m", "handler": "named:handle"}, "named"),
        (None, {"modelName": "m"}, "default"),
    ],
)
async def test_the_request_names_the_handler_before_the_manifest_before_the_configuration(
    processes: Bench, ask: Ask, handler: str | None, manifest: dict[str, str], winner: str
) -> None:
    processes.defaults["handler"] = "default:handle"
    files = {f"{name}.py": FACTS for name in ("asked", "named", "default")}
    processes.store.put("m.mar", {**files, "MAR-INF/MANIFEST.json": json.dumps({"model": manifest})})
    await processes.engine.load(LoadOptions(url="m.mar", handler=handler))
    told = await ask_json(processes, ask("m"))
    assert Path(told["file"]).stem == winner
    assert told["manifest"] == {"model": manifest}


async def test_without_any_handler_a_model_is_refused(processes: Bench) -> None:
    processes.store.put("plain", {"service.py": FACTS})
    with pytest.raises(InvalidArchive, match=r"^Model handler is not defined\.$"):
        await processes.engine.load(LoadOptions(url="plain", name="m"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Make a folder with handlers that belong to no model, as a container has them."""
    folder = tmp_path / "opt" / "toolkit"
    (folder / "a_package").mkdir(parents=True)
    (folder / "beside.py").write_text("WORD = 'beside'")
    (folder / "model_handler.py").write_text(
        "import beside\ndef handle(data, context): return data and [[beside.WORD, __file__]]"
    )
    (folder / "a_package" / "__init__.py").write_text("")
    (folder / "a_package" / "handler_service.py").write_text(
        "class HandlerService:\n"
        "    def initialize(self, context): self.files = context.system_properties['model_dir']\n"
        "    def handle(self, data, context): return data and [[__name__, self.files]]\n"
    )
    return folder


@pytest.mark.parametrize("function", [":handle", ""])
@pytest.mark.parametrize("suffix", [".py", ""])
async def test_the_default_handler_may_be_a_file_anywhere_as_in_sagemaker_containers(
    processes: Bench, ask: Ask, outside: Path, suffix: str, function: str
) -> None:
    processes.defaults["handler"] = f"{outside}/model_handler{suffix}{function}"
    processes.store.put("plain", {"weights.bin": ""})
    await processes.engine.load(LoadOptions(url="plain", name="m"))
    assert await ask_json(processes, ask("m")) == ["beside", str(outside / "model_handler.py")]


async def test_the_default_handler_may_be_an_installed_module_with_one_class(
    processes: Bench, ask: Ask, outside: Path
) -> None:
    environ = {**os.environ, "PYTHONPATH": str(outside)}
    processes.launcher = ProcessLauncher(max_frame_bytes=1 << 20, environ=environ)
    processes.defaults["handler"] = "a_package.handler_service"
    processes.store.put("plain", {"weights.bin": ""})
    status = await processes.engine.load(LoadOptions(url="plain", name="m"))
    assert await ask_json(processes, ask("m")) == ["a_package.handler_service", status.spec.path]


async def test_a_default_handler_that_is_not_there_is_a_load_error(processes: Bench, tmp_path: Path) -> None:
    processes.defaults["handler"] = f"{tmp_path}/no_handler.py:handle"
    processes.store.put("plain", {"weights.bin": ""})
    with pytest.raises(LoadError, match="'no_handler' is neither in the archive nor installed"):
        await processes.engine.load(LoadOptions(url="plain", name="m"))


async def test_a_handler_may_lie_in_a_folder_and_be_named_without_a_function(
    processes: Bench, ask: Ask
) -> None:
    processes.store.put("m", {})
    processes.store.put("m/code", {"service.py": FACTS})
    await processes.engine.load(LoadOptions(url="m", name="m", handler="code/service.py"))
    assert (await ask_json(processes, ask("m")))["file"].endswith("/m/code/service.py")


async def test_modules_are_looked_for_beside_the_handler_then_on_the_users_path_then_in_the_model(
    processes: Bench, ask: Ask, outside: Path
) -> None:
    environ = {**os.environ, "PYTHONPATH": str(outside), "MXNET_USE_OPERATOR_TUNING": "2"}
    processes.launcher = ProcessLauncher(max_frame_bytes=1 << 20, environ=environ)
    names = ("one", "beside", "three")
    processes.store.put("m", {f"{name}.py": "WORD = 'in the model'" for name in names})
    source = f"import os, {', '.join(names)}\ndef handle(data, context):\n"
    source += "    words = [one.WORD, beside.WORD, three.WORD, os.environ['MXNET_USE_OPERATOR_TUNING']]\n"
    processes.store.put(
        "m/code", {"service.py": source + "    return data and [words]", "one.py": "WORD = 'here'"}
    )
    await processes.engine.load(LoadOptions(url="m", name="m", handler="code/service.py:handle"))
    assert await ask_json(processes, ask("m")) == ["here", "beside", "in the model", "2"]


async def test_mxnets_operator_tuning_is_off_unless_the_user_says_otherwise(
    processes: Bench, ask: Ask
) -> None:
    environ = {name: text for name, text in os.environ.items() if name != "MXNET_USE_OPERATOR_TUNING"}
    processes.launcher = ProcessLauncher(max_frame_bytes=64 << 20, environ=environ)
    await processes.load("facts")
    assert (await ask_json(processes, ask("facts")))["environ"]["MXNET_USE_OPERATOR_TUNING"] == "0"


# --- runtime (7.3, last line)


def command(folder: Path, name: str, runs: str) -> None:
    """Make a command that runs an interpreter and leaves its name in a file beside it."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f'#!/bin/sh\ntouch {folder}/ran-{name}\nexec {runs} "$@"\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def archive_for(bench: Bench, runtime: str) -> None:
    manifest = {"runtime": runtime, "model": {"modelName": "m", "handler": "service:handle"}}
    bench.store.put("m.mar", {"service.py": FACTS, "MAR-INF/MANIFEST.json": json.dumps(manifest)})


@pytest.mark.parametrize("runtime", ["python2", "python3"])
async def test_a_runtime_is_that_command_of_the_path(
    processes: Bench, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    command(tmp_path / "bin", runtime, sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    archive_for(processes, runtime)
    await processes.engine.load(LoadOptions(url="m.mar"))
    assert (await ask_json(processes, ask("m")))["python"] == sys.executable
    assert (tmp_path / "bin" / f"ran-{runtime}").exists()


async def test_a_runtime_that_is_not_installed_is_told(
    processes: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    archive_for(processes, "python3")
    message = "the model asks for the runtime python3, which is not installed"
    with pytest.raises(LoadError, match=f"^{message}$"):
        await processes.engine.load(LoadOptions(url="m.mar"))


def old_interpreter() -> str | None:
    """Return a Python before 3.10 that runs here, if there is one."""
    versions = Path.home() / ".pyenv" / "versions"
    found = [shutil.which(name) for name in ("python2", "python2.7", "python3.8", "python3.9")]
    for each in [*found, *map(str, sorted(versions.glob("[23].[0-9].*/bin/python")))]:
        if each and subprocess.run([each, "-c", ""], capture_output=True, check=False).returncode == 0:
            return each
    return None


async def test_a_runtime_that_is_too_old_is_told(
    processes: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_interpreter()
    if old is None:
        pytest.skip("no Python older than 3.10 is installed")
    command(tmp_path / "bin", "python2", old)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    archive_for(processes, "python2")
    with pytest.raises(
        LoadError, match=r"the model's runtime is Python \d\.\d+; workers need 3\.10 or newer"
    ):
        await processes.engine.load(LoadOptions(url="m.mar"))
