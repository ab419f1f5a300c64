"""Report metrics past `context.metrics`: printed by hand, and through mms.service."""

import sys

from mms.metrics.dimension import Dimension
from mms.metrics.metric import Metric
from mms.service import emit_metrics


def handle(data, context):
    if data is None:
        return None
    print("[METRICS]Depth.Count:3|#Level:Model,Kind:tree|#hostname:here,1795243439,id-1,id-2")
    print("[METRICS] forgot the rest")
    emit_metrics([Metric("Rows", 7, "count", [Dimension("Level", "Model")], "id-3")])
    print("ordinary")
    print("a warning", file=sys.stderr)
    sys.stdout.flush()
    return [b"done" for _ in data]
