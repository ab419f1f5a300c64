"""The API of TensorFlow Serving, version 1, as OpenVINO Model Server serves it: REST here, gRPC in grpc.py.

Any model answers here; one whose handler takes raw bodies has an input and an output `body` of strings.
"""

from __future__ import annotations

from collections.abc import Callable

from mms_lite.engine.engine import Engine
from mms_lite.frontends.json_bodies import Readers
from mms_lite.frontends.message import HttpRequest
from mms_lite.frontends.tfserving.description import paths
from mms_lite.frontends.tfserving.rest import RestProtocol

__all__ = ["paths", "protocol"]


def protocol(engine: Engine, authorise: Callable[[HttpRequest], None], readers: Readers) -> RestProtocol:
    """Return the protocol over HTTP; `authorise` raises Unauthorized or Forbidden for who may not reload."""
    return RestProtocol(engine, authorise, readers)
