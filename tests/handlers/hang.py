"""Never answer `hang PATH`, with a grandchild whose pid is written to PATH; echo everything else."""

import subprocess
import sys
import time
from pathlib import Path


def handle(data, context):
    if data is None:
        return None
    for item in data:
        if item["body"].startswith(b"hang "):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(item["body"][5:].decode()).write_text(str(child.pid))
            while True:
                time.sleep(60)
    return [item["body"] for item in data]
