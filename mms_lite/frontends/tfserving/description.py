"""The routes of the TensorFlow Serving API as path items of an OpenAPI document."""

from __future__ import annotations

from typing import Any

_Json = dict[str, Any]

_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_ERRORS = {
    400: "The request cannot be read, or does not fit the model.",
    401: "From another machine, the management token must be sent.",
    403: "The caller may not do this.",
    404: "There is no such model or version.",
    406: "The route does not take this method.",
    412: "The body is no JSON; or the configuration cannot be used.",
    413: "The body, or its JSON, is larger than the limit.",
    415: "The body is encoded.",
    429: "The model's queue is full.",
    500: "The model failed, or its answer cannot be written in this format.",
    503: "The model is not loaded yet, or has no workers.",
    504: "The model gave no answer in time.",
}
_ANY = {"type": "object"}
_REQUEST = {
    "type": "object",
    "description": "Either instances, a list of rows, or inputs, whole tensors.",
    "properties": {
        "signature_name": {"type": "string", "description": "Ignored: a model has one signature."},
        "instances": {
            "type": "array",
            "description": 'Values, or objects with a value for each input; {"b64": "..."} stands for bytes.',
            "items": {},
        },
        "inputs": {"description": "A tensor, or an object with one for each input."},
    },
}
_ANSWER = {
    "type": "object",
    "properties": {
        "predictions": {"type": "array", "description": "Answers instances.", "items": {}},
        "outputs": {"description": "Answers inputs: a tensor, or an object with one for each output."},
    },
}
_STATUSES = {
    "type": "object",
    "required": ["model_version_status"],
    "properties": {
        "model_version_status": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "version": {"type": "string"},
                    "state": {
                        "type": "string",
                        "enum": ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"],
                    },
                    "status": {
                        "type": "object",
                        "properties": {
                            "error_code": {"type": "string"},
                            "error_message": {"type": "string"},
                        },
                    },
                },
            },
        }
    },
}
_CONFIG = {"type": "object", "additionalProperties": _STATUSES}
_PREDICTING = (400, 404, 406, 412, 413, 415, 429, 500, 503, 504)


def paths() -> _Json:
    """Return the path items; each stands alone, without components of the document."""
    name = _in_path("model_name", "string", "Name of a model.")
    version = _in_path("version", "integer", "Number of a version of it; 0 for the default one.")
    label = _in_path("label", "string", "Ignored: the default version answers.")
    found: _Json = {}
    for path, kind, parameters in (
        ("", "", [name]),
        ("/versions/{version}", "Version", [name, version]),
        ("/labels/{label}", "Label", [name, label]),
    ):
        model = f"/v1/models/{{model_name}}{path}"
        found[f"{model}:predict"] = {"post": _predict(kind, parameters)}
        found[model] = {"get": _model_status(kind, parameters)}
        found[f"{model}/metadata"] = {"get": _metadata(kind, parameters)}
    return found | {
        "/v1/config": {
            "get": _operation(
                "v1Config", "Tell how all models are doing.", {"200": _answer("By name.", _CONFIG)}, 406
            )
        },
        "/v1/config/reload": {
            "post": _operation(
                "v1ConfigReload",
                "Look for changes of the configuration and of models now.",
                {
                    "200": _answer("There were none.", _CONFIG),
                    "201": _answer("They are served now.", _CONFIG),
                },
                *(401, 403, 406, 412, 500),
                security=[{}, {"bearerAuth": []}],
            )
        },
    }


def _predict(kind: str, parameters: list[_Json]) -> _Json:
    return _operation(
        f"v1Predict{kind}",
        "Predict, as TensorFlow Serving's clients ask.",
        {"200": _answer("What the model answers.", _ANSWER)},
        *_PREDICTING,
        parameters=parameters,
        requestBody={"content": {"application/json": {"schema": _REQUEST}}},
    )


def _model_status(kind: str, parameters: list[_Json]) -> _Json:
    answers = {"200": _answer("The state of each version.", _STATUSES)}
    return _operation(
        f"v1Status{kind}", "Tell how a model is doing.", answers, 400, 404, 406, parameters=parameters
    )


def _metadata(kind: str, parameters: list[_Json]) -> _Json:
    answers = {"200": _answer("Its inputs and outputs.", _ANY)}
    return _operation(
        f"v1Metadata{kind}", "Describe a model.", answers, 400, 404, 406, 503, parameters=parameters
    )


def _operation(operation_id: str, summary: str, answers: _Json, *errors: int, **more: Any) -> _Json:
    failures = {str(status): _answer(_ERRORS[status], _ERROR) for status in errors}
    return {"operationId": operation_id, "summary": summary, **more, "responses": {**answers, **failures}}


def _answer(description: str, schema: _Json) -> _Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _in_path(name: str, kind: str, meaning: str) -> _Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": meaning,
        "schema": {"type": kind},
    }
