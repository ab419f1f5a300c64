"""Start a process that outlives the request and holds our output open; answer with its pid."""

import subprocess
import sys


def handle(data, context):
    if data is None:
        return None
    return [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid for _ in data]
