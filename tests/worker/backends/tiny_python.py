"""The tiny model as a model.py for the Triton Python backend."""

from pathlib import Path

from tiny import BIAS, WEIGHT, TinyModel

_SOURCE = f"""\
import numpy as np
import triton_python_backend_utils as pb_utils

WEIGHT = np.array({WEIGHT.tolist()}, np.float32)
BIAS = np.array({BIAS.tolist()}, np.float32)


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3]}})
        config.add_output({{"name": "y", "data_type": "TYPE_FP32", "dims": [-1, 2]}})
        return config

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        if x.shape[1:] != (3,):
            error = pb_utils.TritonError("x has no 3 columns", pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("y", x @ WEIGHT + BIAS)])
"""


def make(folder: Path) -> TinyModel:
    path = folder / "model.py"
    path.write_text(_SOURCE)
    return TinyModel("python", (path,))
