"""The work that every server under test does: the same code in each, so that only the servers differ.

It runs in whatever environment a server has, so it imports the standard library alone; a model's framework is
imported by the model that needs it. Models are published ones, which examples/weights keeps in its cache.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOP_K = 5
BATCH_S, ROW_S = 0.005, 0.001  # of "accelerator": what a batch costs before its rows, and each row
TENSOR_SHAPE = (1, 3, 224, 224)  # of float32, a body for "onnx"
TENSOR_BYTES = 602_112

Work = Callable[[list[bytes]], list[object]]  # the bodies of one batch -> an answer for each


def make(work: str, *, sleep_ms: float = 0.0, threads: int = 1, clock_dir: str | None = None) -> Work:
    """Load a model in this process and return what answers a batch.

    `work` is "noop" (which sleeps `sleep_ms` for each batch), "accelerator" (which sleeps for each batch and
    each row), "mxnet" (ResNet-50 on JPEG files) or "onnx" (ResNet-50 on raw tensors). With `clock_dir` each
    batch appends a line to the file CLOCK_DIR/PID: begin and end on the monotonic clock in ns, and rows. Call
    it in the process that will do the work.
    """
    # Some frameworks ask OpenMP alone, which reads this when it is loaded.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    makers: dict[str, Callable[[], Work]] = {
        "noop": lambda: noop(sleep_ms / 1000),
        "accelerator": lambda: noop(BATCH_S, ROW_S),
        "mxnet": mxnet_resnet50,
        "onnx": lambda: onnx_resnet50(threads),
    }
    run = makers[work]()
    return run if clock_dir is None else clocked(run, Path(clock_dir))


def clocked(run: Work, folder: Path) -> Work:
    """Return the same work with a line in FOLDER/PID for each batch; it costs one system call."""
    clock = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def timed(bodies: list[bytes]) -> list[object]:
        begin = time.monotonic_ns()
        answers = run(bodies)
        os.write(clock, b"%d %d %d\n" % (begin, time.monotonic_ns(), len(bodies)))
        return answers

    return timed


def noop(batch_s: float, row_s: float = 0.0) -> Work:
    """Return work that costs no CPU, but if asked for the time of a batch and of each of its rows."""
    pid = os.getpid()

    def run(bodies: list[bytes]) -> list[object]:
        if batch_s or row_s:
            time.sleep(batch_s + row_s * len(bodies))
        return [{"n": len(body), "pid": pid} for body in bodies]

    return run


def mxnet_resnet50() -> Work:
    """Return what the handler of examples/mxnet_resnet50 does with the photos of a batch."""
    import mxnet as mx
    from gluoncv.data.transforms.presets.imagenet import transform_eval

    files = published("resnet50_v1")
    net = mx.gluon.SymbolBlock(
        mx.sym.load(str(files / "resnet50_v1-symbol.json")), mx.sym.var("data", dtype="float32")
    )
    net.load_parameters(str(files / "resnet50_v1-0000.params"), ctx=mx.cpu())

    def run(bodies: list[bytes]) -> list[object]:
        photos = [mx.image.imdecode(body) for body in bodies]
        scores = net(mx.nd.concat(*[transform_eval(photo) for photo in photos], dim=0))
        return best(mx.nd.softmax(scores).asnumpy())

    return run


def onnx_resnet50(threads: int) -> Work:
    """Return a ResNet-50 whose bodies are tensors, TENSOR_SHAPE of float32 in the machine's byte order."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    path = published("resnet50_onnx") / "resnet50.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(bodies: list[bytes]) -> list[object]:
        rows = [np.frombuffer(body, np.float32).reshape(TENSOR_SHAPE) for body in bodies]
        return best(session.run(None, {"data": rows[0] if len(rows) == 1 else np.concatenate(rows)})[0])

    return run


def best(probabilities: Any) -> list[object]:
    """Return the likeliest classes of each row with their probabilities, the likeliest first."""
    indices = (-probabilities).argsort(axis=1)[:, :TOP_K]
    return [
        [{str(index): float(row[index])} for index in chosen]
        for row, chosen in zip(probabilities, indices.tolist(), strict=True)
    ]


def published(name: str) -> Path:
    """Return a folder of examples/weights, which the first who asks fetches."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    from weights.cache import cached

    return cached(name)
