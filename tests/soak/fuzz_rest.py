"""Attack the inference address of real servers: JSON, binary tensors and HTTP that are broken or odd.

    python tests/soak/fuzz_rest.py [--seconds 120] [--seed 1] [--first CASE --count CASES]

What must not happen is printed with the case that did it, and makes the exit code 1.
"""

import asyncio
import gzip
import json
import math
import struct
import sys
import time
import zlib
from dataclasses import dataclass, field
from random import Random
from typing import Any

from attack import PATIENCE_S, digits, main
from rpc_messages import DATATYPES, Shape
from soak_site import UNKNOWN_TO_THE_SERVER, Site

Json = Any
Headers = list[tuple[bytes, bytes]]

_LENGTH = b"Inference-Header-Content-Length"
_HALF = "\ud800\udc80"[1]  # of a character
_ODD: tuple[Json, ...] = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**400, -(2**63), math.nan, math.inf, 1e308),
    *("", "\0", "1", "größer", _HALF, "x" * 5000, "NaN", [], {}, [[]], [{}], {"b64": "AA=="}, {"b64": "?"}),
    *(
        [None],
        [1, [2]],
        ["a", 1],
        [[1], [1, 2]],
        {"b64": 1},
        {"b64": "AA==", "x": 1},
        {"": ""},
        {_HALF: _HALF},
    ),
)
_ODD_PARAMETERS = (
    *("binary_data_size", "binary_data", "binary_data_output", "classification", "timeout", "priority"),
    *("sequence_id", "sequence_start", "content_type", "shared_memory_region", "triton_x", "own"),
)
_PATHS = (
    *(
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{}",
        "/v2/models/{}/ready",
        "/v2/models/{}/config",
    ),
    *(
        "/v2/models/{}/stats",
        "/v2/models/stats",
        "/v2/models/{}/versions/1",
        "/v2/models/{}/versions/9/infer",
    ),
    *(
        "/v2/models/{}/versions/%00/ready",
        "/v2/models/%ff/infer",
        "/v2/models/{}/versions//infer",
        "/v2/models//infer",
    ),
    *(
        "/v2/repository/index",
        "/v2/logging",
        "/v2/trace/setting",
        "/v2/models/{}/generate",
        "/v2/../v1/config",
    ),
    *(
        "/v2/systemsharedmemory/status",
        "/v2/cudasharedmemory/region/r/register",
        "/v2/%2e%2e/%2f",
        "/v2/models/{}%2Finfer",
    ),
    *(
        "/v1/models/{}",
        "/v1/models/{}/metadata",
        "/v1/models/{}/versions/1",
        "/v1/models/{}/versions/99999999999999999999",
    ),
    *(
        "/v1/models/{}/labels/a:predict",
        "/v1/models/{}:classify",
        "/v1/config",
        "/v1/config/reload",
        "/v1/models/%ff:predict",
    ),
    *(
        "/predictions/{}",
        "/predictions/{}/1",
        "/ping",
        "/invocations",
        "/models/{}/invoke",
        "/api-description",
        "/",
    ),
)
_TIMEOUTS = (b"0", b"-1", b"nan", b"inf", b"1e-9", b"1e300", b"1", b"x", b"", b"1_0")


@dataclass(slots=True)
class Case:
    """A request, or the part of it that is sent before the client leaves: all of it if `cut` is None."""

    method: str
    path: str
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    cut: int | None = None
    framing: bytes | None = None  # in place of a Content-Length

    @property
    def data(self) -> bytes:
        """What is sent."""
        framing = b"Content-Length: %d" % len(self.body) if self.framing is None else self.framing
        lines = [f"{self.method} {self.path} HTTP/1.1".encode(), b"Host: localhost", framing]
        lines += [name + b": " + value for name, value in self.headers]
        return b"\r\n".join([*lines, b"", self.body])[: self.cut]

    def __str__(self) -> str:
        return f"{self.method} {self.path}\n  {self.data[:2000]!r}\n  {digits(self.data)}"


def make(random: Random, site: Site, number: int) -> Case:
    """Return a case."""
    name = random.choice(list(site.models))
    datatype, shape, inputs = site.models[name]
    kind = random.random()
    odd = random.choice((0.0, 0.02, 0.1, 0.5))
    if kind < 0.5:
        case = _v2(random, name, datatype, shape, inputs, odd)
    elif kind < 0.85:
        case = _v1(random, name, datatype, shape, inputs, odd)
    elif kind < 0.9:
        document = _broken(
            random, {each: _values(random, datatype, _lengths(random, shape)) for each in inputs}, odd
        )
        case = Case(
            "POST",
            f"/predictions/{name}",
            [(b"Content-Type", b"application/json")],
            _text(random, document, odd),
        )
    else:
        method = random.choice(("GET", "GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"))
        case = Case(
            method, random.choice(_PATHS).replace("{}", name), [], _text(random, random.choice(_ODD), odd)
        )
        if case.path.endswith("reload"):
            case.method = "GET"
    if random.random() < odd:
        _misframe(random, case)
    return case


def _v2(random: Random, name: str, datatype: str, shape: Shape, inputs: tuple[str, ...], odd: float) -> Case:
    """A request of the KServe protocol, its tensors in JSON or behind it."""
    described, behind = [], []
    for each in inputs:
        lengths = _lengths(random, shape)
        tensor: dict[str, Json] = {"name": each, "datatype": datatype, "shape": lengths}
        if random.random() < 0.5:
            data = _packed(random, datatype, math.prod(lengths))
            if random.random() < odd:
                data = random.choice((data[:-1], data + b"\0", b"", b"\xff" * 8, data * 2))
            size = (
                len(data)
                if random.random() >= odd
                else random.choice((-1, 0, 2**63, len(data) + 1, "1", 1.0))
            )
            tensor["parameters"] = {"binary_data_size": size}
            behind.append(data)
        else:
            tensor["data"] = _values(random, datatype, lengths)
        described.append(tensor)
    document: dict[str, Json] = {"inputs": described}
    if random.random() < 0.5:
        document["id"] = "i" if random.random() >= odd else random.choice(_ODD)
    if random.random() < odd + 0.1:
        keys = random.sample(_ODD_PARAMETERS, 2)
        document["parameters"] = {
            key: random.choice((True, False, 1, 2**70, "1", _HALF, random.choice(_ODD))) for key in keys
        }
    if random.random() < odd + 0.1:
        output = {"name": random.choice(("OUTPUT0", "body", "y", "upper", "SCORES", _HALF))}
        document["outputs"] = [
            {**output, "parameters": {random.choice(_ODD_PARAMETERS): random.choice(_ODD)}}
        ]
    text = _text(random, _broken(random, document, odd), odd)
    length = (
        len(text)
        if random.random() >= odd
        else random.choice((0, 1, len(text) - 1, len(text) + 1, 2**64, -1, "x"))
    )
    headers = [(_LENGTH, str(length).encode())] if behind or random.random() < 0.1 else []
    return _packed_case(
        random, Case("POST", f"/v2/models/{name}/infer", headers, text + b"".join(behind)), odd
    )


def _v1(random: Random, name: str, datatype: str, shape: Shape, inputs: tuple[str, ...], odd: float) -> Case:
    """A request of TensorFlow Serving's API, by rows or by columns."""
    values = {each: _values(random, datatype, _lengths(random, shape)) for each in inputs}
    if random.random() < 0.5:
        document: Json = {"inputs": values if len(values) > 1 or random.random() < 0.5 else values[inputs[0]]}
    elif len(values) == 1:
        rows = values[inputs[0]]
        document = {"instances": rows if random.random() < 0.5 else [{inputs[0]: row} for row in rows]}
    else:
        count = min(map(len, values.values()))
        document = {"instances": [{each: values[each][at] for each in inputs} for at in range(count)]}
    if random.random() < odd:
        document["signature_name"] = random.choice(_ODD)
    body = _text(random, _broken(random, document, odd), odd)
    return _packed_case(random, Case("POST", f"/v1/models/{name}:predict", [], body), odd)


def _packed_case(random: Random, case: Case, odd: float) -> Case:
    """Compress a body now and then, or have the answer compressed."""
    if random.random() < 0.05:
        case.headers.append((b"Accept-Encoding", random.choice((b"gzip", b"deflate", b"\xff", b"gzip;q=0"))))
    if random.random() < 0.05:
        case.headers.append((b"X-Request-Timeout-Ms", random.choice(_TIMEOUTS)))
    if random.random() >= odd / 2 + 0.02:
        return case
    encoding = random.choice((b"gzip", b"deflate", b"br", b"gzip, gzip", b"\xff"))
    packed = gzip.compress(case.body) if encoding == b"gzip" else zlib.compress(case.body)
    case.body = random.choice((packed, packed, packed[:-1], packed + b"\0", case.body, packed[:1]))
    case.headers.append((b"Content-Encoding", encoding))
    return case


def _misframe(random: Random, case: Case) -> None:
    """Break the message's framing, or leave in its middle."""
    size = len(case.body)
    kind = random.randrange(4)
    if kind == 0:
        case.cut = random.randrange(len(case.data) + 1)
    elif kind == 1:
        lengths = (b"-1", b"%d" % (size + 5), b"9" * 30, b"0x5", b"%d, %d" % (size, size), b"+%d" % size, b"")
        case.framing = b"Content-Length: " + random.choice(lengths)
        case.cut = len(case.data)
    elif kind == 2:
        case.framing = b"Transfer-Encoding: chunked"
        chunk = b"%x\r\n%s\r\n" % (size, case.body) if size else b""
        case.body = random.choice(
            (chunk + b"0\r\n\r\n", chunk, chunk[:-3], b"zz\r\n", b"ffffffffffffffff\r\n" + chunk)
        )
    else:
        name = random.choice(
            (b"X-Odd", b"x y", b"", b"\xff", b"Host", b"Expect", b"Connection", b"Content-Type")
        )
        value = random.choice((b"\xff\xfe", b"a\0b", b"y" * 9000, b"", b"100-continue", b"close", b"upgrade"))
        case.headers += [(name, value)] * random.choice((1, 1, 200))


def _lengths(random: Random, shape: Shape) -> Shape:
    return [random.choice((1, 2, 3)) if each < 0 else each for each in shape]


def _packed(random: Random, datatype: str, count: int) -> bytes:
    if datatype != "BYTES":
        return random.randbytes(count * DATATYPES[datatype][0])
    elements = [random.choice((b"1", b"", b"\xff", b"x" * 300)) for _ in range(count)]
    return b"".join(struct.pack("<I", len(each)) + each for each in elements)


def _values(random: Random, datatype: str, shape: Shape) -> Json:
    """Return nested lists."""
    if shape:
        return [_values(random, datatype, shape[1:]) for _ in range(shape[0])]
    if datatype == "BYTES":
        return random.choice(("1", "17", "", "größer", {"b64": "/w=="}))
    if datatype == "BOOL":
        return random.random() < 0.5
    return random.randrange(100) if "INT" in datatype else random.choice((0.5, -1, 1e30, math.nan, math.inf))


def _broken(random: Random, value: Json, odd: float) -> Json:
    """Return the value with some of what is in it replaced, left out, or said twice."""
    if random.random() < odd / 10:
        return random.choice(_ODD)
    if isinstance(value, dict):
        kept = {key: _broken(random, each, odd) for key, each in value.items() if random.random() >= odd / 10}
        if random.random() < odd / 10:
            kept[random.choice(("", "x", _HALF, "data", "inputs"))] = random.choice(_ODD)
        return kept
    if isinstance(value, list):
        kept_items = [_broken(random, each, odd) for each in value if random.random() >= odd / 30]
        return kept_items * 2 if random.random() < odd / 20 else kept_items
    return value


def _text(random: Random, document: Json, odd: float) -> bytes:
    """Return a document as JSON; with some luck no JSON.

    Half of a character only passes beside a NaN, for which the server has another reader.
    """
    if isinstance(document, dict) and random.random() < odd:
        document = {**document, "nan": math.nan}
    text = bytearray(json.dumps(document).encode())
    if random.random() >= odd / 2 or not text:
        return bytes(text)
    at = random.randrange(len(text))
    kind = random.randrange(6)
    if kind == 0:
        text[at] ^= 1 << random.randrange(8)
    elif kind == 1:
        del text[at:]
    elif kind == 2:
        text[at:at] = random.choice(
            (b"\xff", b"\0", b"NaN", b"-Infinity", b"\xef\xbb\xbf", b"//", b"'", b"\\ud800")
        )
    elif kind == 3:
        text[at:at] = random.choice((b"[", b'{"a":', b"[NaN,")) * random.choice((3, 500, 1025, 50_000))
    elif kind == 4:
        text[at:at] = random.choice((b"9", b"0", b"e", b".")) * random.choice((1, 400, 5000))
    else:
        return (
            bytes(text)
            .decode()
            .encode(random.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1")), "replace")
        )
    return bytes(text)


async def run(site: Site, case: Case) -> tuple[str, str | None]:
    """Do it; return how it ended, and what was wrong with that."""
    begin = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await _exchange(site, case)
    except TimeoutError:
        return "none", f"no answer in {time.monotonic() - begin:.0f} s"


async def _exchange(site: Site, case: Case) -> tuple[str, str | None]:
    host, port = site.server.http.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(case.data)
        if case.cut is None and case.framing is None:
            await writer.drain()
            return await _answer(reader, case)
        # Whether there is an answer depends on what was left out.
        writer.write_eof()
        said = await reader.read()
        return "cut", "no message of the server's" if UNKNOWN_TO_THE_SERVER.encode() in said else None
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        plain = case.cut is None and case.framing is None and len(case.headers) < 50
        return "closed", f"the connection was closed: {error!r}" if plain else None
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader, case: Case) -> tuple[str, str | None]:
    """Read an answer; return its status, and what is wrong with it."""
    status, headers = 100, dict[str, str]()
    while status == 100:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(head[0].split()[1])
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
        }
    size = int(headers.get("content-length", "0")) if case.method != "HEAD" else 0
    body = await reader.readexactly(size)
    return str(status), _fault(status, headers, body)


def _fault(status: int, headers: dict[str, str], body: bytes) -> str | None:
    if status >= 500 and UNKNOWN_TO_THE_SERVER.encode() in body:
        return f"{status}: {body[:300]!r}"
    encoding = headers.get("content-encoding")
    if encoding:
        body = gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)
    length = headers.get(_LENGTH.decode().lower())
    if length is not None:
        body = body[: int(length)]
    elif headers.get("content-type") != "application/json" or not body:
        return None
    try:
        json.loads(body)
    except ValueError as error:
        return f"{status}: the answer is no JSON: {error}: {body[:300]!r}"
    return None


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], make, run))
