"""tritonclient's four clients behind one face: what they do alike is tested once.

Coroutines of the two asynchronous ones are run to their end; gRPC's messages come as JSON does over HTTP.
"""

import asyncio
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from client_server import Server
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

Array = NDArray[Any]


class TritonClient:
    """One client, open while the block runs. Whatever is not found here is the client's own method."""

    def __init__(self, face: str, server: Server) -> None:
        self.face = face
        self.over_http = face.startswith("http")
        self.module: Any = importlib.import_module(f"tritonclient.{face.partition('.')[0]}")
        self._server = server
        self._loop = asyncio.new_event_loop() if face.endswith("aio") else None
        self._client: Any = None

    def __enter__(self) -> "TritonClient":
        made = importlib.import_module(f"tritonclient.{self.face}").InferenceServerClient
        url = self._server.http if self.over_http else self._server.grpc

        async def inside_a_loop() -> Any:
            return made(url)

        self._client = made(url) if self._loop is None else self._loop.run_until_complete(inside_a_loop())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._loop is not None:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if self._loop is None:
            return method
        loop = self._loop
        return lambda *given, **named: loop.run_until_complete(method(*given, **named))

    def json(self, name: str, *given: Any, **named: Any) -> Any:
        """Call a method; return its answer as JSON values. gRPC's have 64-bit integers as text."""
        if not self.over_http:
            named["as_json"] = True
        return getattr(self, name)(*given, **named)

    def inputs(self, **arrays: Array) -> list[Any]:
        """Return the request's inputs with their data, binary over HTTP."""
        made = []
        for name, array in arrays.items():
            tensor = self.module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            made.append(tensor.set_data_from_numpy(array))
        return made

    def outputs(self, *names: str, **options: Any) -> list[Any]:
        return [self.module.InferRequestedOutput(name, **options) for name in names]

    def ask(self, model: str, named: dict[str, Any] | None = None, **arrays: Array) -> Any:
        """Ask a model; `named` are further arguments of the client's `infer`."""
        return self.infer(model, self.inputs(**arrays), **(named or {}))

    def answer(self, result: Any) -> Any:
        """Return what a result says beside its tensors."""
        return result.get_response() if self.over_http else result.get_response(as_json=True)

    @contextmanager
    def refused(self, *, http: str, grpc: str, saying: str) -> Iterator[None]:
        """Expect an error with this status of either protocol, and with this text in its message."""
        with pytest.raises(InferenceServerException, match=re.escape(saying)) as caught:
            yield
        assert caught.value.status() == (http if self.over_http else f"StatusCode.{grpc}")


def sixteen(start: int, rows: int = 1) -> Array:
    """Return rows of sixteen whole numbers, each row larger than the one before."""
    return np.arange(start, start + 16 * rows, dtype=np.int32).reshape(rows, 16)
