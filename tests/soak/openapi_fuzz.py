"""Ask real servers what their own OpenAPI description says, rightly and wrongly, by schemathesis.

    python tests/soak/openapi_fuzz.py [--seconds 120] [--seed 1]

The answers have to be as described: status, content type, schema, headers. What is not is printed, and makes
the exit code 1.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from soak_site import LOADED_BY_HAND, REPOSITORY, STORE, Defect, Site, attacked

_MOST_OVER_S = 60.0
_RAISING = ("simple_string",)  # for what is no number, as a model may
_CHECKS = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
_SETTINGS = """
seed = {seed}
max-time = {seconds}
request-timeout = 20.0
continue-on-failure = true
warnings = false

[dictionaries.models]
values = {models}

[parameters]
"path.model_name" = {{ dictionary = "models", probability = 0.7 }}

[checks]
enabled = false
{checks}
# The rest is what a model, a full server or a late answer is told by.
[checks.not_a_server_error]
enabled = true
expected-statuses = ["2xx", "4xx", 501, 503, 504]

[phases.stateful]
enabled = false
"""


async def conform(site: Site, arguments: argparse.Namespace) -> list[Defect]:
    """Run schemathesis over all routes of the inference address but those that load, and look after it."""
    with TemporaryDirectory(prefix="mms-lite-openapi-") as folder:
        settings = Path(folder) / "schemathesis.toml"
        models = [name for name in (*site.models, LOADED_BY_HAND) if name not in _RAISING]
        settings.write_text(
            _SETTINGS.format(
                seed=arguments.seed,
                seconds=max(1, int(arguments.seconds)),
                models=json.dumps(models),
                checks="\n".join(f"{name}.enabled = true" for name in _CHECKS),
            )
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "--no-color", "run"),
            *("--exclude-path-regex", "/load$|/unload$|/reload$", f"{site.server.url}/api-description"),
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), arguments.seconds + _MOST_OVER_S)
        finally:
            if process.returncode is None:
                process.kill()
    text = output.decode("utf-8", "replace")
    print(f"{site.kind}:", *(line for line in text.splitlines() if "generated" in line or "Tested" in line))
    found = [Defect("the server is not as it describes itself", text)] if process.returncode else []
    return found + await site.check_end()


def main() -> int:
    """Ask a server over a Triton repository, then one over a model store; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=[REPOSITORY, STORE], choices=[REPOSITORY, STORE])
    arguments = parser.parse_args()
    arguments.seconds /= len(arguments.kinds)
    found: list[Defect] = []
    for kind in arguments.kinds:
        found += asyncio.run(attacked(kind, lambda site: conform(site, arguments)))
    for defect in found:
        print(f"DEFECT: {defect.what}\n{defect.how}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
