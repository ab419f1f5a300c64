"""Two real servers for all tests of this folder, and tritonclient's four clients behind one face.

They run where server and clients are installed together (`make clients`), and are skipped elsewhere.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from client_models import write_repository, write_store
from client_server import FACES, Server


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the Triton repository that `triton` serves."""
    folder = tmp_path_factory.mktemp("repository") / "models"
    write_repository(folder)
    return folder


@pytest.fixture(scope="session")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over a Triton repository, which clients may load from."""
    settings = {"model_repository": repository, "model_control_mode": "explicit"}
    server = Server(tmp_path_factory.mktemp("triton"), **settings)
    try:
        server.start()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over a model store of archives."""
    folder = tmp_path_factory.mktemp("archives")
    write_store(folder)
    server = Server(tmp_path_factory.mktemp("mms"), model_store=folder)
    try:
        server.start()
        yield server
    finally:
        server.end()


@pytest.fixture(params=FACES)
def client(triton: Server, request: pytest.FixtureRequest) -> Iterator["TritonClient"]:  # noqa: F821
    """Each of tritonclient's clients in turn."""
    from triton_client import TritonClient

    with TritonClient(request.param, triton) as made:
        yield made
