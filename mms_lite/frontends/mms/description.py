"""What an address serves, and what one model takes, as OpenAPI documents (MMS reference, section 3.1).

Routes, parameters and answers are tables here; the tests hold them to what the routes really do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from mms_lite.types import ModelSpec

_Json = dict[str, Any]

_REFERENCE = re.compile(r'"#/components/(\w+)/([\w-]+)"')
_BINARY = {"type": "string", "format": "binary"}


class _Field(NamedTuple):
    """A parameter: of the query, of a path, a header, or a property of a JSON body."""

    name: str
    type: str
    meaning: str
    default: Any = None
    choices: tuple[str, ...] = ()


_ERRORS = {
    400: "The request, its body or a parameter cannot be read or used.",
    401: "To manage from another machine, the management token must be sent.",
    403: "The server may not do this, such as fetch a model from a host that is not allowed.",
    404: "There is no such model or version.",
    408: "The request's body did not arrive in time.",
    409: "This version of this model is registered already.",
    413: "The request's body is larger than max_request_size.",
    500: "The server, a worker or the loading of a model failed, or the model gave no answer in time.",
    503: "The model failed, is not ready, or has a full queue; or the server has no room for the request.",
    504: "X-Request-Timeout-Ms passed, in the queue or in the model.",
    507: "The model ran out of memory.",
}
_ERROR_HEADERS = {401: ["WWW-Authenticate"], 503: ["Retry-After"]}
_ALWAYS = (400, 408, 413, 500, 503)  # whatever is asked: it is not HTTP, comes too slowly, is too large, ...
_PREDICTION = (404, 504, 507)
_MANAGEMENT = (401, 403)

REGISTER = (
    _Field("url", "string", "Required. Archive or folder in the model store, or an allowed http(s) address."),
    _Field("model_name", "string", "Name of the model; else the archive's."),
    _Field("version", "string", 'Version of the model; else the archive\'s, else "1".'),
    _Field("handler", "string", "Entry point, module:function; else the archive's, else the server's."),
    _Field("runtime", "string", "Else the archive's.", choices=("python", "python2", "python3")),
    _Field("batch_size", "integer", "Requests that the handler gets at once, at most.", 1),
    _Field("max_batch_delay", "integer", "Milliseconds for which a batch waits to be full.", 0),
    _Field(
        "initial_workers",
        "integer",
        "Workers to start, 0 for none; else default_workers_per_model, in a Triton repository what it says.",
    ),
    _Field("synchronous", "boolean", "Answer when the workers have loaded the model, not before.", True),
    _Field(
        "response_timeout", "integer", "Limit of one batch: minutes in the query, seconds in a JSON body."
    ),
    _Field("replace", "boolean", "Take the place of this version, once the new one is ready.", False),
    _Field("set_default", "boolean", "Let this version answer requests that name none.", False),
    _Field("sha256", "string", "SHA-256 that the archive must have, in hexadecimal."),
)
SCALE = (
    _Field("min_worker", "integer", "Workers to have at least.", 1),
    _Field("max_worker", "integer", "Workers to have at most; else as min_worker."),
    _Field("synchronous", "boolean", "Answer when the workers are there, not before.", False),
)
_LIST = (
    _Field("limit", "integer", "Models per page, at most 100.", 100),
    _Field("next_page_token", "integer", "nextPageToken of the page before.", 0),
)
_DESCRIBE = (_Field("version", "string", "A list of every version.", choices=("all",)),)

_NAME = _Field("model_name", "string", "Name of a model.")
_ANY_NAME = _Field("model_name", "string", "Name of a model; else the only one that was loaded at start.")
_VERSION = _Field("version", "string", "A loaded version of it.")
_ANY_VERSION = _Field(
    "version", "string", "A version of it; where none is called so, the default one answers."
)
_TIME_LIMIT = _Field("X-Request-Timeout-Ms", "number", "Milliseconds that the client waits; more than 0.")

_REST = (
    "Parameters of the query reach the handler as entries of its data. Any method but OPTIONS does the same."
)


def _record(required: Sequence[str] = (), **types: Any) -> _Json:
    """Return the schema of an object, its properties given as types or as schemas."""
    properties = {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in types.items()}
    return {"type": "object", "required": list(required or types), "properties": properties}


def _list_of(schema: _Json) -> _Json:
    return {"type": "array", "items": schema}


def _reference(section: str, name: str | int) -> _Json:
    return {"$ref": f"#/components/{section}/{name}"}


def _headers(*names: str) -> _Json:
    return {name: _reference("headers", name) for name in ("X-Request-Id", *names)}


def _answer(description: str, schema: _Json) -> _Json:
    content = {"application/json": {"schema": schema}}
    return {"description": description, "headers": _headers(), "content": content}


def _error(status: int, description: str) -> _Json:
    answer = _answer(description, _reference("schemas", "Error"))
    return {**answer, "headers": _headers(*_ERROR_HEADERS.get(status, ()))}


_STATUS = _reference("schemas", "Status")
_ANY_DOCUMENT = {"200": _answer("An OpenAPI 3.0.1 document.", {"type": "object"})}
SCALED = {
    "200": _answer("The workers are ready.", _STATUS),
    "202": _answer("The workers are on their way.", _STATUS),
    "210": _answer("Fewer workers than asked for are ready.", _STATUS),
}
_COMPONENTS: dict[str, _Json] = {
    "headers": {
        "X-Request-Id": {
            "description": "What handlers and logs call the request.",
            "schema": {"type": "string"},
        },
        "Retry-After": {
            "description": "Seconds after which to ask again, where that may help.",
            "schema": {"type": "integer"},
        },
        "WWW-Authenticate": {"description": "Bearer.", "schema": {"type": "string"}},
    },
    "responses": {str(status): _error(status, text) for status, text in _ERRORS.items()},
    "schemas": {
        "Error": _record(code="integer", type="string", message="string"),
        "Status": _record(status="string"),
        "Health": _record(status={"type": "string", "enum": ["Healthy", "Partial Healthy", "Unhealthy"]}),
        "ModelList": _record(
            ["models"],
            nextPageToken="string",
            models=_list_of(_record(modelName="string", modelUrl="string")),
        ),
        "Model": _record(
            ["modelName", "modelVersion", "modelUrl", "status", "workers"],
            modelName="string",
            modelVersion="string",
            modelUrl="string",
            engine="string",
            runtime="string",
            minWorkers="integer",
            maxWorkers="integer",
            batchSize="integer",
            maxBatchDelay="number",
            status={"type": "string", "enum": ["LOADING", "READY", "UNLOADING", "FAILED"]},
            detail="string",
            defaultVersion="boolean",
            loadedAtStartup="boolean",
            inputs=_list_of(_reference("schemas", "Tensor")),
            outputs=_list_of(_reference("schemas", "Tensor")),
            metrics=_record(
                rejectedRequests="integer",
                waitingQueueSize="integer",
                requests="integer",
                requestsInFlight="integer",
            ),
            workers=_list_of(_reference("schemas", "Worker")),
        ),
        "Tensor": _record(
            ["name", "datatype"],
            name="string",
            datatype="string",
            shape={"type": "array", "items": {"type": "integer"}, "nullable": True},
        ),
        "Worker": _record(
            ["id", "status"],
            id="string",
            startTime={"type": "string", "format": "date-time"},
            status={"type": "string", "enum": ["LOADING", "READY", "UNLOADING", "FAILED"]},
            gpu="boolean",
            memoryUsage="integer",
            pid="integer",
            restarts="integer",
            lastExit="string",
        ),
    },
    "securitySchemes": {
        "bearerAuth": {
            "type": "http",
            "scheme": "bearer",
            "description": "The management token; this machine itself may not need it.",
        }
    },
}


class Described(NamedTuple):
    """What another protocol says of its routes: path items, and components by section."""

    paths: _Json
    components: Mapping[str, _Json]


def api_description(*, inference: bool, management: bool, others: Sequence[Described] = ()) -> _Json:
    """Return the document of an address that serves these APIs, and those of others."""
    summary = "Describe the APIs of this address."
    paths = {
        "/": {"options": _operation("apiDescription", summary, _ANY_DOCUMENT)},
        "/api-description": {"get": _operation("describeApi", summary, _ANY_DOCUMENT, deprecated=True)},
    }
    info = {
        "title": "Model Server APIs",
        "description": "Predict with the models that are loaded, and manage which are.",
        "version": "1.0.0",
    }
    paths |= _inference_paths() if inference else {}
    paths |= _management_paths() if management else {}
    components = {section: dict(known) for section, known in _COMPONENTS.items()}
    for other in others:
        paths |= other.paths
        for section, more in other.components.items():
            components.setdefault(section, {}).update(more)
    schemes = ["bearerAuth"] if management or others else []
    return _document(info, paths, schemes, components)


def model_description(spec: ModelSpec, version: str | None) -> _Json:
    """Return the document of one model, with the path of this version, or of the default one for None."""
    parts = [spec.name] if version is None else [spec.name, version]
    path = "/predictions/" + "/".join(quote(part, safe="") for part in parts)
    info = {"title": f"RESTful API for: {spec.name}", "version": spec.version}
    predict = _predict(spec.name, f"A predict entry point for model: {spec.name}.", [])
    return _document(info, {path: {"post": predict}})


def _document(
    info: _Json, paths: _Json, schemes: Sequence[str] = (), components: Mapping[str, _Json] = _COMPONENTS
) -> _Json:
    """Return a document with those components that it refers to."""
    used: dict[str, _Json] = {}
    if schemes:
        used["securitySchemes"] = {name: components["securitySchemes"][name] for name in schemes}
    unread: list[_Json] = [paths]
    while unread:
        for section, name in _REFERENCE.findall(json.dumps(unread.pop())):
            if name not in used.setdefault(section, {}):
                used[section][name] = components[section][name]
                unread.append(used[section][name])
    return {"openapi": "3.0.1", "info": info, "paths": paths, "components": used}


def _inference_paths() -> _Json:
    name, version = _in_path(_NAME), _in_path(_ANY_VERSION)
    which = _parameter("query", _ANY_NAME)
    legacy = _prediction("predict", "Predict, as old clients ask.", [name, _fields()], _REST)
    for operation in legacy.values():
        operation["deprecated"] = True
    return {
        "/{model_name}/predict": legacy,
        "/ping": {
            "get": _operation(
                "ping",
                "Tell whether the workers that there should be are ready.",
                {"200": _answer("All, some or none of them are.", _reference("schemas", "Health"))},
                description="Any method does the same, and what follows in the path is ignored.",
            )
        },
        "/predictions/{model_name}": _prediction(
            "predictions",
            "Predict with the default version of a model.",
            [name],
            "The query is ignored. Any method but OPTIONS does the same.",
        ),
        "/predictions/{model_name}/{version}": _prediction(
            "predictionsVersion",
            "Predict with a version of a model.",
            [name, version],
            "The query and what follows in the path are ignored. Any method but OPTIONS does the same.",
        ),
        "/invocations": _prediction(
            "invocations", "Predict, as Amazon SageMaker asks.", [which, _fields()], _REST
        ),
        "/models/{model_name}/invoke": _prediction(
            "invokeModel", "Predict, as SageMaker asks one of many models.", [name, _fields()], _REST
        ),
    }


def _management_paths() -> _Json:
    name = _in_path(_NAME)
    both = [name, _in_path(_VERSION)]
    pages = {"200": _answer("A page of models.", _reference("schemas", "ModelList"))}
    default = {"200": _answer("It answers them now.", _STATUS)}
    return {
        "/models": {
            "get": _manage("listModels", "List the models by name.", pages, parameters=_query(_LIST)),
            "post": _register(),
        },
        "/models/{model_name}": _model("", "the default version of a model", [name], _query(_DESCRIBE)),
        "/models/{model_name}/{version}": _model("Version", "a version of a model", both, []),
        "/models/{model_name}/{version}/set-default": {
            "put": _manage(
                "setDefaultVersion",
                "Let a version answer requests that name none.",
                default,
                404,
                parameters=both,
            )
        },
    }


def _prediction(operation_id: str, summary: str, parameters: list[_Json], description: str) -> _Json:
    """Return a path that predicts, and that describes the model when asked with OPTIONS."""
    given = [each for each in parameters if each["name"] != "fields"]
    describe = "Describe the API of one model."
    return {
        "post": {**_predict(operation_id, summary, parameters), "description": description},
        "options": _operation(f"{operation_id}Api", describe, _ANY_DOCUMENT, 404, parameters=given),
    }


def _predict(operation_id: str, summary: str, parameters: list[_Json]) -> _Json:
    anything = {"application/json": {"schema": {}}, "*/*": {"schema": _BINARY}}
    form = {"schema": {"type": "object", "additionalProperties": _BINARY}}
    answer = {"headers": _headers(), "content": anything}
    answers = {
        "200": {"description": "What the model answers.", **answer},
        "default": {"description": "What it answers with a status of its handler's choice.", **answer},
    }
    body = {
        "description": "Becomes the entry body of the handler's data; of a form, each field an entry.",
        "content": {**anything, "multipart/form-data": form, "application/x-www-form-urlencoded": form},
    }
    return _operation(
        operation_id,
        summary,
        answers,
        *_PREDICTION,
        parameters=[*parameters, _parameter("header", _TIME_LIMIT)],
        requestBody=body,
    )


def _model(suffix: str, what: str, path: list[_Json], query: list[_Json]) -> _Json:
    """Return a path that describes, scales and unregisters what it names."""
    described = _reference("schemas", "Model")
    if query:
        described = {"oneOf": [described, _list_of(described)]}
    gone = {"200": _answer("It is gone; what waited for it has been answered.", _STATUS)}
    removed = "a model: all its versions" if query else what
    return {
        "get": _manage(
            f"describeModel{suffix}",
            f"Describe {what}.",
            {"200": _answer("What is known of it.", described)},
            404,
            parameters=[*path, *query],
        ),
        "put": _manage(
            f"setAutoScale{suffix}",
            f"Set the number of workers of {what}.",
            SCALED,
            *(404, 507),
            parameters=[*path, *_query(SCALE)],
        ),
        "delete": _manage(f"unregisterModel{suffix}", f"Unregister {removed}.", gone, 404, parameters=path),
    }


def _register() -> _Json:
    properties = {field.name: _schema(field) for field in REGISTER}
    schema = {"type": "object", "required": ["url"], "properties": properties}
    return _manage(
        "registerModel",
        "Register a model, or a version of one.",
        {**SCALED, "200": _answer("It is registered, and its workers, if it has any, are ready.", _STATUS)},
        *(404, 409, 507),
        description="Parameters are in the query or in a JSON body, which makes the query ignored.",
        parameters=_query(REGISTER),
        requestBody={"content": {"application/json": {"schema": schema}}},
    )


def _manage(operation_id: str, summary: str, answers: _Json, *errors: int, **more: Any) -> _Json:
    security: list[_Json] = [{}, {"bearerAuth": []}]
    return _operation(operation_id, summary, answers, *errors, *_MANAGEMENT, security=security, **more)


def _operation(operation_id: str, summary: str, answers: _Json, *errors: int, **more: Any) -> _Json:
    """Return an operation with its answers, and those errors besides the ones that every request can meet."""
    failures = {str(status): _reference("responses", status) for status in sorted({*_ALWAYS, *errors})}
    return {"operationId": operation_id, "summary": summary, **more, "responses": {**answers, **failures}}


def _schema(field: _Field) -> _Json:
    schema: _Json = {"type": field.type}
    if field.default is not None:
        schema["default"] = field.default
    if field.choices:
        schema["enum"] = list(field.choices)
    return schema


def _parameter(place: str, field: _Field) -> _Json:
    return {"name": field.name, "in": place, "description": field.meaning, "schema": _schema(field)}


def _query(fields: Sequence[_Field]) -> list[_Json]:
    return [_parameter("query", field) for field in fields]


def _in_path(field: _Field) -> _Json:
    return {**_parameter("path", field), "required": True}


def _fields() -> _Json:
    """Return the parameter that stands for those of any name."""
    schema = {"type": "object", "additionalProperties": {"type": "string"}}
    return {"name": "fields", "in": "query", "description": "Any others.", "schema": schema, "style": "form"}
