"""The TensorFlow Serving API over gRPC: PredictionService and ModelService, on serialized messages."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mms_lite.engine.engine import Engine
from mms_lite.errors import InvalidRequest, ServingError
from mms_lite.frontends import tensor_calls
from mms_lite.frontends.call import Call, RpcService, Stream, Unary, parse, parse_short
from mms_lite.frontends.fields import LEAST_BYTES, lift, lighten
from mms_lite.frontends.message import Buffer, HttpRequest, Limits
from mms_lite.frontends.tfserving.service import (
    DATATYPES,
    SIGNATURE_NAME,
    check_names,
    check_outputs,
    code_of,
    message_of,
    number_of,
    statuses,
    version_of,
)
from mms_lite.frontends.tfserving.tensor_proto import Lifted, decode, encode, made_bytes
from mms_lite.protos import files, message
from mms_lite.types import BYTES, InferRequest, InferResponse, Signature, Tensor, TensorSpec

_CONTENTS = (2, 2, 4)  # PredictRequest.inputs, its value, TensorProto.tensor_content
_TEXTS = (2, 2, 8)  # TensorProto.string_val
_ADVICE = "Send arrays as tensor_content."
_OUTPUTS, _MODEL_SPEC = 1, 2  # fields of PredictResponse
_INLINE_BYTES = 1 << 20  # more of what is not simply passed on is read or written in a thread
_TEXT_BYTES = 64  # as many as take as long as a text
_STATES = {"START": 10, "LOADING": 20, "AVAILABLE": 30, "UNLOADING": 40, "END": 50}
_CODES = {"OK": 0, "UNKNOWN": 2}
_SIGNATURES = "type.googleapis.com/tensorflow.serving.SignatureDefMap"


class _Service:
    """A service of this API: its name, its methods, and how it spells errors."""

    def __init__(self, name: str, unary: Mapping[str, Unary]) -> None:
        self.name = name
        self.unary: dict[str, Unary] = dict(unary)
        self.streams: dict[str, Stream] = {}
        self.files: Sequence[bytes] = files(name)

    def spell(self, error: ServingError, method: str) -> tuple[str, str]:
        """Return the status code's name and the message for an error."""
        return code_of(error), message_of(error)


@dataclass(frozen=True, slots=True)
class _Received:
    """A PredictRequest, what was lifted out of it, and of how many bytes the rest was."""

    message: Any
    lifted: Lifted
    size: int


class Prediction:
    """The methods of PredictionService. `most_bytes` bounds all inputs of a request together."""

    def __init__(self, engine: Engine, *, most_bytes: int) -> None:
        self._engine = engine
        self._most_bytes = most_bytes

    async def predict(self, serialized: bytes, call: Call) -> bytes:
        """Answer a PredictRequest.

        Raises:
            ServingError: it cannot be read or does not fit, or the model cannot answer.
        """
        name, version = "", None
        try:
            received = await _read(serialized)
            name = received.message.model_spec.name
            version = _version(self._engine, received.message.model_spec)
            asked = await self._asked(received, version, call)
            answer = await tensor_calls.infer(self._engine, asked)
            response = await _answered(answer, number_of(self._engine, name, answer.version))
        except ServingError as error:
            self._engine.count(name, version, "tfserving-grpc", code_of(error))
            raise
        self._engine.count(name, answer.version, "tfserving-grpc", "OK")
        return response

    async def metadata(self, serialized: bytes, call: Call) -> bytes:
        """Answer a GetModelMetadataRequest.

        Raises:
            ServingError: it asks for something else than the signature, or there is no such model.
        """
        request = parse_short(message("tensorflow.serving.GetModelMetadataRequest"), serialized)
        if not request.HasField("model_spec"):
            raise InvalidRequest("model_spec missing in request")
        if list(request.metadata_field) != ["signature_def"]:
            raise InvalidRequest("Invalid signature name")
        name = request.model_spec.name
        version = _version(self._engine, request.model_spec)
        spec, signature = tensor_calls.interface(self._engine, name, version)
        signatures = message("tensorflow.serving.SignatureDefMap")()
        described = signatures.signature_def[SIGNATURE_NAME]
        _describe(described.inputs, signature.inputs)
        _describe(described.outputs, signature.outputs)
        response = message("tensorflow.serving.GetModelMetadataResponse")()
        response.model_spec.name = name
        response.model_spec.version.value = number_of(self._engine, name, spec.version)
        packed = response.metadata["signature_def"]
        packed.type_url, packed.value = _SIGNATURES, signatures.SerializeToString()
        return _serialized(response)

    async def _asked(self, received: _Received, version: str | None, call: Call) -> InferRequest:
        """Return the request for the engine.

        Raises:
            ServingError: there is no such model, or an input or output does not fit it.
        """
        request = received.message
        name, outputs = request.model_spec.name, list(request.output_filter) or None
        spec, signature = tensor_calls.interface(self._engine, name, version, asking=True)
        check_names(request.inputs, spec, signature)
        if outputs:
            check_outputs(outputs, signature)
        # What was lifted is passed on; the rest may be millions of single values, or become as many.
        made = sum(map(made_bytes, request.inputs.values()))
        if received.size > LEAST_BYTES or made > _INLINE_BYTES:
            inputs = await asyncio.to_thread(self._inputs, received, signature)
        else:
            inputs = self._inputs(received, signature)
        return InferRequest(
            call.id, name, version, inputs, outputs, headers=call.metadata, deadline=call.deadline
        )

    def _inputs(self, received: _Received, signature: Signature) -> list[Tensor]:
        """Return the inputs.

        Raises:
            ServingError: one does not fit, or together they would be too large.
        """
        specs = {each.name: each for each in signature.inputs} if signature.takes_tensors else {}
        inputs, left = list[Tensor](), self._most_bytes
        for key, proto in received.message.inputs.items():
            inputs.append(decode(key, proto, specs.get(key), lifted=received.lifted, most_bytes=left))
            left -= len(inputs[-1].data)
        return inputs


class Models:
    """The methods of ModelService."""

    def __init__(self, engine: Engine, authorise: Callable[[HttpRequest], None]) -> None:
        self._engine = engine
        self._authorise = authorise

    async def status(self, serialized: bytes, call: Call) -> bytes:
        """Answer a GetModelStatusRequest.

        Raises:
            ServingError: there is no such model or version.
        """
        request = parse_short(message("tensorflow.serving.GetModelStatusRequest"), serialized)
        response = message("tensorflow.serving.GetModelStatusResponse")()
        for each in statuses(self._engine, request.model_spec.name, _number(request.model_spec)):
            added = response.model_version_status.add(version=each.version, state=_STATES[each.state])
            added.status.error_code = _CODES[each.error_code]
            added.status.error_message = each.error_code
        return _serialized(response)

    async def reload(self, serialized: bytes, call: Call) -> bytes:
        """Look for changes of the configuration; what a ReloadConfigRequest says is not looked at.

        Raises:
            ServingError: the caller may not, or what changed cannot be used.
        """
        self._authorise(call.as_http)
        await self._engine.rescan()
        response = message("tensorflow.serving.ReloadConfigResponse")()
        response.status.error_code = _CODES["OK"]
        return _serialized(response)


def services(engine: Engine, authorise: Callable[[HttpRequest], None], limits: Limits) -> list[RpcService]:
    """Return the services; `authorise` raises Unauthorized or Forbidden for who may not reload."""
    prediction = Prediction(engine, most_bytes=limits.max_tensor_request_size)
    models = Models(engine, authorise)
    return [
        _Service(
            "tensorflow.serving.PredictionService",
            {"Predict": prediction.predict, "GetModelMetadata": prediction.metadata},
        ),
        _Service(
            "tensorflow.serving.ModelService",
            {"GetModelStatus": models.status, "HandleReloadConfigRequest": models.reload},
        ),
    ]


async def _read(serialized: bytes) -> _Received:
    """Return a PredictRequest.

    Raises:
        InvalidRequest, RequestTooLarge: it cannot be read, or should not.
    """
    rest, contents = lift(serialized, _CONTENTS)
    if len(rest) <= LEAST_BYTES:
        return _Received(_request(rest), Lifted(contents), len(rest))

    def read() -> _Received:
        light, texts = lighten(rest, _TEXTS, advice=_ADVICE)
        return _Received(_request(light), Lifted(contents, texts), len(rest))

    return await asyncio.to_thread(read)


def _request(serialized: bytes) -> Any:
    return parse(message("tensorflow.serving.PredictRequest"), serialized)


def _serialized(response: Any) -> bytes:
    done: bytes = response.SerializeToString()
    return done


def _number(model_spec: Any) -> int | None:
    return model_spec.version.value if model_spec.HasField("version") else None


def _version(engine: Engine, model_spec: Any) -> str | None:
    return version_of(engine, model_spec.name, _number(model_spec))


def _describe(tensors: Any, specs: Sequence[TensorSpec]) -> None:
    """Fill a map of TensorInfo."""
    for spec in specs:
        described = tensors[spec.name]
        described.name = spec.name
        described.dtype = DATATYPES[spec.datatype][1]
        described.tensor_shape.unknown_rank = spec.shape is None
        for length in spec.shape or ():
            described.tensor_shape.dim.add(size=length)


async def _answered(answer: InferResponse, number: int) -> bytes:
    texts = [each for each in answer.outputs if each.datatype == BYTES]
    if sum(len(each.data) + math.prod(each.shape) * _TEXT_BYTES for each in texts) > _INLINE_BYTES:
        return await asyncio.to_thread(_response, answer.model, number, answer.outputs)
    return _response(answer.model, number, answer.outputs)


def _response(model: str, number: int, outputs: Sequence[Tensor]) -> bytes:
    pieces: list[Buffer] = encode(_OUTPUTS, outputs)
    return b"".join([*pieces, _answering(model, number)])


@lru_cache(maxsize=1024)
def _answering(model: str, number: int) -> bytes:
    """Return the part of a PredictResponse that says which model answered; 0 is no number."""
    response = message("tensorflow.serving.PredictResponse")()
    response.model_spec.name = model
    response.model_spec.signature_name = SIGNATURE_NAME
    if number:
        response.model_spec.version.value = number
    return _serialized(response)
