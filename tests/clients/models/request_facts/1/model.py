"""What the model is told of a request beside its tensors, as JSON."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            facts = {"id": request.request_id(), "parameters": json.loads(request.parameters() or "{}")}
            text = np.array([json.dumps(facts)], np.object_)
            responses.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("FACTS", text)]))
        return responses
