"""Several protocols behind one address: which of them a request is for, by the first part of its path."""

from __future__ import annotations

from collections.abc import Mapping

from mms_lite.errors import ServingError
from mms_lite.frontends.message import HttpProtocol, HttpRequest, HttpResponse


class Router:
    """Gives each request to the protocol of its path's first part; `rest` has what is for none of them."""

    def __init__(self, protocols: Mapping[str, HttpProtocol], rest: HttpProtocol) -> None:
        self._protocols = protocols
        self._rest = rest

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer a request, as its protocol does."""
        return await self._protocol(request.path).handle(request)

    def spell(self, error: ServingError, path: str) -> HttpResponse:
        """Return the error as the path's protocol writes it."""
        return self._protocol(path).spell(error, path)

    def size_limit(self, path: str) -> str:
        """Return the name of the limit of the path's protocol."""
        return self._protocol(path).size_limit(path)

    def _protocol(self, path: str) -> HttpProtocol:
        return self._protocols.get(path[1:].partition("/")[0], self._rest)
