"""The examples of docs/handlers.md, run as they are written there."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mms_lite
from mms_lite.types import InferRequest, Tensor
from mms_lite.wire import Item, Outcome
from mms_lite.worker import handler

ROOT = Path(mms_lite.__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "handlers.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", TEXT, re.DOTALL))
LEGACY = {"Model": {"Model-Name": "old", "Service": "old_service.py", "Signature": "signature.json"}}
SIGNATURE = '{"input_type": "text/plain", "inputs": [{"data_name": "data"}]}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder with every example, as a worker would enter it."""
    for name, source in EXAMPLES.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "signature.json").write_text(SIGNATURE)
    monkeypatch.syspath_prepend(str(ROOT / "mms_lite" / "worker" / "compat"))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(folder: Path, entry: str, manifest: Any = None) -> handler.MmsHandler:
    return handler.load(
        {
            "name": "m",
            "path": str(folder),
            "handler": entry,
            "manifest": manifest,
            "batch_size": 1,
            "device": None,
            "isolate_failures": True,
            "decode_input_request": True,
        }
    )


def ask(model: handler.MmsHandler, data: bytes, *headers: tuple[str, str]) -> Outcome:
    part = Tensor("body", "BYTES", (), bytearray(data), "")
    answers: list[Outcome] = []
    item = Item(0, None, InferRequest(id="r", model="m", inputs=[part], headers=headers))
    model.run([item], lambda _: None, answers.extend)
    return answers[0]


def body(outcome: Outcome) -> bytes:
    assert outcome.error is None
    return bytes(outcome.outputs[0].data)


def test_every_example_of_the_page_is_run_here() -> None:
    assert set(EXAMPLES) == {
        "shout",
        "service",
        "careful",
        "strict",
        "counting",
        "test_careful",
        "old_service",
    }


def test_the_function_loads_its_model_on_the_first_call(folder: Path) -> None:
    assert body(ask(load(folder, "shout"), b"hello")) == b"HELLO"
    (folder / "words.json").write_text('{"bye": "BYE"}')
    assert body(ask(load(folder, "shout:handle"), b"bye")) == b"BYE"


@pytest.mark.parametrize("entry", ["service", "service:Service"])
def test_the_class_is_initialised(folder: Path, entry: str) -> None:
    assert json.loads(body(ask(load(folder, entry), b"12"))) == {"device": None, "bytes": 2}


def test_status_and_content_type_are_chosen_for_each_request(folder: Path) -> None:
    model = load(folder, "careful")
    answer = ask(model, b"12", ("accept", "text/csv"))
    assert (body(answer), answer.status, answer.outputs[0].content_type) == (b"2,bytes", 200, "text/csv")
    answer = ask(model, b"1" * 11)
    assert (body(answer), answer.status, answer.reason) == (b"at most 10 bytes, please", 413, "Too long")


def test_an_error_has_its_message_and_status(folder: Path) -> None:
    model = load(folder, "strict")
    error = ask(model, b"").error
    assert error is not None
    assert (error.message, error.details["status"]) == ("an empty body", 422)
    assert body(ask(model, b"x")) == b"x"


def test_metrics_have_units_and_dimensions(folder: Path) -> None:
    model = load(folder, "counting")
    ask(model, b"two words")
    heads = [line.partition("|#hostname")[0] for line in model.metric_lines(0, "vm")]
    assert heads[0] == "Words.Count:2|#ModelName:m,Level:Model"
    assert heads[1] == "Lookup.Milliseconds:12.5|#Table:words,ModelName:m,Level:Model"
    assert heads[2].startswith("PredictionTime.Milliseconds:")


def test_the_test_of_a_handler_passes(folder: Path) -> None:
    importlib.import_module("test_careful").test_a_long_body_is_refused()


def test_the_service_of_0_x_answers(folder: Path) -> None:
    answer = ask(load(folder, "old_service.py", LEGACY), b"hello")
    assert json.loads(body(answer)) == {"text": "hello", "characters": 5}
