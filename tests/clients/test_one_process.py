"""The server's messages and those of its clients in one process: each has classes of its own."""

import itertools
import subprocess
import sys

import pytest

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (make clients)")
pytest.importorskip("ovmsclient", reason="ovmsclient is not installed (make clients)")

OURS = """
from mms_lite.protos import message
ours = message("inference.ModelInferRequest")
predict = message("tensorflow.serving.PredictRequest")
"""
TRITON = """
from tritonclient.grpc import service_pb2
theirs = service_pb2.ModelInferRequest
"""
OVMS = """
from ovmsclient.tfs_compat.protos.tensorflow_serving.apis import predict_pb2
"""
USE = """
sent = theirs(model_name="m", raw_input_contents=[b"1"])
assert ours.FromString(sent.SerializeToString()).model_name == "m"
assert theirs.FromString(ours(model_name="n").SerializeToString()).model_name == "n"
assert ours is not theirs
asked = predict_pb2.PredictRequest(output_filter=["y"])
assert list(predict.FromString(asked.SerializeToString()).output_filter) == ["y"]
"""


@pytest.mark.parametrize("order", list(itertools.permutations([OURS, TRITON, OVMS])), ids=range(6))
def test_messages_of_server_and_clients_in_one_process(order: tuple[str, ...]) -> None:
    code = "".join(order) + USE
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
