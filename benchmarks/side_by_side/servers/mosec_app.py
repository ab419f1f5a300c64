"""The model in mosec."""

import job
from mosec import Server, Worker


class Model(Worker):
    """The work; a batch comes as a list, a single request without one."""

    def __init__(self) -> None:
        super().__init__()
        self._work = job.load()

    def deserialize(self, data):
        """Take the body as it is."""
        return data

    def forward(self, data):
        """Answer a batch, or one request."""
        return self._work(data) if job.JOB["batch_size"] > 1 else self._work([data])[0]


if __name__ == "__main__":
    server = Server()
    batch = {"max_batch_size": job.JOB["batch_size"]}
    if job.JOB["delay_ms"] is not None:
        batch["max_wait_time"] = job.JOB["delay_ms"]
    server.append_worker(Model, num=job.JOB["workers"], timeout=job.JOB["timeout_s"], **batch)
    server.run()
