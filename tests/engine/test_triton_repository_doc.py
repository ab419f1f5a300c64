"""docs/triton-repository.md: it names every field of a configuration, those without effect too."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("google.protobuf", reason="the grpc extra is not installed")

from mms_lite.engine.repository.model_config import _HONOURED, BACKENDS
from mms_lite.protos import message

PAGE = (Path(__file__).parents[2] / "docs" / "triton-repository.md").read_text(encoding="utf-8")
WORDS = set(re.findall(r"`([\w.]+)`", PAGE))
HONOURED, _, UNHONOURED = PAGE.partition("**Refused**")
# Priorities and time-outs of queues, as the page calls them together.
TOGETHER = {"priority_levels", "default_priority_level", "priority_queue_policy", "timeout_action"} | {
    "default_timeout_microseconds",
    "allow_timeout_override",
}


def fields(descriptor: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of a message's fields, where the code looks into a field those in it."""
    found = []
    for field in descriptor.fields:
        path = prefix + field.name
        inner = any(known.startswith(f"{path}.") for known in _HONOURED)
        found += fields(field.message_type, f"{path}.") if inner else [path]
    return found


@pytest.mark.parametrize("field", fields(message("inference.ModelConfig").DESCRIPTOR))
def test_a_field_stands_where_it_belongs(field: str) -> None:
    name = field.rpartition(".")[2]
    if field in _HONOURED and name != "model_transaction_policy":  # of which one value is refused
        assert name in HONOURED
    elif field == "ensemble_scheduling":
        assert "ensembles" in UNHONOURED
    else:
        assert name in UNHONOURED or name in TOGETHER


def test_the_backends_are_those_of_the_code() -> None:
    assert BACKENDS.keys() <= WORDS
    assert {each.file for each in BACKENDS.values()} <= WORDS
