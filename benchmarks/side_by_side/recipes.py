"""How each server is started for a job, as its own documentation says: files, a command, where to ask.

What the job does not say is left at the server's default, but for the time that an answer may take.
"""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import CannotCompareError, free_ports
from protocols import Door

HERE = Path(__file__).resolve().parent
SERVERS = HERE / "servers"
RAW = {"Content-Type": "application/octet-stream"}

_TIMEOUT_S = 120  # MMS's own; mosec's and LitServe's, of 3 s and 30 s, are too short for a full queue
_REGISTER_S = 120.0
_STEP_S = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """What a server is to serve, and with how much."""

    work: str = "noop"  # "mxnet", "onnx", "identity"
    sleep_ms: float = 0.0
    workers: int = 1
    batch_size: int = 1
    max_batch_delay_ms: int | None = None  # None: the server's own default
    queue_size: int = 100  # for servers that have a bound
    threads: int = 1  # of each worker's framework
    clock_dir: Path | None = None  # each worker appends its clock readings there

    def environment(self, folder: Path, port: int) -> dict[str, str]:
        """Return what tells a server's processes the job; they leave their pids in FOLDER/workers."""
        made = {"work": self.work, "sleep_ms": self.sleep_ms, "threads": self.threads}
        clock = {"clock_dir": str(self.clock_dir)} if self.clock_dir else {}
        told = {
            "make": {**made, **clock},
            "workers": self.workers,
            "batch_size": self.batch_size,
            "delay_ms": self.max_batch_delay_ms,
            "timeout_s": _TIMEOUT_S,
            "port": port,
            "workers_dir": str(folder / "workers"),
        }
        return {
            "SIDE_BY_SIDE_JOB": json.dumps(told),
            "PYTHONPATH": f"{SERVERS}:{HERE}",
            "OMP_NUM_THREADS": str(self.threads),
        }


def _same(body: bytes) -> bytes:
    return body


@dataclass(frozen=True, slots=True)
class Launch:
    """A server that is ready to be started, and how to ask it."""

    command: list[str]
    port: Callable[[], int | None]  # None: not bound yet
    path: str
    headers: Mapping[str, str] = field(default_factory=lambda: RAW)
    encode: Callable[[bytes], bytes] = _same
    decode: Callable[[bytes], Any] = json.loads
    register: Callable[[], None] | None = None  # what is to be done once it runs
    programs: Path | None = None  # where it looks for `python`; None: beside the command
    doors: Mapping[str, Door] = field(default_factory=dict)  # "identity" is asked by these, not by `path`


def mms_lite(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start this project's server as `pip install` leaves it, every default on, with free ports."""
    _archive(folder, bin_folder / "model-archiver")
    addresses = {f"{api}_address": "http://127.0.0.1:0" for api in ("inference", "management", "metrics")}
    properties(folder, {**addresses, **_mms_settings(job)})

    def bound(api: str) -> int | None:
        return bound_port(folder, api)

    return Launch(
        start_mms(bin_folder / "mms-lite"),
        lambda: bound("inference_address"),
        "/predictions/m",
        register=_registering(job, lambda: bound("management_address")),
    )


def bound_port(folder: Path, api: str) -> int | None:
    """Return the port that this project's server has bound for a property's address; None: not yet."""
    with suppress(OSError, ValueError, KeyError):
        state = json.loads((folder / "tmp" / ".model_server.json").read_text())
        return urllib.parse.urlsplit(state[api]).port
    return None


def multi_model_server(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start Multi Model Server; it cannot choose ports itself."""
    inference, management = free_ports(2)
    _archive(folder, bin_folder / "model-archiver")
    addresses = {
        "inference_address": f"http://127.0.0.1:{inference}",
        "management_address": f"http://127.0.0.1:{management}",
    }
    properties(folder, {**addresses, **_mms_settings(job)})
    return Launch(
        start_mms(bin_folder / "multi-model-server"),
        lambda: inference,
        "/predictions/m",
        register=_registering(job, lambda: management),
    )


def start_mms(program: Path) -> list[str]:
    """Return the command that starts it in the foreground with config.properties."""
    return [str(program), "--start", "--foreground", "--mms-config", "config.properties"]


def _mms_settings(job: Job) -> dict[str, object]:
    """Return what both spell alike; batch sizes can be said in a registration only."""
    settings = {"default_workers_per_model": job.workers, "job_queue_size": job.queue_size}
    return {**settings, "model_store": "store", **({"load_models": "m.mar"} if job.batch_size == 1 else {})}


def _archive(folder: Path, archiver: Path) -> None:
    """Pack the handler into FOLDER/store/m.mar with the server's own tool."""
    source, store = folder / "source", folder / "store"
    source.mkdir()
    store.mkdir()
    shutil.copy(SERVERS / "service.py", source)
    pack = [str(archiver), "--model-name", "m", "--model-path", str(source), "--handler", "service:handle"]
    _run([*pack, "--export-path", str(store)])


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        raise CannotCompareError(f"{Path(command[0]).name} fails: {told.strip()[-300:]}") from error


def properties(folder: Path, settings: Mapping[str, object]) -> None:
    """Write FOLDER/config.properties."""
    lines = [f"{key}={value}\n" for key, value in settings.items()]
    (folder / "config.properties").write_text("".join(lines))


def _registering(job: Job, port: Callable[[], int | None]) -> Callable[[], None] | None:
    """Return what registers the model with its batch size, where it has one."""
    if job.batch_size == 1:
        return None
    query = {"url": "m.mar", "batch_size": job.batch_size}
    query |= {"initial_workers": job.workers, "synchronous": "true"}
    if job.max_batch_delay_ms is not None:
        query["max_batch_delay"] = job.max_batch_delay_ms
    return lambda: _post_models(port, "/models?" + urllib.parse.urlencode(query))


def _post_models(port: Callable[[], int | None], target: str) -> None:
    until = time.monotonic() + _REGISTER_S
    told = "no answer"
    while time.monotonic() < until:
        if (number := port()) is not None:
            connection = http.client.HTTPConnection("127.0.0.1", number, timeout=_REGISTER_S)
            with suppress(OSError, http.client.HTTPException):
                connection.request("POST", target)
                answer = connection.getresponse()
                told = answer.read(300).decode(errors="replace")
                connection.close()
                if answer.status == 200:
                    return
                break
        time.sleep(_STEP_S)
    raise CannotCompareError(f"the model cannot be registered: {told}")


def mosec(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start mosec."""
    (port,) = free_ports(1)
    command = [str(bin_folder / "python"), str(SERVERS / "mosec_app.py"), "--address", "127.0.0.1"]
    limits = ["--capacity", str(job.queue_size), "--timeout", str(_TIMEOUT_S * 1000)]
    return Launch([*command, "--port", str(port), *limits], lambda: port, "/inference")


def litserve(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start LitServe; it has no bound on its queue."""
    (port,) = free_ports(1)
    command = [str(bin_folder / "python"), str(SERVERS / "litserve_app.py")]
    return Launch(command, lambda: port, "/predict")


def torchserve(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start TorchServe; its archive holds the model's settings."""
    inference, management, metrics, *grpc = free_ports(5)
    (folder / "store").mkdir()
    delay = {} if job.max_batch_delay_ms is None else {"maxBatchDelay": job.max_batch_delay_ms}
    counts = {"minWorkers": job.workers, "maxWorkers": job.workers, "batchSize": job.batch_size}
    model = {**counts, **delay, "jobQueueSize": job.queue_size}
    (folder / "model.yaml").write_text("".join(f"{key}: {value}\n" for key, value in model.items()))
    pack = [str(bin_folder / "torch-model-archiver"), "--model-name", "m", "--version", "1.0"]
    pack += ["--handler", str(SERVERS / "service.py"), "--config-file", str(folder / "model.yaml")]
    _run([*pack, "--export-path", str(folder / "store")])
    settings = {
        "inference_address": f"http://127.0.0.1:{inference}",
        "management_address": f"http://127.0.0.1:{management}",
        "metrics_address": f"http://127.0.0.1:{metrics}",
        "grpc_inference_port": grpc[0],
        "grpc_management_port": grpc[1],
        "model_store": "store",
        "load_models": "m.mar",
        "job_queue_size": job.queue_size,
    }
    properties(folder, settings)
    command = [str(bin_folder / "torchserve"), "--start", "--foreground", "--disable-token-auth"]
    return Launch([*command, "--ts-config", "config.properties"], lambda: inference, "/predictions/m")


def mlserver(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start MLServer; it has no bound on its queue."""
    port, grpc, metrics = free_ports(3)
    server = {"host": "127.0.0.1", "http_port": port, "grpc_port": grpc, "metrics_port": metrics}
    (folder / "settings.json").write_text(json.dumps({**server, "parallel_workers": job.workers}))
    model: dict[str, object] = {"name": "m", "implementation": "mlserver_runtime.Model"}
    if job.batch_size > 1:
        delay_s = 0.1 if job.max_batch_delay_ms is None else job.max_batch_delay_ms / 1000
        model |= {"max_batch_size": job.batch_size, "max_batch_time": delay_s}
    (folder / "m").mkdir()
    (folder / "m" / "model-settings.json").write_text(json.dumps(model))
    return Launch(
        [str(bin_folder / "mlserver"), "start", "."],
        lambda: port,
        "/v2/models/m/infer",
        headers={"Content-Type": "application/json"},
        encode=_as_v2,
        decode=_from_v2,
    )


def _as_v2(body: bytes) -> bytes:
    text = base64.b64encode(body).decode()
    given = {"name": "body", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    return json.dumps({"inputs": [given]}).encode()


def _from_v2(answer: bytes) -> object:
    return json.loads(json.loads(answer)["outputs"][0]["data"][0])


def own_programs() -> Path:
    """Return the folder of this project's programs, which the running Python has."""
    return Path(sys.executable).parent
