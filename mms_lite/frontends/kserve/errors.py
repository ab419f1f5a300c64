"""How the KServe v2 protocol spells errors: one table for REST and gRPC, after Triton Inference Server.

Its texts for what is unknown or not ready are here too, as clients compare them.
"""

from __future__ import annotations

from mms_lite.errors import (
    BadTensor,
    HandlerError,
    ModelNotFound,
    ModelNotReady,
    QueueFull,
    ServingError,
    VersionNotFound,
)
from mms_lite.frontends.call import chosen_code
from mms_lite.frontends.message import shown

_NO_ID = "<id_unknown>"
_LONGEST_NAME = 255  # of a folder, and so of a model

# code of the error -> HTTP status and name of the gRPC status
ERRORS: dict[str, tuple[int, str]] = {
    "internal": (500, "INTERNAL"),
    "invalid_request": (400, "INVALID_ARGUMENT"),
    "bad_tensor": (400, "INVALID_ARGUMENT"),
    "unsupported_media": (415, "INVALID_ARGUMENT"),
    "unsupported": (501, "UNIMPLEMENTED"),
    "unauthorized": (401, "UNAUTHENTICATED"),
    "forbidden": (403, "PERMISSION_DENIED"),
    "request_too_large": (413, "RESOURCE_EXHAUSTED"),
    "overloaded": (503, "RESOURCE_EXHAUSTED"),
    "request_timeout": (408, "DEADLINE_EXCEEDED"),
    "model_not_found": (404, "NOT_FOUND"),
    "version_not_found": (404, "NOT_FOUND"),
    "model_conflict": (409, "ALREADY_EXISTS"),
    "model_not_ready": (503, "UNAVAILABLE"),
    "queue_full": (429, "RESOURCE_EXHAUSTED"),
    "deadline_exceeded": (504, "DEADLINE_EXCEEDED"),
    "handler_error": (500, "INTERNAL"),
    "out_of_memory": (507, "RESOURCE_EXHAUSTED"),
    "worker_died": (500, "UNAVAILABLE"),
    "load_failed": (400, "INVALID_ARGUMENT"),
    "invalid_archive": (400, "INVALID_ARGUMENT"),
    "download_failed": (400, "INVALID_ARGUMENT"),
    "backend_missing": (400, "INVALID_ARGUMENT"),
}


def http_status(error: ServingError) -> int:
    """Return an error's status; a handler may have chosen its own."""
    if isinstance(error, HandlerError):
        chosen = error.details.get("status")
        if type(chosen) is int and 400 <= chosen <= 599:
            return chosen
    return ERRORS.get(error.code, ERRORS["internal"])[0]


def grpc_status(error: ServingError) -> str:
    """Return the name of an error's gRPC status, such as "NOT_FOUND"; a model may have chosen its own."""
    return chosen_code(error) or ERRORS.get(error.code, ERRORS["internal"])[1]


def of_lookup(error: ServingError, name: str, version: str | None) -> ServingError:
    """Return what is said of a model or version that is not there, or not ready."""
    asked = f"Request for unknown model: '{name[:_LONGEST_NAME]}'"
    if isinstance(error, VersionNotFound) and version is not None:
        return VersionNotFound(f"{asked} version {shown(version)} is not found", **error.details)
    if isinstance(error, ModelNotFound):
        return ModelNotFound(f"{asked} is not found", **error.details)
    if isinstance(error, ModelNotReady):
        which = "" if version is None else f" version {shown(version)}"
        return ModelNotReady(f"{asked}{which} is not at ready state: {error.message}", **error.details)
    return error


def of_request(error: ServingError, request_id: str) -> ServingError:
    """Return an error of a request's own, which names the request; others are returned as they are."""
    if isinstance(error, (BadTensor, QueueFull)):
        return type(error)(f"[request id: {shown(request_id) or _NO_ID}] {error.message}", **error.details)
    return error
