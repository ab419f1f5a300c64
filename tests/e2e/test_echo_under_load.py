"""Every response belongs to its request: 100,000 of all shapes, both readers of HTTP, two models at once."""

import asyncio
import random

import pytest
from mms_site import Connection, Site

pytestmark = pytest.mark.time_limit(240)

CLIENTS = 40
ROUNDS = 250
PIPELINED = 10
HANDLER = """
    def handle(data, context):
        if data is None:
            return None
        return [bytes(item["body"]) for item in data]
"""


def request(model: str, body: bytes, *, chunked: bool) -> bytes:
    """Return a request of plain form, or one in chunks, which the other reader takes."""
    kind = "Content-Type: application/octet-stream"
    head = f"POST /predictions/{model} HTTP/1.1\r\nHost: t\r\n{kind}\r\n".encode()
    if chunked:
        middle = len(body) // 2 + 1
        pieces = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:middle], body[middle:]) if part]
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(pieces) + b"0\r\n\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def client(connection: Connection, number: int) -> int:
    """Send rounds of pipelined requests and check each answer; return how many were right."""
    shapes = random.Random(number)
    right = 0
    for turn in range(ROUNDS):
        bodies = [
            f"client {number} round {turn} request {each};".encode() * shapes.choice((1, 1, 1, 40, 2000))
            for each in range(PIPELINED)
        ]
        # The first half of the clients never sends chunks and stays with the first reader.
        sent = [
            request(
                shapes.choice(("one", "two")),
                body,
                chunked=number >= CLIENTS // 2 and turn > 9 and shapes.random() < 0.5,
            )
            for body in bodies
        ]
        sending = asyncio.ensure_future(connection.send(b"".join(sent)))
        for body in bodies:
            answer = await connection.answer()
            right += answer.status == 200 and answer.body == body
        await sending
    await connection.close()
    return right


async def test_every_response_belongs_to_its_request(site: Site) -> None:
    for name in ("one", "two"):
        site.handler(name, HANDLER)
    site.configure(load_models="", job_queue_size=1000)
    await site.start()
    for name, batch_size in (("one", 1), ("two", 4)):
        query = f"url={name}&model_name={name}&batch_size={batch_size}&initial_workers=2"
        assert (await site.ask("POST", f"/models?{query}", api="management")).status == 200
    right = await asyncio.gather(*[client(await site.connect(), number) for number in range(CLIENTS)])
    assert right == [ROUNDS * PIPELINED] * CLIENTS
