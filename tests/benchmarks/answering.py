"""A server on a thread that does with each request what a test says."""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
HEAD_END = b"\r\n\r\n"

Address = tuple[str, int]
Script = Callable[[socket.socket, int], bool]  # after the n-th request of a connection; False closes it


@dataclass
class Target:
    """What a generator needs to know of a server."""

    host: str
    port: int
    path: str = "/predictions/m"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "image/jpeg"})

    def encode(self, body: bytes) -> bytes:
        return body


def always(answer: bytes, *, stays: bool = True) -> Script:
    def script(connection: socket.socket, _: int) -> bool:
        connection.sendall(answer)
        return stays

    return script


@contextmanager
def server(script: Script) -> Iterator[Address]:
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    connections: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                connections.append(connection)
                threading.Thread(target=_serve, args=(connection, script), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        thread.join()
        listening.close()
        for connection in connections:
            connection.close()


def _serve(connection: socket.socket, script: Script) -> None:
    number = 0
    with suppress(OSError), connection:
        while _read_request(connection):
            number += 1
            if not script(connection, number):
                return


def _read_request(connection: socket.socket) -> bool:
    """Read one whole request; return whether there was one."""
    data = b""
    while HEAD_END not in data:
        if not (piece := connection.recv(1 << 20)):
            return False
        data += piece
    head, _, body = data.partition(HEAD_END)
    left = int(head.lower().partition(b"content-length:")[2].split()[0]) - len(body)
    while left:
        left -= len(connection.recv(left))
    return True
