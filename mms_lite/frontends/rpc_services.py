"""Services that every gRPC server has: health checking, and reflection, by which tools find the others.

Apart from the server because they are services like any other, and need no gRPC library.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool

from mms_lite.errors import ModelNotFound, ServingError
from mms_lite.frontends.call import Call, RpcService, Stream, Unary, parse_short
from mms_lite.protos import files, message, with_imports

_WATCH_S = 1.0
_NOT_FOUND = 5  # gRPC's status code


def about_the_server(services: Sequence[RpcService], ready: Callable[[], bool]) -> list[RpcService]:
    """Return the services that tell of a server with these services, which are `ready` or not."""
    health = Health([service.name for service in services], ready)
    reflections = [Reflection("grpc.reflection.v1"), Reflection("grpc.reflection.v1alpha")]
    for reflection in reflections:
        reflection.services = [*services, health, *reflections]
    return [health, *reflections]


class Health:
    """grpc.health.v1.Health for the server, whose name is empty, and for each of its services."""

    name = "grpc.health.v1.Health"

    def __init__(self, services: Sequence[str], ready: Callable[[], bool]) -> None:
        self.files: Sequence[bytes] = files(self.name)
        self.unary: dict[str, Unary] = {"Check": self._check, "List": self._list}
        self.streams: dict[str, Stream] = {"Watch": self._watch}
        self._known = ["", *services]
        self._ready = ready

    def spell(self, error: ServingError, method: str) -> tuple[str, str]:
        """Return the error's own code and words."""
        return error.grpc, error.message

    def _status(self, service: str) -> Any:
        known = "SERVING" if self._ready() else "NOT_SERVING"
        status = known if service in self._known else "SERVICE_UNKNOWN"
        return message("grpc.health.v1.HealthCheckResponse")(status=status)

    async def _check(self, body: bytes, call: Call) -> bytes:
        service = parse_short(message("grpc.health.v1.HealthCheckRequest"), body).service
        if service not in self._known:
            raise ModelNotFound("unknown service")
        return bytes(self._status(service).SerializeToString())

    async def _list(self, body: bytes, call: Call) -> bytes:
        response = message("grpc.health.v1.HealthListResponse")()
        for service in self._known:
            response.statuses[service].CopyFrom(self._status(service))
        return bytes(response.SerializeToString())

    async def _watch(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
        """Yield the status now and whenever it has changed. It is looked at: nothing tells of a change."""
        async for body in messages:
            service = parse_short(message("grpc.health.v1.HealthCheckRequest"), body).service
            last = None
            while True:
                status = self._status(service)
                if status != last:
                    last = status
                    yield status.SerializeToString()
                await asyncio.sleep(_WATCH_S)


class Reflection:
    """grpc.reflection.v1 or v1alpha: which services there are, and the files that describe them."""

    def __init__(self, package: str) -> None:
        self.name = f"{package}.ServerReflection"
        self.files: Sequence[bytes] = files(self.name)
        self.unary: dict[str, Unary] = {}
        self.streams: dict[str, Stream] = {"ServerReflectionInfo": self._answers}
        self.services: Sequence[RpcService] = ()
        self._package = package

    def spell(self, error: ServingError, method: str) -> tuple[str, str]:
        """Return the error's own code and words."""
        return error.grpc, error.message

    async def _answers(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
        pool = DescriptorPool()
        for file in (file for service in self.services for file in service.files):
            pool.AddSerializedFile(file)  # the same file once more changes nothing
        async for body in messages:
            request = parse_short(message(f"{self._package}.ServerReflectionRequest"), body)
            response = message(f"{self._package}.ServerReflectionResponse")(
                valid_host=request.host, original_request=request
            )
            try:
                self._fill(response, request, pool)
            except KeyError:
                response.error_response.error_code = _NOT_FOUND
                response.error_response.error_message = "not found"
            yield response.SerializeToString()

    def _fill(self, response: Any, request: Any, pool: Any) -> None:
        """Answer one question; a KeyError says that there is no answer. proto3 has no extensions."""
        asked = request.WhichOneof("message_request")
        if asked == "list_services":
            for service in self.services:
                response.list_services_response.service.add(name=service.name)
            return
        if asked == "file_by_filename":
            file = pool.FindFileByName(request.file_by_filename)
        elif asked == "file_containing_symbol":
            file = pool.FindFileContainingSymbol(request.file_containing_symbol)
        else:
            raise KeyError(asked)
        response.file_descriptor_response.file_descriptor_proto.extend(with_imports(file))
