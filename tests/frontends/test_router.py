"""Several protocols behind one address."""

import pytest
from raw_http import Stub

from mms_lite.errors import InvalidRequest, ServingError
from mms_lite.frontends.message import HttpRequest, HttpResponse
from mms_lite.frontends.router import Router


class Named(Stub):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def spell(self, error: ServingError, path: str) -> HttpResponse:
        return HttpResponse(418, [], [f"{self.name}: {path}".encode()])

    def size_limit(self, path: str) -> str:
        return self.name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v2", "two"),
        ("/v2/models/x", "two"),
        ("/v1/models", "v1"),
        ("/v22", "rest"),
        ("/", "rest"),
        ("", "rest"),
    ],
)
async def test_the_first_part_of_the_path_says_whose_a_request_is(path: str, name: str) -> None:
    protocols = {each: Named(each) for each in ("two", "v1", "rest")}
    router = Router({"v2": protocols["two"], "v1": protocols["v1"]}, protocols["rest"])
    await router.handle(HttpRequest("GET", path))
    assert [each for each, protocol in protocols.items() if protocol.asked] == [name]
    assert router.spell(InvalidRequest("no"), path).body == [f"{name}: {path}".encode()]
    assert router.size_limit(path) == name
