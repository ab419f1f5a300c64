"""What is wrong with a request, over every protocol of tensors and real sockets: one table.

What goes wrong behind a good request is in test_protocol_failures.py.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the grpc extra")

from protocol_clients import (
    ALL,
    GOOD,
    GRPC,
    REST,
    V1,
    V1_COLUMN,
    V1_GRPC,
    V1_REST,
    V1_ROW,
    V2,
    V2_BINARY,
    V2_CONTENTS,
    V2_GRPC,
    V2_JSON,
    V2_RAW,
    V2_REST,
    Gate,
    Input,
    Question,
    Served,
    serving,
)

from mms_lite.frontends.message import Limits

LIMIT = 100_000
V2_AND_V1_GRPC = (*V2, V1_GRPC)

# HTTP status -> gRPC status
CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    504: "DEADLINE_EXCEEDED",
}


@dataclass(frozen=True)
class Case:
    """What is asked, and what comes back. `status` is HTTP's, of which gRPC's follows, or gRPC's own.

    What is refused before a protocol has read it is not `counted`, and over HTTP may end the connection.
    `batches` is how many the model has run once a good request has followed.
    """

    question: Question
    status: int | str
    text: str
    counted: bool = True
    batches: int = 1

    def code(self, protocol: str) -> str:
        """Return the code that this protocol sends."""
        if protocol in REST:
            return str(self.status)
        return self.status if isinstance(self.status, str) else CODES[self.status]


def on(protocols: Sequence[str], *case: Any, **more: Any) -> dict[str, Case]:
    """Return the same case for several protocols."""
    return dict.fromkeys(protocols, Case(*case, **more))


def asking(*, outputs: tuple[str, ...] = (), **of_input: Any) -> Question:
    return Question(inputs=(Input(**of_input),), outputs=outputs)


def both(name: str) -> Question:
    return Question(inputs=(Input(), Input(name=name)))


def sending(body: bytes, *lines: str) -> Question:
    return Question(body=body, lines=lines)


def editing(edit: Callable[[Any], None]) -> Question:
    """Return a good question of which `edit` changes the message, or the JSON object."""
    return Question(edit=edit)


def _numbers_too(asked: Any) -> None:
    asked["inputs"][0]["data"] = [3, 4]


def _contents_too(asked: Any) -> None:
    asked.inputs[0].contents.fp32_contents.extend([3, 4])


def _raw_too(asked: Any) -> None:
    asked.raw_input_contents.append(b"12345678")


def _columns_too(asked: Any) -> None:
    asked.update({"inputs": {"x": [[3, 4]]}, "instances": [{"x": [3, 4]}]})


def _in_shared_memory(asked: Any) -> None:
    if isinstance(asked, dict):
        asked["inputs"][0]["parameters"] = {"shared_memory_region": "r"}
    else:
        asked.inputs[0].parameters["shared_memory_region"].string_param = "r"


def _size(size: int) -> Callable[[Any], None]:
    def edit(asked: Any) -> None:
        asked["inputs"][0]["parameters"]["binary_data_size"] = size

    return edit


def _first_length(number: int) -> Question:
    return asking(shape=(number, 2), values=(3, 4))


NESTED = b"[" * 90_000
NAN = asking(values=(float("nan"), 1))
OVER = gzip.compress(bytes(LIMIT + 1))
BOMB = gzip.compress(bytes(500 * LIMIT))
GZIP, HEADER = "Content-Encoding: gzip", "Inference-Header-Content-Length"
TRUNCATED = b"\x0a\x05m"
DEEP = Input(shape=(1,) * 33, values=(1,))
LONG = Input(shape=(1 << 62,) * 4_000, values=(1,))
VOID = Input(shape=(1 << 62, 0), values=())

TABLE: dict[str, dict[str, Case]] = {
    "unknown model": on(V2, Question("nobody"), 404, "Request for unknown model: 'nobody' is not found")
    | on(V1, Question("nobody"), 404, "Model with requested name is not found"),
    "unknown version": on(V2, Question(version="9"), 404, "unknown model: 'm' version 9 is not found")
    | on(V1, Question(version="9"), 404, "Model with requested version is not found"),
    "version that is no number": on(V2, Question(version="best"), 400, "version string 'best'")
    | on(V1_REST, Question(version="best"), 400, "Invalid request URL", counted=False)
    | on([V1_GRPC], Question(version="-5"), 404, "Model with requested version is not found"),
    "version over int64": on(V2, Question(version="1" * 30), 404, "is not found")
    | on(V1_REST, Question(version="1" * 30), 400, "Could not parse model version in request"),
    "wrong name": on(V2, asking(name="z"), 400, "unexpected inference input 'z', allowed inputs are: x")
    | on(V1, asking(name="z"), 400, "Missing input with specific name - Required input: x"),
    "an input too many": on(V2, both("z"), 400, "expected 1 inputs but got 2 inputs for model 'm'")
    | on(V1, both("z"), 400, "Invalid number of inputs - Expected: 1; Actual: 2"),
    "no input": on(V2, Question(inputs=()), 400, "Got input(s) [], but missing required input(s) ['x']")
    | on([V1_ROW], Question(inputs=()), 400, "Missing instances in row format")
    | on([V1_COLUMN], Question(inputs=()), 400, "Missing inputs in column format")
    | on([V1_GRPC], Question(inputs=()), 400, "Invalid number of inputs - Expected: 1; Actual: 0"),
    "input twice": on(V2, both("x"), 400, "input 'x' already exists in request"),  # in v1 they are a map
    "wrong shape": on(V2, asking(shape=(1, 3), values=(1, 2, 3)), 400, "Expected [-1,2], got [1,3].")
    | on(V1, asking(shape=(1, 3), values=(1, 2, 3)), 400, "input shape - Expected: (-1,2); Actual: (1,3)"),
    "wrong rank": on(V2, asking(shape=(2,)), 400, "Expected [-1,2], got [2].")
    | on(V1, asking(shape=(2,)), 400, "Invalid number of shape dimensions - Expected: (-1,2); Actual: (2)"),
    "negative length": on(V2_REST, _first_length(-1), 400, "Unable to parse 'shape' of input 'x'")
    | on(V2_GRPC, _first_length(-1), 400, "input 'x' has a negative length in its shape")
    | on([V1_GRPC], _first_length(-1), 400, "Negative or zero dimension size is not acceptable: (-1,2)"),
    "length over int64": on(V2_REST, _first_length(1 << 63), 400, "Unable to parse 'shape' of input 'x'"),
    "lengths that overflow": on((V2_BINARY, *V2_GRPC), _first_length(1 << 62), 400, f"Expected {1 << 65}, ")
    | on([V2_JSON], _first_length(1 << 62), 400, f"its shape is [2], not [{1 << 62},2]")
    | on([V1_GRPC], _first_length(1 << 62), 400, f"Expected: {1 << 65} bytes; Actual: 8 bytes"),
    "more axes than arrays have": on(V2_AND_V1_GRPC, Question("any", inputs=(DEEP,)), 400, "33 axes"),
    "lengths whose product takes long": on(V2_AND_V1_GRPC, Question("any", inputs=(LONG,)), 400, "4000 axes"),
    "empty and huge": on(V2_AND_V1_GRPC, Question("any", inputs=(VOID,)), 400, "lengths"),
    "wrong datatype": on(V2, asking(datatype="INT64"), 400, "'INT64', but model 'm' expects 'FP32'")
    | on(V1_REST, asking(values=("a", "b")), 400, 'the model expects FP32 [-1,2], got text: "a" at [0')
    | on([V1_GRPC], asking(datatype="INT64"), 400, "Expected: FP32; Actual: I64; input name: x"),
    "unknown datatype": on(V2_REST, asking(datatype="COMPLEX"), 400, "invalid datatype for input x")
    | on([V2_RAW], asking(datatype="COMPLEX"), 400, "'COMPLEX', but model 'm' expects 'FP32'")
    | on([V2_CONTENTS], asking(datatype="COMPLEX"), 400, "expected datatype 'COMPLEX'")
    | on([V1_GRPC], asking(datatype="COMPLEX"), 400, "Expected: FP32; Actual: INVALID; input name: x"),
    "too few bytes": on([V2_JSON], asking(values=(3,)), 400, "its shape is [1], not [1,2]")
    | on((V2_BINARY, *V2_GRPC), asking(values=(3,)), 400, "'x' for model 'm'. Expected 8, got 4")
    | on([V1_ROW], sending(b'{"instances": [{"x": [3, 4]}, {"x": [3]}]}'), 400, "ragged list")
    | on([V1_COLUMN], sending(b'{"inputs": {"x": [[3, 4], [3]]}}'), 400, "ragged list")
    | on([V1_GRPC], asking(values=(3,)), 400, "Expected: 8 bytes; Actual: 4 bytes; input name: x"),
    "too many bytes": on([V2_JSON], asking(values=(3, 4, 5)), 400, "its shape is [3], not [1,2]")
    | on((V2_BINARY, *V2_GRPC), asking(values=(3, 4, 5)), 400, "'x' for model 'm'. Expected 8, got 12")
    | on([V1_GRPC], asking(values=(3, 4, 5)), 400, "Expected: 8 bytes; Actual: 12 bytes"),
    "truncated": on([V2_JSON], sending(b'{"inputs": [{"name": "x"'), 400, "failed to parse the request JSON")
    | on([V2_BINARY], sending(b"{}", f"{HEADER}: 3"), 400, "header size should be in range (0, 2), got: 3")
    | on(V2_GRPC, sending(TRUNCATED), 400, "no valid inference.ModelInferRequest")
    | on([V1_ROW], sending(b'{"instances": [{"x": [3,'), 412, "The file is not valid json - Error: ")
    | on([V1_COLUMN], sending(b'{"inputs": [[3,'), 412, "The file is not valid json - Error: ")
    | on([V1_GRPC], sending(TRUNCATED), 400, "the message is no valid tensorflow.serving.PredictRequest"),
    "truncated JSON header": on([V2_BINARY], sending(b'{"inputs": []}', f"{HEADER}: 9"), 400, "request JSON"),
    "header length that is none": on([V2_BINARY], sending(b"{}", f"{HEADER}: two"), 400, "got: two"),
    "truncated tensor": on(
        [V2_BINARY], editing(_size(12)), 400, "'x', expecting 4 additional bytes for model 'm'"
    ),
    "more than the tensors": on([V2_BINARY], editing(_size(4)), 400, "unexpected additional input data"),
    "contents and raw contents": on([V2_BINARY], editing(_numbers_too), 400, "must set only one of")
    | on([V2_RAW], editing(_contents_too), 400, "must not be specified when using raw_input_contents")
    | on([V2_CONTENTS], editing(_raw_too), 400, "must not be specified when using raw_input_contents")
    # of a TensorProto with both, the content counts
    | on(V1_REST, editing(_columns_too), 400, "Could not detect row or column format"),
    "empty": on([V2_JSON], sending(b""), 400, "failed to parse the request JSON buffer")
    | on([V2_BINARY], sending(b"", f"{HEADER}: 1"), 400, "header size should be in range (0, 0), got: 1")
    | on(V2_GRPC, sending(b""), 404, "Request for unknown model: '' is not found")
    | on(V1_REST, sending(b""), 412, "The file is not valid json")
    | on([V1_GRPC], sending(b""), 404, "Model with requested name is not found"),
    "no object": on(V2_REST, sending(b"[1]"), 400, "request JSON buffer: it is not an object")
    | on(V1_REST, sending(b"[1]"), 400, "Request body should be JSON object"),
    "nested without end": on(V2_REST, sending(NESTED), 400, "failed to parse the request JSON buffer")
    | on(V1_REST, sending(NESTED), 412, "The file is not valid json"),
    "nested around NaN": on(V2_REST, sending(NESTED + b"NaN"), 400, "failed to parse the request JSON buffer")
    | on(V1_REST, sending(NESTED + b"NaN"), 412, "The file is not valid json"),
    "unknown output": on(V2, asking(outputs=("z",)), 400, "output 'z', allowed outputs are: y")
    | on([V1_GRPC], asking(outputs=("z",)), 400, "not found in signature: z Outputs expected to be in the"),
    "an output too many": on(V2, asking(outputs=("y", "z")), 400, "output 'z', allowed outputs are: y")
    | on([V1_GRPC], asking(outputs=("y", "z")), 400, "not found in signature: z"),
    "output twice": on(V2, asking(outputs=("y", "y")), 400, "output 'y' already exists in request")
    | on([V1_GRPC], asking(outputs=("y", "y")), 400, "duplicate output tensor alias: y"),
    "NaN": on(ALL, NAN, 400, "input 'x' has elements that are not numbers (NaN)", batches=2),
    "in shared memory": on(V2, editing(_in_shared_memory), 501, "input 'x' is in shared memory"),
    "unknown encoding": on(V2_REST, Question(lines=("Content-Encoding: br",)), 415, "compression type")
    | on(V1_REST, Question(lines=("Content-Encoding: br",)), 415, "Unsupported content encoding - br"),
    "broken gzip": on(V2_REST, Question(lines=(GZIP,)), 400, "failed to decompress the request"),
    "gzip bomb": on(V2_REST, sending(BOMB, GZIP), 413, f"unpacks to more than the limit of {LIMIT} bytes")
    | on(V1_REST, sending(BOMB, GZIP), 415, "Unsupported content encoding - gzip"),
    "deadline that is none": on(
        REST, Question(lines=("X-Request-Timeout-Ms: soon",)), 400, "X-Request-Timeout-Ms is not a positive"
    ),
    "deadline passed on arrival": on((*REST, *V2_GRPC), Question(timeout_s=1e-9), 504, "deadline passed"),
    "too large": on(
        REST, sending(bytes(LIMIT + 1)), 413, f"max_tensor_request_size, {LIMIT} bytes", counted=False
    )
    | on(GRPC, sending(bytes(LIMIT + 1)), "RESOURCE_EXHAUSTED", "larger than max", counted=False),
    "too large once unpacked": on(V2_REST, sending(OVER, GZIP), 413, "unpacks to more"),
}

CASES = [
    pytest.param(protocol, case, id=f"{name}-{protocol}")
    for name, cases in TABLE.items()
    for protocol, case in cases.items()
]


@pytest.fixture
async def served(inline: Any, tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(inline, Gate(tmp_path), Limits(max_tensor_request_size=LIMIT)) as made:
        yield made


@pytest.mark.parametrize(("protocol", "case"), CASES)
async def test_a_bad_request_is_told_why_and_the_next_is_answered(
    served: Served, protocol: str, case: Case
) -> None:
    client = served.client(protocol)
    reply = await client.ask(case.question)
    assert (reply.code, case.text in reply.text) == (case.code(protocol), True)
    assert reply.headers.get("connection") in (None, "keep-alive") or not case.counted
    assert (await client.ask(GOOD)).values == [6, 8]
    counted = [(client.label, reply.code)] if case.counted else []
    assert served.counted() == Counter([*counted, (client.label, client.good)])
    assert served.batches() == case.batches
