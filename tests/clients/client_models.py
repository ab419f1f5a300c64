"""What the servers of these tests serve: a Triton repository, and a model store with archives."""

import json
import shutil
from pathlib import Path

from client_server import BIN, command

HERE = Path(__file__).parent
# Datatypes of KServe v2, which a config.pbtxt names TYPE_...; BYTES is TYPE_STRING there.
DATATYPES = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "BF16", "FP32", "FP64", "BYTES"),
)
_SCALE = '''\
"""y = 3 x, for any number of rows."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x * x.dtype.type(3))]))
        return responses
'''
_ROWS = {"datatype": "FP32", "shape": [-1, 4]}


def write_repository(folder: Path) -> None:
    """Write a Triton repository: the models of tests/clients/models, and `identity_X` for each datatype."""
    shutil.copytree(HERE / "models", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for datatype in DATATYPES:
        add_identity(folder, datatype)


def add_identity(folder: Path, datatype: str) -> None:
    """Add `identity_X`, which gives INPUT0 [-1,-1] back as OUTPUT0."""
    model = folder / f"identity_{datatype}"
    shutil.copytree(HERE / "identity", model, ignore=shutil.ignore_patterns("__pycache__"))
    config = model / "config.pbtxt"
    text = config.read_text().replace("identity_DATATYPE", model.name)
    config.write_text(text.replace("DATATYPE", "STRING" if datatype == "BYTES" else datatype))


def write_store(folder: Path) -> None:
    """Write a model store: `echo`, a handler of raw bodies, and `scale`, a model without a handler."""
    echo = folder / "echo"
    echo.mkdir(parents=True)
    shutil.copy(HERE.parent / "handlers" / "echo.py", echo / "service.py")
    _archive(folder, "echo", "--model-path", str(echo), "--handler", "service:handle")
    shutil.rmtree(echo)
    source = folder / "model.py"
    source.write_text(_SCALE)
    backend = {"inputs": [{"name": "x", **_ROWS}], "outputs": [{"name": "y", **_ROWS}], "batch": True}
    config = json.dumps({"backend": backend})
    _archive(folder, "scale", "--model-file", str(source), "--handler", "tensor", "--handler-config", config)
    source.unlink()


def _archive(folder: Path, name: str, *words: str) -> None:
    archiver = [str(BIN / "model-archiver"), "--model-name", name, "--export-path", str(folder), *words]
    done = command(archiver, cwd=folder, temp=folder)
    assert done.returncode == 0, done.stdout
