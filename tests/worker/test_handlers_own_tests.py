"""What users' tests of their handlers do: build a Context by hand and call the handler, without a server."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest

import mms_lite

COMPAT = Path(mms_lite.__file__).resolve().parent / "worker" / "compat"
HANDLERS = Path(__file__).resolve().parent.parent / "handlers"


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import a handler as its tests would: from its folder, with the mms package installed."""
    monkeypatch.syspath_prepend(str(COMPAT))
    monkeypatch.syspath_prepend(str(HANDLERS))
    before = set(sys.modules)
    yield importlib.import_module("template")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def context_of(batch_size: int = 1, gpu: int | None = None, requests: int = 1) -> Any:
    """Return a context as tests build it: the constructor's six arguments in MMS's order, then attributes."""
    mms = importlib.import_module("mms.context")
    context = mms.Context(
        "shout", "/models/shout", {"model": {"modelName": "shout"}}, batch_size, gpu, "1.1.11"
    )
    context.request_ids = {index: f"id{index}" for index in range(requests)}
    context.request_processor = [
        mms.RequestProcessor({"Content-Type": "text/plain"}) for _ in range(requests)
    ]
    context.metrics = importlib.import_module("mms.metrics.metrics_store").MetricsStore(
        context.request_ids, context.model_name
    )
    return context


def test_a_handler_is_loaded_and_called_with_a_context_made_by_hand(template: ModuleType) -> None:
    context = context_of()
    assert template.handle(None, context) is None
    assert template.handle([{"body": b"hello"}], context) == ["HELLO"]
    assert context.get_response_status(0) == (200, None)


def test_a_partial_batch_trips_the_templates_assertion_and_its_status_is_seen(template: ModuleType) -> None:
    context = context_of(batch_size=2)
    assert template.handle([{"body": b"hello"}], context) == ["a batch of 1 for 2"] * 2
    assert context.get_response_status(0) == (500, "Unknown inference error")


def test_a_failure_of_a_whole_batch_marks_every_request(template: ModuleType) -> None:
    context = context_of(batch_size=2, requests=2)
    answers = template.handle([{"body": b"hello"}, {"body": b"\xff"}], context)
    assert len(answers) == 2
    assert [context.get_response_status(index)[0] for index in (0, 1)] == [500, 500]


def test_the_single_processor_of_mms_1_0_works_too(template: ModuleType) -> None:
    context = context_of()
    context.request_processor = importlib.import_module("mms.context").RequestProcessor({})
    template.handle([{"body": b"\xff"}], context)
    assert context.get_response_status(0) == (500, "Unknown inference error")
    context.set_response_content_type("id0", "image/png")
    assert context.get_response_content_type("id0") == context.get_response_content_type(0) == "image/png"


@pytest.mark.parametrize("stand_in", [Mock, MagicMock])
def test_a_mock_in_place_of_the_processor_records_the_call(template: ModuleType, stand_in: type) -> None:
    context = context_of()
    context.request_processor = stand_in()
    template.handle([{"body": b"\xff"}], context)
    context.request_processor.report_status.assert_called_once_with(500, "Unknown inference error")


def test_contexts_are_equal_when_all_they_hold_is(template: ModuleType) -> None:
    mms = importlib.import_module("mms.context")
    one, same, other = (mms.Context("m", "/m", None, 1, gpu, "1.1.11") for gpu in (None, None, 0))
    assert one == same
    assert one != other
    same.request_ids = {0: "a"}
    assert one != same


def test_metrics_of_a_context_made_by_hand_can_be_looked_at(template: ModuleType) -> None:
    context = context_of()
    context.metrics.add_counter("Words", 2)
    context.metrics.add_counter("Words", 3)
    (metric,) = context.metrics.store
    assert (metric.name, metric.value, metric.unit, metric.request_id) == ("Words", 5, "Count", "id0")
    assert [str(each) for each in metric.dimensions] == ["ModelName:shout", "Level:Model"]
