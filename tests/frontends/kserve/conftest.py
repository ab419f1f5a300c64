"""What the tests of the KServe v2 protocol share: models that take tensors, the service, and calls of it."""

from __future__ import annotations

import textwrap
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import pytest
from raw_http import Answer

from mms_lite.engine.launcher import InlineLauncher
from mms_lite.frontends.json_bodies import Readers
from mms_lite.frontends.kserve import rest
from mms_lite.frontends.kserve.service import KServeService
from mms_lite.frontends.message import HttpRequest, Limits, split_target
from mms_lite.shared import Arena, SharedBytes, read_only
from mms_lite.types import LoadOptions, TensorSpec
from mms_lite.worker import loop

LIMITS = Limits(max_tensor_request_size=4 << 20)


def model_source(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], body: str) -> str:
    """Return the service.py of a model of tensors; `body` makes `out`, a dict, of `x`, a dict of arrays."""
    specs = f"Signature({tuple(inputs)!r}, {tuple(outputs)!r}, True)"
    code = textwrap.indent(textwrap.dedent(body).strip(), " " * 12)
    return f"""
import numpy as np
from mms_lite.types import Signature, TensorSpec

class Model:
    signature = {specs}

    def initialize(self, context):
        pass

    def handle(self, data, context):
        answers = []
        for x in data:
{code}
            answers.append(out)
        return answers

    def close(self):
        pass
"""


@pytest.fixture
def tensor_model(inline: Any) -> Callable[..., Awaitable[Any]]:
    """Load a model of tensors: `await tensor_model("double", inputs, outputs, "out = ...")`."""

    async def load(
        name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], body: str, **options: Any
    ) -> Any:
        inline.store.put(name, {"service.py": model_source(inputs, outputs, body)})
        return await inline.engine.load(LoadOptions(url=name, name=name, handler="service", **options))

    return load


@pytest.fixture
async def double(tensor_model: Callable[..., Awaitable[Any]]) -> None:
    """Load the model `double`: FP32 x and y of [-1,4], twice and minus of [-1,4] in this order."""
    x, y = TensorSpec("x", "FP32", (-1, 4)), TensorSpec("y", "FP32", (-1, 4))
    twice, minus = TensorSpec("twice", "FP32", (-1, 4)), TensorSpec("minus", "FP32", (-1, 4))
    body = "out = {'twice': x['x'] * 2, 'minus': x['x'] - x['y']}"
    await tensor_model("double", (x, y), (twice, minus), body)


@pytest.fixture
def arena(inline: Any) -> Arena:
    """Memory for large bodies, which the engine's workers read; name it before what loads a model."""
    arena = Arena.create(1 << 22)
    if arena is None:
        pytest.skip("this system has no files in memory")
    run = partial(loop.run, shared=read_only(arena.fd))
    inline.launcher = InlineLauncher(run, max_frame_bytes=64 << 20)
    return arena


@pytest.fixture
def placed(arena: Arena) -> Callable[[bytes], SharedBytes]:
    """Put a body into shared memory."""

    def place(body: bytes) -> SharedBytes:
        found = arena.take(len(body))
        assert found is not None
        found.view[:] = body
        return found

    return place


@pytest.fixture
def service(inline: Any) -> KServeService:
    return KServeService(
        inline.engine, server_name="mms-lite", server_version="0.1", authorise=lambda _: None
    )


Call = Callable[..., Awaitable[Answer]]


@pytest.fixture
def call(service: KServeService) -> Call:
    """Ask over HTTP, without a socket: `await call("POST", "/v2/...", body, ("Header", "value"))`."""
    protocol = rest.protocol(service, LIMITS, Readers())

    async def ask(
        method: str,
        target: str,
        body: bytes | SharedBytes = b"",
        *headers: tuple[str, str],
        remote: str = "127.0.0.1:5000",
    ) -> Answer:
        path, query = split_target(target)
        whole = body if isinstance(body, SharedBytes) else bytearray(body)
        request = HttpRequest(method, path, "our-id", target, query, headers, whole, remote)
        response = await protocol.handle(request)
        lower = {name.lower(): value for name, value in response.headers}
        return Answer(response.status, lower, b"".join(response.body), response.reason)

    return ask
