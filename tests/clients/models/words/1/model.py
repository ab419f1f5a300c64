"""Words in capitals."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            words = pb_utils.get_input_tensor_by_name(request, "words").as_numpy()
            upper = np.array([word.upper() for word in words], np.object_)
            responses.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("upper", upper)]))
        return responses
