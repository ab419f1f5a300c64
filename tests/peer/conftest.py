"""Makes the comparison's scripts importable: benchmarks/compat is a folder of scripts, no package."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "compat"))

if sys.version_info < (3, 11):
    pytest.skip("the comparison's scripts need Python 3.11 (tomllib)", allow_module_level=True)
