"""`mms-lite check ARCHIVE`: load a model in one worker, show what it takes and gives, run its samples.

For the person who packed it, before anybody serves it: no ports, no configuration, one answer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mms_lite.engine.engine import Engine
from mms_lite.engine.launcher import ProcessLauncher
from mms_lite.engine.repository.mar import Defaults, MarRepository
from mms_lite.errors import ServingError
from mms_lite.logs import MODEL
from mms_lite.machine import cpu_count
from mms_lite.types import BYTES, InferRequest, InferResponse, LoadOptions, ModelStatus, Tensor
from mms_lite.worker import samples

_MAX_FRAME_BYTES = 1 << 30
_SHOWN_CHARACTERS = 2000
_SHOWN_LINES = 30
_SHOWN_LOG_LINES = 20


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("archive", type=click.Path(exists=True, path_type=Path))
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
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
def command(archive: Path, files: tuple[Path, ...], gpu: int | None, timeout_s: float) -> None:
    """Load ARCHIVE (.mar or a model's folder) in one worker, show its inputs and outputs, run its samples.

    Further FILES are asked like the samples of the archive. The exit code is 0 if the model loads and answers
    everything, else 1.
    """
    work_dir = Path(tempfile.mkdtemp(prefix="mms-lite-check-"))
    defaults = Defaults(
        workers=1,
        queue_size=1,
        response_timeout_s=timeout_s,
        load_timeout_s=timeout_s,
        devices=() if gpu is None else (gpu,),
    )
    try:
        sys.exit(asyncio.run(_check(archive.resolve(), files, work_dir, defaults)))
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


class _Output(logging.Handler):
    """Keeps what the worker prints, and the rest of the log off the terminal: what matters is told once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[str] = deque(maxlen=_SHOWN_LOG_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        if record.name == MODEL:
            self.lines.append(record.getMessage())

    def show(self) -> None:
        """Print what was kept; of several attempts to load the model, the last one's traceback."""
        lines = list(self.lines)
        begins = [index for index, line in enumerate(lines) if line.startswith("Traceback ")]
        click.echo(
            "".join(f"  | {line.rstrip()}\n" for line in lines[begins[-1] if begins else 0 :]), nl=False
        )


async def _check(archive: Path, files: Sequence[Path], work_dir: Path, defaults: Defaults) -> int:
    output = _Output()
    logging.getLogger().addHandler(output)
    logging.getLogger(MODEL).setLevel(logging.INFO)
    repository = MarRepository(archive.parent, work_dir, defaults)
    engine = Engine(repository, ProcessLauncher(max_frame_bytes=_MAX_FRAME_BYTES), cores=cpu_count())
    begin = time.monotonic()
    try:
        status = await engine.load(LoadOptions(url=archive.name, workers=1))
        output.show()
        click.echo("\n".join(_facts(archive.name, status, time.monotonic() - begin)))
        return await _run_samples(engine, status, files)
    except ServingError as error:
        output.show()
        named = error.message.startswith(archive.name)
        click.echo(error.message if named else f"{archive.name}: {error.message}")
        return 1
    finally:
        await engine.close(drain_s=0)


def _facts(archive: str, status: ModelStatus, load_s: float) -> list[str]:
    spec, worker = status.spec, status.workers[0]
    model = (spec.manifest or {}).get("model")
    backend = model.get("backend") if isinstance(model, Mapping) else None
    gpu = "" if worker.device is None else f" with GPU {worker.device} at hand"
    served = f"{backend}, " if backend else ""
    lines = [
        f"{archive}: {spec.name}, version {spec.version} ({served}handler {spec.handler})",
        f"loaded in {load_s:.1f} s{gpu}; the worker takes {worker.memory_bytes / 2**20:.0f} MiB",
    ]
    for side, specs in (("input", status.signature.inputs), ("output", status.signature.outputs)):
        lines += [f"{side:>6}  {spec}" for spec in specs]
    return lines


async def _run_samples(engine: Engine, status: ModelStatus, files: Sequence[Path]) -> int:
    failed, count = 0, 0
    packed = samples.read(status.spec.path, status.spec.manifest)
    for name, body in [*packed, *((str(file), samples.body(str(file))) for file in files)]:
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
        click.echo("no samples: pack some with model-archiver --sample FILE, or name files here")
    elif failed:
        click.echo(f"{failed} of {count} failed")
    else:
        click.echo(f"all answered: {count}")
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
