"""What `--print-config` and the banner say."""

import re
from pathlib import Path

import pytest

import mms_lite
from mms_lite.config import OPTIONS, Config, LoadedConfig
from mms_lite.config_report import banner, shares, table
from mms_lite.machine import Cpus


def loaded(tmp_path: Path, text: str = "", **environ: str) -> LoadedConfig:
    file = tmp_path / "config.properties"
    file.write_text(text)
    return Config.load(file, {"job_queue_size": "3"}, environ)


def test_the_table_has_every_option_its_value_and_its_origin(tmp_path: Path) -> None:
    text = "enable_envvars_config=true\nload_timeout_s=1.5\nmetrics_address=none\n"

    lines = table(loaded(tmp_path, text, MMS_MAX_REQUEST_SIZE="9")).splitlines()

    rows = dict(zip((option.key for option in OPTIONS), map(str.split, lines), strict=True))
    assert all(row[0] == key for key, row in rows.items())
    assert rows["job_queue_size"][1:] == ["3", "command", "line"]
    assert rows["load_timeout_s"][1:] == ["1.5", "file", str(tmp_path / "config.properties")]
    assert rows["max_request_size"][1:] == ["9", "environment", "MMS_MAX_REQUEST_SIZE"]
    assert rows["drain_timeout_s"][1:] == ["30", "default"]
    assert rows["metrics_address"][1] == rows["model_store"][1] == "N/A"
    assert rows["enable_envvars_config"][1] == "true"


def test_the_columns_of_the_table_are_aligned(tmp_path: Path) -> None:
    lines = table(loaded(tmp_path)).splitlines()

    columns = [re.fullmatch(r"(\S+ +)(\S+ +)\S+( .+)?", line) for line in lines]
    assert len({(len(match[1]), len(match[2])) for match in columns if match}) == 1
    assert all(columns)


def test_secrets_are_masked_but_not_their_defaults(tmp_path: Path) -> None:
    assert "changeit" in table(loaded(tmp_path))
    shown = table(loaded(tmp_path, "keystore_pass=open sesame"))
    assert "sesame" not in shown
    assert re.search(r"^keystore_pass +\*{4} ", shown, re.MULTILINE)


def test_notes_come_after_the_table(tmp_path: Path) -> None:
    shown = table(loaded(tmp_path, "default_response_timeout=2")).splitlines()
    assert len(shown) == len(OPTIONS) + 1
    assert shown[-1].startswith("Note: default_response_timeout counts minutes, as in MMS: 2 is 120 s")


@pytest.mark.parametrize(
    ("text", "environ", "cpus", "gpus", "rows"),
    [
        (
            "",
            {},
            Cpus(4, None),
            0,
            [
                "4  affinity 4, no cgroup quota",
                "0  nvidia-smi, number_of_gpu",
                "4  one per CPU",
                "1  CPUs / workers",
            ],
        ),
        (
            "default_workers_per_model=2\n",
            {},
            Cpus(16, 7.5),
            0,
            ["7  affinity 16, cgroup quota 7.5", "0", "2  default_workers_per_model", "3  CPUs / workers"],
        ),
        (
            "",
            {"OMP_NUM_THREADS": "3"},
            Cpus(8, None),
            2,
            ["8", "2  nvidia-smi", "2  one per GPU", "3  environment OMP_NUM_THREADS"],
        ),
        ("debug=true\n", {}, Cpus(8, None), 2, ["8", "2", "1  debug", "8  CPUs / workers"]),
    ],
)
def test_shares_of_the_machine_and_why(
    tmp_path: Path, text: str, environ: dict[str, str], cpus: Cpus, gpus: int, rows: list[str]
) -> None:
    lines = shares(loaded(tmp_path, text).config, environ, cpus, gpus=gpus).splitlines()

    names = ["CPUs", "GPUs", "workers per model", "threads per worker"]
    assert [line[: len("threads per worker")].strip() for line in lines] == names
    assert all(line[20:].startswith(row) for line, row in zip(lines, rows, strict=True))


def test_the_banner_counts_what_there_is(tmp_path: Path) -> None:
    lines = banner(loaded(tmp_path, ""), cpus=8, gpus=2, workers=5)
    for line in ("Number of CPUs: 8", "Number of GPUs: 2", "Default workers per model: 5"):
        assert line in lines


def test_the_banner_says_where_everything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "model_store=models\nload_models=ALL\nlog_location=/var/log/x\nkeystore_pass=open sesame\n"

    lines = banner(loaded(tmp_path, text), cpus=1, gpus=0, workers=1)

    assert lines[0] == f"Model server version: {mms_lite.__version__}"
    assert f"Current directory: {tmp_path}" in lines
    assert f"Config file: {tmp_path / 'config.properties'}" in lines
    assert "Inference address: http://127.0.0.1:8080" in lines
    assert f"Model Store: {tmp_path / 'models'}" in lines
    assert "Initial Models: ALL" in lines
    assert "Log dir: /var/log/x" in lines
    assert f"Metrics dir: {tmp_path / 'logs'}" in lines
    assert "Preload model: false" in lines
    assert "sesame" not in "".join(lines)


def test_what_is_not_set_is_not_available_as_in_mms(tmp_path: Path) -> None:
    lines = banner(
        Config.load(tmp_path / "missing", {"metrics_address": "none"}, {}), cpus=1, gpus=0, workers=1
    )
    for name in ("Config file", "Metrics address", "Model Store", "Initial Models", "Blacklist Regex"):
        assert f"{name}: N/A" in lines


def test_a_working_folder_that_is_gone_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()

    assert "Current directory: ." in banner(Config.load(None, {}, {}), cpus=1, gpus=0, workers=1)
