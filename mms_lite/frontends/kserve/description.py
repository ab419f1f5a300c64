"""The routes of rest.py as OpenAPI 3.0.1, to be merged into the description of the address that serves them.

Names of components begin with V2: other APIs of the address have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_Json = dict[str, Any]

_TEXT: _Json = {"type": "string"}
_WHOLE: _Json = {"type": "integer"}
_FLAG: _Json = {"type": "boolean"}
_ANY: _Json = {"type": "object"}
_BINARY: _Json = {"type": "string", "format": "binary"}

_ERRORS = {
    400: "The request cannot be read, or does not fit the model; or what is asked is not ready.",
    401: "To load and unload models from another machine, the management token must be sent.",
    403: "The server may not do this, such as load models where model_control_mode is not explicit.",
    404: "There is no such model or version.",
    408: "The request's body did not arrive in time.",
    413: "The request's body, as it is or unpacked, or its JSON, is larger than the limit.",
    415: "The body has a Content-Encoding other than gzip and deflate.",
    429: "The model's queue is full.",
    500: "The model, its worker or the server failed.",
    501: "The protocol knows it, this server does not do it.",
    503: "The model is not ready, or the server has no room for the request.",
    504: "The deadline passed, in the queue or in the model.",
    507: "The model ran out of memory.",
}
_ALWAYS = (400, 408, 413, 500, 503)
_MODEL = (404,)
_INFER = (404, 415, 429, 501, 504, 507)
_CONTROL = (401, 403, 404, 415, 501, 507)


def _record(required: Sequence[str], **properties: _Json) -> _Json:
    stated = {"required": list(required)} if required else {}
    return {"type": "object", **stated, "properties": properties}


def _list(items: _Json) -> _Json:
    return {"type": "array", "items": items}


def _schema(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}


_PARAMETERS: _Json = {
    "type": "object",
    "additionalProperties": {"oneOf": [_TEXT, {"type": "number"}, _FLAG]},
}
_VALUES: _Json = {
    "description": "In C order, flat or nested: numbers, booleans, or texts for BYTES.",
    "type": "array",
    "items": {},
}
_DURATION = _schema("V2Duration")
_COMPUTE = {"compute_input": _DURATION, "compute_infer": _DURATION, "compute_output": _DURATION}
_INFERENCE_STATISTICS = dict.fromkeys(("success", "fail", "queue", "cache_hit", "cache_miss"), _DURATION)

_COMPONENTS: dict[str, _Json] = {
    "headers": {
        "V2JsonLength": {"description": "Bytes of JSON, behind which tensors follow.", "schema": _WHOLE},
    },
    "responses": {
        f"V2Error{status}": {
            "description": text,
            "content": {"application/json": {"schema": _schema("V2Error")}},
        }
        for status, text in _ERRORS.items()
    },
    "schemas": {
        "V2Error": _record(["error"], error=_TEXT),
        "V2Server": _record(
            ["name", "version", "extensions"], name=_TEXT, version=_TEXT, extensions=_list(_TEXT)
        ),
        "V2Model": _record(
            ["name", "versions", "platform", "inputs", "outputs"],
            name=_TEXT,
            versions=_list(_TEXT),
            platform=_TEXT,
            inputs=_list(_schema("V2TensorSpec")),
            outputs=_list(_schema("V2TensorSpec")),
        ),
        "V2TensorSpec": _record(
            ["name", "datatype", "shape"],
            name=_TEXT,
            datatype=_TEXT,
            shape={**_list(_WHOLE), "description": "-1 stands for any length."},
        ),
        "V2Tensor": _record(
            ["name", "datatype", "shape"],
            name=_TEXT,
            datatype=_TEXT,
            shape=_list(_WHOLE),
            parameters={
                **_PARAMETERS,
                "description": "binary_data_size: bytes of the tensor behind the JSON, instead of data. "
                'content_type: that of bodies; "base64" for texts that are.',
            },
            data=_VALUES,
        ),
        "V2Output": _record(
            ["name"],
            name=_TEXT,
            parameters={
                **_PARAMETERS,
                "description": "binary_data: whether it shall follow the JSON. "
                "classification: how many of its highest elements are wanted instead.",
            },
        ),
        "V2Request": _record(
            ["inputs"],
            id=_TEXT,
            parameters={
                **_PARAMETERS,
                "description": "binary_data_output: whether outputs shall follow the JSON. timeout: "
                "microseconds. priority, sequence_id, sequence_start, sequence_end; others reach the model.",
            },
            inputs=_list(_schema("V2Tensor")),
            outputs=_list(_schema("V2Output")),
        ),
        "V2Answer": _record(
            ["model_name", "model_version", "outputs"],
            model_name=_TEXT,
            model_version=_TEXT,
            id=_TEXT,
            parameters=_PARAMETERS,
            outputs=_list(_schema("V2Tensor")),
        ),
        "V2Duration": _record(["count", "ns"], count=_WHOLE, ns=_WHOLE),
        "V2Statistics": _record(
            ["model_stats"],
            model_stats=_list(
                _record(
                    ["name", "version"],
                    name=_TEXT,
                    version=_TEXT,
                    last_inference={**_WHOLE, "description": "Milliseconds since 1970."},
                    inference_count=_WHOLE,
                    execution_count=_WHOLE,
                    inference_stats=_record([], **_INFERENCE_STATISTICS, **_COMPUTE),
                    response_stats=_ANY,
                    batch_stats=_list(_record(["batch_size"], batch_size=_WHOLE, **_COMPUTE)),
                    memory_usage=_list(_ANY),
                )
            ),
        ),
        "V2Index": _list(
            _record(
                ["name"],
                name=_TEXT,
                version=_TEXT,
                state={"type": "string", "enum": ["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]},
                reason=_TEXT,
            )
        ),
    },
}


def components() -> dict[str, _Json]:
    """Return what the paths refer to, by section: headers, responses, schemas."""
    return _COMPONENTS


def paths() -> _Json:
    """Return the path items of the protocol's routes."""
    live, ready = _record(["live"], live=_FLAG), _record(["ready"], ready=_FLAG)
    found = {
        "/v2": _get("v2Server", "Name the server and its extensions.", _schema("V2Server")),
        "/v2/health/live": _get("v2Live", "Tell that the server is there.", live),
        "/v2/health/ready": _get("v2Ready", "Tell whether all models are ready.", ready),
        "/v2/models/stats": _get("v2AllStatistics", "Count and time all models.", _schema("V2Statistics")),
        "/v2/logging": _get("v2Logging", "Tell how logs are written.", _ANY),
        "/v2/trace/setting": _get("v2Trace", "Tell that nothing is traced.", _ANY),
        "/v2/repository/index": _index(),
        "/v2/repository/models/{model_name}/load": _load(),
        "/v2/repository/models/{model_name}/unload": _unload(),
        "/v2/systemsharedmemory/status": _get("v2SharedMemory", "List regions: none.", _list(_ANY)),
        "/v2/systemsharedmemory/unregister": _post("v2UnregisterSharedMemory", "Forget all regions."),
        "/v2/cudasharedmemory/status": _get("v2CudaSharedMemory", "List regions: none.", _list(_ANY)),
        "/v2/cudasharedmemory/unregister": _post("v2UnregisterCudaSharedMemory", "Forget all regions."),
    }
    return {**found, **_of_model("", "", []), **_of_model("/versions/{version}", "Version", ["version"])}


def _of_model(place: str, suffix: str, names: Sequence[str]) -> _Json:
    """Return the routes of a model, or of one version of it."""
    base, given = f"/v2/models/{{model_name}}{place}", _in_path("model_name", *names)
    what = "a version of a model" if names else "the default version of a model"
    ready = _record(["name", "ready"], name=_TEXT, ready=_FLAG)
    routes = {
        "": ("Metadata", f"Describe {what}.", _schema("V2Model")),
        "/ready": ("ModelReady", f"Tell whether {what} is ready.", ready),
        "/config": ("Config", f"Return the ModelConfig of {what}.", _ANY),
        "/stats": ("Statistics", f"Count and time {what if names else 'all versions of a model'}.", None),
        "/trace/setting": ("ModelTrace", "Tell that nothing is traced.", _ANY),
    }
    described = {
        f"{base}{path}": _get(
            f"v2{name}{suffix}", summary, schema or _schema("V2Statistics"), *_MODEL, parameters=given
        )
        for path, (name, summary, schema) in routes.items()
    }
    return {**described, f"{base}/infer": _infer(suffix, what, given)}


def _infer(suffix: str, what: str, given: list[_Json]) -> _Json:
    content = {
        "application/json": {"schema": _schema("V2Request")},
        "application/octet-stream": {"schema": _BINARY},
    }
    answer = {
        "description": "The outputs.",
        "headers": {"Inference-Header-Content-Length": {"$ref": "#/components/headers/V2JsonLength"}},
        "content": {**content, "application/json": {"schema": _schema("V2Answer")}},
    }
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Bytes of JSON, behind which tensors follow; 0 where the whole body is the one input.",
        "schema": _WHOLE,
    }
    limit = {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "description": "Milliseconds that the client waits; more than 0.",
        "schema": {"type": "number"},
    }
    return _operation(
        "post",
        f"v2Infer{suffix}",
        f"Infer with {what}.",
        answer,
        *_INFER,
        parameters=[*given, header, limit],
        requestBody={"required": True, "content": content},
    )


def _index() -> _Json:
    body = _body(_record([], ready={**_FLAG, "description": "Only what is ready."}))
    return _post("v2Index", "List the models of the repository.", _schema("V2Index"), 415, requestBody=body)


def _load() -> _Json:
    meaning = "config: a ModelConfig in JSON, in place of the model's own; file:PATH: a file, in base64."
    body = _body(_record([], parameters={**_PARAMETERS, "description": meaning}))
    given = _in_path("model_name")
    return _post(
        "v2Load", "Load a model, or load it anew.", None, *_CONTROL, parameters=given, requestBody=body
    )


def _unload() -> _Json:
    meaning = "unload_dependents is accepted; no model is made of others here."
    body = _body(_record([], parameters={**_PARAMETERS, "description": meaning}))
    given = _in_path("model_name")
    return _post("v2Unload", "Unload a model.", None, *_CONTROL, parameters=given, requestBody=body)


def _body(schema: _Json) -> _Json:
    return {"content": {"application/json": {"schema": schema}}}


def _get(name: str, summary: str, schema: _Json, *errors: int, **more: Any) -> _Json:
    return _operation("get", name, summary, _answer(schema), *errors, **more)


def _post(name: str, summary: str, schema: _Json | None = None, *errors: int, **more: Any) -> _Json:
    return _operation("post", name, summary, _answer(schema), *errors, **more)


def _answer(schema: _Json | None) -> _Json:
    done: _Json = {"description": "Done."}
    return done if schema is None else {**done, **_body(schema)}


def _operation(method: str, name: str, summary: str, answer: _Json, *errors: int, **more: Any) -> _Json:
    failures = {
        str(status): {"$ref": f"#/components/responses/V2Error{status}"}
        for status in sorted({*_ALWAYS, *errors})
    }
    responses = {"200": answer, **failures}
    return {method: {"operationId": name, "summary": summary, **more, "responses": responses}}


def _in_path(*names: str) -> list[_Json]:
    meanings = {"model_name": "Name of a model.", "version": "A loaded version of it."}
    return [
        {"name": name, "in": "path", "required": True, "description": meanings[name], "schema": _TEXT}
        for name in names
    ]
