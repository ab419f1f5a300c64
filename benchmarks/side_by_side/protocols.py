"""One tensor in the open protocols: a request's bytes as clients send them, and the tensor in an answer.

What any server of a protocol is asked, and how its answer is read, is the same; where one
listens is its recipe's.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MODEL, INPUT, OUTPUT = "identity", "IN", "OUT"
SHAPE = (1, 3, 224, 224)
DATATYPE = "FP32"
DTYPE = np.dtype("<f4")
HOST = "127.0.0.1"

_INFER = f"/v2/models/{MODEL}/infer"
_JSON_LENGTH = "inference-header-content-length"  # of the JSON before binary tensors
_DT_FLOAT = 1  # tensorflow.DataType
_ANSWER_S = 60.0


class WrongAnswerError(ValueError):
    """An answer is not the tensor that was sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of an answer, or a gRPC message; header names in small letters."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a tensor is asked: `request` makes a body or gRPC message of it, `tensor` reads it in an answer."""

    name: str
    path: str
    request: Callable[[bytes], bytes]
    tensor: Callable[[Answer], bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    is_grpc: bool = False

    def ask(self, port: int, body: bytes) -> Answer:
        """Ask once, on a connection of its own.

        Raises:
            OSError, http.client.HTTPException: there is no answer.
            WrongAnswerError: it is a refusal.
        """
        return _call(port, self.path, body) if self.is_grpc else _post(port, self, body)


@dataclass(frozen=True, slots=True)
class Door:
    """Where a server answers a protocol; a bare `echo` answers with the request itself."""

    port: Callable[[], int | None]
    echo: bool = False


def check(protocol: Protocol, door: Door, tensor: bytes) -> Answer:
    """Ask a server for the tensor; return the answer, which has it bit for bit.

    Raises:
        OSError, http.client.HTTPException: there is no answer.
        WrongAnswerError: it is another one.
    """
    if (port := door.port()) is None:
        raise ConnectionRefusedError("it does not listen yet")
    body = protocol.request(tensor)
    answer = protocol.ask(port, body)
    if door.echo:
        if answer.body != body:
            raise WrongAnswerError("the echo differs from the request")
        return answer
    try:
        found = protocol.tensor(answer)
    except (KeyError, IndexError, ValueError) as error:
        raise WrongAnswerError(f"{error!r} in {answer.body[:200]!r}") from error
    if found != tensor:
        raise WrongAnswerError(f"{len(found)} bytes of a tensor that differ from those sent")
    return answer


def _post(port: int, protocol: Protocol, body: bytes) -> Answer:
    connection = http.client.HTTPConnection(HOST, port, timeout=_ANSWER_S)
    try:
        connection.request("POST", protocol.path, body, dict(protocol.headers))
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise WrongAnswerError(f"{answer.status} {content[:300]!r}")
    return Answer(content, {name.lower(): value for name, value in answer.getheaders()})


def _call(port: int, path: str, message: bytes) -> Answer:
    import grpc

    unbounded = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"{HOST}:{port}", unbounded) as channel:
        try:
            return Answer(channel.unary_unary(path)(message, timeout=_ANSWER_S))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise ConnectionRefusedError(error.details()) from error
            raise WrongAnswerError(f"{error.code().name}: {error.details()}") from error


def _message(name: str) -> Any:
    from mms_lite.protos import message

    return message(name)


def _input(**more: object) -> dict[str, object]:
    return {"name": INPUT, "shape": list(SHAPE), "datatype": DATATYPE, **more}


def _json(tensor: bytes) -> bytes:
    """Spell each number as Python's JSON does, with the digits of a double, as tritonclient sends it."""
    numbers = np.frombuffer(tensor, DTYPE).tolist()
    return json.dumps({"inputs": [_input(data=numbers)]}, separators=(",", ":")).encode()


def _from_json(answer: Answer) -> bytes:
    (output,) = json.loads(answer.body)["outputs"]
    return np.asarray(output["data"], DTYPE).tobytes()


def _binary_head() -> bytes:
    size = int(np.prod(SHAPE)) * DTYPE.itemsize
    head = {
        "inputs": [_input(parameters={"binary_data_size": size})],
        "parameters": {"binary_data_output": True},
    }
    return json.dumps(head, separators=(",", ":")).encode()


def _from_binary(answer: Answer) -> bytes:
    return answer.body[int(answer.headers[_JSON_LENGTH]) :]


def _grpc(tensor: bytes) -> bytes:
    request = _message("inference.ModelInferRequest")(model_name=MODEL, raw_input_contents=[tensor])
    request.inputs.add(name=INPUT, datatype=DATATYPE, shape=SHAPE)
    made: bytes = request.SerializeToString()
    return made


def _from_grpc(answer: Answer) -> bytes:
    (content,) = _message("inference.ModelInferResponse").FromString(answer.body).raw_output_contents
    return bytes(content)


def _v1_grpc(tensor: bytes) -> bytes:
    request = _message("tensorflow.serving.PredictRequest")()
    request.model_spec.name = MODEL
    given = request.inputs[INPUT]
    given.dtype, given.tensor_content = _DT_FLOAT, tensor
    for size in SHAPE:
        given.tensor_shape.dim.add(size=size)
    made: bytes = request.SerializeToString()
    return made


def _from_v1_grpc(answer: Answer) -> bytes:
    outputs = _message("tensorflow.serving.PredictResponse").FromString(answer.body).outputs
    if OUTPUT not in outputs:
        raise KeyError(OUTPUT)
    return bytes(outputs[OUTPUT].tensor_content)


_HEAD = _binary_head()
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "v2-rest-binary",
            _INFER,
            lambda tensor: _HEAD + tensor,
            _from_binary,
            {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(_HEAD))},
        ),
        Protocol("v2-grpc", "/inference.GRPCInferenceService/ModelInfer", _grpc, _from_grpc, is_grpc=True),
        Protocol(
            "v1-grpc",
            "/tensorflow.serving.PredictionService/Predict",
            _v1_grpc,
            _from_v1_grpc,
            is_grpc=True,
        ),
        Protocol("v2-rest-json", _INFER, _json, _from_json, {"Content-Type": "application/json"}),
    )
}
