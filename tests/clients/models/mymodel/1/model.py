"""With the tensors of the Open Inference Protocol's example: for each flag the sums of columns, or half."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            numbers = pb_utils.get_input_tensor_by_name(request, "input0").as_numpy()
            flags = pb_utils.get_input_tensor_by_name(request, "input1").as_numpy()
            rows = np.where(flags[:, None], numbers.sum(axis=0), numbers.sum(axis=0) / 2)
            output = pb_utils.Tensor("output0", rows.astype(np.float32))
            responses.append(pb_utils.InferenceResponse(output_tensors=[output]))
        return responses
