"""Attack the gRPC port of real servers: messages that are noise, broken or odd, and broken connections.

    python tests/soak/fuzz_grpc.py [--seconds 120] [--seed 1] [--first CASE --count CASES]

What must not happen is printed with the case that did it, and makes the exit code 1.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from random import Random

import grpc
import raw_http2
from attack import PATIENCE_S, digits, main
from rpc_messages import Requests, methods
from soak_site import UNKNOWN_TO_THE_SERVER, Site

_AGAIN_S = 3.0
_ENDLESS = "/grpc.health.v1.Health/Watch"
_LOADING = ("RepositoryModelLoad", "RepositoryModelUnload")
_INFERENCE = (
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/tensorflow.serving.PredictionService/Predict",
)
_METADATA = ((("triton_grpc_error", "true"),), (("x", "y" * 4000),), (("authorization", "Bearer x"),))


@dataclass(slots=True)
class Case:
    """What is sent: messages to a method, or, with `raw`, bytes on a connection."""

    path: str
    messages: list[bytes]
    timeout_s: float = PATIENCE_S
    metadata: tuple[tuple[str, str], ...] = ()
    cancel_s: float | None = None
    raw: tuple[list[bytes], bool] | None = None

    def __str__(self) -> str:
        sent = "\n  ".join(map(digits, self.raw[0] if self.raw else self.messages))
        how = f"timeout {self.timeout_s} s, cancelled after {self.cancel_s} s, metadata {self.metadata}"
        return f"{'raw bytes' if self.raw else self.path} ({how})\n  {sent}"


def make(random: Random, site: Site, number: int) -> Case:
    """Return a case."""
    requests = Requests(random, site.models)
    path = random.choice(_INFERENCE if random.random() < 0.6 else tuple(methods()))
    if path.endswith(_LOADING) and random.random() < 0.9:  # a load takes long
        path = random.choice(_INFERENCE)
    if random.random() < 0.08:
        return Case(path, [], raw=raw_http2.attack(random, path, requests.any(path)))
    several = methods()[path].client_streaming
    count = random.choice((0, 1, 2, 5, 40)) if several else 1
    case = Case(path, [requests.any(path) for _ in range(count)])
    if path == _ENDLESS:
        case.timeout_s = 0.2
    elif random.random() < 0.04:
        case.timeout_s = random.choice((0.0, 0.001, 0.01))
    if random.random() < 0.04:
        case.cancel_s = random.choice((0.0, 0.0, 0.001, 0.01))
    if random.random() < 0.05:
        case.metadata = random.choice(_METADATA)
    return case


async def run(site: Site, case: Case) -> tuple[str, str | None]:
    """Do it; return how it ended, and what was wrong with that."""
    if case.raw is not None:
        await raw_http2.send(site.server.grpc, case.raw[0], reset=case.raw[1])
        return "raw", None
    begin = time.monotonic()
    try:
        code, said = "OK", await _answers(site, case)
    except asyncio.CancelledError:
        code, said = "CANCELLED", ""
    except grpc.aio.AioRpcError as error:
        code, said = error.code().name, str(error.details())
    return code, _fault(case, code, said, time.monotonic() - begin)


async def _answers(site: Site, case: Case) -> str:
    """Return the texts in all answers."""
    # On the wire a call with one message is no special case.
    call = site.channel.stream_stream(case.path)(
        _each(case.messages), timeout=case.timeout_s, metadata=case.metadata
    )
    if case.cancel_s is not None:
        asyncio.get_running_loop().call_later(case.cancel_s, call.cancel)
    said = []
    async for answer in call:
        said.append(answer[:100_000].decode("latin-1"))
    return "".join(said)


async def _each(messages: list[bytes]) -> AsyncIterator[bytes]:
    for each in messages:
        yield each


def _fault(case: Case, code: str, said: str, took_s: float) -> str | None:
    """Return what is wrong with an end."""
    if UNKNOWN_TO_THE_SERVER in said or (code == "UNKNOWN" and "Unexpected" in said):
        return f"{code}: {said[:300]}"
    if code == "UNAVAILABLE" and "not ready" not in said and "not available" not in said:
        return f"the connection was lost: {said[:300]}"
    if took_s > PATIENCE_S - 1 and not case.path.endswith(_LOADING):
        return f"no answer in {took_s:.0f} s"
    return None


async def call_no_path(site: Site) -> None:
    """Call a path that is no text, after which gRPC listens again, and others have been cut off."""
    await raw_http2.send(site.server.grpc, raw_http2.call(b"/inference.\xff"), reset=False)
    await asyncio.sleep(_AGAIN_S)


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], make, run, last=call_no_path))
