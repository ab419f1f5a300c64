"""How user code is called: find its entry, build `data`, call `handle(data, context)`, check its answer.

One bad item fails alone: when a batch fails, each of its items is run once by itself.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from mms_lite.errors import BadTensor, HandlerError, InvalidRequest, OutOfMemory, ServingError
from mms_lite.types import BYTES, InferRequest, Tensor
from mms_lite.wire import Item, Outcome
from mms_lite.worker import entry
from mms_lite.worker import outputs as wanted_outputs
from mms_lite.worker.context import Context, PredictionException
from mms_lite.worker.entry import Entry
from mms_lite.worker.metrics_store import MetricsStore

_RESCUES_BEFORE_WARNING = 3
MMS_VERSION = "1.1.11"  # the version of MMS whose behaviour handlers see

Started = Callable[[Iterable[int]], None]
Emit = Callable[[Sequence[Outcome]], None]


def load(settings: dict[str, Any]) -> MmsHandler:
    """Load the model that the LOAD frame's `settings` describe.

    Raises:
        LoadError: the entry point cannot be found.
        Exception: whatever the user's code raises.
    """
    context = Context(
        settings["name"],
        settings["path"],
        settings["manifest"],
        settings["batch_size"],
        settings["device"],
        MMS_VERSION,
        model_config=settings.get("config"),
        instance=settings.get("instance", 0),
    )
    return MmsHandler(
        entry.find(settings["handler"], context),
        context,
        name=settings["handler"],
        isolate=settings["isolate_failures"],
        decode=settings["decode_input_request"],
    )


class MmsHandler:
    """A loaded model with MMS's calling convention: a list of dicts in, a list as long out."""

    def __init__(self, entry: Entry, context: Context, *, name: str, isolate: bool, decode: bool) -> None:
        self.signature = entry.signature
        self.completed_config = entry.completed
        self._call_entry = entry.call
        self._close_entry = entry.close
        self._ready_made = entry.close is not None  # sees for itself what a body is
        self._context = context
        self._module = entry.module
        self._name = name
        # Those of a handler that takes tensors; what another answers with, only its answers tell.
        self._known_outputs = [s.name for s in self.signature.outputs if self.signature.takes_tensors]
        self._isolate = isolate
        self._decode = decode
        self._begun = 0.0  # when the batch came: what clients had left counts from there
        self._rescued = 0  # batches in a row that had to be taken apart
        self._metrics = [context.metrics]  # of each call since they were last taken; the first is the load

    def run(self, items: list[Item], started: Started, emit: Emit) -> None:
        """Run a batch and emit one final outcome for each item."""
        self._begun = time.monotonic()
        good: list[tuple[Item, dict[str, Any]]] = []
        for item in items:
            try:
                good.append((item, self._data(item.request)))
            except InvalidRequest as error:
                emit([Outcome(item.job_id, error=error)])
        if not good:
            return
        try:
            emit(self._attempt(good))
            self._rescued = 0
            return
        except ServingError as error:
            # Code of a user's own is not called again when memory is short.
            spent = isinstance(error, OutOfMemory) and not self._ready_made
            if len(good) == 1 or not self._isolate or spent:
                emit([Outcome(item.job_id, error=error) for item, _ in good])
                return
        for item, _ in good:
            started([item.job_id])  # its own time-out
            emit(self._alone(item))
        self._count_rescue()

    def metric_lines(self, now_s: float, hostname: str) -> list[str]:
        """Return the metric lines of the calls since the last time, and forget them."""
        stores, self._metrics = self._metrics, []
        return [line for store in stores for line in store.lines(now_s, hostname)]

    def close(self) -> None:
        """Let go of the model, so that its destructors run while they can still log."""
        if self._close_entry is not None:
            self._close_entry()
        del self._call_entry, self._close_entry
        if self._module.__name__.startswith("mms_lite."):  # not the model's own, and shared by threads
            return
        names = vars(self._module)
        # Last things first: what a destructor uses stands above it.
        for name in [name for name in reversed(names) if name != "logging" and not name.startswith("__")]:
            names.pop(name, None)

    def _alone(self, item: Item) -> list[Outcome]:
        try:
            return self._attempt([(item, self._data(item.request))])
        except ServingError as error:
            return [Outcome(item.job_id, error=error)]

    def _count_rescue(self) -> None:
        self._rescued += 1
        if self._rescued == _RESCUES_BEFORE_WARNING:
            print(
                f"{self._rescued} batches in a row failed and were run again item by item: "
                f"does the handler {self._name} work with batches?",
                file=sys.stderr,
            )

    def _attempt(self, batch: list[tuple[Item, dict[str, Any]]]) -> list[Outcome]:
        """Call the handler once.

        Raises:
            ServingError: the call as a whole failed.
        """
        items = [item for item, _ in batch]
        context = self._context
        context.begin_batch(
            [item.request.id for item in items],
            [_headers(item.request) for item in items],
            [None if item.remaining_ms is None else self._begun + item.remaining_ms / 1000 for item in items],
            parameters=[item.request.parameters for item in items],
            outputs=[item.request.outputs for item in items],
        )
        self._metrics.append(context.metrics)
        called = time.perf_counter()
        result = self._call([data for _, data in batch])
        took_ms = (time.perf_counter() - called) * 1000
        if not isinstance(result, list):
            raise self._bad_answer(
                "Invalid model predict output", f"returned {type(result).__name__}, not a list"
            )
        if len(result) != len(items):
            raise self._bad_answer(
                "number of batch response mismatched",
                f"returned a list of {len(result)} for a batch of {len(items)}",
            )
        metrics = context.metrics
        if isinstance(metrics, MetricsStore):
            metrics.add_prediction_time(round(took_ms, 2))
        else:  # an object of the handler's own
            metrics.add_time("PredictionTime", round(took_ms, 2))
        return [self._outcome(index, items[index], value) for index, value in enumerate(result)]

    def _call(self, data: list[dict[str, Any]]) -> Any:
        try:
            return self._call_entry(data, self._context)
        except ServingError:  # of a ready-made handler, or one derived from it
            raise
        except PredictionException as error:
            message = "Prediction failed" if error.message is None else str(error.message)
            raise HandlerError(message, status=_status(error.error_code, 500, least=400)) from error
        except MemoryError as error:
            traceback.print_exc()
            raise OutOfMemory("Out of resources") from error
        except Exception as error:
            traceback.print_exc()
            raise HandlerError("Prediction failed") from error

    def _bad_answer(self, message: str, detail: str) -> HandlerError:
        print(f"handler {self._name} {detail}", file=sys.stderr)
        return HandlerError(message)

    def _data(self, request: InferRequest) -> dict[str, Any]:
        """Return what MMS handlers get for one request: a dict of its parts, decoded by content type.

        Raises:
            InvalidRequest: a part is not what its content type says.
        """
        return {part.name: self._value(part) for part in request.inputs}

    def _value(self, part: Tensor) -> Any:
        if _is_array(part):
            try:
                return _tensors().to_array(part)
            except ImportError as error:
                raise InvalidRequest(f"this model takes raw bodies, not tensors: {part.name!r}") from error
        if not self._decode:
            return part.data
        kind = part.content_type
        try:
            if kind == "application/json":
                return json.loads(part.data)
            if kind.startswith("text"):
                return part.data.decode("utf-8")
        except (ValueError, RecursionError) as error:
            if self._ready_made:
                return part.data
            raise InvalidRequest(f"the body is declared as {kind} and is not: {error}") from error
        return part.data

    def _outcome(self, index: int, item: Item, value: Any) -> Outcome:
        job_id = item.job_id
        outputs = self._sent(value, item.request)
        if isinstance(outputs, ServingError):
            return Outcome(job_id, error=outputs)
        try:
            status, reason, headers = self._context.response(index)
            parameters = self._context.response_parameters(index)
            if not (headers or reason):  # nearly always
                return Outcome(job_id, outputs, _status(status, 200), parameters=parameters)
            for text in itertools.chain([reason], *headers):
                text.encode("utf-8", "surrogateescape")  # else no frame can carry it
        except ValueError as error:
            traceback.print_exc()
            return Outcome(job_id, error=HandlerError(f"Invalid response header: {error}"))
        chosen = [value for name, value in headers if name.lower() == "content-type"]
        if chosen and outputs and not _is_array(outputs[0]):
            outputs = [replace(outputs[0], content_type=chosen[-1])]
        return Outcome(
            job_id,
            outputs=outputs,
            status=_status(status, 200),
            reason=reason,
            headers=[(name, value) for name, value in headers if name.lower() != "content-type"],
            parameters=parameters,
        )

    def _sent(self, value: Any, request: InferRequest) -> list[Tensor] | ServingError:
        """Return the outputs that go to the client, or its error."""
        if isinstance(value, ServingError):  # the answer of a ready-made handler to a bad request
            return value
        try:
            outputs = _outputs(value, request, known=bool(self._known_outputs))
        except MemoryError:
            traceback.print_exc()
            return OutOfMemory("Out of resources")
        except Exception:  # an answer's own methods may raise anything; its mates are fine
            traceback.print_exc()
            return HandlerError("Unsupported model output data type.")
        try:
            return self._wanted(outputs, request.outputs) if request.outputs else outputs
        except BadTensor as error:
            return error

    def _wanted(self, outputs: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """Return the outputs that a request names.

        Raises:
            BadTensor: the model has no such output. One that it knows and left out this time is left out.
        """
        found = {tensor.name: tensor for tensor in outputs}
        wanted_outputs.check(names, list(dict.fromkeys([*self._known_outputs, *found])))
        return list(wanted_outputs.pick(found, names).values())


def _headers(request: InferRequest) -> list[tuple[str, Any]]:
    """Return the headers that handlers see: as in MMS, first each part with its content type."""
    parts = [(part.name, {"content-type": part.content_type}) for part in request.inputs]
    return [*parts, *request.headers]


def _is_array(tensor: Tensor) -> bool:
    return tensor.datatype != BYTES or bool(tensor.shape)


@functools.cache
def _tensors() -> ModuleType:
    """Return what knows arrays, which needs numpy: a model of raw bodies may live without it."""
    return importlib.import_module("mms_lite.tensors")


def _outputs(value: Any, request: InferRequest, *, known: bool) -> list[Tensor]:
    """Return an answer's outputs: one raw body, or to a request of arrays what a dict of arrays holds.

    Where outputs are `known` to be arrays, a request without inputs is one, and an empty dict holds some.
    """
    asked = any(map(_is_array, request.inputs)) or (known and not request.inputs)
    if isinstance(value, dict) and asked and _holds_arrays(value, known):
        return [_tensors().to_tensor(name, array) for name, array in value.items()]
    data, kind = _body(value)
    return [Tensor("body", BYTES, (), data, kind)]


def _holds_arrays(value: dict[Any, Any], known: bool) -> bool:
    return (bool(value) or known) and all(hasattr(each, "dtype") for each in value.values())


def _body(value: Any) -> tuple[bytes | bytearray, str]:
    if isinstance(value, (bytes, bytearray)):
        return value, "application/octet-stream"
    if isinstance(value, str):
        return value.encode("utf-8"), "text/plain; charset=utf-8"
    return _pretty(value, "\n").encode("utf-8"), "application/json"


_compact = json.JSONEncoder().encode


def _pretty(value: Any, newline: str) -> str:
    """Return what `json.dumps(value, indent=2)` returns, which takes twice as long for want of C code.

    Raises:
        TypeError: the value is not one of JSON's.
        RecursionError: it contains itself.
    """
    inner = newline + "  "
    if isinstance(value, dict) and value:
        pairs = [f"{_key(key)}: {_pretty(item, inner)}" for key, item in value.items()]
        return "{" + inner + ("," + inner).join(pairs) + newline + "}"
    if isinstance(value, (list, tuple)) and value:
        return "[" + inner + ("," + inner).join([_pretty(item, inner) for item in value]) + newline + "]"
    return _compact(value)


def _key(key: Any) -> str:
    return _compact(key) if isinstance(key, str) else _compact({key: 0})[1:-4]


def _status(code: Any, default: int, *, least: int = 200) -> int:
    """Return a handler's status code if it is one of `least` to 599."""
    try:
        number = int(code)
    except (TypeError, ValueError):
        return default
    return number if least <= number <= 599 else default
