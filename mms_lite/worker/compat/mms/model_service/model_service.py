"""mms.model_service.model_service: base classes of MMS 0.x services (deprecated)."""

import ast
import json
import logging
import os
import time
from typing import Any


class ModelService:
    """A service as 0.x archives define it: constructed, then `initialize(context)`, then `handle`."""

    def __init__(self, model_name: str, model_dir: str, manifest: Any, gpu: int | None = None) -> None:
        self.ctx: Any = None
        self._context: Any = None
        self._signature: Any = None

    def initialize(self, context: Any) -> None:
        """Read the signature file that the manifest names.

        Raises: ValueError if it is missing.
        """
        self._context = context
        model_dir = context.system_properties["model_dir"]
        name = context.manifest["Model"].get("Signature")
        path = os.path.join(model_dir, name or "")
        if not os.path.isfile(path):
            raise ValueError("Signature file is not found.")
        with open(path, encoding="utf-8") as file:
            self._signature = json.load(file)

    def inference(self, data: list[Any]) -> Any:
        """Return the answer to one request's inputs; a subclass defines it."""
        raise NotImplementedError

    def ping(self) -> Any:
        """Return a sign of health; a subclass may define it."""
        return None

    def signature(self) -> Any:
        """Return the signature as read."""
        return self._signature

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Answer the batch's first request, the only one there is: 0.x models have batch size 1.

        The input is the part that the signature's first input names, else "body", else "data".
        """
        names = (self._signature["inputs"][0]["data_name"], "body", "data")
        given = next((data[0][name] for name in names if data[0].get(name) is not None), None)
        if self._signature.get("input_type") == "application/json" and isinstance(given, (bytes, bytearray)):
            given = _literal(given.decode("utf-8"))
        answer = self.inference([given])
        return answer if isinstance(answer, list) else [answer]


class SingleNodeService(ModelService):
    """A service in three steps, each of which a subclass may replace."""

    def inference(self, data: list[Any]) -> Any:
        """Run the three steps and log how long each took, in milliseconds."""
        for name, step in (
            ("preprocess", self._preprocess),
            ("inference", self._inference),
            ("postprocess", self._postprocess),
        ):
            start_s = time.perf_counter()
            data = step(data)
            logging.info("%s time: %.2f", name, (time.perf_counter() - start_s) * 1000)
        return data

    def _preprocess(self, data: Any) -> Any:
        return data

    def _inference(self, data: Any) -> Any:
        return data

    def _postprocess(self, data: Any) -> Any:
        return data


def _literal(text: str) -> Any:
    """Return JSON, or the Python literal that MMS's clients could send in its place."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)
