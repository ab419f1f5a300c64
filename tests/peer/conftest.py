"""Makes the comparison's scripts importable: benchmarks/compat is a folder of scripts, no package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "compat"))
