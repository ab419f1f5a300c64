"""The work in a loop, without a server: the most that the machine can do, to which a server is compared.

    python benchmarks/side_by_side/bare.py --work onnx --body tensor.bin --threads 1 --workers 2 --seconds 10

Each worker is a process of its own, as in a server; all begin at once, with the model loaded and warm.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from work import make

WARM_BATCHES = 3
END_S = 60.0  # a worker that is not done so long after its time hangs


def rate(work: str, body: Path, *, workers: int, threads: int, rows: int, seconds: float) -> float:
    """Return how many bodies per second `workers` processes get done, each in batches of `rows`.

    Raises:
        RuntimeError: a worker failed; why is in its output.
    """
    command = [sys.executable, __file__, "--loop", "--work", work, "--body", str(body)]
    command += ["--threads", str(threads), "--rows", str(rows), "--seconds", str(seconds)]
    with contextlib.ExitStack() as stack:
        loops = [stack.enter_context(_started(command)) for _ in range(workers)]
        if any(loop.stdout.readline() != "ready\n" for loop in loops):
            raise RuntimeError(f"a loop with {work} did not start")
        for loop in loops:
            loop.stdin.write("go\n")
            loop.stdin.flush()
        found = [loop.communicate(timeout=seconds + END_S)[0] for loop in loops]
    return sum(float(text) for text in found)


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def loop(work: str, body: bytes, *, threads: int, rows: int, seconds: float) -> float:
    """Load a model, wait for a line of input, work for some seconds; return bodies per second."""
    run = make(work, threads=threads)
    batch = [body] * rows
    for _ in range(WARM_BATCHES):
        run(batch)
    print("ready", flush=True)
    sys.stdin.readline()
    done, begin = 0, time.monotonic()
    while (passed := time.monotonic() - begin) < seconds:
        run(batch)
        done += rows
    return done / passed


def main() -> None:
    """Run the command line; with --loop as one of the workers."""
    parser = argparse.ArgumentParser(description="Do the work of the benchmarks in a loop.")
    parser.add_argument("--work", required=True, choices=("noop", "mxnet", "onnx"))
    parser.add_argument("--body", type=Path, required=True, help="the file that each row is")
    parser.add_argument("--workers", type=int, default=1, help="processes at the same time")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--rows", type=int, default=1, help="of a batch")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    stated = {"threads": options.threads, "rows": options.rows, "seconds": options.seconds}
    if options.loop:
        print(loop(options.work, options.body.read_bytes(), **stated))
    else:
        print(f"{rate(options.work, options.body, workers=options.workers, **stated):.2f} per second")


if __name__ == "__main__":
    main()
