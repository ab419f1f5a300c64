"""What a worker prints: lines of the log, or metrics in the form that MMS's workers print them.

Apart from the launcher, which knows processes: this knows lines, their length and what they mean.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import deque

from mms_lite.logs import MODEL, MODEL_METRICS

_MAX_LINE_BYTES = 16 * 1024
# What MMS's workers print of a metric, by hand or through mms.service.emit_metrics:
# [METRICS]Name.Unit:value|#Dimension:value,...|#hostname:H,SECONDS[,request ids]
_METRICS_MARK = "[METRICS]"
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_METRIC = re.compile(
    rf"(?P<metric>[^#,:|]+\.(?:[^#,:|.]+:{_NUMBER}|Error:[^|]*)\|#[^|]*)"
    r"\|#hostname:(?P<host>[^,|]+),(?P<time>\d+)(?:\.\d+)?(?:,(?P<ids>[^|]+))?"
)

_log = logging.getLogger(MODEL)
_metrics_log = logging.getLogger(MODEL_METRICS)


def metric_line(text: str) -> str | None:
    """Return the line of model_metrics.log for a metric that a worker printed; None if it is none."""
    if not text.startswith(_METRICS_MARK):
        return None
    match = _METRIC.fullmatch(text.removeprefix(_METRICS_MARK).strip())
    if match is None:
        return None
    ids = f",requestID:{match['ids']}" if match["ids"] else ""
    return f"{match['metric']}|#hostname:{match['host']}{ids},timestamp:{match['time']}"


class LineReader:
    """Logs a worker's output line by line and keeps the last lines; metrics go to their own log."""

    def __init__(self, fd: int, last: deque[str], name: str, level: int) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fd = os.dup(fd)
        self._last = last
        self._name = name
        self._level = level
        self._rest = b""

    def start(self) -> None:
        """Read on the running loop, until the pipe ends."""
        os.set_blocking(self._fd, False)
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 64 * 1024)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._rest and (not data or len(self._rest) > _MAX_LINE_BYTES):
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._emit(line)
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self.finished.set_result(None)

    def _emit(self, line: bytes) -> None:
        text = line[:_MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r")
        stream = "stdout" if self._level == logging.INFO else "stderr"
        extra = {"thread_name": f"{self._name}-{stream}"}
        if metric := metric_line(text):
            _metrics_log.info("%s", metric, extra=extra)
        else:
            self._last.append(text)
            _log.log(self._level, "%s", text, extra=extra)
