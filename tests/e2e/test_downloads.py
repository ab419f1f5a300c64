"""A running server that fetches models by http: what allowed_urls permits, and nothing else."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mms_site import Site

HANDLER = """
    def handle(data, context):
        return data and ["served"] * len(data)
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shop(site: Site) -> Iterator[str]:
    """The address of a server that offers m.mar."""
    folder = site.folder / "shop"
    folder.mkdir()
    site.archive("m", HANDLER).rename(folder / "m.mar")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def register(site: Site, query: str) -> tuple[int, str]:
    answer = await site.ask("POST", f"/models?initial_workers=1&{query}", api="management")
    return answer.status, answer.json.get("message", answer.json.get("status"))


async def test_models_come_from_where_they_may(site: Site, shop: str) -> None:
    known = digest(site.folder / "shop" / "m.mar")
    site.configure(allowed_urls=f"{shop}/", load_models=f"first={shop}/m.mar#sha256={known}")
    assert "Model first: ready" in await site.start()
    assert (await site.ask("POST", "/predictions/first", b"x")).body == b"served"
    assert await register(site, f"url={shop}/m.mar&sha256={known}") == (200, "Workers scaled")
    assert (await site.ask("POST", "/predictions/m", b"x")).body == b"served"
    described = (await site.ask("GET", "/models/m", api="management")).json
    assert described["modelUrl"] == f"{shop}/m.mar"
    missing = f"{shop}/none.mar"
    assert await register(site, f"url={missing}") == (
        400,
        f"Failed to download model from: {missing}, code: 404",
    )
    status, message = await register(site, f"url={shop}/m.mar&model_name=n&sha256={'0' * 64}")
    assert (status, known in message) == (400, True)
    status, _ = await register(site, "url=http://localhost/m.mar&model_name=n")
    assert status == 403


async def test_without_a_list_nothing_is_fetched(site: Site, shop: str) -> None:
    site.configure(load_models="")
    await site.start()
    status, message = await register(site, f"url={shop}/m.mar")
    assert (status, "allowed_urls" in message) == (403, True)


async def test_a_list_that_is_none_ends_the_start(site: Site) -> None:
    site.configure(allowed_urls="example.org/models")
    result = await site.mms("--start")
    assert result.returncode == 1
    assert "Invalid configuration: " in result.stdout
    assert "allowed_urls" in result.stdout
