"""What every server's own code begins with: the job from the environment, and the work that it asks for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import work

JOB: dict[str, Any] = json.loads(os.environ["SIDE_BY_SIDE_JOB"])


def load() -> work.Work:
    """Load the model in this process, and tell the benchmark that this process is a worker."""
    made = work.make(**JOB["make"])
    tell()
    return made


def tell() -> None:
    """Tell the benchmark that this process is a worker."""
    Path(JOB["workers_dir"], str(os.getpid())).touch()
