"""The handler of the side-by-side benchmark, with a sampler in the worker and a clock around the model."""

import os
import time

import sampler
import service

_sampler = sampler.listen(os.environ[sampler.FOLDER])


def handle(data, context):
    """Answer each request of a batch."""
    begin = time.monotonic_ns()
    answers = service.handle(data, context)
    _sampler.model_ns += time.monotonic_ns() - begin
    _sampler.batches += 1
    return answers
