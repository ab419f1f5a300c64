"""A worker that is killed while it works: what its clients see, and that the others see nothing."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from mms_site import Answer, Site

pytestmark = pytest.mark.time_limit(60)

CLIENTS = 30
REQUESTS = 10
HANDLER = """
    import time

    def handle(data, context):
        if data is None:
            return None
        time.sleep(0.01)
        return [bytes(item["body"]) for item in data]
"""


async def client(site: Site, number: int, answers: list[tuple[bytes, Answer]]) -> None:
    connection = await site.connect()
    for each in range(REQUESTS):
        body = f"client {number} request {each}".encode()
        answer = await connection.post("/predictions/busy", body)
        answers.append((body, answer))
        if answer.headers["connection"] == "close":
            await connection.close()
            connection = await site.connect()
    await connection.close()


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (2, 1), (2, 4)])
async def test_only_the_batch_of_the_killed_worker_fails(
    site: Site, wait_until: Callable[..., Any], workers: int, batch_size: int
) -> None:
    site.handler("busy", HANDLER)
    site.configure(load_models="")
    await site.start()
    query = f"url=busy&model_name=busy&batch_size={batch_size}&max_batch_delay=5&initial_workers={workers}"
    registered = await site.ask("POST", f"/models?{query}", api="management")
    assert registered.status == 200, registered.body
    victim = site.workers()[0]
    answers: list[tuple[bytes, Answer]] = []

    clients = [asyncio.create_task(client(site, number, answers)) for number in range(CLIENTS)]
    await wait_until(lambda: len(answers) >= CLIENTS, "the load to build up")
    victim.kill()
    await asyncio.gather(*clients)

    assert len(answers) == CLIENTS * REQUESTS
    failed = [answer for _, answer in answers if answer.status != 200]
    assert len(failed) <= batch_size
    for answer in failed:
        assert answer.status == 500
        assert answer.json == {"code": 500, "type": "InternalServerException", "message": "Worker died."}
    assert all(answer.body == body for body, answer in answers if answer.status == 200)
    await wait_until(lambda: len(site.workers()) == workers, "the worker to be replaced")
    assert victim.pid not in [worker.pid for worker in site.workers()]
    after = await asyncio.gather(*(site.ask("POST", "/predictions/busy", b"%d" % n) for n in range(10)))
    assert [(answer.status, answer.body) for answer in after] == [(200, b"%d" % n) for n in range(10)]
    described = json.loads((await site.ask("GET", "/models/busy", api="management")).body)
    assert [worker["status"] for worker in described["workers"]] == ["READY"] * workers


async def test_a_worker_that_dies_again_and_again_fails_only_what_kills_it(
    site: Site, wait_until: Callable[..., Any]
) -> None:
    site.handler(
        "fragile",
        """
        import os

        def handle(data, context):
            if data is None:
                return None
            if any(item["body"] == b"poison" for item in data):
                os.kill(os.getpid(), 9)
            return ["fine"] * len(data)
        """,
    )
    site.configure()
    await site.start()

    bodies = [b"poison" if n % 5 == 4 else b"good" for n in range(10)]
    answers = await asyncio.gather(*(site.ask("POST", "/predictions/fragile", body) for body in bodies))

    assert [answer.status for answer in answers] == [500 if body == b"poison" else 200 for body in bodies]
    assert (await site.ask("POST", "/predictions/fragile", b"good")).body == b"fine"
