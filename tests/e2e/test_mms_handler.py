"""A handler as users of MMS have written them runs as it is: packed, started, asked in every way."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from mms_site import BIN, Site, request

pytestmark = pytest.mark.time_limit(60)

SERVICE = '''
"""Classify by length: in the style of MMS's examples, with a module-level service."""
import json
import logging
import os

from mms.context import Context
from mms.service import PredictionException


class LengthClassifier(object):
    def __init__(self):
        self.initialized = False
        self.labels = None
        self.device = None

    def initialize(self, context: Context):
        properties = context.system_properties
        gpu_id = properties.get("gpu_id")
        self.device = "cpu" if gpu_id is None else "gpu" + str(gpu_id)
        with open(os.path.join(properties.get("model_dir"), "labels.json")) as f:
            self.labels = json.load(f)
        logging.info("loaded %s, batch size %s", context.model_name, properties.get("batch_size"))
        self.initialized = True

    def preprocess(self, data):
        images = [item.get("data") or item.get("body") for item in data]
        for image in images:
            if not isinstance(image, (bytes, bytearray)):
                raise PredictionException("not bytes but " + type(image).__name__, 415)
        return [len(image) for image in images]

    def inference(self, lengths):
        return [self.labels[length % len(self.labels)] for length in lengths]

    def postprocess(self, labels):
        return [[{label: "0.75"}, {"device": self.device}] for label in labels]


_service = LengthClassifier()


def handle(data, context):
    if not _service.initialized:
        _service.initialize(context)

    if data is None:
        return None

    context.set_response_header(0, "X-Request", context.get_request_id(0))
    return _service.postprocess(_service.inference(_service.preprocess(data)))
'''


@pytest.fixture
async def served(site: Site) -> Site:
    folder = site.folder / "services" / "classifier"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "classifier_service.py").write_text(SERVICE)
    (folder / "labels.json").write_text(json.dumps(["even", "odd"]))
    packed = site.run(
        [
            *(str(BIN / "model-archiver"), "--model-name", "lengths", "--model-path", str(folder)),
            *("--handler", "classifier_service:handle", "--export-path", "store"),
        ]
    )
    assert packed.returncode == 0, packed.stdout
    site.configure(default_service_handler="")
    await site.start()
    return site


async def test_the_archive_runs_unmodified(served: Site, wait_until: Callable[..., Any]) -> None:
    answer = await served.ask("POST", "/predictions/lengths", b"123")

    assert answer.status == 200
    assert answer.body == b'[\n  {\n    "odd": "0.75"\n  },\n  {\n    "device": "cpu"\n  }\n]'
    assert answer.headers["x-request"] == answer.headers["x-request-id"]
    await wait_until(lambda: "loaded lengths, batch size 1" in served.log(), "its line in the log")


async def test_forms_reach_the_field_data(served: Site) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="data"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n1234\r\n--b--\r\n"
    )
    connection = await served.connect()

    for target in ("/predictions/lengths", "/lengths/predict", "/models/lengths/invoke", "/invocations"):
        kind = "Content-Type: multipart/form-data; boundary=b"
        answer = await connection.post(target, form, kind)
        assert (answer.status, answer.json[0]) == (200, {"even": "0.75"}), target

    await connection.close()


async def test_its_own_error_reaches_the_client(served: Site) -> None:
    connection = await served.connect()
    await connection.send(
        request("POST", "/predictions/lengths", b'{"a": 1}', "Content-Type: application/json")
    )

    answer = await connection.answer()

    assert answer.status == 415
    assert answer.json == {
        "code": 415,
        "type": "InternalServerException",
        "message": "not bytes but dict",
    }
    await connection.close()
    assert (await served.ask("POST", "/predictions/lengths", b"12")).status == 200
