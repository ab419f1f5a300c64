"""Bad requests to a real classifier: each gets a clear answer or a clean close, and harms no one after it."""

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mms_site import BIN, ROOT, Answer, Site, copy_tutorial, request

pytestmark = [pytest.mark.mxnet, pytest.mark.time_limit(60)]

TARGET = "/predictions/squeezenet"
PHOTOS = ROOT / "examples" / "photos"
COFFEE = (PHOTOS / "coffee.png").read_bytes()
CHELSEA = (PHOTOS / "chelsea.png").read_bytes()
FORM = "Content-Type: multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
FETCH_S = 500.0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with SqueezeNet, for all of these tests; it must live through them."""
    site = Site(tmp_path_factory.mktemp("bad_bodies") / "site")
    folder = copy_tutorial(site)
    commands = [
        [str(BIN / "python"), "fetch_weights.py", "squeezenet1_1"],
        [
            *(str(BIN / "model-archiver"), "--model-name", "squeezenet", "--model-path", "mxnet_squeezenet"),
            *("--handler", "img_classifier_service:handle", "--export-path", str(site.store)),
        ],
    ]
    try:
        for command in commands:
            result = site.run(command, cwd=folder, timeout_s=FETCH_S)
            assert result.returncode == 0, result.stdout
        site.configure(default_service_handler="")
        result = site.run([str(BIN / "mms-lite"), "--start"])
        assert result.returncode == 0, result.stdout
        yield site
    finally:
        site.end()


@pytest.fixture(autouse=True)
async def unharmed(classifier: Site) -> Any:
    """After each test a good request is answered, by the worker that was there before."""
    worker = classifier.workers()[0]
    yield
    answer = await classifier.ask("POST", TARGET, COFFEE)
    assert answer.status == 200
    assert best(answer)[0] == "espresso"
    assert best(answer)[1] > 0.9
    assert classifier.workers() == [worker]


def best(answer: Answer) -> tuple[str, float]:
    ((label, probability),) = answer.json[0].items()
    return label, float(probability)


def check_error(answer: Answer, status: int, kind: str, words: str) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["code"] == status
    assert answer.json["type"] == kind
    assert words in answer.json["message"]
    assert "Traceback" not in answer.json["message"]


def jpeg() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(COFFEE)).convert("RGB").save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Empty image"),
        (b"this is no image", "not an image"),
        (b"\x00" * 1000, "not an image"),
        (COFFEE[:300], "not an image"),
        (COFFEE[:5000], "not an image"),
        (jpeg()[:100], "not an image"),
        (b"GIF89a" + bytes(100), "not an image"),
    ],
    ids=["empty", "text", "zeros", "png header", "half png", "jpeg header", "gif"],
)
async def test_what_is_no_image(classifier: Site, body: bytes, words: str) -> None:
    check_error(await classifier.ask("POST", TARGET, body), 400, "InternalServerException", words)


async def test_a_jpeg_that_ends_early_is_classified(classifier: Site) -> None:
    whole = jpeg()

    answer = await classifier.ask("POST", TARGET, whole[: len(whole) * 3 // 4])

    assert answer.status == 200
    assert len(answer.json) == 5


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("text/plain", b"a text", "text or JSON"),
        ("application/json", b'{"a": 1}', "text or JSON"),
        ("application/json", b"[]", "Empty image"),
        ("multipart/form-data", PART + b"without a boundary it is a body like any other", "not an image"),
        ("application/x-www-form-urlencoded", b"data=text", "not an image"),
    ],
)
async def test_bodies_of_other_types(classifier: Site, kind: str, body: bytes, words: str) -> None:
    connection = await classifier.connect()
    answer = await connection.post(TARGET, body, f"Content-Type: {kind}")
    await connection.close()

    check_error(answer, 400, "InternalServerException", words)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (FORM, b"no boundary anywhere"),
        (FORM, PART + COFFEE[:1000]),
        (FORM, b"--b\r\n\r\n\r\n--b--\r\n"),
        ("Content-Type: application/json", b'{"half": '),
        ("Content-Type: application/json", b"\xff\xfe"),
    ],
    ids=["no boundary", "cut off", "nameless part", "half json", "no utf-8"],
)
async def test_malformed_bodies(classifier: Site, kind: str, body: bytes) -> None:
    connection = await classifier.connect()
    answer = await connection.post(TARGET, body, kind)
    await connection.close()

    check_error(answer, 400, "BadRequestException", "")
    assert answer.json["message"]


async def test_a_form_without_the_field_that_the_handler_reads(classifier: Site) -> None:
    connection = await classifier.connect()
    answer = await connection.post(TARGET, PART.replace(b'"data"', b'"photo"') + b"x\r\n--b--\r\n", FORM)
    await connection.close()

    check_error(answer, 400, "InternalServerException", "Empty image")


async def test_a_body_that_is_too_large(classifier: Site) -> None:
    answer = await classifier.ask("POST", TARGET, bytes(20 << 20))

    check_error(answer, 413, "RequestEntityTooLargeException", "max_request_size, 6553500 bytes")


async def test_a_body_that_says_it_is_too_large_is_not_waited_for(classifier: Site) -> None:
    connection = await classifier.connect()
    head = request("POST", TARGET, b"", "Expect: 100-continue").replace(
        b"Content-Length: 0", b"Content-Length: 99999999999"
    )
    await connection.send(head)

    check_error(await connection.answer(), 413, "RequestEntityTooLargeException", "6553500")

    await connection.close()


@pytest.mark.parametrize(
    ("api", "method", "target", "status", "kind"),
    [
        ("inference", "POST", "/predictions/squeezenot", 404, "ModelNotFoundException"),
        ("inference", "POST", "/predictions/", 404, "ResourceNotFoundException"),
        ("inference", "POST", "/no/such/path", 404, "ResourceNotFoundException"),
        ("inference", "GET", "/models/squeezenet", 404, "ResourceNotFoundException"),
        ("inference", "POST", "/predictions/..%2Fsqueezenet", 404, "ModelNotFoundException"),
        ("management", "POST", TARGET, 404, "ResourceNotFoundException"),
        ("management", "PATCH", "/models/squeezenet", 405, "MethodNotAllowedException"),
        ("management", "DELETE", "/models", 405, "MethodNotAllowedException"),
        ("management", "DELETE", "/models/squeezenot", 404, "ModelNotFoundException"),
        ("management", "POST", "/models?url=squeezenet.mar", 409, "ConflictStatusException"),
        ("management", "POST", "/models?url=../squeezenet.mar", 404, "ModelNotFoundException"),
        ("management", "PUT", "/models/squeezenet?min_worker=x", 400, "BadRequestException"),
    ],
)
async def test_wrong_names_and_methods(
    classifier: Site, api: str, method: str, target: str, status: int, kind: str
) -> None:
    check_error(await classifier.ask(method, target, b"", api=api), status, kind, "")


@pytest.mark.parametrize(
    "sent",
    [
        b"NONSENSE\r\n\r\n",
        b"POST " + TARGET.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST " + TARGET.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["no http", "bad length", "bad chunk"],
)
async def test_what_is_no_http(classifier: Site, sent: bytes) -> None:
    connection = await classifier.connect()
    await connection.send(sent)

    check_error(await connection.answer(), 400, "BadRequestException", "Invalid HTTP message.")

    assert await connection.reader.read() == b""  # and a clean close
    await connection.close()


async def test_clients_that_hang_up(classifier: Site) -> None:
    whole = request("POST", TARGET, COFFEE)
    for sent in (whole[:40], whole[:200], whole[: len(whole) // 2], whole):
        connection = await classifier.connect()
        await connection.send(sent)
        connection.leave()


async def test_a_client_that_closes_its_side_in_mid_body_is_not_waited_for(classifier: Site) -> None:
    connection = await classifier.connect()
    await connection.send(request("POST", TARGET, COFFEE)[:5000])
    connection.writer.write_eof()

    await asyncio.wait_for(connection.reader.read(), 10)

    await connection.close()


async def test_of_a_batch_only_the_bad_one_fails(classifier: Site, wait_until: Callable[..., Any]) -> None:
    before = classifier.workers()
    registered = await classifier.ask(
        "POST",
        "/models?url=squeezenet.mar&model_name=batched&batch_size=8&max_batch_delay=2000&initial_workers=1",
        api="management",
    )
    assert registered.status == 200, registered.body
    (added,) = [worker for worker in classifier.workers() if worker not in before]
    alone = {body: best(await classifier.ask("POST", TARGET, body)) for body in (COFFEE, CHELSEA)}
    bodies = [COFFEE, CHELSEA, COFFEE, b"garbage", CHELSEA, COFFEE, CHELSEA, COFFEE]

    answers = await asyncio.gather(*(classifier.ask("POST", "/predictions/batched", body) for body in bodies))

    assert [answer.status for answer in answers] == [200, 200, 200, 400, 200, 200, 200, 200]
    for body, answer in zip(bodies, answers, strict=True):
        if body == b"garbage":
            check_error(answer, 400, "InternalServerException", "not an image")
        else:
            label, probability = best(answer)
            assert label == alone[body][0]
            assert probability == pytest.approx(alone[body][1], abs=1e-4)
    described = json.loads((await classifier.ask("GET", "/models/batched", api="management")).body)
    assert described["batchSize"] == 8
    assert added.is_running()
    deleted = await classifier.ask("DELETE", "/models/batched", api="management")
    assert deleted.status == 200
    await wait_until(lambda: classifier.workers() == before, "the batched model's worker to end")
