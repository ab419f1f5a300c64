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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
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
_WAITING_RECORDS = 50_000  # per writer, about 250 bytes each; what comes on top is dropped and counted
_TOGETHER = 1000  # lines made and written at once: well below a millisecond without a turn for the others
_CLOSE_S = 3.0
_GATHER_S = 0.1
_LEVEL_NAMES = {"WARNING": "WARN", "CRITICAL": "FATAL"}  # as log4j spells them
_REQUESTS = {2: "Requests2XX", 4: "Requests4XX"}  # by a status's first digit; any other is 5XX in MMS
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # a tab may stay

Access = tuple[int, int, str]  # milliseconds of the epoch, status, line


def access_line(remote: str, method: str, raw_path: str, version: str, status: int, ms: int) -> str:
    """Return the message of one access log line; version like "HTTP/1.1".

    `remote` is `host:port`, or "" for the client of a Unix socket.
    """
    path = raw_path.replace('"', "%22")  # a quote in the path would end the field
    return _escape(f'/{remote or "0.0.0.0"} "{method} {path} {version}" {status} {ms}')


def log_access(remote: str, method: str, raw_path: str, version: str, status: int, ms: int) -> None:
    """Write a line of the access log through its logger, for servers without a `LogRouter`."""
    logging.getLogger(ACCESS).info("%s", access_line(remote, method, raw_path, version, status, ms))


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


def _open_files(log_dir: Path, metrics_dir: Path) -> list[_LogFile]:
    files: list[_LogFile] = []
    folder = log_dir
    try:
        for name in (None, *_OWN_FILES):
            folder = metrics_dir if name in (MODEL_METRICS, METRICS) else log_dir
            folder.mkdir(parents=True, exist_ok=True)
            kind = {ACCESS: _AccessFile, METRICS: _MetricsFile}.get(name or "", _LogFile)
            files.append(kind(folder / (_OWN_FILES[name] if name else _MAIN_FILE), name))
            files[-1].open()
        folder = log_dir
        (log_dir / _EMPTY_FILE).touch()
    except OSError as err:
        for file in files:
            file.close()
        raise ConfigError(f"log folder {folder} cannot be written: {err.strerror}") from err
    return files


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
        """Leave the record to the writing threads; never blocks, never raises."""
        # The two attributes where stdlib formatters keep the same texts. Made here, because arguments may
        # change later and a waiting traceback would keep request bodies alive.
        try:
            record.message = record.getMessage()
            if record.exc_info and not record.exc_text:
                record.exc_text = logging.Formatter().formatException(record.exc_info)
        except Exception as err:  # whatever an argument's __str__ raises: a bad log call is no failed request
            record.message = f"{record.msg} (could not be formatted: {type(err).__name__})"
        for sink in self._sinks:
            sink.put(record)

    def log_access(self, remote: str, method: str, raw_path: str, version: str, status: int, ms: int) -> None:
        """Write a line of the access log, past its logger: nothing else is written for every request."""
        line = access_line(remote, method, raw_path, version, status, ms)
        entry = (time.time_ns() // 1_000_000, status, line)
        for sink in self._sinks:
            sink.put(entry)

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
    """A thread that writes to its outputs; what they have no room for is dropped and counted."""

    def __init__(self, name: str, outputs: Sequence[_LogFile | _Console]) -> None:
        self._outputs = outputs
        # Appended to here, cut off at the front by the thread: each of the two is one step under the GIL.
        self._waiting: list[logging.LogRecord | Access] = []
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._dropped = 0
        self._reported = 0
        self._closed = False
        self._closing = Event()
        self._asleep = False
        self._wake: SimpleQueue[None] = (
            SimpleQueue()
        )  # no lock: a destructor may log in the middle of a put()

    def start(self) -> None:
        self._thread.start()

    def put(self, entry: logging.LogRecord | Access) -> None:
        if len(self._waiting) < _WAITING_RECORDS:
            self._waiting.append(entry)
            if self._asleep:
                self._asleep = False
                self._wake.put(None)
        else:
            self._dropped += 1

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._closing.set()
        self._wake.put(None)
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():  # else it hangs in a write, and closing would hang as well
            for output in self._outputs:
                output.close()

    def _run(self) -> None:
        open_ended = True
        while open_ended:
            self._asleep = True
            if not self._waiting:  # looked at after that, as put() looks after its append: none goes unseen
                self._wake.get()
            self._asleep = False
            # Lines are gathered for a moment: one wake-up and one write for many of them leave the serving
            # thread alone.
            self._closing.wait(_GATHER_S)
            open_ended = not self._closing.is_set()
            while self._write_some():
                pass

    def _write_some(self) -> bool:
        """Write what waits, up to a limit; say whether it was reached."""
        entries = self._waiting[:_TOGETHER]
        del self._waiting[: len(entries)]
        for kind, run in groupby(entries, type):
            if kind is tuple:
                lines = cast(list[Access], list(run))
                for output in self._outputs:
                    output.write_access(lines)
            else:
                for record in run:
                    self._write_record(cast(logging.LogRecord, record))
        if self._dropped > self._reported:
            self._report_dropped()
        for output in self._outputs:
            output.flush()
        return len(entries) == _TOGETHER

    def _write_record(self, record: logging.LogRecord) -> None:
        for output in self._outputs:
            output.write_record(record)

    def _report_dropped(self) -> None:
        count, self._reported = self._dropped - self._reported, self._dropped
        record = logging.LogRecord(
            __name__, logging.WARNING, __file__, 0, "%d log lines were dropped", (count,), None
        )
        record.message = record.getMessage()
        self._write_record(record)


@lru_cache(maxsize=1024)
def _stamp(ms: int) -> str:
    """Return the local time as log4j writes it: ISO 8601 with a comma before the milliseconds."""
    return f"{_second_stamp(ms // 1000)},{ms % 1000:03d}"


@lru_cache(maxsize=2)
def _second_stamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(second))


def _escape(text: str) -> str:
    if text.isprintable():  # nearly always, and told at a tenth of the pattern's cost
        return text
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _record_text(record: logging.LogRecord, *, bare: bool = False) -> str:
    """Return `TIME [LEVEL] thread logger - message`, or `TIME - message` where the file says the rest."""
    head = _stamp(int(record.created * 1000))
    if not bare:
        level = _LEVEL_NAMES.get(record.levelname, record.levelname)
        thread = getattr(record, "thread_name", None) or record.threadName
        head += f" [{level:<5}] {_escape(str(thread))} {record.name}"
    lines = getattr(record, "lines", None) or [record.message]  # many of one moment may be one record
    if not "".join(lines).isprintable():
        lines = [_escape(line) for line in lines]
    # Indented, a traceback's lines cannot pass for records, whatever an exception's text holds.
    traceback = [f"    {_escape(line)}\n" for line in (record.exc_text or "").splitlines()]
    return "".join([f"{head} - ", f"\n{head} - ".join(lines), "\n", *traceback])


class _LogFile:
    """The file of one logger, or of all that have none of their own; survives a full disk."""

    def __init__(self, path: Path, logger: str | None) -> None:
        self._file = RotatingFile(path)
        self._logger = logger
        self._complained = False

    def open(self) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be opened.
        """
        self._file.open()

    def write_record(self, record: logging.LogRecord) -> None:
        if record.name == self._logger if self._logger else record.name not in _OWN_FILES:
            with self._complaining():
                text = _record_text(record, bare=self._logger is not None)
                self._file.write(text.encode(), record.created)

    def write_access(self, lines: Sequence[Access]) -> None:
        """Write nothing: two files have something to say about a request."""

    def flush(self) -> None:
        with self._complaining():
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write_lines(self, texts: list[str], lines: Sequence[Access]) -> None:
        """Write the texts that the lines have become."""
        data, last_s = "".join(texts).encode(), lines[-1][0] / 1000
        if self._file.has_room(len(data), last_s):
            with self._complaining():
                self._file.write(data, last_s)
            return
        for text, (ms, _, _) in zip(texts, lines, strict=True):  # a new file begins with one of them
            with self._complaining():
                self._file.write(text.encode(), ms / 1000)

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        """Tell once that something cannot be written, and go on."""
        try:
            yield
        except Exception as error:
            if not self._complained:
                self._complained = True
                with suppress(OSError, ValueError, AttributeError):
                    sys.stderr.write(f"cannot write {self._file.path}: {error}\n")


class _AccessFile(_LogFile):
    def write_access(self, lines: Sequence[Access]) -> None:
        with self._complaining():
            self._write_lines([f"{_stamp(ms)} - {line}\n" for ms, _, line in lines], lines)


class _MetricsFile(_LogFile):
    """mms_metrics.log: its logger's lines, and MMS's count of one answer for each line of the access log.

    Made here, on the writing thread, no line is dropped without the other.
    """

    def __init__(self, path: Path, logger: str | None) -> None:
        super().__init__(path, logger)
        self._hostname = socket.gethostname()

    def write_access(self, lines: Sequence[Access]) -> None:
        texts: list[str] = []
        with self._complaining():
            for (ms, status), same in groupby(lines, itemgetter(0, 1)):
                name = _REQUESTS.get(status // 100, "Requests5XX")
                where = f"#Level:Host|#hostname:{self._hostname},timestamp:{ms // 1000}"
                texts += [f"{_stamp(ms)} - {name}.Count:1|{where}\n"] * len(list(same))
            self._write_lines(texts, lines)


class _Console:
    """Standard output, past Python's buffer: its lock, held in a hanging write, would abort the exit."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def write_record(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.INFO:
            self._texts.append(_record_text(record))

    def write_access(self, lines: Sequence[Access]) -> None:
        self._texts += [f"{_stamp(ms)} [INFO ] http {ACCESS} - {line}\n" for ms, _, line in lines]

    def flush(self) -> None:
        data = "".join(self._texts).encode()
        self._texts.clear()
        with suppress(OSError):  # nobody reads any more
            while data:
                data = data[os.write(1, data) :]

    def close(self) -> None:
        """Leave standard output open: it is not ours."""


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
