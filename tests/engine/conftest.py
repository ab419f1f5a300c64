"""What the tests of pool, worker and metrics share: a launcher whose workers the test plays, and requests."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asking import begin
from scripted import ScriptedLauncher

from mms_lite.engine.model import Model
from mms_lite.types import InferRequest, InferResponse


@pytest.fixture
def launcher() -> ScriptedLauncher:
    return ScriptedLauncher()


@pytest.fixture
def send(ask: Callable[..., InferRequest]) -> Callable[..., "asyncio.Task[InferResponse]"]:
    """Submit a request to a model and return the task that awaits its answer."""

    def submit(model: Model, body: bytes = b"hello", **fields: Any) -> "asyncio.Task[InferResponse]":
        return begin(model.submit(ask("m", body, **fields)).answer())

    return submit
