"""The TensorFlow Serving API over HTTP, as OpenVINO Model Server serves it: which routes there are."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from mms_lite.engine.engine import Engine
from mms_lite.errors import (
    ConfigError,
    InvalidRequest,
    LoadError,
    ServingError,
    Unauthorized,
    UnsupportedMedia,
)
from mms_lite.frontends import json_bodies, tensor_calls
from mms_lite.frontends.message import Buffer, HttpRequest, HttpResponse, deadline, retry_after_s
from mms_lite.frontends.tfserving import bodies
from mms_lite.frontends.tfserving.service import (
    DATATYPES,
    SIGNATURE_NAME,
    VersionStatus,
    all_statuses,
    message_of,
    number_of,
    status_of,
    statuses,
    version_of,
)
from mms_lite.types import InferRequest, InferResponse, Signature, TensorSpec

_VERSION = r"(?:/versions/([0-9]+)|/labels/\w+)?"  # labels are taken and ignored
_PREDICT = re.compile(rf"/v1/models/([^/:]+){_VERSION}:(predict|classify|regress)")
_MODEL = re.compile(rf"/v1/models(?:/([^/:]+))?{_VERSION}(/metadata)?")
_MOST_DIGITS = 19  # of an int64
_HEADERS = [("Content-Type", "application/json")]
_SIGNATURES = "type.googleapis.com/tensorflow.serving.SignatureDefMap"

_log = logging.getLogger("mms_lite.tfserving")


class RestProtocol:
    """Version 1 of the API: predictions, statuses, metadata, and the configuration."""

    def __init__(
        self, engine: Engine, authorise: Callable[[HttpRequest], None], readers: json_bodies.Readers
    ) -> None:
        self._engine = engine
        self._authorise = authorise
        self._readers = readers

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer a request; errors come back as responses."""
        try:
            return await self._route(request)
        except ServingError as error:
            return spell(error)

    def spell(self, error: ServingError, path: str) -> HttpResponse:
        """Return an error that came up outside of `handle`."""
        return spell(error)

    def size_limit(self, path: str) -> str:
        """Return the name of the limit of the protocols of tensors, for all routes."""
        return "max_tensor_request_size"

    async def _route(self, request: HttpRequest) -> HttpResponse:
        path, get, post = request.path, request.method == "GET", request.method == "POST"
        predict, model = _PREDICT.fullmatch(path), _MODEL.fullmatch(path)
        if post and predict:
            return await self._predict(request, predict)
        if get and model:
            return self._describe(model)
        if get and path == "/v1/config":
            return json_response(self._config())
        if post and path == "/v1/config/reload":
            return await self._reload(request)
        if predict or model or not (get or post):
            return error_response(406, "Unsupported method")
        return error_response(400, "Invalid request URL")

    async def _predict(self, request: HttpRequest, match: re.Match[str]) -> HttpResponse:
        name, number, verb = match[1], match[2], match[3]
        if verb != "predict":
            return error_response(404, "Requested REST resource not found")
        version = None
        try:
            version = version_of(self._engine, name, _number(number))
            answer, by_row = await self._infer(request, name, version)
            response = HttpResponse(200, _HEADERS, await _written(answer, by_row=by_row))
            version = answer.version
        except ServingError as error:
            response = spell(error)
        self._engine.count(name, version, "tfserving-rest", response.status)
        return response

    async def _infer(
        self, request: HttpRequest, name: str, version: str | None
    ) -> tuple[InferResponse, bool]:
        spec, signature = tensor_calls.interface(self._engine, name, version, asking=True)
        encoding = request.header("content-encoding")
        if encoding not in (None, "", "identity"):
            raise UnsupportedMedia(f"Unsupported content encoding - {encoding}")
        body = request.body
        inputs, by_row = await self._readers.read(len(body), bodies.read, body, spec, signature)
        asked = InferRequest(
            request.id, name, version, inputs, headers=request.headers, deadline=deadline(request)
        )
        return await tensor_calls.infer(self._engine, asked), by_row

    def _describe(self, match: re.Match[str]) -> HttpResponse:
        name, number = match[1] or "", _number(match[2])
        if not match[3]:
            return json_response(_status_list(statuses(self._engine, name, number)))
        version = version_of(self._engine, name, number)
        spec, signature = tensor_calls.interface(self._engine, name, version)
        return json_response(_metadata(name, number_of(self._engine, name, spec.version), signature))

    async def _reload(self, request: HttpRequest) -> HttpResponse:
        """Look for changes of the configuration and of models; 201 says that there were some."""
        self._authorise(request)
        try:
            changed = await self._engine.rescan()
        except ConfigError as error:
            _log.warning("request %s: the configuration cannot be used: %s", request.id, error.message)
            return error_response(412, "Reloading config file failed. Check server logs for more info.")
        except LoadError as error:
            _log.warning("request %s: a model cannot be loaded: %s", request.id, error.message)
            return error_response(500, "Reloading models versions failed. Check server logs for more info.")
        return json_response(self._config(), status=201 if changed else 200)

    def _config(self) -> dict[str, Any]:
        return {name: _status_list(found) for name, found in all_statuses(self._engine).items()}


def json_response(value: Any, *, status: int = 200) -> HttpResponse:
    """Return a value as indented JSON: these answers are read by people, too."""
    return HttpResponse(status, _HEADERS, [orjson.dumps(value, option=orjson.OPT_INDENT_2)])


def error_response(status: int, message: str) -> HttpResponse:
    """Return an error in the shape of this API."""
    text = message.encode("utf-8", "replace").decode()  # it may hold what no Unicode is: half of a pair
    return HttpResponse(status, _HEADERS, [orjson.dumps({"error": text})])


def spell(error: ServingError) -> HttpResponse:
    """Return an error as this API spells it."""
    response = error_response(status_of(error), message_of(error))
    if isinstance(error, Unauthorized):
        response.headers = [*_HEADERS, ("WWW-Authenticate", "Bearer")]
    elif error.retryable and response.status in (429, 503):
        response.headers = [*_HEADERS, ("Retry-After", str(retry_after_s(error)))]
    return response


def _number(text: str | None) -> int | None:
    """Return the version that a path names.

    Raises:
        InvalidRequest: it is no int64.
    """
    if text is None:
        return None
    digits = text.lstrip("0") or "0"  # int() takes its time for thousands of them
    if len(digits) > _MOST_DIGITS or int(digits) >= 1 << 63:
        raise InvalidRequest("Could not parse model version in request")
    return int(digits)


async def _written(answer: InferResponse, *, by_row: bool) -> Sequence[Buffer]:
    several = by_row and len(answer.outputs) > 1
    pieces = sum(each.shape[0] for each in answer.outputs if each.shape) if several else 0
    if json_bodies.is_long(answer.outputs, pieces=pieces):
        return await asyncio.to_thread(bodies.write, answer.outputs, by_row=by_row)
    return bodies.write(answer.outputs, by_row=by_row)


def _status_list(found: Sequence[VersionStatus]) -> dict[str, Any]:
    return {
        "model_version_status": [
            {
                "version": str(each.version),  # an int64, which protobuf's JSON writes as text
                "state": each.state,
                "status": {"error_code": each.error_code, "error_message": each.error_code},
            }
            for each in found
        ]
    }


def _metadata(name: str, number: int, signature: Signature) -> dict[str, Any]:
    """Return a GetModelMetadataResponse as protobuf's JSON has it, with all default values."""
    tensors = {
        "inputs": {spec.name: _tensor_info(spec) for spec in signature.inputs},
        "outputs": {spec.name: _tensor_info(spec) for spec in signature.outputs},
        "methodName": "",
    }
    return {
        "modelSpec": {"name": name, "signatureName": "", "version": str(number)},
        "metadata": {"signature_def": {"@type": _SIGNATURES, "signatureDef": {SIGNATURE_NAME: tensors}}},
    }


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    shape = {
        "dim": [{"size": str(length), "name": ""} for length in spec.shape or ()],
        "unknownRank": spec.shape is None,
    }
    return {"dtype": DATATYPES[spec.datatype][0], "tensorShape": shape, "name": spec.name}
