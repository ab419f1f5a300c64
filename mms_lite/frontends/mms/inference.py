"""MMS's inference API: ping and the four ways to spell a prediction (MMS reference, section 4)."""

from __future__ import annotations

from mms_lite.engine.engine import Engine
from mms_lite.errors import InvalidRequest, ServingError
from mms_lite.frontends.message import HttpRequest, HttpResponse, deadline
from mms_lite.frontends.mms.answers import json_response, model_response, spell
from mms_lite.frontends.mms.body import read_parts
from mms_lite.frontends.mms.description import model_description
from mms_lite.types import BYTES, InferRequest, Tensor


class Inference:
    """The routes of the inference port."""

    def __init__(self, engine: Engine, *, max_response_size: int) -> None:
        self._engine = engine
        self._max_response_size = max_response_size

    async def handle(self, request: HttpRequest, parts: list[str]) -> HttpResponse | None:
        """Answer a request whose path has these parts; None if no route here takes it."""
        match parts:
            case ["ping", *_]:
                return self._ping()
            case ["predictions", name, *rest]:
                loaded = bool(rest) and self._engine.has_version(name, rest[0])
                return await self._predict(request, name, version=rest[0] if loaded else None)
            case ["invocations"]:
                return await self._invoke(request, "")
            case ["models", name, "invoke"]:
                return await self._invoke(request, name)
            case [name, "predict"] if name != "models":
                return await self._predict(request, name, with_query=True)
        return None

    def _ping(self) -> HttpResponse:
        if self._engine.starting:  # MMS listens only when its start-up models are up
            return json_response({"status": "Unhealthy"}, status=503)
        wanted, ready = self._engine.health()
        status = "Healthy" if ready >= wanted else "Partial Healthy" if ready else "Unhealthy"
        return json_response({"status": status})

    async def _invoke(self, request: HttpRequest, name: str) -> HttpResponse:
        if not name:
            name = request.parameters.get("model_name", "") or self._only_startup_model()
        return await self._predict(request, name, with_query=True)

    def _only_startup_model(self) -> str:
        names = self._engine.startup_models()
        if len(names) != 1:
            raise InvalidRequest("Parameter model_name is required.")
        return names.pop()

    async def _predict(
        self, request: HttpRequest, name: str, *, version: str | None = None, with_query: bool = False
    ) -> HttpResponse:
        if request.method == "OPTIONS":
            spec = self._engine.describe(name, version).spec
            return json_response(model_description(spec, version))
        try:
            until = deadline(request)
            inputs = await read_parts(request, with_query=with_query)
            if not inputs and self._engine.interface(name, version)[1].takes_tensors:
                # No parts at all would be a request of tensors, whose answer this API cannot carry.
                inputs = [Tensor("body", BYTES, (), bytearray())]
            answer = await self._engine.infer(
                InferRequest(
                    request.id, name, version, inputs=inputs, headers=request.headers, deadline=until
                )
            )
        except ServingError as error:
            response = spell(error, name)
        else:
            version = answer.version
            response = model_response(answer, self._max_response_size)
        self._engine.count(name, version, "mms", response.status)
        return response
