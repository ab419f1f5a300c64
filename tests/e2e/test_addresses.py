"""https and Unix sockets through the command line, as a user sets them up."""

import asyncio
import os
import signal
import ssl
from contextlib import suppress
from pathlib import Path

import pytest
from certificates import Pair, client_context
from mms_site import Connection, Site, request

SOCKET = "management.sock"
pytestmark = pytest.mark.time_limit(90)

ECHO = """
    def handle(data, context):
        return None if data is None else [bytes(item["body"]) for item in data]
"""


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def socket_file(site: Site, pair: Pair) -> Path:
    """Configure inference over https and management on a Unix socket; return the socket's file."""
    site.handler("echo", ECHO)
    socket_file = site.folder / SOCKET
    site.configure(
        inference_address="https://127.0.0.1:0",
        management_address=f"unix:{socket_file}",
        **{key: path.name for key, path in pair.write(site.folder).items()},
    )
    return socket_file


async def over_tls(site: Site, context: ssl.SSLContext) -> Connection:
    return Connection(*await asyncio.open_connection(*site.host(), ssl=context, server_hostname="localhost"))


async def manage(socket_file: Path, method: str, target: str) -> int:
    connection = Connection(*await asyncio.open_unix_connection(str(socket_file)))
    await connection.send(request(method, target, b""))
    answer = await connection.answer()
    await connection.close()
    return answer.status


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_predictions_over_https_and_management_on_a_unix_socket(
    site: Site, pair: Pair, socket_file: Path, version: str
) -> None:
    said = await site.start()
    assert f"Inference API:  {site.state['inference_address']}\n" in said
    assert site.state["inference_address"].startswith("https://127.0.0.1:")
    assert f"Management API: unix:{socket_file}\n" in said

    context = client_context(pair)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    connection = await over_tls(site, context)
    for body in (b"hello", os.urandom(2_000_000)):
        assert (await connection.post("/predictions/echo", body)).body == body
    answer = await connection.post("/predictions/echo", bytes(7_000_000))
    assert (answer.status, answer.json["type"]) == (413, "RequestEntityTooLargeException")
    with suppress(OSError):
        await connection.close()

    assert await manage(socket_file, "GET", "/models/echo") == 200
    assert await manage(socket_file, "DELETE", "/models/echo") == 200
    await site.stop()
    assert not (site.folder / SOCKET).exists()


async def test_the_socket_of_a_killed_server_is_replaced(site: Site, pair: Pair, socket_file: Path) -> None:
    await site.start()
    server = site.server
    server.send_signal(signal.SIGKILL)
    await asyncio.to_thread(server.wait, 10)
    assert (site.folder / SOCKET).exists()

    await site.start()

    assert await manage(socket_file, "GET", "/models/echo") == 200
    await site.stop()
    assert not (site.folder / SOCKET).exists()


async def test_a_start_without_the_certificate_says_why(site: Site, pair: Pair, socket_file: Path) -> None:
    (site.folder / "certificate.pem").unlink()
    result = await site.mms("--start")
    said = "Invalid configuration: cannot read certificate_file certificate.pem: No such file or directory\n"
    assert result.returncode == 1
    assert said in result.stdout
    assert not (site.folder / SOCKET).exists()
