"""What the examples and the demo share: run commands as they are printed, serve while a block runs, ask.

The server keeps its files in a folder of its own and takes free ports, so that it disturbs no other.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weights import libraries
from weights.packages import FetchError

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CONFIG = """\
# Written by examples/serving.py. Port 0 takes a free port.
inference_address=http://127.0.0.1:0
management_address=http://127.0.0.1:0
metrics_address=http://127.0.0.1:0
grpc_address=http://127.0.0.1:0
model_store={store}
log_location={logs}
metrics_location={logs}
"""
# For machines without curl: the same as `curl -X POST URL -H TYPE -T FILE`.
POST = (
    "import sys, urllib.request as r; url, file, kind = sys.argv[1:]; "
    'ask = r.Request(url, open(file, "rb").read(), {"Content-Type": kind}); '
    'print(r.urlopen(ask).read().decode(), end="")'
)


class Shell:
    """Runs commands in an example's folder; `state` is the private folder of its server."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.folder = folder
        self.state = state

    def enter(self) -> None:
        """Print how to come to where the printed commands can be repeated."""
        self.state.mkdir(exist_ok=True)
        print(f"$ cd {self.folder.relative_to(ROOT)}")
        print(f"$ export TMPDIR={self._shown(self.state)}  # a second server needs its own", flush=True)

    def run(self, *command: str) -> None:
        """Print and run a command, or end with its exit code if it fails."""
        self._run(command, stdout=None)

    def ask(self, url: str, body: str, content_type: str = "") -> str:
        """Post a file of the example's folder with curl, or with Python where there is no curl."""
        if shutil.which("curl"):
            head = ("-H", f"Content-Type: {content_type}") if content_type else ()
            post = ("curl", "--silent", "--show-error", "--fail", "-X", "POST", url, *head, "-T", body)
        else:
            post = ("python", "-c", POST, url, body, content_type or "application/octet-stream")
        return self._run(post, stdout=subprocess.PIPE)

    @contextmanager
    def serving(self, store: str, *archives: str) -> Iterator[str]:
        """Serve archives of a model store while the block runs; give the address to ask."""
        settings = CONFIG.format(store=(self.folder / store).resolve(), logs=self.state / "logs")
        config = self.state / "config.properties"
        config.write_text(settings)
        # A start that fails leaves no server, and one that was already running is not ours to stop.
        self.run("mms-lite", "--start", "--mms-config", self._shown(config), "--models", *archives)
        try:
            yield json.loads((self.state / ".model_server.json").read_text())["inference_address"]
        finally:
            self.run("mms-lite", "--stop")

    def _run(self, command: tuple[str, ...], stdout: int | None) -> str:
        print(f"$ {shlex.join(command)}", flush=True)
        program, *arguments = command
        # The temporary folder is where a server's pid file is: one of our own lets other servers run beside.
        environment = {
            **os.environ,
            "TMPDIR": str(self.state),
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        try:
            result = subprocess.run(
                [sys.executable if program == "python" else program, *arguments],
                cwd=self.folder,
                env=environment,
                text=True,
                stdout=stdout,
                check=False,
            )
        except FileNotFoundError:
            sys.exit(f"{program} is not installed: pip install {_here()}")
        if result.returncode:
            sys.exit(result.returncode)
        return result.stdout or ""

    def _shown(self, path: Path) -> str:
        return os.path.relpath(path, self.folder)


def shell_of(example: Path, **needs: str) -> Shell:
    """Return the shell of an example's run.py; `needs` maps modules to the extra that installs each.

    Ends with one line of advice if one of them cannot be imported.
    """
    try:
        libraries.require({module: f"{_here()}[{extra}]" for module, extra in needs.items()})
    except FetchError as error:
        sys.exit(f"{example.name}: {error}")
    folder = example.resolve().parent
    shell = Shell(folder, folder / ".run")
    shell.enter()
    return shell


def _here() -> str:
    """Name the project for pip, from where the user is."""
    return os.path.relpath(ROOT)
