"""A handler like those of MMS's examples: a singleton, three steps, whole batches only, errors as 500."""

import logging

from mms.context import Context  # as the examples import it, for nothing

assert Context


class Shout:
    def __init__(self):
        self.initialized = False
        self._context = None
        self._batch_size = 0

    def initialize(self, context):
        self._context = context
        self._batch_size = context.system_properties["batch_size"]
        self.initialized = True

    def preprocess(self, batch):
        assert len(batch) == self._batch_size, f"a batch of {len(batch)} for {self._batch_size}"
        return [request.get("data") or request.get("body") for request in batch]

    def inference(self, texts):
        return [text.decode("ascii").upper() for text in texts]

    def postprocess(self, answers):
        return answers

    def handle(self, data, context):
        try:
            return self.postprocess(self.inference(self.preprocess(data)))
        except Exception as error:
            logging.exception("the model failed")
            context.request_processor.report_status(500, "Unknown inference error")
            return [str(error)] * self._batch_size


_service = Shout()


def handle(data, context):
    if not _service.initialized:
        _service.initialize(context)
    if data is None:
        return None
    return _service.handle(data, context)
