"""The KServe v2 protocol over HTTP: which path is which verb, and how answers and errors are written.

Routes and statuses are Triton's (its HTTP server), also where it serves more than the protocol has.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

import orjson

from mms_lite.errors import InvalidRequest, RequestTooLarge, ServingError, Unsupported
from mms_lite.frontends import json_bodies
from mms_lite.frontends.kserve import codec, compression
from mms_lite.frontends.kserve.errors import http_status
from mms_lite.frontends.kserve.service import KServeService, asked_version
from mms_lite.frontends.message import HttpRequest, HttpResponse, Limits, deadline, retry_after_s, shown
from mms_lite.shared import SharedBytes
from mms_lite.types import InferRequest, InferResponse

PROTOCOL = "kserve-rest"  # in the metrics
_MOST_ASKED_BYTES = 128 << 10  # where an object has few keys, and no tensor
_OURS = ("content-", "inference-header-", "transfer-")  # headers of an answer that no handler sets
_JSON = ("Content-Type", "application/json")
_BINARY = ("Content-Type", "application/octet-stream")


@dataclass(frozen=True, slots=True)
class _Route:
    """What a path means: a verb, the methods that it takes, and the model that it names."""

    verb: str
    methods: tuple[str, ...] = ("GET",)
    model: str = ""
    version: str | None = None


_POST = ("POST",)
_MODEL_ROUTES: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    (): ("model_metadata", ("GET",)),
    ("infer",): ("infer", _POST),
    ("ready",): ("model_ready", ("GET",)),
    ("config",): ("model_config", ("GET",)),
    ("stats",): ("statistics", ("GET",)),
    ("trace", "setting"): ("trace", ("GET", "POST")),
    ("generate",): ("generate", _POST),
    ("generate_stream",): ("generate", _POST),
}


_FIXED_ROUTES: dict[tuple[str, ...], _Route] = {
    (): _Route("server_metadata"),
    ("health", "live"): _Route("server_live"),
    ("health", "ready"): _Route("server_ready"),
    ("models", "stats"): _Route("statistics"),
    ("repository", "index"): _Route("index", _POST),
    ("logging",): _Route("logging", ("GET", "POST")),
    ("trace", "setting"): _Route("trace", ("GET", "POST")),
}


@lru_cache(maxsize=1024)
def _find(target: str) -> _Route | None:
    """Return what a request's target, as it was sent, means; None if nothing."""
    path = target if target.startswith("/") else urlsplit(target).path
    parts = tuple(unquote(part) for part in path.partition("?")[0].rstrip("/").split("/")[2:])
    found = _FIXED_ROUTES.get(parts)
    if found is not None:
        return found
    match parts:
        case ["models", model, "versions", version, *rest] if model and version:
            found = _of_model(rest, model, version)
        case ["models", model, *rest] if model:
            found = _of_model(rest, model, None)
        case ["repository", "models", model, "load" | "unload" as what] if model:
            found = _Route(what, _POST, model)
        case ["repository", _, "index"] | ["repository", _, "models", _, "load" | "unload"]:
            found = _Route("named_repository", _POST)
        case ["systemsharedmemory" | "cudasharedmemory", *rest]:
            found = _of_shared_memory(rest)
    return found


def _of_model(rest: list[str], model: str, version: str | None) -> _Route | None:
    found = _MODEL_ROUTES.get(tuple(rest))
    return None if found is None else _Route(*found, model, asked_version(version))


def _of_shared_memory(rest: list[str]) -> _Route | None:
    found = None
    match rest:
        case ["status"]:
            found = _Route("shared_memory_status")
        case ["unregister"]:
            found = _Route("shared_memory_unregister", _POST)
        case ["region", _, "status"]:
            found = _Route("shared_memory")
        case ["region", _, "register" | "unregister"]:
            found = _Route("shared_memory", _POST)
    return found


class KServeRest:
    """The protocol on one HTTP address, below /v2."""

    def __init__(self, service: KServeService, limits: Limits, readers: json_bodies.Readers) -> None:
        self._service = service
        self._limits = limits
        self._unpacked = compression.Unpacked(limits.max_bytes_in_flight)
        self._readers = readers
        self._verbs: dict[str, Callable[[HttpRequest, _Route], Awaitable[HttpResponse]]] = {
            "server_metadata": self._server_metadata,
            "server_live": self._server_live,
            "server_ready": self._server_ready,
            "model_metadata": self._model_metadata,
            "model_ready": self._model_ready,
            "model_config": self._model_config,
            "statistics": self._statistics,
            "index": self._index,
            "load": self._load,
            "unload": self._unload,
            "logging": self._settings,
            "trace": self._settings,
            "shared_memory_status": self._shared_memory_status,
            "shared_memory_unregister": self._shared_memory_unregister,
        }

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer a request; errors come back as responses."""
        route = _find(request.raw_path or request.path)
        if route is None:
            return _error(404, "Not Found")
        method = "GET" if request.method == "HEAD" else request.method
        if method not in route.methods:
            response = _error(405, "Method Not Allowed")
            response.headers = [*response.headers, ("Allow", ", ".join(route.methods))]
            return response
        if route.verb == "infer":
            return await self._infer(request, route)
        verb = self._verbs.get(route.verb)
        try:
            if verb is None:
                raise Unsupported(_NOT_DONE[route.verb])
            return await verb(request, route)
        except ServingError as error:
            return spell(error)

    def spell(self, error: ServingError, path: str) -> HttpResponse:
        """Return an error that came up outside of `handle`."""
        return spell(error)

    def size_limit(self, path: str) -> str:
        """Return the name of the limit of requests with tensors, for all routes."""
        return "max_tensor_request_size"

    async def _infer(self, request: HttpRequest, route: _Route) -> HttpResponse:
        version = route.version
        try:
            with self._unpacked.share() as share:
                asked = await self._read(request, route, share)
                answer = await self._service.infer(
                    InferRequest(
                        asked.id,
                        route.model,
                        version,
                        asked.inputs,
                        None,
                        asked.parameters,
                        request.headers,
                        deadline(request),
                    ),
                    asked.outputs,
                    call_id=request.id,
                )
            version = answer.version
            response = await _write(answer, codec.Format(asked.outputs, binary=asked.binary), request)
        except ServingError as error:
            response = spell(error)
        self._service.engine.count(route.model, version, PROTOCOL, response.status)
        return response

    async def _read(self, request: HttpRequest, route: _Route, share: compression.Share) -> codec.Asked:
        """Return what a request for an inference asks.

        Raises:
            ServingError: there is no such model, or the body cannot be read.
        """
        expected = self._service.expected(route.model, route.version)
        body = await self._body(request, share, self._limits.max_tensor_request_size)
        header = request.header("inference-header-content-length")
        length = codec.read_header_length(header, len(body))
        if header is not None and not length:
            inputs = [self._service.raw_input(route.model, route.version, body)]
            return codec.Asked("", inputs, [], {}, binary=True)
        return await self._readers.read(length, codec.read, body, length, expected)

    async def _body(self, request: HttpRequest, share: compression.Share, most_bytes: int) -> codec.Body:
        encoding = request.header("content-encoding")
        if encoding is None or encoding in ("", "identity"):
            return request.body
        return await compression.unpack(request.body, encoding, most_bytes, share)

    async def _object(self, request: HttpRequest, most_bytes: int) -> dict[str, Any]:
        """Return a body that is a JSON object, or empty.

        Raises:
            InvalidRequest: it is something else.
            RequestTooLarge: it has more bytes than that.
        """
        with self._unpacked.share() as share:
            body = await self._body(request, share, most_bytes)
            if len(body) > most_bytes:
                raise RequestTooLarge(f"The request's body is larger than the limit of {most_bytes} bytes.")
            return await self._readers.read(len(body), _read_object, body)

    async def _server_metadata(self, request: HttpRequest, route: _Route) -> HttpResponse:
        return _json(self._service.server_metadata())

    async def _server_live(self, request: HttpRequest, route: _Route) -> HttpResponse:
        return _json({"live": self._service.live()})

    async def _server_ready(self, request: HttpRequest, route: _Route) -> HttpResponse:
        return _json({"ready": True}) if self._service.ready() else _error(400, "Server not ready")

    async def _model_ready(self, request: HttpRequest, route: _Route) -> HttpResponse:
        try:
            ready = self._service.model_ready(route.model, route.version)
        except ServingError as error:  # Triton has one status for what is not ready and what is not there
            return _error(400, error.message)
        return (
            _json({"name": route.model, "ready": True}) if ready else _error(400, "Model version not ready")
        )

    async def _model_metadata(self, request: HttpRequest, route: _Route) -> HttpResponse:
        return _json(self._service.model_metadata(route.model, route.version))

    async def _model_config(self, request: HttpRequest, route: _Route) -> HttpResponse:
        return _json(self._service.model_config(route.model, route.version))

    async def _statistics(self, request: HttpRequest, route: _Route) -> HttpResponse:
        return _json(self._service.statistics(route.model, route.version))

    async def _index(self, request: HttpRequest, route: _Route) -> HttpResponse:
        only_ready = (await self._object(request, _MOST_ASKED_BYTES)).get("ready", False)
        if type(only_ready) is not bool:
            raise InvalidRequest("Invalid value for 'ready': expected a boolean")
        return _json(await self._service.repository_index(only_ready=only_ready))

    async def _load(self, request: HttpRequest, route: _Route) -> HttpResponse:
        self._service.authorise(request)  # nothing of others is read
        given = codec.parameters(await self._object(request, self._limits.max_tensor_request_size))
        await self._service.load(route.model, await asyncio.to_thread(_with_files, given), request)
        return HttpResponse(200, [_JSON])

    async def _unload(self, request: HttpRequest, route: _Route) -> HttpResponse:
        self._service.authorise(request)
        given = codec.parameters(await self._object(request, _MOST_ASKED_BYTES))
        await self._service.unload(route.model, given, request)
        return HttpResponse(200, [_JSON])

    async def _settings(self, request: HttpRequest, route: _Route) -> HttpResponse:
        """Tell how logs or traces are made; nobody changes it here."""
        if request.method == "POST":
            raise Unsupported(f"the settings of {route.verb} cannot be changed while the server runs")
        if route.model:
            self._service.model_ready(route.model, route.version)
        logging = route.verb == "logging"
        return _json(self._service.log_settings() if logging else self._service.trace_settings())

    async def _shared_memory_status(self, request: HttpRequest, route: _Route) -> HttpResponse:
        return _json([])

    async def _shared_memory_unregister(self, request: HttpRequest, route: _Route) -> HttpResponse:
        """Forget all regions: there are none, and clients begin with it."""
        return HttpResponse(200, [_JSON])


_NOT_DONE = {
    "generate": "generate is not supported: ask the model with infer",
    "named_repository": "'repository_name' specification is not supported",
    "shared_memory": "shared memory of clients is not supported: send tensors in the body",
}


def protocol(service: KServeService, limits: Limits, readers: json_bodies.Readers) -> KServeRest:
    """Return the protocol of an HTTP address, for paths that begin with /v2."""
    return KServeRest(service, limits, readers)


def spell(error: ServingError) -> HttpResponse:
    """Return an error as the protocol writes it."""
    response = _error(http_status(error), error.message)
    if error.retryable and response.status in (429, 503):
        response.headers = [*response.headers, ("Retry-After", str(retry_after_s(error)))]
    if response.status == 401:
        response.headers = [*response.headers, ("WWW-Authenticate", "Bearer")]
    return response


def _json(value: Any, *, status: int = 200) -> HttpResponse:
    return HttpResponse(status, [_JSON], [orjson.dumps(value)])


def _error(status: int, text: str) -> HttpResponse:
    # A text may hold what no Unicode is, such as half of a pair in a name.
    return _json({"error": text.encode("utf-8", "replace").decode()}, status=status)


async def _write(answer: InferResponse, how: codec.Format, request: HttpRequest) -> HttpResponse:
    """Return a model's answer, packed if the client asks for it.

    Raises:
        ServingError: it cannot be written.
    """
    if json_bodies.is_long([each for each in answer.outputs if not how.is_binary(each.name)]):
        pieces, header_length = await asyncio.to_thread(codec.write, answer, how)
    else:
        pieces, header_length = codec.write(answer, how)
    theirs = [each for each in answer.headers if not each[0].lower().startswith(_OURS)]
    response = HttpResponse(200, [*_answer_headers(header_length), *theirs], pieces)
    encoding = compression.wanted(request.header("accept-encoding"))
    if encoding is not None:
        response.body = [await compression.packed(pieces, encoding)]
        response.headers = [*response.headers, ("Content-Encoding", encoding)]
    return response


def _read_object(body: codec.Body) -> dict[str, Any]:
    """Return a body that is a JSON object, or empty.

    Raises:
        InvalidRequest: it is something else.
    """
    if not len(body):
        return {}
    text = body.view if isinstance(body, SharedBytes) else memoryview(body)
    try:  # files are long texts, of which nothing is made but bytes
        found = json_bodies.loads(text, most_cost=json_bodies.MOST_COST + len(text))
    except ValueError as error:
        raise InvalidRequest(f"failed to parse the request JSON buffer: {error}") from error
    if type(found) is not dict:
        raise InvalidRequest("failed to parse the request JSON buffer: it is not an object")
    return found


def _answer_headers(header_length: int | None) -> list[tuple[str, str]]:
    if header_length is None:
        return [_JSON]
    return [_BINARY, ("Inference-Header-Content-Length", str(header_length))]


def _with_files(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a load, files as bytes.

    Raises:
        InvalidRequest: a file is not base64.
    """
    read: dict[str, Any] = {}
    for name, value in given.items():
        try:
            read[name] = base64.b64decode(value, validate=True) if name.startswith("file:") else value
        except (binascii.Error, TypeError, ValueError) as error:
            raise InvalidRequest(f"parameter '{shown(name)}' is not base64: {error}") from error
    return read
