"""How MMS spells what it says: its JSON, its errors, and a model's answer.

The table of errors is here and nowhere else (MMS reference, section 3).
"""

from __future__ import annotations

import json
from typing import Any

from mms_lite.errors import DeadlineExceeded, HandlerError, LoadError, ModelNotReady, QueueFull, ServingError
from mms_lite.frontends.message import HttpResponse, retry_after_s
from mms_lite.types import BYTES, InferResponse

_quoted = json.JSONEncoder().encode

# code of the error -> HTTP status and the type that MMS's clients know
ERRORS: dict[str, tuple[int, str]] = {
    "internal": (500, "InternalServerException"),
    "invalid_request": (400, "BadRequestException"),
    "bad_tensor": (400, "BadRequestException"),
    "unsupported_media": (415, "UnsupportedMediaTypeException"),
    "unsupported": (501, "NotImplementedException"),
    "unauthorized": (401, "UnauthorizedException"),
    "forbidden": (403, "ForbiddenException"),
    "request_too_large": (413, "RequestEntityTooLargeException"),
    "request_timeout": (408, "RequestTimeoutException"),
    "overloaded": (503, "ServiceUnavailableException"),
    "model_not_found": (404, "ModelNotFoundException"),
    "version_not_found": (404, "ModelNotFoundException"),
    "model_conflict": (409, "ConflictStatusException"),
    "model_not_ready": (503, "ServiceUnavailableException"),
    "queue_full": (503, "ServiceUnavailableException"),
    "deadline_exceeded": (504, "RequestTimeoutException"),
    "handler_error": (503, "InternalServerException"),
    "out_of_memory": (507, "InternalServerException"),
    "worker_died": (500, "InternalServerException"),
    "load_failed": (500, "InternalServerException"),
    "invalid_archive": (400, "InvalidModelException"),
    "download_failed": (400, "DownloadModelException"),
    "backend_missing": (500, "InternalServerException"),
}


def json_response(value: Any, *, status: int = 200, reason: str = "") -> HttpResponse:
    """Return a value as MMS prints JSON: two spaces of indent, a newline at the end."""
    body = json.dumps(value, indent=2).encode() + b"\n"
    return HttpResponse(status, [("Content-Type", "application/json")], [body], reason)


def error_response(status: int, kind: str, message: str) -> HttpResponse:
    """Return an error in MMS's shape; `kind` is one of its words."""
    # By hand, as a full queue refuses by the thousand: with an indent `json` has no C code.
    body = f'{{\n  "code": {status},\n  "type": "{kind}",\n  "message": {_quoted(message)}\n}}\n'
    return HttpResponse(status, [("Content-Type", "application/json")], [body.encode()])


def resource_not_found() -> HttpResponse:
    """Return what MMS says to a path it does not know."""
    message = "Requested resource is not found, please refer to API document."
    return error_response(404, "ResourceNotFoundException", message)


def method_not_allowed() -> HttpResponse:
    """Return what MMS says to a method that a path does not take."""
    message = "Requested method is not allowed, please refer to API document."
    return error_response(405, "MethodNotAllowedException", message)


def spell(error: ServingError, model: str = "") -> HttpResponse:
    """Return an error as MMS spells it; `model` is the name that its sentences mention."""
    code = error.code
    if isinstance(error, DeadlineExceeded) and error.details.get("by") == "server":
        code = "worker_died"  # MMS kills a worker that is too slow, and so do we
    status, kind = ERRORS.get(code, ERRORS["internal"])
    if isinstance(error, HandlerError):
        chosen = error.details.get("status")
        if type(chosen) is int and 400 <= chosen <= 599:
            status = chosen
    response = error_response(status, kind, _message(error, code, model))
    if code == "unauthorized":
        response.headers = [*response.headers, ("WWW-Authenticate", "Bearer")]
    if error.retryable and status == 503:
        response.headers = [*response.headers, ("Retry-After", str(retry_after_s(error)))]
    return response


def model_response(answer: InferResponse, max_size: int) -> HttpResponse:
    """Return a model's answer: its one raw output as it is, with the status and headers that it chose."""
    if len(answer.outputs) > 1 or any(t.datatype != BYTES or t.shape for t in answer.outputs):
        return error_response(
            *ERRORS["internal"], "The model answers with tensors, which this API cannot carry."
        )
    headers = list(answer.headers)
    if not answer.outputs:
        return HttpResponse(answer.status, headers, (), answer.reason)
    output = answer.outputs[0]
    if len(output.data) > max_size:
        message = f"The response has {len(output.data)} bytes; max_response_size is {max_size}."
        return error_response(*ERRORS["internal"], message)
    if output.content_type:
        headers.insert(0, ("Content-Type", output.content_type))
    return HttpResponse(answer.status, headers, [output.data], answer.reason)


def _message(error: ServingError, code: str, model: str) -> str:
    if code == "worker_died":
        return "Worker died."
    if code == "out_of_memory":
        return "Out of resources"
    if type(error) is LoadError:
        return f"Failed to start workers: {error.message}"
    if model and isinstance(error, (QueueFull, ModelNotReady)):
        refusal = f"No worker is available to serve request for model: {model}."
        return f"{refusal} Consider increasing job queue size. ({_why(error)})"
    return error.message


def _why(error: ServingError) -> str:
    if not isinstance(error, QueueFull):
        return error.message
    details = error.details
    rate = f"{details.get('answered_per_s', 0):g}"
    return f"queue {details.get('depth', 0)}/{details.get('limit', 0)}, {rate} answered/s"
