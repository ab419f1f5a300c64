"""In SageMaker's place: its preset and its calls, and its own toolkit, which finds and ends the server."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mms_site import Answer, Site

pytestmark = pytest.mark.time_limit(120)

Wait = Callable[..., Any]

DOUBLE = """
    import json

    def handle(data, context):
        if data is None:
            return None
        return [[2 * number for number in json.loads(item["body"])] for item in data]
"""
FULL_AT_LOAD = """
    def handle(data, context):
        raise MemoryError("the weights do not fit")
"""
FULL_AT_INVOKE = """
    def handle(data, context):
        if data is not None:
            raise MemoryError("the photo does not fit")
"""
# What users give the toolkit: functions for its own handler service.
INFERENCE = """
    def model_fn(model_dir):
        print("the model is in " + model_dir)
        return 2

    def predict_fn(data, model):
        return data * model
"""
SERVE = """
    from sagemaker_inference import model_server
    model_server.start_model_server({arguments})
"""
TOOLKIT = [
    "sagemaker-inference==1.10.1",
    "retrying<1.4",
    "boto3",
    "botocore",
    "s3transfer",
    "jmespath",
    "six",
]
# A process id 1, a /proc and an /etc of one's own, as in a container.
UNSHARE = [
    "unshare",
    "--user",
    "--map-root-user",
    "--fork",
    "--kill-child",
    "--pid",
    "--mount",
    "--mount-proc",
]
OWN_ETC = 'mount --rbind /etc "$0/real" && mount --bind "$0/etc" /etc && exec "$@"'


def free_port() -> int:
    """Return a port that is free now: SageMaker's containers are told a number, and one for both APIs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def call(site: Site, method: str, target: str, value: object = None) -> Answer:
    """Call as SageMaker does: one port for all, JSON in the body."""
    connection = await site.connect()
    try:
        lines = [f"{method} {target} HTTP/1.1", "Host: test", "Content-Type: application/json"]
        body = b"" if value is None else json.dumps(value).encode()
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        await connection.send(head.encode() + body)
        return await asyncio.wait_for(connection.answer(), 60)
    finally:
        await connection.close()


async def keep_the_contract(site: Site) -> None:
    """Make all calls that SageMaker makes to a container for several models."""
    for name, source in {"double": DOUBLE, "heavy": FULL_AT_LOAD, "greedy": FULL_AT_INVOKE}.items():
        site.handler(name, source)

    async def load(name: str) -> Answer:
        return await call(site, "POST", "/models", {"model_name": name, "url": str(site.store / name)})

    ping = await call(site, "GET", "/ping")
    assert (ping.status, ping.json) == (200, {"status": "Healthy"})
    assert (await call(site, "GET", "/models")).json["models"] == []

    assert (await load("double")).status == 200
    assert (await load("double")).status == 409
    listed = (await call(site, "GET", "/models")).json["models"]
    assert listed == [{"modelName": "double", "modelUrl": str(site.store / "double")}]
    assert "double" in (await call(site, "GET", "/models/double")).body.decode()
    answer = await call(site, "POST", "/models/double/invoke", [1, 2])
    assert (answer.status, answer.json) == (200, [2, 4])

    assert (await load("heavy")).status == 507
    assert (await call(site, "GET", "/models/heavy")).status == 404
    assert (await load("greedy")).status == 200
    assert (await call(site, "POST", "/models/greedy/invoke", [1])).status == 507
    assert (await load("missing")).status == 404
    assert (await call(site, "POST", "/models/missing/invoke", [1])).status == 404

    assert (await call(site, "DELETE", "/models/double")).status == 200
    assert (await call(site, "POST", "/models/double/invoke", [1])).status == 404
    assert (await call(site, "DELETE", "/models/double")).status == 404
    assert (await call(site, "GET", "/ping")).status == 200


async def test_the_preset_serves_several_models_on_one_port(site: Site) -> None:
    port = free_port()
    site.environ = {
        "SAGEMAKER_MODEL_STORE": "/",
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "SAGEMAKER_RESPONSE_TIMEOUT": "1",
        "SAGEMAKER_NUM_MODEL_WORKERS": "1",
        "SAGEMAKER_HANDLER": "service:handle",
        "SAGEMAKER_MAX_RESPONSE_SIZE": "1000",
        "SAGEMAKER_MAX_REQUEST_SIZE": "1000",
    }

    line = "mxnet-model-server --start --mms-config sagemaker > output.txt"
    started = await asyncio.to_thread(site.run, ["sh", "-c", line])

    assert started.returncode == 0, started.stdout
    assert site.state["inference_address"] == site.state["management_address"] == f"http://0.0.0.0:{port}"
    await keep_the_contract(site)
    await site.stop()
    printed = (site.folder / "output.txt").read_text()
    assert "default_response_timeout counts minutes, as in MMS: 1 is 60 s" in printed
    assert '"POST /models/double/invoke HTTP/1.1" 200' in printed
    assert site.processes() == []


@pytest.fixture(scope="session")
def toolkit(pytestconfig: pytest.Config) -> Path:
    """A folder with SageMaker's own toolkit, as its maker released it."""
    pytest.importorskip("scipy", reason="the toolkit needs scipy, which comes with the mxnet extra")
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("sagemaker-toolkit") / "-".join(map(str, sys.version_info[:2]))
    if not (folder / "sagemaker_inference").is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
            *TOOLKIT,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        if result.returncode != 0:
            pytest.skip(f"the toolkit cannot be installed: {result.stderr[-300:]}")
    return folder


class Container:
    """What stands for a container: a process with id 1 that may write to /etc."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._output = site.folder / "output.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, arguments: str, **environ: str) -> None:
        """Run a script that starts the toolkit, as the entry point of an image does."""
        script = self._site.folder / "serve.py"
        script.write_text(textwrap.dedent(SERVE).format(arguments=arguments))
        etc, real = self._site.folder / "etc", self._site.folder / "real"
        etc.mkdir()
        real.mkdir()
        for name in os.listdir("/etc"):
            (etc / name).symlink_to(real / name)
        bin_folder = Path(sys.executable).parent
        own = {"TMPDIR": str(self._site.folder), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [*UNSHARE, "sh", "-c", OWN_ETC, self._site.folder, sys.executable, script],
                cwd=self._site.folder,
                env={**os.environ, **own, **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def watches(self) -> bool:
        """Whether the toolkit has found its server and waits for a signal or the server's end."""
        status = Path(f"/proc/{self._first().pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def stop(self) -> int:
        """Stop as SageMaker does; return the exit code."""
        assert self._process is not None
        self._first().send_signal(signal.SIGTERM)
        return self._process.wait(40)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def _first(self) -> psutil.Process:
        assert self._process is not None
        (first,) = psutil.Process(self._process.pid).children()
        return first


@pytest.fixture
def container(site: Site, toolkit: Path) -> Iterator[Container]:
    probe = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"this machine lends no namespaces: {probe.stderr.decode(errors='replace').strip()}")
    container = Container(site)
    yield container
    container.end()


async def healthy(site: Site, container: Container, wait_until: Wait) -> None:
    """Wait until the server serves and the toolkit has found it."""
    lines = ("Model server started.", "Model server was not started.")
    await wait_until(
        lambda: container.ended or any(line in container.output for line in lines), "the server to start", 60
    )
    assert lines[0] in container.output
    await wait_until(container.watches, "the toolkit to find its server", 20)
    ping = await call(site, "GET", "/ping")
    assert (ping.status, ping.json) == (200, {"status": "Healthy"})


async def test_the_toolkit_starts_finds_and_stops_the_server(
    site: Site, container: Container, toolkit: Path, wait_until: Wait
) -> None:
    code = site.folder / "model" / "code"
    code.mkdir(parents=True)
    (code / "inference.py").write_text(textwrap.dedent(INFERENCE))

    container.run(
        "",
        PYTHONPATH=str(toolkit),
        SAGEMAKER_BASE_DIR=str(site.folder),
        SAGEMAKER_BIND_TO_PORT=str(free_port()),
        SAGEMAKER_MODEL_SERVER_WORKERS="1",
    )

    await healthy(site, container, wait_until)
    answer = await call(site, "POST", "/invocations", [1, 2])
    assert (answer.status, answer.json) == (200, [2, 4])
    assert answer.headers["content-type"] == "application/json"
    assert await asyncio.to_thread(container.stop) == 0
    # CloudWatch reads what the first process may write to: the log and what the model printed.
    assert "Model server started." in container.output.splitlines()
    assert f"the model is in {site.folder}/model" in container.output
    assert '"POST /invocations HTTP/1.1" 200' in container.output
    assert " - Model server stopped.\n" in container.output
    assert site.processes() == []


async def test_the_toolkit_serves_several_models(
    site: Site, container: Container, toolkit: Path, wait_until: Wait
) -> None:
    container.run(
        '"service:handle"',
        PYTHONPATH=str(toolkit),
        SAGEMAKER_MULTI_MODEL="true",
        SAGEMAKER_BASE_DIR=str(site.folder),
        SAGEMAKER_BIND_TO_PORT=str(free_port()),
    )

    await healthy(site, container, wait_until)
    await keep_the_contract(site)
    assert await asyncio.to_thread(container.stop) == 0
    assert site.processes() == []
