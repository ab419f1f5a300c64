"""Published models, each packed by one command without code, give the answers that are known of them."""

import asyncio
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mms_site import ROOT, Site
from weights.archives import ARCHIVES, command
from weights.cache import cached
from weights.packages import FetchError

pytestmark = pytest.mark.time_limit(300)

PHOTOS = ROOT / "examples" / "photos"
COFFEE, CHELSEA = PHOTOS / "coffee.png", PHOTOS / "chelsea.png"
MODULES = {"opencv": "cv2"}

# Class and probability that the networks' frameworks give for these photos, with Pillow's bicubic scaling.
RESNET = {COFFEE: ("espresso", 0.994), CHELSEA: ("Egyptian cat", 0.744)}
SQUEEZENET = {COFFEE: ("espresso", 0.953), CHELSEA: ("Egyptian cat", 0.521)}
EFFICIENTNET = {COFFEE: ("espresso", 0.951), CHELSEA: ("tiger cat", 0.385)}
MOBILENET = {COFFEE: ("espresso", 0.991), CHELSEA: ("tabby", 0.475)}
CLASSIFIERS = {
    "resnet50-onnxruntime": RESNET,
    **dict.fromkeys((name for name in ARCHIVES if name.startswith("squeezenet-")), SQUEEZENET),
    "efficientnet_lite0-onnxruntime": EFFICIENTNET,
    "mobilenet_v1-openvino": MOBILENET,
    "mobilenet_v1-opencv": MOBILENET,
}


async def serve(site: Site, *names: str) -> None:
    """Pack archives with the commands of examples/weights/archives.py and start a server with them."""
    for name in names:
        backend = ARCHIVES[name].backend
        if importlib.util.find_spec(MODULES.get(backend, backend)) is None:
            pytest.skip(f"{backend} is not installed in this environment")
        try:
            call = command(name, site.store)
        except FetchError as error:
            pytest.fail(f"the weights cannot be had: {error}")
        packed = await asyncio.to_thread(site.run, call)
        assert packed.returncode == 0, packed.stdout
    site.configure()
    await site.start()


async def predict(site: Site, name: str, body: bytes) -> Any:
    answer = await site.ask("POST", f"/predictions/{name}", body)
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.parametrize("name", CLASSIFIERS)
async def test_a_classifier_gives_its_known_answers(site: Site, name: str) -> None:
    await serve(site, name)
    for photo, (label, probability) in CLASSIFIERS[name].items():
        top = await predict(site, name, photo.read_bytes())
        assert len(top) == 5
        assert label in top[0]["class"]
        assert math.isclose(top[0]["probability"], probability, abs_tol=0.006)
    await site.stop()


@pytest.mark.parametrize("name", ["ssd_mobilenet_v2-opencv", "ssd_mobilenet_v2-openvino"])
async def test_a_detector_finds_what_opencv_finds(site: Site, name: str) -> None:
    await serve(site, name)
    for photo, label, score in ((CHELSEA, "cat", 0.91), (COFFEE, "cup", 0.951)):
        best = (await predict(site, name, photo.read_bytes()))[0]
        assert best["label"] == label
        assert math.isclose(best["score"], score, abs_tol=0.006)
        assert overlap(best["box"], best_box_of_opencv(photo)) >= 0.95
    await site.stop()


def best_box_of_opencv(photo: Path) -> list[float]:
    """Return the likeliest box, left, top, right, bottom in pixels, as a script with cv2 alone finds it."""
    import cv2

    graph = cached("ssd_mobilenet_v2_coco") / "frozen_inference_graph.pb"
    net = cv2.dnn.readNetFromTensorflow(str(graph), f"{graph}txt")
    image = cv2.imread(str(photo))
    net.setInput(cv2.dnn.blobFromImage(image, size=(300, 300), swapRB=True))
    best = max(net.forward()[0, 0], key=lambda row: float(row[2]))
    height, width = image.shape[:2]
    return [float(v) for v in best[3:7] * (width, height, width, height)]


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


async def test_a_page_is_found_and_read(site: Site) -> None:
    import cv2

    await serve(site, "ppocr_det-onnxruntime", "ppocr_rec-onnxruntime")
    photo = cached("photos") / "page.png"
    found = await predict(site, "ppocr_det-onnxruntime", photo.read_bytes())
    page, lines = cv2.imread(str(photo)), []
    for box in (each["box"] for each in found):
        left, top = (max(0, math.floor(min(point[axis] for point in box))) for axis in (0, 1))
        right, bottom = (math.ceil(max(point[axis] for point in box)) for axis in (0, 1))
        line = cv2.imencode(".png", page[top:bottom, left:right])[1].tobytes()
        lines.append(await predict(site, "ppocr_rec-onnxruntime", line))
    text = " ".join(line["text"] for line in lines)
    words = ("segmentation", "determine", "markers", "coins", "unambiguously", "object", "background")
    assert [word for word in words if word not in text] == []
    assert min(line["score"] for line in lines) > 0.8
    await site.stop()


async def test_sentences_that_mean_the_same_are_near(site: Site) -> None:
    await serve(site, "minilm-onnxruntime")
    texts = ["A man is eating food.", "A man eats something.", "The new movie is awesome."]
    connection = await site.connect()
    body = json.dumps({"texts": texts}).encode()
    answer = await connection.post("/predictions/minilm-onnxruntime", body, "Content-Type: application/json")
    await connection.close()
    embeddings = answer.json["embeddings"]
    near, far = (dot(embeddings[0], embeddings[other]) for other in (1, 2))
    assert near > 0.7
    assert abs(far) < 0.2
    await site.stop()


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


async def test_eight_photos_in_one_batch_are_answered_as_each_alone(site: Site) -> None:
    photos = [path.read_bytes() for path in sorted(cached("imagenet_photos").glob("*.jpg"))[:8]]
    await serve(site, "squeezenet-onnxruntime")
    alone = [await predict(site, "squeezenet-onnxruntime", photo) for photo in photos]
    await site.ask("DELETE", "/models/squeezenet-onnxruntime", api="management")
    options = "url=squeezenet-onnxruntime.mar&initial_workers=1&batch_size=8&max_batch_delay=10000"
    registered = await site.ask("POST", f"/models?{options}", api="management")
    assert registered.status == 200
    together = await asyncio.gather(*(predict(site, "squeezenet-onnxruntime", photo) for photo in photos))
    metrics = (await site.ask("GET", "/metrics", api="metrics")).body.decode()
    batches = dict(re.findall(r"^mms_batch_size_(sum|count)\{.*\} (\S+)$", metrics, re.MULTILINE))
    assert {name: float(value) for name, value in batches.items()} == {"sum": 8, "count": 1}
    for one, other in zip(alone, together, strict=True):
        assert [each["class"] for each in one] == [each["class"] for each in other]
        for first, second in zip(one, other, strict=True):
            assert math.isclose(first["probability"], second["probability"], abs_tol=1e-5)
    await site.stop()
