"""The log files of MMS, their line formats, and what keeps a slow or full disk away from serving.

Callers use stdlib loggers below `mms_lite`; the server alone calls `configure`. Lines are written by two
threads of their own, one for the files and one for the console, so that neither can hold up the event loop
or the other. A line is one record: control characters in a message are escaped, so no client forges one.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import cast

from mms_lite.errors import ConfigError
from mms_lite.rotation import RotatingFile

ACCESS = "mms_lite.access"
MODEL = "mms_lite.model"
MODEL_METRICS = "mms_lite.model_metrics"
METRICS = "mms_lite.metrics"

_OWN_FILES = {ACCESS: "access_log.log", MODEL_METRICS: "model_metrics.log", METRICS: "mms_metrics.log"}
_MAIN_FILE = "mms_log.log"
_EMPTY_FILE = "model_log.log"  # MMS makes it and writes nothing to it; what follows it must find it
_WAITING_RECORDS = 20_000  # per writer; what comes on top is dropped and counted
_CLOSE_S = 3.0
_GATHER_S = 0.05
_MILLISECONDS = [f"{ms:03d}" for ms in range(1000)]
_LEVEL_NAMES = {"WARNING": "WARN", "CRITICAL": "FATAL"}  # as log4j spells them
_REQUESTS = {"2": "Requests2XX", "4": "Requests4XX"}  # by a status's first digit; any other is 5XX in MMS
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # a tab may stay


def access_line(remote: str, method: str, raw_path: str, version: str, status: int, ms: int) -> str:
    """Return the message of one access log line; version like "HTTP/1.1".

    `remote` is `host:port`, or "" for the client of a Unix socket.
    """
    path = raw_path.replace('"', "%22")  # a quote in the path would end the field
    return f'/{remote or "0.0.0.0"} "{method} {path} {version}" {status} {ms}'


def configure(
    log_dir: Path, metrics_dir: Path, *, console: bool = True, level: int = logging.INFO
) -> LogRouter:
    """Send everything logged to the files of MMS and, from INFO on, to stdout; close() ends it.

    `level` is that of the loggers below `mms_lite`; the access log and the metrics are always written.
    An earlier configuration is replaced.

    Raises:
        ConfigError: a folder cannot be made or written.
    """
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, LogRouter)]:
        earlier.close()
    sinks = [_Sink("log-files", _open_files(log_dir, metrics_dir))]
    if console:
        sinks.append(_Sink("log-console", [_Console()]))
    router = LogRouter(sinks)
    levels = {"": max(level, logging.INFO), "mms_lite": level, **dict.fromkeys(_OWN_FILES, logging.INFO)}
    router.start(levels)
    return router


def _open_files(log_dir: Path, metrics_dir: Path) -> list[logging.Handler]:
    files: list[_LogFile] = []
    folder = log_dir
    try:
        for name in (None, *_OWN_FILES):
            folder = metrics_dir if name in (MODEL_METRICS, METRICS) else log_dir
            folder.mkdir(parents=True, exist_ok=True)
            kind = _MetricsFile if name == METRICS else _LogFile
            files.append(kind(folder / (_OWN_FILES[name] if name else _MAIN_FILE), name))
            files[-1].open()
        folder = log_dir
        (log_dir / _EMPTY_FILE).touch()
    except OSError as err:
        for file in files:
            file.close()
        raise ConfigError(f"log folder {folder} cannot be written: {err.strerror}") from err
    return [*files]


class _AccessLine:
    """What the formatter needs of a LogRecord, for the one line that every request costs."""

    __slots__ = ("created", "message")
    name = ACCESS
    levelno = logging.INFO
    levelname = "INFO"
    threadName = "http"
    exc_text = None

    def __init__(self, message: str) -> None:
        self.message = message
        self.created = time.time()


class LogRouter(logging.Handler):
    """The one handler on the root logger: completes each record and hands it to the writing threads."""

    def __init__(self, sinks: list[_Sink]) -> None:
        super().__init__()
        self._sinks = sinks
        self._levels_before: dict[str, int] = {}

    def start(self, levels: dict[str, int]) -> None:
        """Start the threads and take over the root logger, with `levels` by logger name."""
        for name, level in levels.items():
            self._levels_before[name] = logging.getLogger(name).level
            logging.getLogger(name).setLevel(level)
        for sink in self._sinks:
            sink.start()
        # No line tells the source file or the process: looking them up is half of a log call's cost.
        logging.logProcesses = logging.logMultiprocessing = False
        logging._srcfile = None
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record; never blocks, never raises."""
        # The two attributes where stdlib formatters keep the same texts. Made here, because arguments may
        # change later and a queued traceback would keep request bodies alive.
        try:
            record.message = record.getMessage()
            if record.exc_info and not record.exc_text:
                record.exc_text = logging.Formatter().formatException(record.exc_info)
        except Exception as err:  # whatever an argument's __str__ raises: a bad log call is no failed request
            record.message = f"{record.msg} (could not be formatted: {type(err).__name__})"
        for sink in self._sinks:
            sink.put(record)

    def access(self, line: str) -> None:
        """Queue a line of the access log. Cheaper than its logger, by a fifth of a small request's cost."""
        record = _AccessLine(line)
        for sink in self._sinks:
            sink.put(record)

    def close(self) -> None:
        """Write what waits, for a few seconds at most, close the files, give the root logger back."""
        logging.getLogger().removeHandler(self)
        for name, level in self._levels_before.items():
            logging.getLogger(name).setLevel(level)
        self._levels_before = {}
        for sink in self._sinks:
            sink.close()
        super().close()


class _Sink:
    """A thread that writes records to its handlers; records it has no room for are dropped and counted."""

    def __init__(self, name: str, handlers: list[logging.Handler]) -> None:
        self._handlers = handlers
        self._queue: SimpleQueue[logging.LogRecord | _AccessLine | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._dropped = 0
        self._reported = 0
        self._closed = False
        self._closing = Event()

    def start(self) -> None:
        self._thread.start()

    def put(self, record: logging.LogRecord | _AccessLine) -> None:
        if self._queue.qsize() < _WAITING_RECORDS:
            self._queue.put(record)
        else:
            self._dropped += 1

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._closing.set()
        self._queue.put(None)
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():  # else it hangs in a write, and closing would hang as well
            for handler in self._handlers:
                handler.close()

    def _run(self) -> None:
        open_ended = True
        while open_ended:
            record = self._queue.get()
            # Lines are gathered for a moment: one wake-up and one flush for many of them leave the serving
            # thread alone.
            self._closing.wait(_GATHER_S)
            while record is not None:
                self._write(record)
                if self._queue.empty():
                    break
                record = self._queue.get()
            open_ended = record is not None
            if self._dropped > self._reported:
                self._report_dropped()
            for handler in self._handlers:
                handler.flush()

    def _write(self, line: logging.LogRecord | _AccessLine) -> None:
        record = cast(logging.LogRecord, line)
        for handler in self._handlers:
            # Not handle(): only this thread writes, and a lock held in a hanging write would block exit.
            if record.levelno >= handler.level and handler.filter(record):
                handler.emit(record)

    def _report_dropped(self) -> None:
        count, self._reported = self._dropped - self._reported, self._dropped
        record = logging.LogRecord(
            __name__, logging.WARNING, __file__, 0, "%d log lines were dropped", (count,), None
        )
        record.message = record.getMessage()
        self._write(record)


class _LineFormatter(logging.Formatter):
    """`TIME [LEVEL] thread logger - message`, or `TIME - message` where the file says the rest."""

    def __init__(self, *, bare: bool = False) -> None:
        super().__init__()
        self._bare = bare
        self._second = -1
        self._stamp = ""  # of that second

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the local time as log4j writes it: ISO 8601 with a comma before the milliseconds."""
        second = int(record.created)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S,", time.localtime(second))
        return self._stamp + _MILLISECONDS[int(record.created % 1 * 1000)]

    def format(self, record: logging.LogRecord) -> str:
        head = self.formatTime(record)
        if not self._bare:
            level = _LEVEL_NAMES.get(record.levelname, record.levelname)
            thread = getattr(record, "thread_name", None) or record.threadName
            head += f" [{level:<5}] {_escape(str(thread))} {record.name}"
        if lines := getattr(record, "lines", None):  # several lines of one moment in one record
            return "\n".join([f"{head} - {_escape(line)}" for line in lines])
        line = f"{head} - {_escape(record.message)}"
        if not record.exc_text:
            return line
        # Indented, a traceback's lines cannot pass for records, whatever an exception's text holds.
        return "\n    ".join([line, *map(_escape, record.exc_text.splitlines())])


def _escape(text: str) -> str:
    if text.isprintable():  # nearly always, and told at a tenth of the pattern's cost
        return text
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _RequestsFormatter(_LineFormatter):
    """What mms_metrics.log has of each line of the access log: MMS's count of one answer."""

    def __init__(self) -> None:
        super().__init__(bare=True)
        self._hostname = socket.gethostname()
        self._counted_second = -1
        self._counts: dict[str, str] = {}  # of that second, by a status's first digit

    def format(self, record: logging.LogRecord) -> str:
        if record.name != ACCESS:
            return super().format(record)
        words = record.message.rsplit(" ", 2)  # ..., status, milliseconds
        if len(words) < 3 or not words[1].isdigit():
            return ""
        second = int(record.created)
        if second != self._counted_second:
            self._counted_second, self._counts = second, {}
        digit = words[1][0]
        if digit not in self._counts:
            name = _REQUESTS.get(digit, "Requests5XX")
            stamp = f"#hostname:{self._hostname},timestamp:{second}"
            self._counts[digit] = f"{name}.Count:1|#Level:Host|{stamp}"
        return f"{self.formatTime(record)} - {self._counts[digit]}"


class _LogFile(logging.Handler):
    """The file of one logger, or of all that have none of their own; survives a full disk."""

    def __init__(self, path: Path, logger: str | None) -> None:
        super().__init__()
        self.setFormatter(_LineFormatter(bare=logger is not None))
        self._file = RotatingFile(path)
        self._logger = logger
        self._complained = False

    def open(self) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be opened.
        """
        self._file.open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if line := self.format(record):
                self._file.write(f"{line}\n".encode(), record.created)
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        try:
            self._file.flush()
        except (OSError, ValueError):
            self.handleError(logging.makeLogRecord({}))

    def close(self) -> None:
        self._file.close()
        super().close()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name == self._logger if self._logger else record.name not in _OWN_FILES

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._complained:
            self._complained = True
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(f"cannot write {self._file.path}: {sys.exc_info()[1]}\n")


class _MetricsFile(_LogFile):
    """mms_metrics.log: its logger's lines, and one for each line of the access log.

    Made here, on the writing thread, they cost a request nothing, and no line is dropped without the other.
    """

    def __init__(self, path: Path, logger: str | None) -> None:
        super().__init__(path, logger)
        self.setFormatter(_RequestsFormatter())

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name in (METRICS, ACCESS)


class _Console(logging.Handler):
    """Standard output, past Python's buffer: its lock, held in a hanging write, would abort the exit."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(_LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        data = (self.format(record) + "\n").encode()
        with suppress(OSError):  # nobody reads any more
            while data:
                data = data[os.write(1, data) :]


_LOG4J_LEVELS = {
    "all": logging.DEBUG,
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "off": logging.CRITICAL + 10,
}
_MMS_LOGGER = "com.amazonaws.ml.mms"


def log_config_level(file: Path) -> tuple[int | None, str]:
    """Return the level of MMS's or else the root logger in a log4j file, and a note if there is none.

    Read with patterns, as text: no XML parser, so no entities. Appenders and layouts are not looked at.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(64 * 1024).decode("utf-8", "replace")
    except OSError as err:
        return None, f"--log-config {file} cannot be read: {err.strerror}"
    found = _xml_levels(text) if text.lstrip("\ufeff \t\r\n").startswith("<") else _property_levels(text)
    for name in (_MMS_LOGGER, "root"):
        level = _LOG4J_LEVELS.get(found.get(name, "").lower())
        if level is not None:
            return level, ""
    return None, f"--log-config {file}: no level of {_MMS_LOGGER} or the root logger found; ignored"


def _xml_levels(text: str) -> dict[str, str]:
    levels = {}
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # log4j2 has the level as an attribute, log4j 1 as an element right after the tag.
    tags = r"<(?:Async)?(Logger|Root)\b([^<>]*)>\s*(<(?:level|priority)\b[^<>]*>)?"
    for kind, attributes, child in re.findall(tags, text, re.IGNORECASE):
        name = re.search(r"""\bname\s*=\s*["']([^"']*)""", attributes)
        level = re.search(r"""\b(?:level|value)\s*=\s*["'](\w+)["']""", attributes + child)
        if level and (name or kind.lower() == "root"):
            levels["root" if name is None else name[1]] = level[1]
    return levels


def _property_levels(text: str) -> dict[str, str]:
    entries = dict(re.findall(r"^[ \t]*([\w.]+)[ \t]*[=:][ \t]*([\w.]+)", text, re.MULTILINE))
    levels = {}
    for key, value in entries.items():
        if key in ("log4j.rootLogger", "log4j.rootCategory", "rootLogger", "rootLogger.level"):
            levels["root"] = value
        elif key.startswith("log4j.logger."):
            levels[key.removeprefix("log4j.logger.")] = value
        elif key.startswith("logger.") and key.endswith(".name"):
            levels[value] = entries.get(key.removesuffix("name") + "level", "")
    return levels
