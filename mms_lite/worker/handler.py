"""How user code is called: find its entry, build `data`, call `handle(data, context)`, check its answer.

One bad item fails alone: when a batch fails, each of its items is run once by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from mms_lite.errors import HandlerError, InvalidRequest, LoadError, OutOfMemory, ServingError
from mms_lite.types import BYTES, InferRequest, Tensor
from mms_lite.wire import Item, Outcome
from mms_lite.worker.context import Context, PredictionException

_RESCUES_BEFORE_WARNING = 3
MMS_VERSION = "1.1.11"  # the version of MMS whose behaviour handlers see

Started = Callable[[Iterable[int]], None]
Emit = Callable[[Sequence[Outcome]], None]
Entry = Callable[[Any, Context], Any]


def load(settings: dict[str, Any]) -> MmsHandler:
    """Load the model that the LOAD frame's `settings` describe.

    Raises:
        LoadError: the entry point cannot be found.
        Exception: whatever the user's code raises.
    """
    path, handler = settings["path"], settings["handler"]
    context = Context(
        settings["name"], path, settings["manifest"], settings["batch_size"], settings["device"], MMS_VERSION
    )
    module = _import(handler.partition(":")[0], path)
    return MmsHandler(
        _entry_point(module, handler, context),
        context,
        module,
        name=handler,
        isolate=settings["isolate_failures"],
        decode=settings["decode_input_request"],
    )


def _entry_point(module: ModuleType, handler: str, context: Context) -> Entry:
    """Find the entry and load the model (MMS: `module[:function]`, or the module's one class)."""
    function = handler.partition(":")[2] or "handle"
    cls = _legacy_class(module) if _is_legacy(context.manifest) else None
    if cls is not None:
        properties = context.system_properties
        service = cls(context.model_name, properties["model_dir"], context.manifest, properties["gpu_id"])
    else:
        entry = getattr(module, function, None)
        if entry is not None and not inspect.isclass(entry):
            entry(None, context)  # MMS's convention: a first call without data loads the model
            return entry  # type: ignore[no-any-return]
        cls = entry if entry is not None else _only_class(module, handler, function)
        service = cls()
    for method in ("initialize", "handle"):
        if not callable(getattr(service, method, None)):
            raise LoadError(f"class {cls.__name__} of handler {handler} has no method {method!r}")
    service.initialize(context)
    return service.handle  # type: ignore[no-any-return]


def _is_legacy(manifest: Any) -> bool:
    """Tell a manifest of MMS 0.x, whose keys are capitalised."""
    return manifest is not None and "Model" in manifest and "model" not in manifest


def _legacy_class(module: ModuleType) -> Any:
    """Return the module's first class, by name as in MMS, that is a service of MMS 0.x; None without one."""
    bases = sys.modules.get("mms.model_service.model_service")  # imported if one is derived from it
    services = [cls for cls in _own_classes(module) if bases and issubclass(cls, bases.ModelService)]
    return min(services, key=lambda cls: cls.__name__, default=None)


def _own_classes(module: ModuleType) -> list[type]:
    own = [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]
    return list(dict.fromkeys(own))


def _only_class(module: ModuleType, handler: str, function: str) -> Any:
    own = _own_classes(module)
    if len(own) != 1:
        names = ", ".join(sorted(c.__name__ for c in own)) or "none"
        raise LoadError(
            "Expected only one class in custom service code or a function entry point: "
            f"{handler} has no function {function!r}, and these classes: {names}"
        )
    return own[0]


def _import(file: str, path: str) -> ModuleType:
    """Import a handler's module: its file in the model's folder if there is one, else by name."""
    stem = file[:-3] if file.endswith(".py") else file
    name = stem.replace("\\", "/").rsplit("/", 1)[-1]
    source = os.path.join(path, stem + ".py")
    if not os.path.isfile(source):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise LoadError(
                f"the handler's module {name!r} is neither in the archive nor installed"
            ) from error
    if name in sys.modules:
        name = f"handler_{name}"  # a model may name its file as the standard library names a module
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise LoadError(f"the handler {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # as an import statement would
        raise
    return module


class MmsHandler:
    """A loaded model with MMS's calling convention: a list of dicts in, a list as long out."""

    def __init__(
        self, entry: Entry, context: Context, module: ModuleType, *, name: str, isolate: bool, decode: bool
    ) -> None:
        self._entry = entry
        self._context = context
        self._module = module
        self._name = name
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
            if len(good) == 1 or not self._isolate or isinstance(error, OutOfMemory):
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
        del self._entry
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
        context.metrics.add_time("PredictionTime", round(took_ms, 2))
        return [self._outcome(index, items[index].job_id, value) for index, value in enumerate(result)]

    def _call(self, data: list[dict[str, Any]]) -> Any:
        try:
            return self._entry(data, self._context)
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
        if part.datatype != BYTES or part.shape:
            raise InvalidRequest(f"this model takes raw bodies, not tensors: {part.name!r}")
        if not self._decode:
            return part.data
        kind = part.content_type
        try:
            if kind == "application/json":
                return json.loads(part.data)
            if kind.startswith("text"):
                return part.data.decode("utf-8")
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the body is declared as {kind} and is not: {error}") from error
        return part.data

    def _outcome(self, index: int, job_id: int, value: Any) -> Outcome:
        try:
            data, kind = _body(value)
        except MemoryError:
            traceback.print_exc()
            return Outcome(job_id, error=OutOfMemory("Out of resources"))
        except Exception:  # an answer's own methods may raise anything; its mates are fine
            traceback.print_exc()
            return Outcome(job_id, error=HandlerError("Unsupported model output data type."))
        try:
            status, reason, headers = self._context.response(index)
            for text in itertools.chain([reason], *headers):
                text.encode("utf-8", "surrogateescape")  # else no frame can carry it
        except ValueError as error:
            traceback.print_exc()
            return Outcome(job_id, error=HandlerError(f"Invalid response header: {error}"))
        chosen = [value for name, value in headers if name.lower() == "content-type"]
        return Outcome(
            job_id,
            outputs=[Tensor("body", BYTES, (), data, chosen[-1] if chosen else kind)],
            status=_status(status, 200),
            reason=reason,
            headers=[(name, value) for name, value in headers if name.lower() != "content-type"],
        )


def _headers(request: InferRequest) -> list[tuple[str, Any]]:
    """Return the headers that handlers see: as in MMS, first each part with its content type."""
    parts = [(part.name, {"content-type": part.content_type}) for part in request.inputs]
    return [*parts, *request.headers]


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
