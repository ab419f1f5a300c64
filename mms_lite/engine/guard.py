"""Ends the process groups of workers whose server was killed: run by path, standard library only.

The kernel ends a worker with its server, but not what the worker's model had started. This process reads
"+GROUP" and "-GROUP" lines from the server; at the end of the file the server is gone, and so are the groups.
"""

import os
import signal
import sys


def main() -> None:
    """Follow the server until its pipe ends, then kill what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends after its server, never before
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


if __name__ == "__main__":
    main()
