"""The API of awslabs/multi-model-server: which routes an address has, and how their errors are spelt."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from mms_lite.engine.engine import Engine
from mms_lite.errors import ServingError
from mms_lite.frontends.message import HttpRequest, HttpResponse, Limits
from mms_lite.frontends.mms.answers import json_response, method_not_allowed, resource_not_found, spell
from mms_lite.frontends.mms.description import Described, api_description
from mms_lite.frontends.mms.inference import Inference
from mms_lite.frontends.mms.management import Management

__all__ = ["Described", "MmsProtocol", "protocol"]

Routes = Callable[[HttpRequest, list[str]], Awaitable[HttpResponse | None]]
Authorise = Callable[[HttpRequest], None]


class MmsProtocol:
    """One address's routes, asked in turn; `description` is what it answers when asked what they are."""

    def __init__(self, routes: Sequence[Routes], description: HttpResponse) -> None:
        self._routes = routes
        self._description = description

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer a request; errors come back as responses."""
        parts = request.path.rstrip("/").split("/")[1:]
        if parts == ["api-description"] or (not parts and request.method == "OPTIONS"):
            return self._description
        if not parts or parts[0] == "api-description":
            return method_not_allowed()
        try:
            for routes in self._routes:
                response = await routes(request, parts)
                if response is not None:
                    return response
        except ServingError as error:
            return spell(error)
        return resource_not_found()

    def spell(self, error: ServingError, path: str) -> HttpResponse:
        """Return an error that came up outside of `handle`."""
        return spell(error)

    def size_limit(self, path: str) -> str:
        """Return the name of the limit of the MMS API, for all routes."""
        return "max_request_size"


def protocol(
    engine: Engine,
    limits: Limits,
    *,
    inference: bool = False,
    management: Authorise | None = None,
    default_workers: int | None = 0,
    more: Sequence[Routes] = (),
    others: Sequence[Described] = (),
) -> MmsProtocol:
    """Return the protocol of an address with these APIs; inference comes first, as in MMS.

    `management` is called for every management request and raises Unauthorized or Forbidden; None leaves the
    API out. `default_workers` is for registrations that name none; with None the model's files say how many.
    `more` routes are asked before ours.
    `others` are protocols that share the address: the API description is the whole address's.
    """
    routes = [*more]
    if inference:
        routes.append(Inference(engine, max_response_size=limits.max_response_size).handle)
    if management:
        routes.append(Management(engine, default_workers=default_workers, authorise=management).handle)
    if not (inference or management):
        return MmsProtocol(routes, resource_not_found())
    described = api_description(inference=inference, management=management is not None, others=others)
    return MmsProtocol(routes, json_response(described))
