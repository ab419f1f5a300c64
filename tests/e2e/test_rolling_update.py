"""A new version takes over under load: no request is lost, whichever way it is done."""

import asyncio
from collections import Counter

import pytest
from mms_site import Site

pytestmark = pytest.mark.time_limit(90)

CONNECTIONS = 50
HANDLER = """
    import time

    def handle(data, context):
        if data is None:
            time.sleep(0.2)  # loading takes its time
            return None
        time.sleep(0.004)
        return ["{answer}" for _ in data]
"""


class Load:
    """Clients that ask one after another, each on its own connection, until told to stop."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._stop = False
        self.answers: Counter[tuple[int, bytes]] = Counter()

    async def __aenter__(self) -> "Load":
        self._clients = [asyncio.create_task(self._client()) for _ in range(CONNECTIONS)]
        await self.more(200)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._clients)

    async def more(self, count: int) -> None:
        """Wait until so many more requests were answered."""
        until = self.answers.total() + count
        while self.answers.total() < until:
            await asyncio.sleep(0.02)

    async def _client(self) -> None:
        connection = await self._site.connect()
        while not self._stop:
            answer = await connection.post("/predictions/m", b"x")
            self.answers[answer.status, answer.body] += 1
        await connection.close()


async def manage(site: Site, method: str, target: str) -> None:
    answer = await site.ask(method, target, api="management")
    assert answer.status == 200, answer.body


@pytest.fixture
async def serving(site: Site) -> Site:
    """A server with `old.mar` loaded as m, and `new.mar` in the store."""
    for name in ("old", "new"):
        site.archive(name, HANDLER.format(answer=name))
    site.configure(load_models="m=old.mar", job_queue_size=200)
    await site.start()
    return site


async def test_a_version_beside_then_switched_to_then_alone(serving: Site) -> None:
    async with Load(serving) as load:
        await manage(serving, "POST", "/models?url=new.mar&model_name=m&version=2&initial_workers=1")
        await load.more(100)
        assert load.answers[200, b"new"] == 0  # it was not asked for
        await manage(serving, "PUT", "/models/m/2/set-default")
        before = load.answers[200, b"old"]
        await load.more(300)
        # What had been accepted before the switch may still be answered by the old version.
        assert load.answers[200, b"old"] - before <= CONNECTIONS
        await manage(serving, "DELETE", "/models/m/1")
        await load.more(200)
    assert {status for status, _ in load.answers} == {200}
    assert min(load.answers[200, b"old"], load.answers[200, b"new"]) > 100
    assert len(serving.workers()) == 1


async def test_a_version_replaced_in_one_call(serving: Site) -> None:
    async with Load(serving) as load:
        await manage(serving, "POST", "/models?url=new.mar&model_name=m&replace=true")
        before = load.answers[200, b"old"]
        await load.more(300)
        assert load.answers[200, b"old"] - before <= CONNECTIONS
    assert {status for status, _ in load.answers} == {200}
    assert load.answers[200, b"new"] > 200
    assert len(serving.workers()) == 1


async def test_a_broken_version_in_its_place_changes_nothing(serving: Site) -> None:
    serving.archive("broken", "raise RuntimeError('no')")
    async with Load(serving) as load:
        target = "/models?url=broken.mar&model_name=m&replace=true"
        answer = await serving.ask("POST", target, api="management")
        assert answer.status == 500
        assert "RuntimeError: no" in answer.json["message"]
        await load.more(200)
    assert set(load.answers) == {(200, b"old")}
