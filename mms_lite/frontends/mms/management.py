"""MMS's management API: register, scale, describe, list, unregister (MMS reference, section 5).

Beyond MMS, which knew no versions: `/models/NAME/VERSION` for one of them, and `set-default` below it.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from mms_lite.engine.engine import Engine
from mms_lite.errors import InvalidRequest
from mms_lite.frontends.message import HttpRequest, HttpResponse
from mms_lite.frontends.mms.answers import json_response, method_not_allowed
from mms_lite.frontends.mms.body import content_type, read_json
from mms_lite.frontends.mms.description import REGISTER, SCALE
from mms_lite.types import LoadOptions, ModelStatus, TensorSpec, WorkerState, WorkerStatus

_MAX_PAGE = 100
_RUNNING = (WorkerState.READY, WorkerState.BUSY)
# What is documented, and what MMS takes too, but has no effect.
_REGISTER = (*(each.name for each in REGISTER), "preload_model")
_SCALE = (*(each.name for each in SCALE), "number_gpu", "timeout")
_WORKER_STATUS = {
    WorkerState.STARTING: "LOADING",
    WorkerState.BACKOFF: "LOADING",
    WorkerState.READY: "READY",
    WorkerState.BUSY: "READY",
    WorkerState.STOPPING: "UNLOADING",
    WorkerState.STOPPED: "UNLOADING",
    WorkerState.FAILED: "FAILED",
}

_T = TypeVar("_T")

_MAX_INTEGER = 2**31 - 1  # as in MMS


class Management:
    """The routes of the management port. `default_workers` is what a registration gets that names none.

    With None that is what the model's files say, as for those of a Triton repository.
    `authorise` is asked before anything else is done for a route of ours, and raises for who may not.
    """

    def __init__(
        self, engine: Engine, *, default_workers: int | None, authorise: Callable[[HttpRequest], None]
    ) -> None:
        self._engine = engine
        self._default_workers = default_workers
        self._authorise = authorise

    async def handle(self, request: HttpRequest, parts: list[str]) -> HttpResponse | None:
        """Answer a request whose path has these parts; None if no route here takes it.

        Raises:
            ServingError: what the engine says.
        """
        if parts[0] != "models" or parts[2:] == ["invoke"]:
            return None
        self._authorise(request)
        match parts:
            case ["models"]:
                return await self._models(request)
            case ["models", name] if name:
                return await self._model(request, name, None)
            case ["models", name, version] if name and version:
                return await self._model(request, name, version)
            case ["models", name, version, "set-default"] if name and version:
                return self._set_default(request, name, version)
        return None

    async def _models(self, request: HttpRequest) -> HttpResponse:
        if request.method == "GET":
            return self._list(_Parameters(request.parameters))
        if request.method == "POST":
            return await self._register(request)
        return method_not_allowed()

    async def _model(self, request: HttpRequest, name: str, version: str | None) -> HttpResponse:
        if request.method == "GET":
            return self._describe(request, name, version)
        if request.method == "PUT":
            return await self._scale(_Parameters(request.parameters), name, version)
        if request.method == "DELETE":
            await self._engine.unload(name, version)
            which = "" if version is None else f" version {version}"
            return json_response({"status": f'Model "{name}"{which} unregistered'})
        return method_not_allowed()

    def _describe(self, request: HttpRequest, name: str, version: str | None) -> HttpResponse:
        wanted = request.parameters.get("version")
        if wanted is None or version is not None:
            return json_response(_description(self._engine.describe(name, version)))
        if wanted != "all":
            raise InvalidRequest(f"Parameter version can only be all here; one is at /models/{name}/{wanted}")
        return json_response([_description(status) for status in self._engine.versions(name)])

    def _set_default(self, request: HttpRequest, name: str, version: str) -> HttpResponse:
        if request.method != "PUT":
            return method_not_allowed()
        self._engine.set_default(name, version)
        return json_response({"status": f'Model "{name}": version {version} is the default'})

    async def _register(self, request: HttpRequest) -> HttpResponse:
        in_json = content_type(request)[0].lower() == "application/json"
        given = _Parameters(await read_json(request.own_body) if in_json else request.parameters)
        given.check(_REGISTER)
        if given.text("url") is None and request.body and not in_json:
            raise InvalidRequest(
                "Parameter url is required. (The body is not application/json, so not read.)"
            )
        timeout = given.integer("response_timeout", -1)
        wait = given.boolean("synchronous", True)
        replaces = given.boolean("replace", False)
        workers: int | None = max(0, given.integer("initial_workers", self._default_workers or 0))
        if given.text("initial_workers") is None and (replaces or self._default_workers is None):
            workers = None  # as many as before, or as the files say
        options = LoadOptions(
            url=given.text("url") or "",
            sha256=given.text("sha256"),
            name=given.text("model_name"),
            version=given.text("version"),
            handler=given.text("handler"),
            runtime=given.text("runtime"),
            batch_size=given.integer("batch_size", 1),
            max_batch_delay_ms=given.integer("max_batch_delay", 0),
            workers=workers,
            # MMS reads minutes in the query and seconds in JSON.
            response_timeout_s=(timeout if in_json else timeout * 60) if timeout > 0 else None,
            replace=replaces,
            set_default=given.boolean("set_default", False),
            wait=wait,
        )
        status = await self._engine.load(options)
        if not status.spec.min_workers:
            return json_response({"status": f'Model "{status.spec.name}" registered'})
        return _scaled(status) if wait else _scaling()

    async def _scale(self, given: _Parameters, name: str, version: str | None) -> HttpResponse:
        given.check(_SCALE)
        least = given.integer("min_worker", 1)
        most = given.integer("max_worker", least)
        wait = given.boolean("synchronous", False)
        status = await self._engine.scale(name, least, most, version=version, wait=wait)
        return _scaled(status) if wait else _scaling()

    def _list(self, given: _Parameters) -> HttpResponse:
        limit = given.integer("limit", _MAX_PAGE)
        if not 0 < limit <= _MAX_PAGE:
            limit = _MAX_PAGE
        start = max(0, given.integer("next_page_token", 0))
        models = [status.spec for status in self._engine.models() if status.is_default]
        page = [{"modelName": m.name, "modelUrl": m.url} for m in models[start : start + limit]]
        token = {"nextPageToken": str(start + limit)} if start + limit < len(models) else {}
        return json_response({**token, "models": page})


class _Parameters:
    """Parameters of the query or of a JSON object; numbers and booleans may be strings, as for Gson."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def check(self, known: Sequence[str]) -> None:
        """Refuse what looks like a typing error; else unknown parameters are ignored, as in MMS.

        Raises:
            InvalidRequest: a parameter is nearly one of those.
        """
        for name in self._given:
            if name not in known and (near := difflib.get_close_matches(name, known, 1, 0.8)):
                raise InvalidRequest(f"Unknown parameter {name[:100]}; did you mean {near[0]}?")

    def text(self, name: str) -> str | None:
        """Return a parameter; an empty one counts as absent.

        Raises:
            InvalidRequest: it is neither text nor a number.
        """
        value = self._given.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, (str, int, float)):
            raise InvalidRequest(f"Parameter {name} is neither text nor a number.")
        return str(value)

    def integer(self, name: str, default: int) -> int:
        """Return a whole number.

        Raises:
            InvalidRequest: it is not one.
        """
        text = self.text(name)
        if text is None:
            return default
        try:
            number = int(text)
        except ValueError as error:
            raise InvalidRequest(f"Parameter {name} is not a whole number: {text}") from error
        if abs(number) > _MAX_INTEGER:
            raise InvalidRequest(f"Parameter {name} is too large: {text}")
        return number

    def boolean(self, name: str, default: bool) -> bool:
        """Return a boolean; as in Java only "true" is true."""
        text = self.text(name)
        return default if text is None else text.lower() == "true"


def _scaled(status: ModelStatus) -> HttpResponse:
    running = sum(worker.state in _RUNNING for worker in status.workers)
    if running < status.spec.min_workers:
        message = {"status": "Workers scaling in progress..."}
        return json_response(message, status=210, reason="Partial Success")
    return json_response({"status": "Workers scaled"})


def _scaling() -> HttpResponse:
    return json_response({"status": "Processing worker updates..."}, status=202)


def _description(status: ModelStatus) -> dict[str, Any]:
    spec = status.spec
    engine = (spec.manifest or {}).get("engine") or {}
    described = {
        "modelName": spec.name,
        "modelVersion": spec.version,
        "modelUrl": spec.url,
        "engine": engine.get("engineName") if isinstance(engine, dict) else None,
        "runtime": spec.runtime,
        "minWorkers": spec.min_workers,
        "maxWorkers": spec.max_workers,
        "batchSize": spec.batch_size,
        "maxBatchDelay": spec.max_batch_delay_ms,
        "status": status.state.value,
        "detail": status.detail,
        "defaultVersion": status.is_default,
        "loadedAtStartup": spec.at_startup,
        "inputs": _tensors(status.signature.inputs),
        "outputs": _tensors(status.signature.outputs),
        "metrics": {
            "rejectedRequests": status.refused,
            "waitingQueueSize": status.queue_depth,
            "requests": status.answered,
            "requestsInFlight": status.in_flight,
        },
        "workers": [_worker(worker) for worker in status.workers],
    }
    return {key: value for key, value in described.items() if value is not None}


def _tensors(specs: Sequence[TensorSpec]) -> list[dict[str, Any]] | None:
    """Describe a model's tensors; None for a handler of raw bodies, which says nothing of them."""
    return [asdict(spec) for spec in specs] or None


def _worker(worker: WorkerStatus) -> dict[str, Any]:
    started = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(worker.started_at))
    described = {
        "id": worker.id,
        "startTime": f"{started}.{int(worker.started_at * 1000) % 1000:03d}Z",
        "status": _WORKER_STATUS[worker.state],
        "gpu": worker.device is not None,
        "memoryUsage": worker.memory_bytes,
        "pid": worker.pid,
        "restarts": worker.restarts,
        "lastExit": worker.last_exit,
    }
    return {key: value for key, value in described.items() if value is not None}
