"""Serve the published models of examples/weights through each backend that is installed; note what it takes.

    python benchmarks/backends/measure.py --out today.json [NAME ...]

One worker with one thread for each model; one photo, asked one at a time. Times include decoding and scaling
of the photo; memory is the worker's resident size after the last answer.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.engine.repository.mar import Defaults, MarRepository
from mms_lite.types import BYTES, InferRequest, LoadOptions, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from weights.archives import ARCHIVES, COFFEE, command

MODULES = {"opencv": "cv2"}
WARM, MEASURED = 5, 40
HANDLERS = ("image_classifier", "object_detector")  # what can answer a photo


async def measure(name: str, folder: Path) -> dict[str, Any]:
    """Load a model that was packed into the folder, ask it; return its answer, times and memory."""
    defaults = Defaults(workers=1, queue_size=1, response_timeout_s=120, load_timeout_s=600)
    repository = MarRepository(folder, folder, defaults)
    engine = Engine(repository, ProcessLauncher(max_frame_bytes=1 << 30), cores=1)
    photo = COFFEE.read_bytes()
    try:
        begin = time.monotonic()
        model = (await engine.load(LoadOptions(url=f"{name}.mar"))).spec.name
        load_s, times = time.monotonic() - begin, []
        for _ in range(WARM + MEASURED):
            body = Tensor("body", BYTES, (), bytearray(photo))
            begin = time.perf_counter()
            answer = await engine.infer(InferRequest("measured", model, inputs=[body]))
            times.append((time.perf_counter() - begin) * 1000)
        memory = engine.describe(model).workers[0].memory_bytes
    finally:
        await engine.close(drain_s=0)
    return {
        "name": name,
        "answer": json.loads(bytes(answer.outputs[0].data)),
        "load_s": load_s,
        "median_ms": statistics.median(times[WARM:]),
        "memory_mib": memory / 2**20,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure published models in the backends installed here.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="default: all that can be asked with a photo"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    found = []
    for name in options.names or ARCHIVES:
        archive = ARCHIVES[name]
        if archive.handler not in HANDLERS:
            continue
        if importlib.util.find_spec(MODULES.get(archive.backend, archive.backend)) is None:
            print(f"{name}: {archive.backend} is not installed here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(command(name, Path(folder)), check=True)
            found.append(asyncio.run(measure(name, Path(folder))))
        print("{name}: {median_ms:.1f} ms, {memory_mib:.0f} MiB".format(**found[-1]), flush=True)
    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
