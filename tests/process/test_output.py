"""What workers print: which lines are metrics and where they go; and which variables workers get at all."""

import asyncio
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import body

from mms_lite import logs
from mms_lite.engine.launcher import ProcessLauncher, worker_environ
from mms_lite.engine.output import metric_line
from mms_lite.errors import ConfigError
from mms_lite.types import InferRequest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes as on Linux")

Ask = Callable[..., InferRequest]
Bench = Any
TAIL = "|#Level:Model|#hostname:vm,1795243439"


@pytest.fixture
def log_files(tmp_path: Path) -> Iterator[Callable[[], dict[str, list[str]]]]:
    """Log to files; call it to end that and get their lines, without times."""
    folder = tmp_path / "logs"
    router = logs.configure(folder, folder, console=False)

    def read() -> dict[str, list[str]]:
        router.close()
        return {
            path.name: [line.split(",", 1)[1][4:] for line in path.read_text().splitlines()]
            for path in folder.iterdir()
        }

    yield read
    router.close()


async def test_metrics_that_a_handler_prints_or_emits_reach_their_file(
    processes: Bench, ask: Ask, log_files: Callable[[], dict[str, list[str]]]
) -> None:
    name = "metrics_by_hand_" + "x" * 20
    await processes.load("metrics_by_hand", name)
    begun_s = int(time.time())
    answer = await asyncio.wait_for(processes.engine.infer(ask(name)), 20)
    assert body(answer) == b"done"
    await processes.close()
    files = log_files()
    by_hand, emitted = [line for line in files["model_metrics.log"] if "PredictionTime" not in line]
    assert by_hand == (
        "- Depth.Count:3|#Level:Model,Kind:tree|#hostname:here,requestID:id-1,id-2,timestamp:1795243439"
    )
    form = rf"- Rows\.Count:7\|#Level:Model\|#hostname:{socket.gethostname()},requestID:id-3,timestamp:(\d+)"
    match = re.fullmatch(form, emitted)
    assert match is not None, emitted
    assert begun_s <= int(match[1]) <= time.time()
    thread = f"W-{name[:25]}-N"
    lines = [
        re.sub(r"-\d+-std", "-N-std", line) for line in files["mms_log.log"] if "mms_lite.model " in line
    ]
    assert sorted(lines) == [
        f"[INFO ] {thread}-stdout mms_lite.model - [METRICS] forgot the rest",
        f"[INFO ] {thread}-stdout mms_lite.model - ordinary",
        f"[WARN ] {thread}-stderr mms_lite.model - a warning",
    ]
    assert not any("Depth" in line or "Rows" in line for line in files["mms_log.log"])


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("[METRICS]A.Count:1", "A.Count:1"),
        ("[METRICS] A.Count:1", "A.Count:1"),
        ("[METRICS]Two words.some unit:-1.5", "Two words.some unit:-1.5"),
        ("[METRICS]layer.1.time.Milliseconds:1e-05", "layer.1.time.Milliseconds:1e-05"),
        ("[METRICS]A.Percent:.5", "A.Percent:.5"),
        ("[METRICS]A.Error:cannot read: x, y", "A.Error:cannot read: x, y"),
    ],
)
def test_a_printed_metric_becomes_a_line_of_the_file(text: str, head: str) -> None:
    line = f"{head}|#Level:Model|#hostname:vm,timestamp:1795243439"
    assert metric_line(text + TAIL) == line
    ids = f"{head}|#Level:Model|#hostname:vm,requestID:a-1,b-2,timestamp:1795243439"
    assert metric_line(f"{text}{TAIL},a-1,b-2") == ids


def test_a_metric_may_have_no_dimensions_and_parts_of_a_second() -> None:
    line = "A.Count:1|#|#hostname:vm,timestamp:1795243439"
    assert metric_line("[METRICS]A.Count:1|#|#hostname:vm,1795243439.25\r") == line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A.Count:1" + TAIL,
        " [METRICS]A.Count:1" + TAIL,
        "x [METRICS]A.Count:1" + TAIL,
        "[METRICS]",
        "[METRICS]A.Count:1",
        "[METRICS]A.Count:1|#Level:Model",
        "[METRICS]A.Count:1|#Level:Model|#hostname:vm",
        "[METRICS]A.Count:1|#Level:Model|#hostname:vm,now",
        "[METRICS]A.Count:1|#Level:Model|#hostname:vm,-1",
        "[METRICS]A.Count:1|Level:Model|#hostname:vm,1",
        "[METRICS]A.Count:one" + TAIL,
        "[METRICS]A.Count:nan" + TAIL,
        "[METRICS]A.Count:1,5" + TAIL,
        "[METRICS]A.Count:" + TAIL,
        "[METRICS]A:1" + TAIL,
        "[METRICS].Count:1" + TAIL,
        "[METRICS]A.Count:1" + TAIL + ",id|more",
        "[METRICS]A.Count:1|#a:b|#c:d|#hostname:vm,1",
    ],
)
def test_anything_else_is_an_ordinary_line(text: str) -> None:
    assert metric_line(text) is None


@pytest.mark.parametrize("piece", [" ", "a", "a.", "1", "1.", ".", "a:1|#", "|#hostname:", ",1", "A.Error:"])
def test_no_line_holds_up_the_server(piece: str) -> None:
    begun_s = time.process_time()
    for head in ("", "A.Count:", "A.Count:1|#a:b|#hostname:h,1,"):
        metric_line("[METRICS]" + head + piece * (16_384 // len(piece)) + "\x00|")
    assert time.process_time() - begun_s < 0.5


ENVIRON = {"HOME": "/home/me", "AWS_KEY": "k", "AWS_SECRET_KEY": "s", "MY_AWS": "m", "PYTHONPATH": "/p"}


@pytest.mark.parametrize(
    ("blacklist", "hidden"),
    [
        ("", set()),
        ("AWS.*", {"AWS_KEY", "AWS_SECRET_KEY"}),
        ("AWS", set()),
        (".*AWS|HOME", {"MY_AWS", "HOME"}),
        ("PYTHON.*", {"PYTHONPATH"}),
        ("(?i)home", {"HOME"}),
        (".*", set(ENVIRON)),
    ],
)
def test_variables_whose_whole_name_matches_are_hidden(blacklist: str, hidden: set[str]) -> None:
    expected = {name: value for name, value in ENVIRON.items() if name not in hidden}
    assert worker_environ(ENVIRON, blacklist) == expected


@pytest.mark.parametrize("blacklist", ["(", "*", "a{2,1}", "(?P<x"])
def test_a_bad_expression_names_its_key(blacklist: str) -> None:
    with pytest.raises(ConfigError, match=r"^blacklist_env_vars is not a regular expression: "):
        worker_environ(ENVIRON, blacklist)


async def test_a_worker_does_not_see_a_hidden_variable(processes: Bench, ask: Ask) -> None:
    environ = {**os.environ, "MMS_TEST_SECRET": "s", "MMS_TEST_OPEN": "o"}
    environ = worker_environ(environ, "MMS_TEST_SEC.*|OMP_NUM_THREADS")
    processes.launcher = ProcessLauncher(max_frame_bytes=64 << 20, environ=environ)
    await processes.load("facts")
    answer = await asyncio.wait_for(processes.engine.infer(ask("facts")), 20)
    seen = json.loads(body(answer))["environ"]
    assert "MMS_TEST_SECRET" not in seen
    assert seen["MMS_TEST_OPEN"] == "o"
    assert int(seen["OMP_NUM_THREADS"]) >= 1  # what the server sets itself stays
