"""The model in MLServer: bodies cross as base64 in the JSON of the open inference protocol."""

import base64
import json

import job
from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):
    """The work; the batch is the rows of the inputs."""

    async def load(self) -> bool:
        """Load the model."""
        self._work = job.load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer each row."""
        rows = [base64.b64decode(row) for given in payload.inputs for row in given.data.root]
        answers = [json.dumps(answer) for answer in self._work(rows)]
        output = StringCodec.encode_output("answers", answers)
        return InferenceResponse(model_name=self.name, outputs=[output])
