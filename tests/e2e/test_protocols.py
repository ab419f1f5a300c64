"""One network, six ways to ask it: the same scores for the same photos, whatever the protocol."""

import asyncio
import base64
import http.client
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mms_site import Site
from weights.archives import command
from weights.cache import cached
from weights.packages import FetchError

pytest.importorskip("tritonclient.http", reason="tritonclient is not installed (make clients)")
pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (make clients)")
pytest.importorskip("ovmsclient", reason="ovmsclient is not installed (make clients)")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed (make clients)")

import ovmsclient
import tritonclient.grpc
import tritonclient.http

pytestmark = pytest.mark.time_limit(300)

Array = np.ndarray[Any, Any]
PHOTOS = 10
SIDE = 224
INPUT, OUTPUT = "data", "prob"
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    try:
        return sorted(cached("imagenet_photos").glob("*.jpg"))[:PHOTOS]
    except FetchError as error:
        pytest.fail(f"the photos cannot be had: {error}")


def prepared(photo: Path) -> Array:
    """Return a photo as the network takes it: FP32 [1,3,224,224], scaled and cut as for its training."""
    from PIL import Image

    image = Image.open(photo).convert("RGB")
    short = math.ceil(SIDE / 0.875)
    factor = short / min(image.size)
    width, height = (max(short, round(each * factor)) for each in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((each - SIDE) // 2 for each in image.size)
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    scaled = (pixels - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with ResNet-50 twice: `scores` as it is, `resnet50-onnxruntime` as a classifier of photos."""
    site = Site(tmp_path_factory.mktemp("protocols") / "site")
    try:
        network = str(cached("resnet50_onnx") / "resnet50.onnx")
        classifier = command("resnet50-onnxruntime", site.store)
        words = ["--model-name", "scores", "--model-file", network, "--backend", "onnxruntime"]
        words += ["--handler", "tensor", "--export-path", str(site.store)]
        for call in (classifier, [classifier[0], *words]):
            packed = site.run(call)
            assert packed.returncode == 0, packed.stdout
        site.configure(grpc_address="http://127.0.0.1:0")
        asyncio.run(site.start())
        yield site
        asyncio.run(site.stop())
    except FetchError as error:
        pytest.fail(f"the weights cannot be had: {error}")
    finally:
        site.end()


def kserve(site: Site, protocol: str, photo: Array, **data: bool) -> Array:
    """Ask with tritonclient; `data` says of HTTP whether tensors are binary or JSON."""
    module: Any = getattr(tritonclient, protocol)
    url = "{}:{}".format(*site.host("inference" if protocol == "http" else "grpc"))
    with module.InferenceServerClient(url) as client:
        tensor = module.InferInput(INPUT, list(photo.shape), "FP32").set_data_from_numpy(photo, **data)
        result = client.infer("scores", [tensor], outputs=[module.InferRequestedOutput(OUTPUT, **data)])
        found: Array = result.as_numpy(OUTPUT)
        return found


def tensorflow_serving(site: Site, protocol: str, photo: Array) -> Array:
    over_http = protocol == "http"
    made = ovmsclient.make_http_client if over_http else ovmsclient.make_grpc_client
    client = made("{}:{}".format(*site.host("inference" if over_http else "grpc")))
    try:
        return np.asarray(client.predict({INPUT: photo}, "scores"), np.float32)
    finally:
        (client.session if over_http else client.channel).close()


def mms(site: Site, photo: Array) -> Array:
    """Ask on the route of MMS, with an array as its file, and for one."""
    file = io.BytesIO()
    np.save(file, photo)
    connection = http.client.HTTPConnection(*site.host())
    headers = {"Content-Type": "application/x-npy", "Accept": "application/x-npy"}
    connection.request("POST", "/predictions/scores", file.getvalue(), headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == 200, body
    found: Array = np.load(io.BytesIO(body))
    return found


WAYS: dict[str, Callable[[Site, Array], Array]] = {
    "KServe v2, gRPC": lambda site, photo: kserve(site, "grpc", photo),
    "KServe v2, REST, binary": lambda site, photo: kserve(site, "http", photo, binary_data=True),
    "KServe v2, REST, JSON": lambda site, photo: kserve(site, "http", photo, binary_data=False),
    "TensorFlow Serving, gRPC": lambda site, photo: tensorflow_serving(site, "grpc", photo),
    "TensorFlow Serving, REST": lambda site, photo: tensorflow_serving(site, "http", photo),
    "MMS": mms,
}


def top5(scores: Array) -> list[int]:
    return [int(each) for each in np.argsort(-scores[0])[:5]]


def test_all_protocols_give_the_same_scores(served: Site, photos: list[Path]) -> None:
    known = 0
    for path in photos:
        photo = prepared(path)
        found = {name: ask(served, photo) for name, ask in WAYS.items()}
        first = found["KServe v2, gRPC"]
        assert first.shape == (1, 1000)
        for name, scores in found.items():
            np.testing.assert_allclose(scores, first, rtol=0, atol=1e-6, err_msg=f"{name}, {path.name}")
            assert top5(scores) == top5(first), (name, path.name)
        known += int(path.stem.rpartition("_")[2]) in top5(first)  # a photo's file is named by its class
    assert known >= 8


async def test_all_protocols_give_the_same_classes(served: Site, photos: list[Path]) -> None:
    """The classifier takes photos: bodies of MMS, elements of type BYTES for the others."""
    photo = photos[0].read_bytes()
    expected = (await served.ask("POST", "/predictions/resnet50-onnxruntime", photo)).json
    assert len(expected) == 5

    def over_kserve(protocol: str) -> Any:
        module: Any = getattr(tritonclient, protocol)
        url = "{}:{}".format(*served.host("inference" if protocol == "http" else "grpc"))
        body = np.array([photo], np.object_)
        with module.InferenceServerClient(url) as client:
            tensor = module.InferInput("body", [1], "BYTES").set_data_from_numpy(body)
            return json.loads(client.infer("resnet50-onnxruntime", [tensor]).as_numpy("body")[0])

    for protocol in ("http", "grpc"):
        assert await asyncio.to_thread(over_kserve, protocol) == expected
    row = {"instances": [{"b64": base64.b64encode(photo).decode()}]}
    answer = await served.ask("POST", "/v1/models/resnet50-onnxruntime:predict", json.dumps(row).encode())
    assert [json.loads(each) for each in answer.json["predictions"]] == [expected]
