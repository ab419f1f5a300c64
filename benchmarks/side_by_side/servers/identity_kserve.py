"""The identity in KServe's Python server; it listens on the two ports that follow on the command line."""

import sys

import job
from kserve import InferRequest, InferResponse, Model, ModelServer
from kserve.utils.utils import get_predict_response


class Identity(Model):
    """Answers each request with its own tensor, in the form that the request asks for."""

    def load(self) -> bool:
        """Tell that this process is a worker."""
        job.tell()
        self.ready = True
        return True

    async def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        """Answer."""
        return get_predict_response(payload, payload.inputs[0].as_numpy(), self.name)


if __name__ == "__main__":
    model = Identity("identity")
    model.load()
    ModelServer(http_port=int(sys.argv[1]), grpc_port=int(sys.argv[2])).start([model])
