"""Finding a handler: the entry point that a manifest names, in the archive, installed, or ready-made.

Apart from `handler`, which calls what is found here.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mms_lite.errors import BackendMissing, LoadError
from mms_lite.types import Signature
from mms_lite.worker import sources
from mms_lite.worker.context import Context

Call = Callable[[Any, Context], Any]

# Handlers that need no code in the archive; a file of the same name in it comes first. Models of a Triton
# repository have no handlers of their own: there such a file is a module as any.
READY_MADE = {
    "image_classifier": "ImageClassifier",
    "object_detector": "ObjectDetector",
    "tensor": "TensorHandler",
    "text_detector": "TextDetector",
    "text_embedder": "TextEmbedder",
    "text_recognizer": "TextRecognizer",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A handler that has loaded its model; `close` is set for ready-made ones and those derived from them.

    The signature is empty where it takes raw bodies only. `completed` is what the model adds to its
    configuration in a Triton repository.
    """

    call: Call
    module: ModuleType
    signature: Signature = field(default_factory=Signature)
    close: Callable[[], None] | None = None
    completed: Mapping[str, Any] = field(default_factory=dict)


def find(handler: str, context: Context) -> Entry:
    """Find the entry point and have it load the model of `context`.

    Raises:
        LoadError: it cannot be found.
        Exception: whatever the user's code raises.
    """
    path = context.system_properties["model_dir"]
    in_repository = context.model_config is not None
    if handler in READY_MADE and (in_repository or not os.path.isfile(os.path.join(path, f"{handler}.py"))):
        module = _ready_made(handler)
        handler = f"{handler}:{READY_MADE[handler]}"
    else:
        module = _import(handler.partition(":")[0], path)
    return _entry_point(module, handler, context)


def _ready_made(handler: str) -> ModuleType:
    try:
        return importlib.import_module(f"mms_lite.handlers.{handler}")
    except ModuleNotFoundError as error:
        advice = "pip install 'mms-lite[handlers]'"
        raise BackendMissing(
            f"the handler {handler} needs {error.name}, which is not installed: {advice}"
        ) from error


def _entry_point(module: ModuleType, handler: str, context: Context) -> Entry:
    """Find the entry, `module[:function]` or the module's one class as in MMS, and have it load the model."""
    function = handler.partition(":")[2] or "handle"
    cls = _legacy_class(module) if _is_legacy(context.manifest) else None
    if cls is not None:
        properties = context.system_properties
        service = cls(context.model_name, properties["model_dir"], context.manifest, properties["gpu_id"])
    else:
        entry = getattr(module, function, None)
        if entry is not None and not inspect.isclass(entry):
            entry(None, context)  # MMS's convention: a first call without data loads the model
            return Entry(entry, module)
        cls = entry if entry is not None else _only_class(module, handler, function)
        service = cls()
    for method in ("initialize", "handle"):
        if not callable(getattr(service, method, None)):
            raise LoadError(f"class {cls.__name__} of handler {handler} has no method {method!r}")
    service.initialize(context)
    signature = getattr(service, "signature", None)
    if isinstance(signature, Signature):
        completed = getattr(service, "completed_config", {})
        return Entry(service.handle, module, signature, service.close, completed)
    return Entry(service.handle, module)


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
    return sources.import_file(name, source)
