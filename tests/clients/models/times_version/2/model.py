"""The input times this version's number."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self._factor = int(args["model_version"])

    def execute(self, requests):
        responses = []
        for request in requests:
            numbers = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            product = pb_utils.Tensor("OUTPUT0", numbers * numbers.dtype.type(self._factor))
            responses.append(pb_utils.InferenceResponse(output_tensors=[product]))
        return responses
