"""What a configuration looks like in print: the table of `--print-config` and the banner of the log.

No other place turns settings into text for people, so here alone secrets are masked.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import mms_lite
from mms_lite.config import OPTIONS, SECRET, LoadedConfig

_UNSET = "N/A"  # as in MMS


def table(loaded: LoadedConfig) -> str:
    """Return a line for each option: key, value, where the value came from; then the notes."""
    rows = []
    for option in OPTIONS:
        origin = loaded.origins[option.name]
        masked = option.kind is SECRET and origin != "default"
        value = "****" if masked else _text(getattr(loaded.config, option.name))
        rows.append((option.key, value, origin))
    keys, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{key:{keys}}  {value:{values}}  {origin}" for key, value, origin in rows]
    return "\n".join([*lines, *(f"Note: {note}" for note in loaded.notes)])


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
        "Management address": config.management_address,
        "Metrics address": config.metrics_address,
        "Model Store": config.model_store and _absolute(config.model_store),
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
