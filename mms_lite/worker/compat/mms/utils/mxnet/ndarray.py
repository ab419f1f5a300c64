"""mms.utils.mxnet.ndarray: class scores to labels."""

from typing import Any


def top_probability(data: Any, labels: list[str], top: int = 5) -> list[dict[str, Any]]:
    """Return the best labels of row 0 of data, an NDArray (batch, classes) or (batch, classes, 1, …)."""
    scores = data.reshape(data.shape[:2])[0].asnumpy().tolist()
    best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top]
    return [{"probability": scores[i], "class": labels[i]} for i in best]
