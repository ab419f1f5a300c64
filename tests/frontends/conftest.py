"""What the tests of the front ends share: models by their source, the MMS API with and without a socket."""

import asyncio
import ssl
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop
from raw_http import Answer, Client

from mms_lite.frontends import mms
from mms_lite.frontends.listener import HttpListener
from mms_lite.frontends.message import Cors, HttpProtocol, HttpRequest, HttpResponse, Limits, split_target
from mms_lite.shared import Arena

LIMITS = Limits(max_request_size=1_000_000, max_response_size=200_000)


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Any:
    """Run the tests over sockets on both loops: the server's is uvloop, and they close connections unlike."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name.startswith(("test_http_", "test_hot_conn", "test_rpc")):
        loops["uvloop"] = uvloop.new_event_loop
    return loops


@pytest.fixture
def model(inline: Any) -> Callable[..., Awaitable[Any]]:
    """Load a model whose service.py is `source`: `await model("echo", "def handle(data, context): ...")`."""

    async def load(name: str, source: str, **options: Any) -> Any:
        folder = inline.store.folder / name
        folder.mkdir()
        (folder / "service.py").write_text(textwrap.dedent(source))
        return await inline.load(name, name, **options)

    return load


Call = Callable[..., Awaitable[Answer]]


def _caller(make: Callable[[], HttpProtocol]) -> Call:
    made: list[HttpProtocol] = []  # on the first call: a test may still set up its engine

    async def call(
        method: str, target: str, body: bytes = b"", *headers: tuple[str, str], request_id: str = "id-1"
    ) -> Answer:
        path, query = split_target(target)
        request = HttpRequest(method, path, request_id, target, query, headers, bytearray(body))
        if not made:
            made.append(make())
        response: HttpResponse = await made[0].handle(request)
        lower = {name.lower(): value for name, value in response.headers}
        return Answer(response.status, lower, b"".join(response.body), response.reason)

    return call


@pytest.fixture
def merged(inline: Any) -> Call:
    """Call the API of an address with both parts, without a socket."""
    return _caller(lambda: mms.protocol(inline.engine, LIMITS, inference=True, management=lambda _: None))


@pytest.fixture
def inference(inline: Any) -> Call:
    return _caller(lambda: mms.protocol(inline.engine, LIMITS, inference=True))


@pytest.fixture
def management(inline: Any) -> Call:
    return _caller(lambda: mms.protocol(inline.engine, LIMITS, management=lambda _: None))


@pytest.fixture
def hot() -> bool:
    """Whether listeners let messages of plain form take the fast way in; tests of both ways replace it."""
    return True


@pytest.fixture
async def listen(hot: bool) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Serve a protocol on a free port: `await listen(protocol, idle_s=0.1)`; `.listener` is the last one."""
    listeners: list[HttpListener] = []

    class Listen:
        @property
        def listener(self) -> HttpListener:
            return listeners[-1]

        async def __call__(
            self,
            protocol: HttpProtocol,
            *,
            tls: ssl.SSLContext | None = None,
            cors: Cors | None = None,
            **limits: Any,
        ) -> int:
            arena = Arena.create(8 << 20)
            listener = HttpListener(protocol, Limits(**limits), cors=cors, hot=hot, arena=arena)
            listeners.append(listener)
            return await listener.start("127.0.0.1", 0, tls=tls)

    yield Listen()
    for listener in listeners:
        await listener.stop(0.2)


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Awaitable[Client]]]:
    """Open a connection to a port of this machine; it is closed at the end."""
    clients: list[Client] = []

    async def to(port: int, tls: ssl.SSLContext | None = None) -> Client:
        host = "localhost" if tls else None
        streams = await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=host)
        clients.append(Client(*streams))
        return clients[-1]

    yield to
    for client in clients:
        await client.close()
