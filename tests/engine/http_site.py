"""A web server for tests, on 127.0.0.1: each path is answered by a function that writes what it likes."""

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Page = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; a page writes its answer with `answer`, or byte by byte with `raw`."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: "_Server"

    def do_GET(self) -> None:
        self.server.seen.append(self)
        page = self.server.pages.get(self.path.partition("?")[0])
        with contextlib.suppress(OSError):  # the client may have left
            if page is None:
                self.answer(404, b"no such page")
            else:
                page(self)
        self.close_connection = True

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def raw(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.wfile.write(piece)

    def drip(self, piece: bytes, every_s: float) -> None:
        """Write a piece again and again until the client or the site goes."""
        while not self.server.closing.wait(every_s):
            self.raw(piece)

    def log_message(self, *_arguments: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    seen: list[Request]
    pages: dict[str, Page]
    closing: threading.Event

    def handle_error(self, *_arguments: object) -> None:
        pass  # a client that leaves, or does not trust the certificate


@dataclass
class Site:
    """Where the server is, what it says (path -> page), and what it was asked for."""

    scheme: str
    port: int
    closing: threading.Event
    pages: dict[str, Page] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def put(self, path: str, body: bytes) -> str:
        """Serve bytes at a path; return their URL."""
        self.pages[path] = lambda request: request.answer(200, body)
        return self.origin + path

    def redirect(self, path: str, to: str, status: int = 302) -> str:
        """Redirect a path; return its URL."""
        self.pages[path] = lambda request: request.answer(status, b"over there", Location=to)
        return self.origin + path


@contextlib.contextmanager
def serve(tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    """Run a server until the end of the block."""
    server = _Server(("127.0.0.1", 0), Request)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    scheme = "https" if tls else "http"
    site = Site(scheme, server.server_address[1], threading.Event())
    server.seen, server.pages, server.closing = site.seen, site.pages, site.closing
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
