"""Pack a real pretrained classifier, serve it, classify a real photo, stop: what `make demo` runs.

Every command is printed in the form in which it can be repeated. The server takes a free port and keeps its
files in the folder `.demo`, so that it disturbs no other.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "mxnet_resnet50"
STATE = ROOT / ".demo"
BIN = Path(sys.executable).parent
# The server's pid file is in the temporary folder: a folder of our own lets other servers run beside it.
ENVIRONMENT = {**os.environ, "TMPDIR": str(STATE), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
MODELS = {
    "squeezenet": ("squeezenet1_1", "mxnet_squeezenet"),
    "resnet50": ("resnet50_v1", "mxnet_resnet50"),
}
CONFIG = """\
# Written by examples/demo.py. Port 0 takes a free port.
inference_address=http://127.0.0.1:0
management_address=http://127.0.0.1:0
model_store={store}
log_location={logs}
metrics_location={logs}
"""


def run(*command: str, quiet: bool = False) -> str:
    """Print and run a command in the example's folder; return its output, or end with its exit code."""
    shown = [
        Path(part).name if part.startswith(str(BIN)) else part.replace(f"{ROOT}/", "../../")
        for part in command
    ]
    print(f"$ {shlex.join(shown)}", flush=True)
    result = subprocess.run(
        command, cwd=EXAMPLE, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, check=False
    )
    if not quiet or result.returncode:
        print(result.stdout, end="", flush=True)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout


def post(url: str, photo: Path) -> list[dict[str, str]]:
    """Send the photo with curl, or with Python where there is no curl, and return the answer."""
    if shutil.which("curl"):
        answer = run("curl", "--silent", "--show-error", "--fail", "-X", "POST", url, "-T", str(photo))
    else:
        code = (
            "import sys, urllib.request as r; "
            "print(r.urlopen(r.Request(sys.argv[1], open(sys.argv[2], 'rb').read())).read().decode())"
        )
        answer = run(str(BIN / "python"), "-c", code, url, str(photo))
    print()
    top: list[dict[str, str]] = json.loads(answer)
    return top


def main() -> None:
    """Run the demo."""
    name = sys.argv[1] if len(sys.argv) > 1 else "squeezenet"
    if name not in MODELS:
        sys.exit(f"no such demo model: {name}; there are {', '.join(MODELS)}")
    weights, folder = MODELS[name]
    STATE.mkdir(exist_ok=True)
    store = STATE / "model-archives"
    store.mkdir(exist_ok=True)
    config = STATE / "config.properties"
    config.write_text(CONFIG.format(store=store, logs=STATE / "logs"))
    print(f"$ cd {EXAMPLE.relative_to(ROOT)}\n$ export TMPDIR=../../.demo  # a second server needs its own")

    run(str(BIN / "python"), "fetch_weights.py", weights)
    run(
        *(str(BIN / "model-archiver"), "--model-name", name, "--model-path", folder),
        *("--handler", "img_classifier_service:handle", "--export-path", str(store), "--force"),
    )
    run(str(BIN / "mms-lite"), "--start", "--mms-config", str(config), "--models", f"{name}.mar")
    try:
        address = json.loads((STATE / ".model_server.json").read_text())["inference_address"]
        top = post(f"{address}/predictions/{name}", ROOT / "examples" / "photos" / "coffee.png")
    finally:
        run(str(BIN / "mms-lite"), "--stop")
    label, probability = next(iter(top[0].items()))
    print(f"\nThe photo shows: {label} ({float(probability):.0%}).")
    print(
        "To go on: README.md tells how to serve a model of your own; `make demo MODEL=resnet50` takes a\n"
        "larger network; examples/mxnet_resnet50/README.md is the tutorial step by step."
    )


if __name__ == "__main__":
    main()
