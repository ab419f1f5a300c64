"""What the tests of the TensorFlow Serving API share: models of arrays, and the API without a socket."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from raw_http import Answer

from mms_lite.errors import Forbidden
from mms_lite.frontends import tfserving
from mms_lite.frontends.call import Call
from mms_lite.frontends.json_bodies import Readers
from mms_lite.frontends.message import HttpRequest, Limits, split_target
from mms_lite.frontends.tfserving.grpc import services
from mms_lite.protos import message

MOST_BYTES = 10_000
_MODEL = """
    import numpy as np
    from mms_lite.types import Signature, TensorSpec

    class Model:
        signature = Signature({inputs}, {outputs}, takes_tensors=True)

        def initialize(self, context):
            pass

        def close(self):
            pass

        def handle(self, data, context):
            return [self.run(**each) for each in data]

        def run(self, **arrays):
            {run}
"""

Spec = tuple[str, str, tuple[int, ...] | None]
Ask = Callable[..., Awaitable[Any]]


@pytest.fixture
def arrays(model: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Load a model of arrays: `await arrays("m", [("x", "FP32", (-1,))], [...], "return {...}")`.

    The code has the inputs in `arrays`. Without outputs and code it is the identity.
    """

    async def load(
        name: str,
        inputs: list[Spec],
        outputs: list[Spec] | None = None,
        run: str = "return arrays",
        **options: Any,
    ) -> Any:
        source = _MODEL.format(inputs=_specs(inputs), outputs=_specs(outputs or inputs), run=run)
        return await model(name, source, **options)

    return load


@pytest.fixture
def rest(inline: Any) -> Callable[..., Awaitable[Answer]]:
    """Call the API over HTTP: `await rest("POST", "/v1/models/m:predict", b"...")`."""

    async def call(
        method: str, target: str, body: bytes = b"", *headers: tuple[str, str], remote: str = ""
    ) -> Answer:
        path, query = split_target(target)
        request = HttpRequest(method, path, "id-1", target, query, headers, bytearray(body), remote)
        response = await tfserving.protocol(inline.engine, authorise, Readers()).handle(request)
        lower = {name.lower(): value for name, value in response.headers}
        return Answer(response.status, lower, b"".join(response.body), response.reason)

    return call


@pytest.fixture
def rpc(inline: Any) -> Ask:
    """Call the API over gRPC: `await rpc("Predict", request)`; both are messages."""

    async def call(method: str, request: Any, **fields: Any) -> Any:
        limits = Limits(max_tensor_request_size=MOST_BYTES)
        methods: dict[str, Any] = {}
        for service in services(inline.engine, authorise, limits):
            methods |= service.unary
        serialized = request if isinstance(request, bytes) else request.SerializeToString()
        answer = await methods[method](serialized, Call("id-1", **fields))
        assert type(answer) is bytes
        kind = "ReloadConfig" if method == "HandleReloadConfigRequest" else method
        return message(f"tensorflow.serving.{kind}Response").FromString(answer)

    return call


def authorise(request: HttpRequest) -> None:
    if request.remote:
        raise Forbidden("not from there")


def _specs(specs: list[Spec]) -> str:
    return f"({''.join(f'TensorSpec{spec!r}, ' for spec in specs)})"
