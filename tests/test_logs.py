"""Log files: which line goes where, in which form, and what a client, a model or a full disk cannot do."""

import gzip
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mms_lite import logs
from mms_lite.errors import ConfigError

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3}"
RECORD = re.compile(rf"^{TIME} (\[[A-Z ]{{5}}\] .* )?- ")
FILES = {"access_log.log", "mms_log.log", "model_log.log", "model_metrics.log", "mms_metrics.log"}

Write = Callable[..., dict[str, list[str]]]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Write]:
    """Return a function that logs by calling its argument and returns the lines of every file."""

    def write(act: Callable[[], object], *, level: int = logging.INFO) -> dict[str, list[str]]:
        router = logs.configure(tmp_path / "logs", tmp_path / "logs", console=False, level=level)
        try:
            act()
        finally:
            router.close()
        # Not splitlines(), which sees lines where grep and tail see none.
        files = {file.name: file.read_text("utf-8").split("\n") for file in (tmp_path / "logs").iterdir()}
        assert all(lines.pop() == "" for lines in files.values())
        return files

    yield write
    assert not any(isinstance(handler, logs.LogRouter) for handler in logging.getLogger().handlers)


def say(name: str, message: str, level: int = logging.INFO) -> Callable[[], None]:
    return lambda: logging.getLogger(name).log(level, "%s", message)


@pytest.mark.parametrize(
    ("name", "file", "form"),
    [
        (logs.ACCESS, "access_log.log", f"{TIME} - hello"),
        (logs.MODEL_METRICS, "model_metrics.log", f"{TIME} - hello"),
        (logs.METRICS, "mms_metrics.log", f"{TIME} - hello"),
        (logs.MODEL, "mms_log.log", rf"{TIME} \[INFO \] MainThread mms_lite\.model - hello"),
        ("mms_lite", "mms_log.log", rf"{TIME} \[INFO \] MainThread mms_lite - hello"),
        (
            "mms_lite.engine.pool",
            "mms_log.log",
            rf"{TIME} \[INFO \] MainThread mms_lite\.engine\.pool - hello",
        ),
        ("aiohttp.server", "mms_log.log", rf"{TIME} \[INFO \] MainThread aiohttp\.server - hello"),
    ],
)
def test_each_logger_has_one_line_in_one_file(written: Write, name: str, file: str, form: str) -> None:
    files = written(say(name, "hello"))
    assert files.keys() == FILES
    (line,) = files.pop(file)
    assert re.fullmatch(form, line)
    assert not any(files.values())


@pytest.mark.parametrize(
    ("level", "word"),
    [(logging.WARNING, "WARN "), (logging.ERROR, "ERROR"), (logging.CRITICAL, "FATAL")],
)
def test_levels_are_spelled_as_log4j_does(written: Write, level: int, word: str) -> None:
    (line,) = written(say("mms_lite", "x", level))["mms_log.log"]
    assert f" [{word}] " in line


def test_the_level_bounds_our_loggers_but_not_access_and_metrics(written: Write) -> None:
    def act() -> None:
        for name in ("mms_lite", logs.ACCESS, logs.METRICS, logs.MODEL_METRICS):
            say(name, "x")()

    files = written(act, level=logging.ERROR)
    assert [name for name in sorted(FILES) if not files[name]] == ["mms_log.log", "model_log.log"]


def test_debug_is_written_when_asked_for(written: Write) -> None:
    assert not written(say("mms_lite", "x", logging.DEBUG))["mms_log.log"]
    assert written(say("mms_lite", "x", logging.DEBUG), level=logging.DEBUG)["mms_log.log"]


def test_model_output_names_model_worker_and_stream(written: Write) -> None:
    def act() -> None:
        model = logging.getLogger(logs.MODEL)
        model.info("%s", "printed 100 %s", extra={"thread_name": "W-mnist-3-stdout"})
        model.warning("%s", "warned", extra={"thread_name": "W-resnet-1-stderr"})

    out, err = written(act)["mms_log.log"]
    assert "[INFO ] W-mnist-3-stdout mms_lite.model - printed 100 %s" in out
    assert "[WARN ] W-resnet-1-stderr mms_lite.model - warned" in err


@given(st.text(st.characters(), max_size=50))  # lone surrogates too
def test_a_message_is_one_line_without_control_characters(message: str) -> None:
    record = logging.LogRecord("mms_lite", logging.INFO, "", 0, message, None, None)
    record.message = message
    line = logs._record_text(record).removesuffix("\n")
    assert len(line.splitlines()) == 1
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", line)
    line.encode()


def test_escapes_are_readable(written: Write) -> None:
    (line,) = written(say(logs.ACCESS, "a\r\nb\x1b[31m\x85\u2028\ud800\tc\u00e4"))["access_log.log"]
    assert line.endswith(" - a\\r\\nb\\x1b[31m\\x85\\u2028\\ud800\tc\u00e4")


def test_a_traceback_is_kept_and_forges_no_record(written: Write) -> None:
    def act() -> None:
        try:
            raise ValueError("bad\n2026-01-01T00:00:00,000 [INFO ] main mms_lite - forged\x1b[2J")
        except ValueError:
            logging.getLogger("mms_lite").exception("request %s failed", "r1")

    first, *rest = written(act)["mms_log.log"]
    assert first.endswith(" - request r1 failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert "    2026-01-01T00:00:00,000 [INFO ] main mms_lite - forged\\x1b[2J" in rest
    assert not any(RECORD.match(line) for line in rest)


class Angry:
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("form", "argument", "error"), [("%d", "x", "TypeError"), ("%s", Angry(), "RuntimeError")]
)
def test_a_bad_log_call_raises_nothing(tmp_path: Path, form: str, argument: object, error: str) -> None:
    router = logs.configure(tmp_path, tmp_path, console=False)
    # Handed over directly: the handlers of pytest do raise.
    router.handle(logging.LogRecord("mms_lite", logging.INFO, "", 0, form, (argument,), None))
    router.close()
    line = (tmp_path / "mms_log.log").read_text()
    assert line.endswith(f" - {form} (could not be formatted: {error})\n")


def test_arguments_are_rendered_when_logged(written: Write) -> None:
    def act() -> None:
        items = [1]
        logging.getLogger("mms_lite").info("%s", items)
        items.append(2)

    assert written(act)["mms_log.log"][0].endswith(" - [1]")


def test_metrics_have_their_own_folder(tmp_path: Path) -> None:
    logs.configure(tmp_path / "a/b", tmp_path / "c", console=False).close()
    logs_of_server = {"access_log.log", "mms_log.log", "model_log.log"}
    assert {file.name for file in (tmp_path / "a/b").iterdir()} == logs_of_server
    assert {file.name for file in (tmp_path / "c").iterdir()} == {"model_metrics.log", "mms_metrics.log"}


def test_configuring_again_replaces_and_duplicates_nothing(tmp_path: Path) -> None:
    first = logs.configure(tmp_path / "a", tmp_path / "a", console=False)
    second = logs.configure(tmp_path / "b", tmp_path / "b", console=False)
    say("mms_lite", "x")()
    second.close()
    first.close()
    assert (tmp_path / "a/mms_log.log").read_text() == ""
    assert len((tmp_path / "b/mms_log.log").read_text().splitlines()) == 1


def test_closing_gives_the_levels_back(tmp_path: Path) -> None:
    names = ("", "mms_lite", logs.ACCESS)
    before = [logging.getLogger(name).level for name in names]
    logs.configure(tmp_path, tmp_path, console=False, level=logging.DEBUG).close()
    assert [logging.getLogger(name).level for name in names] == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=f"^log folder {re.escape(str(tmp_path))}/file/x cannot be written: "
    ):
        logs.configure(tmp_path / "file/x", tmp_path, console=False)
    with pytest.raises(ConfigError, match=f"^log folder {re.escape(str(tmp_path))}/file cannot be written: "):
        logs.configure(tmp_path, tmp_path / "file", console=False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    full = tmp_path / "logs" / "access_log.log"
    full.symlink_to("/dev/full")

    router = logs.configure(tmp_path / "logs", tmp_path / "logs", console=False)
    for _ in range(3):
        say(logs.ACCESS, "x" * 10_000)()
    say("mms_lite", "still here")()
    router.close()
    assert "still here" in (tmp_path / "logs/mms_log.log").read_text()
    assert capsys.readouterr().err.count("cannot write ") == 1


def test_a_log_of_another_day_is_put_aside_at_the_first_line(tmp_path: Path) -> None:
    log = tmp_path / "mms_log.log"
    log.write_text("before\n")
    noon = time.mktime((2026, 1, 31, 12, 0, 0, 0, 0, -1))
    os.utime(log, (noon, noon))
    router = logs.configure(tmp_path, tmp_path, console=False)
    say("mms_lite", "after")()
    router.close()
    assert log.read_text().endswith(" - after\n")
    for thread in threading.enumerate():
        if thread.name == "log-compress":
            thread.join(20)
    assert gzip.decompress((tmp_path / "mms_log.31-Jan.log.gz").read_bytes()) == b"before\n"


def test_a_writer_that_falls_behind_drops_and_counts(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_WAITING_RECORDS", 0)
    files = written(lambda: [say(logs.ACCESS, "x")() for _ in range(7)])
    assert not files["access_log.log"]
    assert not files["mms_metrics.log"]
    (line,) = files["mms_log.log"]
    assert line.endswith("[WARN ] log-files mms_lite.logs - 7 log lines were dropped")


SCRIPT = """
import logging, sys
from pathlib import Path
from mms_lite import logs
folder = Path(sys.argv[1])
logs._CLOSE_S = 1.0
logs.configure(folder, folder, level=logging.DEBUG)
logging.getLogger("mms_lite").debug("detail")
for number in range(int(sys.argv[2])):
    logging.getLogger(logs.ACCESS).info("line %d \u00e4", number)
"""


def test_the_console_has_every_line_once_from_info_on_even_without_close(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "3"], capture_output=True, check=True, timeout=30
    )
    lines = done.stdout.decode().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        f"MainThread mms_lite.access - line {n} \u00e4" for n in range(3)
    ]
    assert len((tmp_path / "access_log.log").read_text("utf-8").splitlines()) == 3
    assert "detail" in (tmp_path / "mms_log.log").read_text()
    assert done.stderr == b""


def test_a_console_that_nobody_reads_stops_neither_the_files_nor_the_exit(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "5000"], stdout=subprocess.PIPE
    ) as child:
        assert child.wait(30) == 0  # 5,000 lines are far more than a pipe holds
    assert len((tmp_path / "access_log.log").read_text("utf-8").splitlines()) == 5000


def test_a_console_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "10"]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=30, check=True)
    finally:
        os.close(write)
    assert done.stderr == b""
    assert len((tmp_path / "access_log.log").read_text("utf-8").splitlines()) == 10


LOG4J2 = (
    '<Configuration><Loggers>{}<Root level="info"><AppenderRef ref="x"/></Root></Loggers></Configuration>'
)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (LOG4J2.format(""), logging.INFO),
        (LOG4J2.format('<Logger name="com.amazonaws.ml.mms" level="debug"/>'), logging.DEBUG),
        (LOG4J2.format("<AsyncLogger level='WARN' name='com.amazonaws.ml.mms'/>"), logging.WARNING),
        (LOG4J2.format('<Logger name="org.apache" level="error"/>'), logging.INFO),
        (LOG4J2.format('<!-- <Logger name="com.amazonaws.ml.mms" level="debug"/> -->'), logging.INFO),
        (
            '<?xml version="1.0"?>\n<log4j:configuration><root><level value="OFF"/></root>',
            logging.CRITICAL + 10,
        ),
        ("log4j.rootLogger = ERROR, stdout\n", logging.ERROR),
        ("log4j.rootLogger=ERROR\nlog4j.logger.com.amazonaws.ml.mms=TRACE, mms_log", logging.DEBUG),
        ("rootLogger.level = warn\n", logging.WARNING),
        ("logger.mms.name = com.amazonaws.ml.mms\nlogger.mms.level = fatal\n", logging.CRITICAL),
    ],
)
def test_the_level_of_a_log4j_file_is_found(tmp_path: Path, text: str, level: int) -> None:
    file = tmp_path / "log4j"
    file.write_text(text)
    assert logs.log_config_level(file) == (level, "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<",
        "<Root>",
        '<Root level="${sys:level}"/>',
        '<Logger level="debug"/>',
        "log4j.rootLogger=",
        "\x00\xff",
        '<!DOCTYPE x [<!ENTITY a "aaaa">]><Root level="&a;"/>',
        "log4j.rootLogger=LOUD",
        "# rootLogger.level=info",
    ],
)
def test_any_other_file_gives_a_note(tmp_path: Path, text: str) -> None:
    file = tmp_path / "log4j"
    file.write_text(text)
    level, note = logs.log_config_level(file)
    assert level is None
    assert note.startswith(f"--log-config {file}: no level of ")


def test_a_log4j_file_that_is_missing_gives_a_note(tmp_path: Path) -> None:
    level, note = logs.log_config_level(tmp_path / "none")
    assert level is None
    assert "cannot be read" in note


@given(st.text(st.sampled_from("<>=\"'/ \nRootLogerlvnam.4j!-:"), max_size=80))
def test_no_text_breaks_the_scan(text: str) -> None:
    assert isinstance(logs._xml_levels(text), dict)
    assert isinstance(logs._property_levels(text), dict)
