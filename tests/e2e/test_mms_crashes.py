"""What brings MMS down (its weaknesses, by number in the MMS reference, section 14): each is harmless here.

Every test ends with the same question: the model still answers, from the workers that it had.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest
from mms_site import Answer, Connection, Site, request

pytestmark = pytest.mark.time_limit(60)

ECHO = """
    import os, time

    def handle(data, context):
        if data is None:
            return None
        bodies = [item["body"] for item in data]
        if any(body == b"fail" for body in bodies):
            raise ValueError("a bad item")
        while any(body == b"wait" for body in bodies) and not os.path.exists("GATE"):
            time.sleep(0.01)
        return [bytes(body) if isinstance(body, bytearray) else str(body) for body in bodies]
"""
QUEUE = 10
JSON = "Content-Type: application/json"


@pytest.fixture
async def serving(site: Site) -> AsyncIterator[Site]:
    """A server with the model echo, which must be the same server with the same worker after each test."""
    site.archive("echo", ECHO.replace("GATE", str(site.folder / "gate")))
    site.configure(load_models="echo.mar", job_queue_size=QUEUE)
    await site.start()
    before = await workers(site)
    yield site
    assert (await site.ask("POST", "/predictions/echo", b"good")).body == b"good"
    assert await workers(site) == before
    await site.stop()
    assert site.processes() == []


async def workers(site: Site) -> set[int]:
    described = (await site.ask("GET", "/models/echo", api="management")).json
    return {worker["pid"] for worker in described["workers"]}


async def post(site: Site, body: bytes, *lines: str, target: str = "/predictions/echo") -> Answer:
    connection = await site.connect()
    answer = await asyncio.wait_for(connection.post(target, body, *lines), 20)
    await connection.close()
    return answer


async def manage(site: Site, method: str, target: str) -> Answer:
    return await site.ask(method, target, api="management")


@pytest.mark.parametrize("body", [b'{"a":', b"", b"nonsense"])
async def test_malformed_json_kills_no_worker(serving: Site, body: bytes) -> None:
    answer = await post(serving, body, JSON)
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
async def test_bad_utf_8_kills_no_worker(serving: Site, kind: str) -> None:
    answer = await post(serving, b'"\xff\xfe"', f"Content-Type: {kind}")
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")


async def test_a_failing_batch_of_two_fails_the_bad_item_only_and_kills_no_worker(serving: Site) -> None:
    target = "/models?url=echo.mar&model_name=pairs&batch_size=2&max_batch_delay=2000&initial_workers=1"
    assert (await manage(serving, "POST", target)).status == 200
    answers = await asyncio.gather(*(post(serving, b, target="/predictions/pairs") for b in (b"fail", b"ok")))
    assert [answer.status for answer in answers] == [503, 200]
    assert answers[0].json["message"] == "Prediction failed"
    assert answers[1].body == b"ok"
    described = (await manage(serving, "GET", "/models/pairs")).json
    assert described["workers"][0]["restarts"] == 0
    await manage(serving, "DELETE", "/models/pairs")


async def test_unregistering_with_a_full_queue_answers_all_that_wait(serving: Site) -> None:
    assert (
        await manage(serving, "POST", "/models?url=echo.mar&model_name=full&initial_workers=1")
    ).status == 200
    waiting = [asyncio.create_task(post(serving, b"wait", target="/predictions/full")) for _ in range(15)]

    async def arrived() -> int:
        counted = (await manage(serving, "GET", "/models/full")).json["metrics"]
        return int(counted["waitingQueueSize"] + counted["requestsInFlight"] + counted["rejectedRequests"])

    while await arrived() < len(waiting):
        await asyncio.sleep(0.01)
    unregistering = asyncio.create_task(manage(serving, "DELETE", "/models/full"))
    while (await manage(serving, "GET", "/models/full")).status == 200:
        await asyncio.sleep(0.01)
    (serving.folder / "gate").touch()
    assert (await unregistering).status == 200
    answers = await asyncio.gather(*waiting)
    assert {answer.status for answer in answers} == {200, 503}  # those over the queue's bound were refused
    # All that had room while the first was on its way to the worker, or one more.
    assert sum(answer.status == 200 for answer in answers) >= QUEUE
    assert (await post(serving, b"late", target="/predictions/full")).status == 404


async def test_a_model_scales_to_zero_and_back(serving: Site) -> None:
    assert (
        await manage(serving, "POST", "/models?url=echo.mar&model_name=zero&initial_workers=1")
    ).status == 200
    assert (await manage(serving, "PUT", "/models/zero?min_worker=0&synchronous=true")).status == 200
    answer = await post(serving, b"x", target="/predictions/zero")
    assert (answer.status, answer.json["type"]) == (503, "ServiceUnavailableException")
    assert (await manage(serving, "GET", "/models/zero")).json["workers"] == []
    assert (await manage(serving, "PUT", "/models/zero?min_worker=2&synchronous=true")).status == 200
    assert (await post(serving, b"x", target="/predictions/zero")).body == b"x"
    for query in ("min_worker=0&max_worker=1", "min_worker=-1"):  # these left MMS with leaked or dead workers
        await manage(serving, "PUT", f"/models/zero?{query}&synchronous=true")
        assert (await post(serving, b"x", target="/predictions/zero")).body == b"x"
    await manage(serving, "DELETE", "/models/zero")


async def test_an_initialize_that_raises_fails_the_load_and_serves_nothing(serving: Site) -> None:
    source = """
        class Service:
            def initialize(self, context):
                raise RuntimeError("no weights")

            def handle(self, data, context):
                return ["served"] * len(data)
    """
    serving.archive("broken", source)
    answer = await manage(serving, "POST", "/models?url=broken.mar&initial_workers=1")
    assert (answer.status, answer.json["type"]) == (500, "InternalServerException")
    assert answer.json["message"].startswith("Failed to start workers: ")
    assert "RuntimeError: no weights" in answer.json["message"]
    assert (await post(serving, b"x", target="/predictions/broken")).status == 404


async def test_a_duplicate_name_at_start_fails_that_model_only(site: Site) -> None:
    site.archive("echo", ECHO)
    site.archive("other", "def handle(data, context): return data and ['other'] * len(data)")
    site.configure(load_models="echo.mar,echo=other.mar,second=echo.mar")
    printed = await site.start()
    assert "Model echo: FAILED: Model echo is already registered." in printed
    for model in ("echo", "second"):  # the first of the list has the name
        assert (await post(site, b"x", target=f"/predictions/{model}")).body == b"x"
    await site.stop()
    assert site.processes() == []


async def test_one_archive_under_two_names_survives_the_end_of_either(serving: Site) -> None:
    assert (
        await manage(serving, "POST", "/models?url=echo.mar&model_name=twin&initial_workers=1")
    ).status == 200
    assert (await manage(serving, "DELETE", "/models/twin")).status == 200
    # A new worker of the other one reads the files again.
    assert (await manage(serving, "PUT", "/models/echo?min_worker=2&synchronous=true")).status == 200
    answers = await asyncio.gather(*(post(serving, b"x") for _ in range(QUEUE)))
    assert [answer.body for answer in answers] == [b"x"] * QUEUE
    assert (await manage(serving, "PUT", "/models/echo?min_worker=1&synchronous=true")).status == 200


async def test_clients_that_never_read_hold_up_nobody(serving: Site) -> None:
    body = bytes(5_000_000)  # far more than the sockets' buffers take
    silent: list[Connection] = []
    for _ in range(8):
        connection = await serving.connect()
        connection.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await connection.send(request("POST", "/predictions/echo", body))
        silent.append(connection)
    for number in range(20):
        assert (await post(serving, b"%d" % number)).body == b"%d" % number
    for connection in silent:
        connection.leave()


async def test_a_registration_that_takes_long_holds_up_nobody(serving: Site) -> None:
    source = """
        import os, time

        def handle(data, context):
            while not os.path.exists("GATE"):
                time.sleep(0.01)
            return data and ["x"]
    """
    serving.archive("slow", source.replace("GATE", str(serving.folder / "gate")))
    target = "/models?url=slow.mar&initial_workers=1"
    registering = [
        asyncio.create_task(manage(serving, "POST", f"{target}&model_name=m{n}")) for n in range(8)
    ]
    for number in range(50):  # more than MMS has threads for
        assert (await post(serving, b"%d" % number)).body == b"%d" % number
        assert (await manage(serving, "GET", "/models")).status == 200
    assert not any(task.done() for task in registering)
    (serving.folder / "gate").touch()
    assert [(await task).status for task in registering] == [200] * 8
