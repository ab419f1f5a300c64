"""Makes the side-by-side benchmark's scripts importable: a folder of scripts, no package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "side_by_side"))
