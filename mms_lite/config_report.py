"""What a configuration looks like in print: the tables of `--print-config` and the banner of the log.

No other place turns settings into text for people, so here alone secrets are masked.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mms_lite
from mms_lite.config import OPTIONS, SECRET, Config, LoadedConfig
from mms_lite.machine import Cpus, threads_per_worker

_THREADS = "OMP_NUM_THREADS"
_UNSET = "N/A"  # as in MMS


def table(loaded: LoadedConfig) -> str:
    """Return a line for each option: key, value, where the value came from; then the notes."""
    rows = []
    for option in OPTIONS:
        origin = loaded.origins[option.name]
        masked = option.kind is SECRET and origin != "default"
        value = "****" if masked else _text(getattr(loaded.config, option.name))
        rows.append((option.key, value, origin))
    return "\n".join([*_aligned(rows), *(f"Note: {note}" for note in loaded.notes)])


def shares(config: Config, environ: Mapping[str, str], cpus: Cpus, *, gpus: int) -> str:
    """Return what the machine gives and how a model's workers share it: a line each, with its origin.

    `environ` is what workers get of the server's environment.
    """
    count = workers_per_model(config, cpus=cpus.count, gpus=gpus)
    if config.default_workers_per_model:
        why = "default_workers_per_model"
    elif config.debug:
        why = "debug"
    else:
        why = f"one per {'GPU' if gpus else 'CPU'}"
    threads, of_threads = str(threads_per_worker(cpus.count, count)), "CPUs / workers, at least 1"
    if stated := environ.get(_THREADS):
        threads, of_threads = stated, f"environment {_THREADS}"
    quota = "no cgroup quota" if cpus.quota is None else f"cgroup quota {cpus.quota:g}"
    rows = [
        ("CPUs", str(cpus.count), f"affinity {cpus.affinity}, {quota}"),
        ("GPUs", str(gpus), "nvidia-smi, number_of_gpu"),
        ("workers per model", str(count), why),
        ("threads per worker", threads, of_threads),
    ]
    return "\n".join(_aligned(rows))


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    keys, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{key:{keys}}  {value:{values}}  {origin}" for key, value, origin in rows]


def workers_per_model(config: Config, *, cpus: int, gpus: int) -> int:
    """Return how many workers a model gets that asks for none: as set, else one per GPU, else per CPU."""
    return config.default_workers_per_model or (1 if config.debug else gpus or cpus)


def banner(loaded: LoadedConfig, *, cpus: int, gpus: int, workers: int) -> list[str]:
    """Return the lines of MMS's start-up record that mean something here, in its order and words."""
    config = loaded.config
    file = loaded.file if loaded.file and loaded.file.is_file() else None
    lines: dict[str, object] = {
        "Model server version": mms_lite.__version__,
        "Model server home": Path(mms_lite.__file__).resolve().parent,
        "Current directory": _absolute(Path()),
        "Temp directory": config.temp_directory or tempfile.gettempdir(),
        "Number of GPUs": gpus,
        "Number of CPUs": cpus,
        "Python executable": sys.executable,
        "Config file": file and _absolute(file),
        "Inference address": config.inference_address,
        "gRPC address": config.grpc_address,
        "Management address": config.management_address,
        "Metrics address": config.metrics_address,
        "Model Store": config.model_store and _absolute(config.model_store),
        "Model repository": config.model_repository and _absolute(config.model_repository),
        "Model control mode": config.model_control_mode,
        "Initial Models": config.load_models or None,
        "Log dir": _absolute(config.log_location),
        "Metrics dir": _absolute(config.metrics_location),
        "Default workers per model": workers,
        "Blacklist Regex": config.blacklist_env_vars or None,
        "Maximum Response Size": config.max_response_size,
        "Maximum Request Size": config.max_request_size,
        "Preload model": config.preload_model,
    }
    return [f"{name}: {_text(value)}" for name, value in lines.items()]


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except OSError:  # the working folder was deleted
        return path


def _text(value: object) -> str:
    if value is None or value == "":
        return _UNSET
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
