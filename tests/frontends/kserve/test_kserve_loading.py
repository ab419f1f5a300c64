"""Loading, unloading and listing models by the KServe v2 protocol; what is done is the engine's business."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from raw_http import Answer

from mms_lite.errors import Forbidden, InvalidRequest
from mms_lite.frontends.kserve.service import KServeService
from mms_lite.frontends.message import HttpRequest
from mms_lite.types import RepositoryEntry, RepositoryState

Call = Callable[..., Awaitable[Answer]]


class Repository:
    """Stands in for the engine: remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    async def load_model(
        self, name: str, *, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        self.told.append(("load", name, config, files))

    async def unload_model(self, name: str, *, dependents: bool = False) -> None:
        self.told.append(("unload", name, dependents))

    async def repository_index(self) -> list[RepositoryEntry]:
        return [
            RepositoryEntry("a", "1", RepositoryState.READY),
            RepositoryEntry("a", "2", RepositoryState.UNAVAILABLE, "unloaded"),
            RepositoryEntry("a", "3", RepositoryState.UNAVAILABLE, "no such file: /srv/secret/model.py"),
            RepositoryEntry("a", "4", RepositoryState.UNAVAILABLE, "no workers"),
            RepositoryEntry("b"),
        ]


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def service(repository: Any) -> KServeService:
    def authorise(caller: HttpRequest) -> None:
        if caller.remote != "127.0.0.1:5000":
            raise Forbidden("explicit model load / unload is not allowed")

    return KServeService(repository, server_name="s", server_version="1", authorise=authorise)


async def test_a_model_is_loaded_by_name(call: Call, repository: Repository) -> None:
    for body in (b"", b"{}", b'{"parameters": {}}'):
        answer = await call("POST", "/v2/repository/models/m/load", body)
        assert (answer.status, answer.body) == (200, b"")
    assert repository.told == [("load", "m", None, None)] * 3


async def test_a_model_is_loaded_with_a_configuration_and_files(call: Call, repository: Repository) -> None:
    given = {"config": "{}", "file:1/model.onnx": base64.b64encode(b"\xff").decode(), "other": 1}
    body = json.dumps({"parameters": given}).encode()
    assert (await call("POST", "/v2/repository/models/m/load", body)).status == 200
    assert repository.told == [("load", "m", "{}", {"1/model.onnx": b"\xff"})]


async def test_a_model_is_unloaded_with_what_it_is_made_of_if_asked(
    call: Call, repository: Repository
) -> None:
    await call("POST", "/v2/repository/models/m/unload")
    await call("POST", "/v2/repository/models/m/unload", b'{"parameters": {"unload_dependents": true}}')
    assert repository.told == [("unload", "m", False), ("unload", "m", True)]


@pytest.mark.parametrize("content", ["text", 7])
async def test_a_file_is_bytes(service: KServeService, repository: Repository, content: Any) -> None:
    caller = HttpRequest("POST", "/", remote="127.0.0.1:5000")
    with pytest.raises(InvalidRequest, match=r"Unable to parse 'file:1/model\.onnx': expected bytes"):
        await service.load("m", {"config": "{}", "file:1/model.onnx": content}, caller)
    assert repository.told == []


@pytest.mark.parametrize("verb", ["load", "unload"])
async def test_who_may_not_changes_nothing(call: Call, repository: Repository, verb: str) -> None:
    answer = await call("POST", f"/v2/repository/models/m/{verb}", b"{", remote="192.0.2.1:5000")
    assert (answer.status, repository.told) == (403, [])
    assert answer.json == {"error": "explicit model load / unload is not allowed"}


async def test_the_index_names_what_there_is(call: Call) -> None:
    ready = {"name": "a", "version": "1", "state": "READY"}
    unloaded = {"name": "a", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"}
    failed = {"name": "a", "version": "3", "state": "UNAVAILABLE", "reason": "failed to load"}
    idle = {"name": "a", "version": "4", "state": "UNAVAILABLE", "reason": "no workers"}
    for body in (b"", b"{}", b'{"ready": false}'):
        found = (await call("POST", "/v2/repository/index", body)).json
        assert found == [ready, unloaded, failed, idle, {"name": "b"}]
    assert (await call("POST", "/v2/repository/index", b'{"ready": true}')).json == [ready]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("path", ["index", "models/m/unload"])
async def test_a_long_body_is_refused_unread(call: Call, path: str, packed: bool) -> None:
    body = b" " * 200_000
    headers = [("Content-Encoding", "gzip")] if packed else []
    answer = await call("POST", f"/v2/repository/{path}", gzip.compress(body) if packed else body, *headers)
    assert answer.status == 413


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("index", b'{"ready": "x"}', "Invalid value for 'ready': expected a boolean"),
        ("index", b"{", "failed to parse the request JSON buffer"),
        ("index", b"[]", "it is not an object"),
        ("models/m/load", b'{"parameters": []}', "Unable to parse 'parameters'"),
        ("models/m/load", b'{"parameters": {"config": {}}}', "Unable to parse 'config'"),
        ("models/m/load", b'{"parameters": {"file:x": "%"}}', "parameter 'file:x' is not base64"),
        ("models/m/load", b'{"parameters": {"file:x": 1}}', "parameter 'file:x' is not base64"),
        ("models/m/unload", b'{"parameters": {"unload_dependents": 1}}', "expected a boolean"),
    ],
)
async def test_a_body_that_is_wrong_changes_nothing(
    call: Call, repository: Repository, path: str, body: bytes, said: str
) -> None:
    answer = await call("POST", f"/v2/repository/{path}", body)
    assert (answer.status, repository.told) == (400, [])
    assert said in answer.json["error"]
