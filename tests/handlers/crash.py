"""End the process in the way that a body asks for; echo everything else."""

import os
import signal
import sys


def handle(data, context):
    if data is None:
        return None
    for item in data:
        if item["body"] == b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if item["body"].startswith(b"exit:"):
            os._exit(int(item["body"][5:]))
        if item["body"].startswith(b"leave:"):
            sys.exit(int(item["body"][6:]))
    return [item["body"] for item in data]
