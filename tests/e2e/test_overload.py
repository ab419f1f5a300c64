"""More clients than the queue has room for: who is refused, how fast, and what the others get."""

import asyncio
import itertools
import statistics
import time
from dataclasses import dataclass

import pytest
from mms_site import Answer, Site

pytestmark = pytest.mark.time_limit(60)

QUEUE = 100
WORKERS = 2
HANDLER = """
    import time

    def handle(data, context):
        if data is None:
            return None
        time.sleep(0.02)
        return [bytes(item["body"]) for item in data]
"""


@dataclass
class Sent:
    body: bytes
    begin: float
    end: float
    answer: Answer


async def client(site: Site, number: int, requests: int) -> list[Sent]:
    """Send requests one after another, on one connection as long as the server keeps it."""
    sent = []
    connection = await site.connect()
    for each in range(requests):
        body = f"client {number} request {each}".encode()
        begin = time.monotonic()
        answer = await connection.post("/predictions/busy", body)
        sent.append(Sent(body, begin, time.monotonic(), answer))
        if answer.headers["connection"] == "close" and each < requests - 1:
            await connection.close()
            connection = await site.connect()
    await connection.close()
    return sent


async def crowd(site: Site, clients: int, requests: int) -> list[Sent]:
    results = await asyncio.gather(*(client(site, number, requests) for number in range(clients)))
    return list(itertools.chain.from_iterable(results))


def most_at_once(sent: list[Sent]) -> int:
    """How many of these were open at the same time, as seen by the clients."""
    changes = sorted([(each.begin, 1) for each in sent] + [(each.end, -1) for each in sent])
    return max(itertools.accumulate(change for _, change in changes))


async def test_a_full_queue_refuses_at_once_and_the_rest_is_served(site: Site) -> None:
    site.handler("busy", HANDLER)
    site.configure(job_queue_size=QUEUE, default_workers_per_model=WORKERS)
    await site.start()

    sent = await crowd(site, clients=200, requests=3)

    served = [each for each in sent if each.answer.status == 200]
    refused = [each for each in sent if each.answer.status == 503]
    assert len(served) + len(refused) == len(sent) == 600
    assert len(refused) >= 200 - QUEUE - 2 * WORKERS
    assert len(served) >= QUEUE
    assert all(each.answer.body == each.body for each in served)
    for each in refused:
        answer = each.answer
        assert answer.headers["content-type"] == "application/json"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert (answer.json["code"], answer.json["type"]) == (503, "ServiceUnavailableException")
        assert answer.json["message"].startswith(
            "No worker is available to serve request for model: busy. Consider increasing job queue size."
        )
        assert f"(queue {QUEUE}/{QUEUE}, " in answer.json["message"]
    # A worker may hold a second batch. An answer on its way to its client still counts as open here: hence 5.
    assert most_at_once(served) <= QUEUE + 2 * WORKERS + 5
    wait_s = statistics.median(each.end - each.begin for each in served)
    refusal_s = statistics.median(each.end - each.begin for each in refused)
    assert refusal_s < wait_s / 4, f"a refusal took {refusal_s:.3f} s, an answer {wait_s:.3f} s"
    answer = await site.ask("POST", "/predictions/busy", b"afterwards")
    assert (answer.status, answer.body) == (200, b"afterwards")


async def test_a_queue_with_room_for_all_refuses_none(site: Site) -> None:
    site.handler("busy", HANDLER)
    site.configure(job_queue_size=1000, default_workers_per_model=WORKERS)
    await site.start()

    sent = await crowd(site, clients=200, requests=2)

    assert {each.answer.status for each in sent} == {200}
    assert all(each.answer.body == each.body for each in sent)


async def test_clients_that_left_take_no_place_in_the_queue(site: Site) -> None:
    site.handler("busy", HANDLER)
    site.configure(job_queue_size=QUEUE)
    await site.start()
    leaving = [await site.connect() for _ in range(QUEUE)]
    target, body = "/predictions/busy", b"nobody waits for this"
    waiting = [asyncio.create_task(connection.post(target, body)) for connection in leaving]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    for connection in leaving:
        connection.leave()
    await asyncio.gather(*waiting, return_exceptions=True)
    begin = time.monotonic()
    answer = await site.ask("POST", target, b"I do")

    assert (answer.status, answer.body) == (200, b"I do")
    assert time.monotonic() - begin < QUEUE * 0.02 / 2
