"""`mms-lite check ARCHIVE`: load a model in one worker, show what it takes and gives, run its samples.

For the person who packed it, before anybody serves it: no ports, no configuration, one answer.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.engine.repository.mar import Defaults, MarRepository
from mms_lite.errors import ServingError
from mms_lite.machine import cpu_count
from mms_lite.types import BYTES, InferRequest, InferResponse, LoadOptions, ModelStatus, Tensor
from mms_lite.worker import samples

_MAX_FRAME_BYTES = 1 << 30
_SHOWN_CHARACTERS = 2000
_SHOWN_LINES = 30
_SHOWN_LOG_LINES = 20


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("archive", type=click.Path(exists=True, path_type=Path))
@click.option("--gpu", type=click.IntRange(0), metavar="ID", help="Load it on this GPU; default: the CPU.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="What the load may take, and each sample's answer.",
)
def command(archive: Path, gpu: int | None, timeout_s: float) -> None:
    """Load ARCHIVE (.mar or a model's folder) in one worker, show its inputs and outputs, run its samples.

    The exit code is 0 if the model loads and answers every sample, else 1.
    """
    work_dir = Path(tempfile.mkdtemp(prefix="mms-lite-check-"))
    try:
        sys.exit(asyncio.run(_check(archive.resolve(), work_dir, gpu, timeout_s)))
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


async def _check(archive: Path, work_dir: Path, gpu: int | None, timeout_s: float) -> int:
    defaults = Defaults(
        workers=1,
        queue_size=1,
        response_timeout_s=timeout_s,
        load_timeout_s=timeout_s,
        devices=() if gpu is None else (gpu,),
    )
    repository = MarRepository(archive.parent, work_dir, defaults)
    engine = Engine(repository, ProcessLauncher(max_frame_bytes=_MAX_FRAME_BYTES), cores=cpu_count())
    begin = time.monotonic()
    try:
        status = await engine.load(LoadOptions(url=archive.name, workers=1))
        click.echo("\n".join(_facts(archive.name, status, time.monotonic() - begin)))
        return await _run_samples(engine, status)
    except ServingError as error:
        click.echo(f"{archive.name}: {error.message}")
        log = error.details.get("log") or error.details.get("traceback") or ()
        click.echo("".join(f"  | {line.rstrip()}\n" for line in log[-_SHOWN_LOG_LINES:]), nl=False)
        return 1
    finally:
        await engine.close(drain_s=0)


def _facts(archive: str, status: ModelStatus, load_s: float) -> list[str]:
    spec, worker = status.spec, status.workers[0]
    model = (spec.manifest or {}).get("model")
    backend = model.get("backend") if isinstance(model, Mapping) else None
    where = "the CPU" if worker.device is None else f"GPU {worker.device}"
    served = f"{backend}, " if backend else ""
    lines = [
        f"{archive}: {spec.name}, version {spec.version} ({served}handler {spec.handler})",
        f"loaded in {load_s:.1f} s on {where}; the worker takes {worker.memory_bytes / 2**20:.0f} MiB",
    ]
    for side, specs in (("input", status.signature.inputs), ("output", status.signature.outputs)):
        lines += [f"{side:>6}  {spec}" for spec in specs]
    return lines


async def _run_samples(engine: Engine, status: ModelStatus) -> int:
    failed, count = 0, 0
    for name, body in samples.read(status.spec.path, status.spec.manifest):
        begin = time.monotonic()
        request = InferRequest(f"sample-{next(_numbers)}", status.spec.name, inputs=[body])
        count += 1
        try:
            answer = await engine.infer(request)
        except ServingError as error:
            failed += 1
            click.echo(f"{name}: failed: {error.message}")
            continue
        click.echo(f"{name}: answered with {answer.status} in {(time.monotonic() - begin) * 1000:.0f} ms")
        click.echo("".join(f"  {line}\n" for line in _shown(answer)), nl=False)
        failed += answer.status >= 400
    if not count:
        click.echo("no samples: pack some with model-archiver --sample FILE")
    elif failed:
        click.echo(f"{failed} of {count} samples failed")
    else:
        click.echo(f"all samples answered: {count}")
    return 1 if failed else 0


def _shown(answer: InferResponse) -> Sequence[str]:
    """Return an answer as lines for a terminal: text as it is, else what it is."""
    return list(itertools.chain.from_iterable(map(_shown_output, answer.outputs)))


def _shown_output(output: Tensor) -> Sequence[str]:
    data: Any = output.data
    if output.datatype != BYTES or output.shape:
        return [f"{output.name} {output.datatype} {list(output.shape)}"]
    try:
        text = bytes(data).decode("utf-8")
    except UnicodeDecodeError:
        return [f"{len(data)} bytes of {output.content_type or 'binary data'}"]
    lines = text[:_SHOWN_CHARACTERS].splitlines()
    if len(text) <= _SHOWN_CHARACTERS and len(lines) <= _SHOWN_LINES:
        return lines
    return [*lines[:_SHOWN_LINES], f"... {len(text)} characters in all"]


_numbers = itertools.count(1)
