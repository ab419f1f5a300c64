"""KServe v2 over gRPC, with Triton's extensions: the methods of inference.GRPCInferenceService.

They translate between messages and the service's JSON, whose field names are protobuf's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from google.protobuf import json_format

from mms_lite import protos
from mms_lite.errors import ModelNotFound, ServingError, Unsupported
from mms_lite.frontends.call import Call, Stream, Unary, parse_short
from mms_lite.frontends.fields import lift, value
from mms_lite.frontends.kserve import infer_messages
from mms_lite.frontends.kserve.errors import grpc_status
from mms_lite.frontends.kserve.infer_messages import Question, parameters
from mms_lite.frontends.kserve.service import KServeService
from mms_lite.frontends.message import Buffer

_PROTOCOL = "kserve-grpc"  # as requests are counted
_MOST_OPEN = 64  # requests of a stream at a time: what comes then waits in the connection
_MOST_OPEN_BYTES = 64 << 20  # of theirs together, but for one
_MOST_LOAD_BYTES = 1 << 20  # of a message that loads a model, besides its files
_FILES = (3, 2, 4)  # RepositoryModelLoadRequest.parameters, its value, ModelRepositoryParameter.bytes_param
_LOAD = protos.message("inference.RepositoryModelLoadRequest")
_LOADED = protos.message("inference.RepositoryModelLoadResponse")
_LOG_FIELDS = {bool: "bool_param", int: "uint32_param", str: "string_param"}

Json = dict[str, Any]
_Method = Callable[[Any, Call], Awaitable[Json]]
_Open = tuple[Question, "asyncio.Task[list[Buffer]]"]


class InferenceService:
    """The service for an RPC server. What it needs of the engine it has from `service`."""

    name = "inference.GRPCInferenceService"

    def __init__(self, service: KServeService) -> None:
        self._service = service
        self.files: Sequence[bytes] = protos.files(self.name)
        self.streams: dict[str, Stream] = {"ModelStreamInfer": self._model_stream_infer}
        methods: dict[str, _Method] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelUnload": self._unload,
            "SystemSharedMemoryStatus": _region_status,
            "SystemSharedMemoryRegister": _unsupported("shared memory of clients"),
            "SystemSharedMemoryUnregister": _nothing,
            "CudaSharedMemoryStatus": _region_status,
            "CudaSharedMemoryRegister": _unsupported("shared memory of clients"),
            "CudaSharedMemoryUnregister": _nothing,
            "TraceSetting": self._trace_settings,
            "LogSettings": self._log_settings,
        }
        self.unary: dict[str, Unary] = {name: _unary(name, method) for name, method in methods.items()}
        self.unary["RepositoryModelLoad"] = self._load
        self.unary["ModelInfer"] = self._model_infer

    def spell(self, error: ServingError, method: str) -> tuple[str, str]:
        """Return the status code and message of an error, as Triton has them."""
        return grpc_status(error), error.message

    async def _server_live(self, _: Any, call: Call) -> Json:
        return {"live": self._service.live()}

    async def _server_ready(self, _: Any, call: Call) -> Json:
        return {"ready": self._service.ready()}

    async def _model_ready(self, asked: Any, call: Call) -> Json:
        try:
            return {"ready": self._service.model_ready(asked.name, _version(asked))}
        except ModelNotFound:
            return {"ready": False}

    async def _server_metadata(self, _: Any, call: Call) -> Json:
        return self._service.server_metadata()

    async def _model_metadata(self, asked: Any, call: Call) -> Json:
        return self._service.model_metadata(asked.name, _version(asked))

    async def _model_config(self, asked: Any, call: Call) -> Json:
        return {"config": self._service.model_config(asked.name, _version(asked))}

    async def _model_statistics(self, asked: Any, call: Call) -> Json:
        return self._service.statistics(asked.name, _version(asked))

    async def _repository_index(self, asked: Any, call: Call) -> Json:
        _check_repository(asked)
        return {"models": await self._service.repository_index(only_ready=asked.ready)}

    async def _load(self, received: bytes, call: Call) -> bytes:
        self._service.authorise(call.as_http)  # nothing of others is read
        rest, files = lift(received, _FILES)
        asked = parse_short(_LOAD, rest, most_bytes=_MOST_LOAD_BYTES)
        _check_repository(asked)
        given = parameters(asked.parameters)
        for name, each in given.items():
            if isinstance(each, bytes):
                given[name] = bytes(value(each, files))
        await self._service.load(asked.model_name, given, call.as_http)
        return bytes(_LOADED().SerializeToString())

    async def _unload(self, asked: Any, call: Call) -> Json:
        _check_repository(asked)
        await self._service.unload(asked.model_name, parameters(asked.parameters), call.as_http)
        return {}

    async def _trace_settings(self, asked: Any, call: Call) -> Json:
        if asked.settings:
            raise Unsupported("this server does not support tracing")
        said = self._service.trace_settings()
        return {"settings": {key: {"value": _listed(value)} for key, value in said.items()}}

    async def _log_settings(self, asked: Any, call: Call) -> Json:
        if asked.settings:
            raise Unsupported("this server does not support changing what is logged")
        said = self._service.log_settings()
        return {"settings": {key: {_LOG_FIELDS[type(value)]: value} for key, value in said.items()}}

    async def _model_infer(self, received: bytes, call: Call) -> bytes:
        return b"".join(await self._answer(await infer_messages.read(received, call), call))

    async def _model_stream_infer(
        self, received: AsyncIterator[bytes], call: Call
    ) -> AsyncGenerator[bytes, None]:
        """Answer requests in their order, while up to `_MOST_OPEN` of them are on their way.

        What one fails with is its answer; with the metadata `triton_grpc_error: true` it ends the stream.
        """
        ends = any(name.lower() == "triton_grpc_error" and text == "true" for name, text in call.metadata)
        opened = _Opened()
        reading = asyncio.create_task(self._open(received, call, opened))
        try:
            while await opened.next():
                yield await opened.answer(ends_by_error=ends)
            await reading
        finally:
            await _end([reading, *opened.answers()])
            del reading  # as in `_Opened.answer`

    async def _open(self, received: AsyncIterator[bytes], call: Call, opened: _Opened) -> None:
        """Read a stream's requests in order and begin to answer each; none that waits is lost on an error."""
        try:
            async for each in received:
                await self._begin(each, call, opened)
                del each  # it would be kept until the next comes, and that may be hours
        finally:
            opened.finish()

    async def _begin(self, received: bytes, call: Call, opened: _Opened) -> None:
        question = await infer_messages.read(received, call)
        await opened.add(question, asyncio.create_task(self._answer(question, call)))

    async def _answer(self, question: Question, call: Call) -> list[Buffer]:
        """Return the pieces of the answer's message, once it is counted.

        Raises:
            ServingError: there is none.
        """
        count = self._service.engine.count
        try:
            if question.request is None:
                raise question.error or ServingError("the request was not read")
            response = await self._service.infer(question.request, question.wanted, call_id=call.id)
            pieces = infer_messages.write(response)
        except ServingError as error:
            question.error = None  # it has this frame, and so the question
            count(question.model, question.version, _PROTOCOL, grpc_status(error))
            raise
        count(response.model, response.version, _PROTOCOL, "OK")
        return pieces


class _Opened:
    """The requests of a stream that are not answered yet, in order, and how many there may be.

    One that is answered is forgotten at once: the next may be hours away.
    """

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[_Open | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._count = self._bytes = 0
        self._current: _Open | None = None

    async def add(self, question: Question, answer: asyncio.Task[list[Buffer]]) -> None:
        """Add a request; return once there is room for another."""
        self._waiting.put_nowait((question, answer))
        self._count += 1
        self._bytes += question.size
        while self._count >= _MOST_OPEN or self._bytes > _MOST_OPEN_BYTES:
            self._room.clear()
            await self._room.wait()

    async def next(self) -> bool:
        """Wait for the request whose answer is due; tell whether there is one."""
        self._current = await self._waiting.get()
        return self._current is not None

    async def answer(self, *, ends_by_error: bool) -> bytes:
        """Return the answer that is due.

        Raises:
            ServingError: with `ends_by_error`, what there is instead of one.
        """
        if self._current is None:
            raise ServingError("no request waits")
        question, answer = self._current
        try:
            said = b"".join(infer_messages.in_stream(await answer))
        except ServingError as error:
            if ends_by_error:
                raise
            said = infer_messages.error_in_stream(error, question)
        finally:  # an error has this frame, and its task the error
            self._current = None
            del answer
        self._count -= 1
        self._bytes -= question.size
        self._room.set()
        return said

    def finish(self) -> None:
        """Let `next` end after what is there."""
        self._waiting.put_nowait(None)

    def answers(self) -> list[asyncio.Task[list[Buffer]]]:
        """Return what may still run."""
        left = [] if self._current is None else [self._current]
        while not self._waiting.empty():
            one = self._waiting.get_nowait()
            left += [] if one is None else [one]
        return [answer for _, answer in left]


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _unary(name: str, method: _Method) -> Unary:
    request = protos.message(f"inference.{name}Request")
    response = protos.message(f"inference.{name}Response")

    async def answer(received: bytes, call: Call) -> bytes:
        said = await method(parse_short(request, received), call)
        return bytes(json_format.ParseDict(said, response()).SerializeToString())

    return answer


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _unsupported(what: str) -> _Method:
    async def refuse(_: Any, call: Call) -> Json:
        raise Unsupported(f"this server does not support {what}")

    return refuse


async def _region_status(asked: Any, call: Call) -> Json:
    if asked.name:
        raise ModelNotFound(f"Unable to find shared memory region: '{asked.name}'")
    return {"regions": {}}


async def _nothing(asked: Any, call: Call) -> Json:
    return {}


def _version(asked: Any) -> str | None:
    return None if asked.version in ("", "-1", "0") else str(asked.version)


def _check_repository(asked: Any) -> None:
    if asked.repository_name:
        raise Unsupported("'repository_name' specification is not supported")
