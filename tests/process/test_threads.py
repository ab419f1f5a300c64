"""What the libraries of workers are told of threads, so that together they use no more than the CPUs."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from asking import body

from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.types import InferRequest

Ask = Callable[..., InferRequest]
NAMES = ("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM", "RAYON_NUM_THREADS")
COUNTS = """
import json, os

def handle(data, context):
    if data is None:
        return None
    import cv2
    return [json.dumps({"cv2": cv2.getNumThreads(), **{name: os.environ[name] for name in %r}})]
"""


async def told(processes: Any, ask: Ask, environ: Mapping[str, str], *, workers: int) -> dict[str, Any]:
    """Return what a worker says of its threads; the server has four CPUs and this environment."""
    bare = {name: value for name, value in os.environ.items() if name not in NAMES}
    processes.cores = 4
    processes.launcher = ProcessLauncher(max_frame_bytes=1 << 20, environ={**bare, **environ})
    processes.store.put("counts", {"service.py": COUNTS % (NAMES,)})
    await processes.load("counts", workers=workers)
    answer: dict[str, Any] = json.loads(body(await processes.engine.infer(ask("counts"))))
    return answer


@pytest.mark.parametrize(("workers", "share"), [(1, 4), (2, 2), (3, 1)])
async def test_each_library_gets_the_workers_share_of_the_cpus(
    processes: Any, ask: Ask, workers: int, share: int
) -> None:
    pytest.importorskip("cv2")
    assert await told(processes, ask, {}, workers=workers) == {
        "cv2": share,
        **dict.fromkeys(NAMES, str(share)),
    }


async def test_what_the_user_sets_holds_for_all_libraries_unless_it_names_one(
    processes: Any, ask: Ask
) -> None:
    pytest.importorskip("cv2")
    found = await told(processes, ask, {"OMP_NUM_THREADS": "3", "RAYON_NUM_THREADS": "5"}, workers=2)
    assert found == {
        "cv2": 3,
        "OMP_NUM_THREADS": "3",
        "OPENCV_FOR_THREADS_NUM": "3",
        "RAYON_NUM_THREADS": "5",
    }
