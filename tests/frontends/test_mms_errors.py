import asyncio
import json

import pytest

from mms_lite import errors
from mms_lite.errors import (
    BackendMissing,
    BadTensor,
    DeadlineExceeded,
    DownloadFailed,
    Forbidden,
    HandlerError,
    InvalidArchive,
    InvalidRequest,
    LoadError,
    ModelConflict,
    ModelNotFound,
    ModelNotReady,
    OutOfMemory,
    Overloaded,
    QueueFull,
    RequestTimeout,
    RequestTooLarge,
    ServingError,
    Unauthorized,
    Unsupported,
    UnsupportedMedia,
    VersionNotFound,
    WorkerDied,
)
from mms_lite.frontends.mms.answers import ERRORS, spell

NO_WORKER = "No worker is available to serve request for model: m. Consider increasing job queue size."

ROWS = [
    (ServingError("odd"), 500, "InternalServerException", "odd"),
    (InvalidRequest("bad"), 400, "BadRequestException", "bad"),
    (BadTensor("bad"), 400, "BadRequestException", "bad"),
    (UnsupportedMedia("odd"), 415, "UnsupportedMediaTypeException", "odd"),
    (Unsupported("later"), 501, "NotImplementedException", "later"),
    (Unauthorized("who?"), 401, "UnauthorizedException", "who?"),
    (DownloadFailed("no answer"), 400, "DownloadModelException", "no answer"),
    (Forbidden("no"), 403, "ForbiddenException", "no"),
    (RequestTooLarge("big"), 413, "RequestEntityTooLargeException", "big"),
    (RequestTimeout("slow"), 408, "RequestTimeoutException", "slow"),
    (Overloaded("busy"), 503, "ServiceUnavailableException", "busy"),
    (ModelNotFound("Model not found: m"), 404, "ModelNotFoundException", "Model not found: m"),
    (
        VersionNotFound("Model not found: m, version 3"),
        404,
        "ModelNotFoundException",
        "Model not found: m, version 3",
    ),
    (
        ModelConflict("Model m is already registered."),
        409,
        "ConflictStatusException",
        "Model m is already registered.",
    ),
    (
        ModelNotReady("model m has no workers", no_workers=True),
        503,
        "ServiceUnavailableException",
        f"{NO_WORKER} (model m has no workers)",
    ),
    (
        QueueFull("full", depth=100, limit=100, answered_per_s=49.0),
        503,
        "ServiceUnavailableException",
        f"{NO_WORKER} (queue 100/100, 49 answered/s)",
    ),
    (DeadlineExceeded("late", by="client"), 504, "RequestTimeoutException", "late"),
    (DeadlineExceeded("late", by="server"), 500, "InternalServerException", "Worker died."),
    (HandlerError("Prediction failed"), 503, "InternalServerException", "Prediction failed"),
    (HandlerError("no such customer", status=599), 599, "InternalServerException", "no such customer"),
    (OutOfMemory("of host memory"), 507, "InternalServerException", "Out of resources"),
    (WorkerDied("signal 9"), 500, "InternalServerException", "Worker died."),
    (LoadError("KeyError: 'x'"), 500, "InternalServerException", "Failed to start workers: KeyError: 'x'"),
    (
        InvalidArchive("Model name is not defined."),
        400,
        "InvalidModelException",
        "Model name is not defined.",
    ),
    (BackendMissing("pip install x"), 500, "InternalServerException", "pip install x"),
]


@pytest.mark.parametrize(("error", "status", "kind", "message"), ROWS)
async def test_every_row_of_the_table(error, status, kind, message):
    response = spell(error, "m")
    assert response.status == status
    assert response.body[0].endswith(b"\n}\n")
    assert json.loads(response.body[0]) == {"code": status, "type": kind, "message": message}
    assert ("Retry-After" in dict(response.headers)) == (
        status == 503 and not isinstance(error, HandlerError)
    )


def test_the_table_is_complete_and_all_of_it_is_tested():
    known = set(errors._BY_CODE) - {errors.ConfigError.code}
    known = {code for code in known if errors._BY_CODE[code].__module__.startswith("mms_lite.")}
    assert known == set(ERRORS) == {error.code for error, *_ in ROWS}


@pytest.mark.parametrize(
    ("depth", "rate", "seconds"), [(100, 49.0, "3"), (1, 1000.0, "1"), (9, 0, "1"), (999, 1, "60")]
)
def test_retry_after_is_when_the_queue_is_empty(depth, rate, seconds):
    response = spell(QueueFull("", depth=depth, limit=100, answered_per_s=rate), "m")
    assert dict(response.headers)["Retry-After"] == seconds


def test_a_message_that_no_text_can_hold_is_still_json():
    assert spell(HandlerError("\ud800 é")).body[0].isascii()


async def test_a_handler_that_raises(inline, inference):
    await inline.load("prediction_error")
    answer = await inference("POST", "/predictions/prediction_error", b"599")
    assert (answer.status, answer.json["message"]) == (599, "no such customer")
    answer = await inference("POST", "/predictions/prediction_error", b"not a number")
    assert (answer.status, answer.json["message"]) == (503, "Prediction failed")


@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        ("return [1, 2]", 503, "number of batch response mismatched"),
        ("return None if data is None else 7", 503, "Invalid model predict output"),
        ("return [object()]", 503, "Unsupported model output data type."),
        ("if data: raise MemoryError", 507, "Out of resources"),
    ],
)
async def test_handlers_that_fail(model, inference, source, status, message):
    await model("m", f"def handle(data, context):\n    {source}")
    answer = await inference("POST", "/predictions/m", b"x")
    assert answer.json == {"code": status, "type": "InternalServerException", "message": message}


async def test_a_full_queue(inline, inference, ask, tmp_path, wait_until):
    inline.defaults["queue_size"] = 1
    await inline.load("gate")
    gate = tmp_path / "open"
    waiting = [asyncio.ensure_future(inline.engine.infer(ask("gate", str(gate))))]
    await wait_until(gate.with_suffix(".started").exists)
    waiting.append(asyncio.ensure_future(inline.engine.infer(ask("gate", "x"))))
    await wait_until(lambda: inline.engine.describe("gate").queue_depth == 1)
    answer = await inference("POST", "/predictions/gate", b"y")
    assert answer.status == 503 and answer.headers["retry-after"]
    assert answer.json["message"].startswith(NO_WORKER.replace("model: m", "model: gate") + " (queue 1/1, ")
    gate.touch()
    await asyncio.gather(*waiting)


async def test_a_model_without_workers(inline, inference):
    await inline.load("echo", workers=0)
    answer = await inference("POST", "/predictions/echo", b"y")
    assert answer.status == 503
    assert answer.json["message"].startswith(NO_WORKER.replace("model: m", "model: echo"))


@pytest.mark.parametrize("status", ["503", [1], 200, 99, True, "200 OK\r\nX: y"])
def test_a_status_that_is_none_of_an_error_is_not_taken(status):
    assert spell(HandlerError("x", status=status)).status == 503
