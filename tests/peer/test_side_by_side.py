"""The real Multi Model Server and ours, asked the same: nothing differs but what is meant to."""

import subprocess
import sys
from pathlib import Path

import pytest
from compare import SKIPPED

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compat" / "compare.py"
LIMIT_S = 1000  # the script ends itself, and its servers, before


@pytest.mark.peer
@pytest.mark.time_limit(LIMIT_S + 60)
def test_nothing_differs_but_what_is_meant_to() -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if run.returncode == SKIPPED:
        pytest.skip(run.stderr.strip())

    assert run.returncode == 0, run.stdout + run.stderr
