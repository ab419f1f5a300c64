"""The error tree: every failure that a client, an operator or another process may see.

An error carries text for users and plain-data details; tracebacks go to the log only. `to_wire` and
`from_wire` carry it between processes; each front end maps `code` to its protocol's spelling.
"""

from __future__ import annotations

from typing import Any, ClassVar

_BY_CODE: dict[str, type[ServingError]] = {}


class ServingError(Exception):
    """A failure with a stable `code`. `http` and `grpc` are defaults that a protocol may override."""

    code: ClassVar[str] = "internal"
    http: ClassVar[int] = 500
    grpc: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init_subclass__(cls, *, code: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.code = code
        _BY_CODE[code] = cls

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def to_wire(self) -> dict[str, Any]:
        """Return the error as plain data: code, message, details."""
        return {"code": self.code, "message": self.message, "details": self.details}


_BY_CODE[ServingError.code] = ServingError


def from_wire(data: dict[str, Any]) -> ServingError:
    """Return the error that `to_wire` described; an unknown code gives a plain ServingError."""
    error = _BY_CODE.get(str(data.get("code", "")), ServingError)(str(data.get("message", "")))
    error.details = dict(data.get("details") or {})
    return error


class InvalidRequest(ServingError, code="invalid_request"):
    """The request cannot be parsed or does not fit the model."""

    http = 400
    grpc = "INVALID_ARGUMENT"


class BadTensor(InvalidRequest, code="bad_tensor"):
    """A tensor's shape, datatype or byte count is not what was declared or expected."""


class UnsupportedMedia(InvalidRequest, code="unsupported_media"):
    """The content type or encoding of the body is not one we read."""

    http = 415


class Unsupported(ServingError, code="unsupported"):
    """The protocol knows it, this server does not do it."""

    http = 501
    grpc = "UNIMPLEMENTED"


class Unauthorized(ServingError, code="unauthorized"):
    """The caller has not said who it is, or not truly."""

    http = 401
    grpc = "UNAUTHENTICATED"


class Forbidden(ServingError, code="forbidden"):
    """The server is not allowed to do this, or not for this caller."""

    http = 403
    grpc = "PERMISSION_DENIED"


class RequestTooLarge(ServingError, code="request_too_large"):
    """The request is over a limit of bytes; the message names it."""

    http = 413
    grpc = "RESOURCE_EXHAUSTED"


class Overloaded(ServingError, code="overloaded"):
    """The bodies of all requests together are at max_bytes_in_flight."""

    http = 503
    grpc = "RESOURCE_EXHAUSTED"
    retryable = True


class RequestTimeout(ServingError, code="request_timeout"):
    """The client stopped sending in the middle of its request."""

    http = 408
    grpc = "DEADLINE_EXCEEDED"


class ModelNotFound(ServingError, code="model_not_found"):
    """No model has this name."""

    http = 404
    grpc = "NOT_FOUND"


class VersionNotFound(ModelNotFound, code="version_not_found"):
    """The model is there, this version of it is not."""


class ModelConflict(ServingError, code="model_conflict"):
    """The name and version are taken."""

    http = 409
    grpc = "ALREADY_EXISTS"


class ModelNotReady(ServingError, code="model_not_ready"):
    """The model is loading, has failed, is being unloaded, or has no workers."""

    http = 503
    grpc = "UNAVAILABLE"
    retryable = True


class QueueFull(ServingError, code="queue_full"):
    """The model's queue is at its bound. Details: depth, limit, answered_per_s."""

    http = 429
    grpc = "RESOURCE_EXHAUSTED"
    retryable = True


class DeadlineExceeded(ServingError, code="deadline_exceeded"):
    """The client's deadline or the model's response timeout passed. Details: by ("client" or "server")."""

    http = 504
    grpc = "DEADLINE_EXCEEDED"


class HandlerError(ServingError, code="handler_error"):
    """User code raised or returned nonsense. Details: status, when the user chose one."""

    http = 500


class OutOfMemory(ServingError, code="out_of_memory"):
    """The model ran out of host or device memory."""

    http = 507
    grpc = "RESOURCE_EXHAUSTED"


class WorkerDied(ServingError, code="worker_died"):
    """The worker process ended with the request in flight."""

    http = 500
    grpc = "UNAVAILABLE"
    retryable = True


class LoadError(ServingError, code="load_failed"):
    """The model could not be loaded. Details: log, the worker's last lines."""

    http = 422
    grpc = "FAILED_PRECONDITION"


class InvalidArchive(LoadError, code="invalid_archive"):
    """The archive, folder or manifest is not one we can read."""

    http = 400


class DownloadFailed(LoadError, code="download_failed"):
    """The archive could not be fetched from where it is said to be."""

    http = 400


class BackendMissing(LoadError, code="backend_missing"):
    """An optional library is not installed; the message is the command that installs it."""


class ConfigError(ServingError, code="invalid_configuration"):
    """The configuration cannot be used. Never on the wire: the command line prints it and exits with 1."""
