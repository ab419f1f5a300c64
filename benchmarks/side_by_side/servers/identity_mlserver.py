"""The identity in MLServer, with its codec for numpy arrays."""

import job
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):
    """Answers each request with its own tensor."""

    async def load(self) -> bool:
        """Tell that this process is a worker."""
        job.tell()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer."""
        array = NumpyCodec.decode_input(payload.inputs[0])
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("OUT", array)])
