"""CPUs and GPUs: what a container leaves of them."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from mms_lite import machine as module
from mms_lite.machine import cpu_count, cpus, gpu_count, threads_per_worker

V1 = "sys/fs/cgroup/cpu,cpuacct"


def cgroup(root: Path, self_lines: str, files: Mapping[str, str]) -> Path:
    for path, text in {"proc/self/cgroup": self_lines, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("self_lines", "files", "count"),
    [
        ("", {}, 16),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "garbage"}, 16),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 16),
        (
            "0::/a/b\n",
            {"sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"},
            3,
        ),
        (
            "4:cpu,cpuacct:/docker/x\n3:cpuset:/\n",
            {f"{V1}/cpu.cfs_quota_us": "400000\n", f"{V1}/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "100000\n"},
            16,
        ),
        (
            "1:cpu:/a\n0::/\n",
            {
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "50000",
            },
            1,
        ),
    ],
)
def test_cpus_are_counted_within_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, self_lines: str, files: Mapping[str, str], count: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert cpu_count(cgroup(tmp_path, self_lines, files)) == count


def test_what_limits_the_cpus_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 3, 5})
    limited = cpus(cgroup(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}))
    assert (limited.affinity, limited.quota, limited.count) == (3, 1.5, 1)
    free = cpus(tmp_path / "nothing")
    assert (free.affinity, free.quota, free.count) == (3, None, 3)


def test_this_machine_has_a_cpu() -> None:
    assert cpu_count() >= 1


@pytest.mark.parametrize(
    ("count", "workers", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 2, 1), (2, 3, 1), (4, 0, 4)]
)
def test_workers_share_the_cpus_and_each_has_one_thread_at_least(
    count: int, workers: int, threads: int
) -> None:
    assert threads_per_worker(count, workers) == threads


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_gpus_are_the_rows_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, "printf 'index\\n0\\n1\\n'")
    assert gpu_count() == 2
    assert [gpu_count(limit) for limit in (0, 1, 5)] == [0, 1, 2]


@pytest.mark.parametrize("body", ["exit 9", "echo 'No devices were found'", "printf 'index\\n0\\n'; exit 1"])
def test_a_failing_nvidia_smi_means_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    fake_smi(tmp_path, monkeypatch, body)
    assert gpu_count() == 0


def test_a_missing_or_hanging_nvidia_smi_means_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_count() == 0

    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    monkeypatch.setattr(module.subprocess, "run", hang)
    assert gpu_count() == 0
