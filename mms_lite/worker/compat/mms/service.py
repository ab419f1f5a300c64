"""mms.service: the exception that handlers raise, and the small rest that their tests use."""

import logging
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import mms

from mms_lite.worker.context import Context, PredictionException

__all__ = ["PREDICTION_METRIC", "PredictionException", "Service", "emit_metrics"]

PREDICTION_METRIC = "PredictionTime"

logger = logging.getLogger(__name__)


class Service:
    """An entry point and its context, for trying a handler without a server."""

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Any,
        entry_point: Callable[[Any, Context], Any],
        gpu: int | None,
        batch_size: int,
    ) -> None:
        self._context = Context(model_name, model_dir, manifest, batch_size, gpu, mms.__version__)
        self._entry_point = entry_point

    @property
    def context(self) -> Context:
        """The context that the entry point is given."""
        return self._context

    def predict(self, batch: list[dict[str, Any]]) -> Any:
        """Call the entry point with a batch as handlers see it, under new request ids and without headers."""
        ids = [str(uuid.uuid4()) for _ in batch]
        self._context.begin_batch(ids, [()] * len(batch))
        return self._entry_point(batch, self._context)


def emit_metrics(metrics: Iterable[Any]) -> None:
    """Log each metric after `[METRICS]`, the mark by which the server tells metrics from other output."""
    for metric in metrics or ():
        logger.info("[METRICS]%s", metric)
