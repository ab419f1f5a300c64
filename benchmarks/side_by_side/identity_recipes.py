"""How each server is started with the identity model, as its own documentation says, and what it speaks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from environments import free_ports
from protocols import DATATYPE, INPUT, MODEL, OUTPUT, PROTOCOLS, SHAPE, Door
from recipes import SERVERS, Job, Launch, bound_port, properties, start_mms

_CONFIG = """name: "{name}"
backend: "python"
input [{{ name: "{input}" data_type: TYPE_{datatype} dims: {dims} }}]
output [{{ name: "{output}" data_type: TYPE_{datatype} dims: {dims} }}]
instance_group [{{ count: {workers} kind: KIND_CPU }}]
"""
_STUB = "triton_python_backend_stub"
_JSON, _BINARY, _GRPC, _V1_GRPC = "v2-rest-json", "v2-rest-binary", "v2-grpc", "v1-grpc"


Port = Callable[[], "int | None"]


def _launch(bin_folder: Path, command: list[str], ports: Mapping[str, Port], *, echo: bool = False) -> Launch:
    """Return a server that answers each protocol at its port; the first port is its main one."""
    doors = {name: Door(port, echo) for name, port in ports.items()}
    main = next(iter(doors))
    return Launch(command, doors[main].port, PROTOCOLS[main].path, programs=bin_folder, doors=doors)


def mms_lite(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start this project's server on a Triton repository, every other default on, with free ports."""
    apis = ("inference", "management", "metrics", "grpc")
    properties(folder, {f"{api}_address": "http://127.0.0.1:0" for api in apis})
    command = [*start_mms(bin_folder / "mms-lite"), "--model-repository", str(_repository(job, folder))]

    def rest() -> int | None:
        return bound_port(folder, "inference_address")

    def grpc() -> int | None:
        return bound_port(folder, "grpc_address")

    return _launch(bin_folder, command, {_BINARY: rest, _JSON: rest, _GRPC: grpc, _V1_GRPC: grpc})


def triton(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start the Triton that PyTriton brings, as a server of its own, on the same repository as ours."""
    rest, grpc, metrics = free_ports(3)
    (installed,) = bin_folder.parent.glob("lib/python*/site-packages/pytriton/tritonserver")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (installed / "backends" / "python").iterdir():
        (backend / file.name).symlink_to(file)
    # PyTriton, too, puts the one for the running Python there.
    version = installed.parents[2].name.removeprefix("python")
    (backend / _STUB).symlink_to(installed / "python_backend_stubs" / version / _STUB)
    command = [str(installed / "bin" / "tritonserver"), "--model-repository", str(_repository(job, folder))]
    command += ["--backend-directory", str(backend.parent), "--metrics-port", str(metrics)]
    command += ["--http-address", "127.0.0.1", "--http-port", str(rest)]
    command += ["--grpc-address", "127.0.0.1", "--grpc-port", str(grpc)]
    return _launch(bin_folder, command, {_BINARY: lambda: rest, _JSON: lambda: rest, _GRPC: lambda: grpc})


def _repository(job: Job, folder: Path) -> Path:
    """Make a Triton model repository of the one model."""
    version = folder / "repository" / MODEL / "1"
    version.mkdir(parents=True)
    shutil.copy(SERVERS / "identity_model.py", version / "model.py")
    told = {"name": MODEL, "input": INPUT, "output": OUTPUT, "datatype": DATATYPE, "dims": list(SHAPE)}
    (version.parent / "config.pbtxt").write_text(_CONFIG.format(**told, workers=job.workers))
    return version.parents[1]


def mlserver(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start MLServer; its REST API has no binary tensors.

    The model runs in the process that listens, which is faster here than its default, a worker beside it.
    """
    rest, grpc, metrics = free_ports(3)
    server = {"host": "127.0.0.1", "http_port": rest, "grpc_port": grpc, "metrics_port": metrics}
    (folder / "settings.json").write_text(json.dumps({**server, "parallel_workers": 0}))
    (folder / MODEL).mkdir()
    model = {"name": MODEL, "implementation": "identity_mlserver.Model"}
    (folder / MODEL / "model-settings.json").write_text(json.dumps(model))
    command = [str(bin_folder / "mlserver"), "start", "."]
    return _launch(bin_folder, command, {_JSON: lambda: rest, _GRPC: lambda: grpc})


def kserve(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start KServe's Python server: the model runs in the processes that listen."""
    rest, grpc = free_ports(2)
    command = [str(bin_folder / "python"), str(SERVERS / "identity_kserve.py"), str(rest), str(grpc)]
    return _launch(bin_folder, command, {_BINARY: lambda: rest, _JSON: lambda: rest, _GRPC: lambda: grpc})


def aiohttp(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start the bare echo over HTTP."""
    return _echo(bin_folder, "identity_aiohttp.py", (_BINARY, _JSON))


def grpcio(job: Job, folder: Path, bin_folder: Path) -> Launch:
    """Start the bare echo over gRPC."""
    return _echo(bin_folder, "identity_grpcio.py", (_GRPC, _V1_GRPC))


def _echo(bin_folder: Path, script: str, names: tuple[str, ...]) -> Launch:
    (port,) = free_ports(1)
    command = [str(bin_folder / "python"), str(SERVERS / script)]
    return _launch(bin_folder, command, {name: lambda: port for name in names}, echo=True)
