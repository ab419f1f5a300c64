"""The work of the benchmarks and what is made of its clocks: time at work, rates, shares of CPU."""

import os
from array import array
from pathlib import Path

import bare
import batching
import models
import pytest
import work
from models import Batch

MS = 1_000_000
ALONE = [Batch(0, 40 * MS, 1), Batch(42 * MS, 80 * MS, 1), Batch(81 * MS, 120 * MS, 8)]


@pytest.fixture(autouse=True)
def _the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which `make` sets


def test_the_work_without_a_model_tells_what_came_to_whom() -> None:
    answers = work.make("noop")([b"abc", bytearray(b"")])

    assert answers == [{"n": 3, "pid": os.getpid()}, {"n": 0, "pid": os.getpid()}]


def test_each_batch_has_a_line_on_the_clock_of_its_process(tmp_path: Path) -> None:
    run = work.make("noop", sleep_ms=1, clock_dir=str(tmp_path))

    run([b"a"])
    run([b"a", b"b"])

    first, second = models.read_clocks(tmp_path)[os.getpid()]
    assert (first.rows, second.rows) == (1, 2)
    assert first.end - first.begin >= MS
    assert first.end <= second.begin


def test_the_likeliest_classes_come_first() -> None:
    np = pytest.importorskip("numpy")

    assert work.best(np.array([[0.25, 0.75]])) == [[{"1": 0.75}, {"0": 0.25}]]


def test_time_at_work_counts_whole_batches_in_the_interval() -> None:
    idle: list[Batch] = []

    found = models.at_work([ALONE, idle], 0, 119 * MS)

    assert found["batches"] == 2
    assert found["rows_per_batch"] == 1
    assert (found["busy_s"], found["wall_s"]) == (0.078, 0.08)
    assert found["gap_ms"] == 2


def test_time_at_work_adds_up_the_workers() -> None:
    late = [Batch(10 * MS, 30 * MS, 1)]

    found = models.at_work([ALONE, late], 0, 200 * MS)

    assert (found["busy_s"], found["wall_s"]) == (0.137, 0.14)
    assert found["gap_ms"] == 1.5


def test_workers_that_did_nothing_have_no_gaps() -> None:
    assert models.at_work([], 0, MS) == {
        "busy_s": 0,
        "wall_s": 0,
        "batches": 0,
        "rows_per_batch": None,
        "gap_ms": None,
    }


def test_rows_on_the_edge_of_the_interval_count_by_the_part_of_their_time() -> None:
    assert models.rows_between([ALONE], 20 * MS, 90 * MS) == pytest.approx(0.5 + 1 + 8 * 9 / 39)


def test_cpu_is_that_of_the_workers_or_of_the_rest() -> None:
    found = models.cpu_shares({1: 0.1, 2: 5.0, 3: 5.0, 4: 0.1}, {2, 3})

    assert found == pytest.approx({"workers_cpu_s": 10, "others_cpu_s": 0.2, "others_share": 0.02})
    assert models.cpu_shares({1: 0.1}, {})["others_share"] is None


def test_the_tensor_is_one_image_of_numbers_that_differ(tmp_path: Path) -> None:
    values = array("f", models.write_body("onnx", tmp_path).read_bytes())

    assert len(values) * 4 == work.TENSOR_BYTES == 602_112
    assert -2 <= min(values) < -1.9 < 1.9 < max(values) <= 2


def test_servers_take_turns_in_being_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_slice", lambda *_: {"rows_per_s": 3.0})
    rates = iter([2.0, 4.0, 8.0] * 2)
    monkeypatch.setattr(bare, "rate", lambda *_, **__: next(rates))
    workload = models.Workload("W", "onnx", workers=1, threads=1)

    found = list(models.measure(["mms", "mosec"], 2, 1, workloads=[workload]))

    assert [record["server"] for record in found] == ["mms", "mosec", "mosec", "mms"]
    assert [record["ratio"] for record in found] == [1.0, 0.5, 1.0, 0.5]
    assert {record["workload"] for record in found} == {"W onnx, 1 x 1 threads, batch 1"}


def test_a_server_that_cannot_be_measured_keeps_nobody_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def slice_of(peer: models.Peer, *_: object) -> dict[str, float]:
        if peer.name == "mosec":
            raise RuntimeError("it does not start")
        return {"rows_per_s": 1.0}

    monkeypatch.setattr(models, "_slice", slice_of)
    monkeypatch.setattr(bare, "rate", lambda *_, **__: 1.0)

    found = list(models.measure(["mosec", "mms-lite"], 1, 1, workloads=models.WORKLOADS[1:2]))

    assert [record.get("error") for record in found] == ["it does not start", None]


def test_the_bare_loop_adds_up_its_processes(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"x")

    assert bare.rate("noop", body, workers=2, threads=1, rows=4, seconds=0.01) > 0
    with pytest.raises(RuntimeError, match="did not start"):
        bare.rate("noop", tmp_path / "missing", workers=1, threads=1, rows=1, seconds=0.01)


def test_the_table_of_batches_has_a_row_for_each_setting_and_a_column_for_each_load() -> None:
    figures = {"rows_per_batch": 7.96, "requests_per_s": 611.7, "p50_ms": 51.2, "p99_ms": 60.0}
    records = [{"batch_size": 8, "delay_ms": None, "connections": 32, **figures}, {"error": "no"}]

    head, _, *rows = batching.table(records)

    assert head == "| batch size, delay | 1 connections | 8 connections | 32 connections | 100 connections |"
    assert len(rows) == len(batching.settings()) == 13
    assert rows[0] == "| 1 | - | - | - | - |"
    assert "| 8, unset | - | - | 8.0 rows, 612/s, 51 / 60 ms | - |" in rows
