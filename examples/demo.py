"""Pack a real pretrained classifier, serve it, classify a real photo, stop: what `make demo` runs.

Every command is printed in the form in which it can be repeated. The server takes a free port and keeps its
files in the folder `.demo`, so that it disturbs no other.
"""

from __future__ import annotations

import json
import sys

from serving import ROOT, Shell

MODELS = {
    "squeezenet": ("squeezenet1_1", "mxnet_squeezenet"),
    "resnet50": ("resnet50_v1", "mxnet_resnet50"),
}
STORE = "../../.demo/model-archives"


def main() -> None:
    """Run the demo."""
    name = sys.argv[1] if len(sys.argv) > 1 else "squeezenet"
    if name not in MODELS:
        sys.exit(f"no such demo model: {name}; there are {', '.join(MODELS)}")
    weights, folder = MODELS[name]
    shell = Shell(ROOT / "examples" / "mxnet_resnet50", ROOT / ".demo")
    shell.enter()
    (shell.folder / STORE).mkdir(exist_ok=True)

    shell.run("python", "fetch_weights.py", weights)
    shell.run(
        *("model-archiver", "--model-name", name, "--model-path", folder),
        *("--handler", "img_classifier_service:handle", "--export-path", STORE, "--force"),
    )
    with shell.serving(STORE, f"{name}.mar") as address:
        answer = shell.ask(f"{address}/predictions/{name}", "../../examples/photos/coffee.png")
        print(answer)
    label, probability = next(iter(json.loads(answer)[0].items()))
    print(f"\nThe photo shows: {label} ({float(probability):.0%}).")
    print(
        "To go on: README.md tells how to serve a model of your own; `make demo MODEL=resnet50` takes a\n"
        "larger network; examples/mxnet_resnet50/README.md is the tutorial step by step."
    )


if __name__ == "__main__":
    main()
