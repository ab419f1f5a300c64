"""A body that is a path: note `PATH.started`, then answer once PATH exists. Any other: answer at once."""

import time
from pathlib import Path


def handle(data, context):
    if data is None:
        return None
    bodies = [bytes(item["body"]) for item in data]
    paths = [Path(body.decode()) for body in bodies if body.startswith(b"/")]
    for path in paths:
        path.with_suffix(".started").touch()
    while not all(path.exists() for path in paths):
        time.sleep(0.002)
    return bodies
