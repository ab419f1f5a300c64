"""Fail as the request says: by raising, or by an error with the code that it names."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        how = pb_utils.get_input_tensor_by_name(request, "HOW").as_numpy()
        word = how[0].decode()
        if word == "raise":
            raise ValueError("raised on demand")
        if word == "well":
            return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("HOW_OUT", how)])
        error = pb_utils.TritonError("an error on demand", getattr(pb_utils.TritonError, word))
        return pb_utils.InferenceResponse(output_tensors=[], error=error)
