"""Sum and difference of whole numbers that come and go as text."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        one, other = (self._numbers(request, f"INPUT{i}") for i in (0, 1))
        outputs = [self._text("OUTPUT0", one + other), self._text("OUTPUT1", one - other)]
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def _numbers(self, request, name):
        return pb_utils.get_input_tensor_by_name(request, name).as_numpy().astype(np.int64)

    def _text(self, name, numbers):
        return pb_utils.Tensor(name, numbers.astype(str).astype(np.object_))
