"""The model in LitServe."""

from typing import Annotated

import job
import litserve
from fastapi import Body


class Model(litserve.LitAPI):
    """The work; a batch comes as a list, a single request without one."""

    def setup(self, device):
        """Load the model."""
        self._work = job.load()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]):
        """Take the body as it is."""
        return request

    def predict(self, x):
        """Answer a batch, or one request."""
        return self._work(x) if job.JOB["batch_size"] > 1 else self._work([x])[0]

    def encode_response(self, output):
        """Leave the JSON to the server."""
        return output


if __name__ == "__main__":
    batch = {"max_batch_size": job.JOB["batch_size"]} if job.JOB["batch_size"] > 1 else {}
    if batch and job.JOB["delay_ms"] is not None:
        batch["batch_timeout"] = job.JOB["delay_ms"] / 1000
    server = litserve.LitServer(
        Model(**batch),
        accelerator="cpu",
        workers_per_device=job.JOB["workers"],
        timeout=job.JOB["timeout_s"],
    )
    server.run(host="127.0.0.1", port=job.JOB["port"], generate_client_file=False)
