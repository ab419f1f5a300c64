"""What is left of frameworks' messages: no folder of this machine, and all that helps their reader."""

import re
from pathlib import Path

import pytest

from mms_lite.worker.backends.faults import reason

NO_NOISE = re.compile(r"(?!)")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("cannot open /tmp/models/m/w.bin", "cannot open w.bin"),
        ("""neither '/tmp/my models/w.bin' nor "/usr/x y/w.bin".""", """neither 'w.bin' nor "w.bin"."""),
        ("path=/tmp/a/w.bin:(/usr/lib/x.so)", "path=w.bin:(x.so)"),
        ("no file /tmp/w.bin in /tmp/a/m", "no file w.bin in m"),
        ("allowed directory: '/tmp/m s/model'", "allowed directory: 'the archive'"),
        ("m.onnx and /tmp/m s/model/w.bin", "m.onnx and w.bin"),
        ("node '/encoder/layer.0/Gather' of input/output", "node '/encoder/layer.0/Gather' of input/output"),
        ("see https://onnx.ai/tmp/a, ../w.bin, N/A", "see https://onnx.ai/tmp/a, ../w.bin, N/A"),
    ],
)
def test_folders_of_this_machine_are_left_out(said: str, told: str) -> None:
    assert reason(ValueError(said), NO_NOISE, folder=Path("/tmp/m s/model")) == told
