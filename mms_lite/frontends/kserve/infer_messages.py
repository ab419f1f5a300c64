"""ModelInferRequest and ModelInferResponse: from the bytes on the wire to what the service takes, and back.

Apart from the methods because every inference goes through it: large tensors are not copied on their way in,
and once on their way out. Messages: Triton's grpc_service.proto, package "inference".
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mms_lite import protos
from mms_lite.errors import HandlerError, InvalidRequest, ServingError, Unsupported
from mms_lite.frontends.call import Call, parse
from mms_lite.frontends.fields import LEAST_BYTES, field, lift, lighten, value
from mms_lite.frontends.kserve.service import MOST_PARAMETERS, RequestedOutput
from mms_lite.frontends.message import Buffer
from mms_lite.frontends.tensor_calls import MOST_INPUTS, MOST_OUTPUTS, check_shape
from mms_lite.shared import SharedBytes
from mms_lite.tensors import DTYPES, pack
from mms_lite.types import InferRequest, InferResponse, Tensor

_REQUEST = protos.message("inference.ModelInferRequest")
_RESPONSE = protos.message("inference.ModelInferResponse")
_STREAM_RESPONSE = protos.message("inference.ModelStreamInferResponse")
_RAW_INPUTS = (7,)  # the number of ModelInferRequest.raw_input_contents
_TEXTS = (5, 5, 8)  # inputs, contents, bytes_contents
_ADVICE = "Send tensors in raw_input_contents."
_RAW_OUTPUTS = 6  # of ModelInferResponse.raw_output_contents
_IN_STREAM = 2  # of ModelStreamInferResponse.infer_response
_THREAD_BYTES = LEAST_BYTES  # of what is left of a message: values to be converted one by one
_EMPTY_FINAL = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"
_REGION = "shared_memory_region"

# InferTensorContents: the datatypes of each field, and whether its encoding is that of the tensor.
_CONTENTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "bool_contents": (("BOOL",), True),
    "int_contents": (("INT32", "INT16", "INT8"), False),
    "int64_contents": (("INT64",), False),
    "uint_contents": (("UINT32", "UINT16", "UINT8"), False),
    "uint64_contents": (("UINT64",), False),
    "fp32_contents": (("FP32",), True),
    "fp64_contents": (("FP64",), True),
    "bytes_contents": (("BYTES",), False),
}


@dataclass(slots=True)
class Question:
    """A ModelInferRequest as read; `error` says why there is no `request`. `size` is that of its bytes."""

    size: int
    model: str = ""
    version: str | None = None
    id: str = ""
    request: InferRequest | None = None
    wanted: list[RequestedOutput] | None = None
    error: ServingError | None = None


@dataclass(frozen=True, slots=True)
class _Lifted:
    """What `fields` took out of a message: of raw_input_contents, and of bytes_contents."""

    raw: Sequence[memoryview]
    texts: Sequence[memoryview] = ()


def parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a map of InferParameter or ModelRepositoryParameter.

    Raises:
        InvalidRequest: one has no value, or there are too many.
    """
    if len(given) > MOST_PARAMETERS:
        raise InvalidRequest(f"there are {len(given)} parameters; {MOST_PARAMETERS} are the most")
    found = {}
    for name, each in given.items():
        kind = each.WhichOneof("parameter_choice")
        if kind is None:
            expected = ", ".join(one.name for one in each.DESCRIPTOR.fields)
            raise InvalidRequest(f"invalid value type for '{name}' parameter, expected one of {expected}.")
        found[name] = getattr(each, kind)
    return found


async def read(received: bytes, call: Call) -> Question:
    """Return the question in a serialized ModelInferRequest; what is wrong with it is its `error`."""
    question = Question(len(received))
    rest, lifted = lift(received, _RAW_INPUTS)
    try:
        if len(rest) <= _THREAD_BYTES:
            _fill(question, rest, _Lifted(lifted), call)
        else:
            await asyncio.to_thread(_fill_at_length, question, rest, lifted, call)
    except ServingError as error:
        question.error = error.with_traceback(None)  # which has this frame, and so the question
    return question


def write(response: InferResponse) -> list[Buffer]:
    """Return the pieces of a serialized ModelInferResponse; all tensors are raw.

    Raises:
        HandlerError: a name or text of the answer is no valid Unicode.
    """
    try:
        return _written(response)
    except UnicodeEncodeError as error:
        raise HandlerError("the model's answer has names or texts that are no valid Unicode") from error


def _written(response: InferResponse) -> list[Buffer]:
    message = _RESPONSE(model_name=response.model, model_version=response.version, id=response.id)
    for name, each in response.parameters.items():
        _set_parameter(message.parameters[name], each)
    raw: list[Buffer] = []
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        data = tensor.data.view if isinstance(tensor.data, SharedBytes) else tensor.data
        raw += field(_RAW_OUTPUTS, tensor.nbytes), data
    return [message.SerializeToString(), *raw]


def in_stream(pieces: Sequence[Buffer]) -> list[Buffer]:
    """Return the pieces of the ModelStreamInferResponse with this ModelInferResponse, its request's last."""
    last = _RESPONSE()
    last.parameters[_FINAL].bool_param = True
    end = last.SerializeToString()  # fields of one message may follow each other in any order
    return [field(_IN_STREAM, sum(memoryview(each).nbytes for each in pieces) + len(end)), *pieces, end]


def error_in_stream(error: ServingError, question: Question) -> bytes:
    """Return the ModelStreamInferResponse that says why a request of a stream failed."""
    said = error.message.encode("utf-8", "replace").decode()  # such as half of a pair, in a handler's text
    message = _STREAM_RESPONSE(error_message=said)
    about = message.infer_response
    about.id, about.model_name, about.model_version = question.id, question.model, question.version or ""
    about.parameters[_FINAL].bool_param = True
    return bytes(message.SerializeToString())


def _fill_at_length(question: Question, rest: bytes, raw: Sequence[memoryview], call: Call) -> None:
    light, texts = lighten(rest, _TEXTS, advice=_ADVICE)
    _fill(question, light, _Lifted(raw, texts), call)


def _fill(question: Question, rest: bytes, lifted: _Lifted, call: Call) -> None:
    """Read a request whose raw tensors are lifted.

    Raises:
        InvalidRequest: it is not one.
    """
    asked = parse(_REQUEST, rest)
    question.model, question.id = asked.model_name, asked.id
    version = question.version = asked.model_version if asked.model_version not in ("", "-1", "0") else None
    given = parameters(asked.parameters) if asked.parameters else {}
    if not isinstance(given.pop(_EMPTY_FINAL, False), bool):  # a model that answers once has no empty answer
        raise InvalidRequest(f"invalid value type for '{_EMPTY_FINAL}' parameter, expected bool_param.")
    if len(asked.outputs) > MOST_OUTPUTS:
        raise InvalidRequest(f"a request wants at most {MOST_OUTPUTS} outputs, got {len(asked.outputs)}")
    question.wanted = [_wanted(each) for each in asked.outputs] or None
    question.request = InferRequest(
        asked.id, asked.model_name, version, _inputs(asked, lifted), None, given, call.metadata, call.deadline
    )


def _inputs(asked: Any, lifted: _Lifted) -> list[Tensor]:
    raw, tensors, at = asked.raw_input_contents, [], 0
    if max(len(asked.inputs), len(raw)) > MOST_INPUTS:
        raise InvalidRequest(f"a request has at most {MOST_INPUTS} inputs")
    for each in asked.inputs:
        content_type = _content_type(each) if each.parameters else ""
        explicit = each.HasField("contents")
        data: Any
        if explicit and raw:
            raise _unfit(
                each, asked, "contents field must not be specified when using raw_input_contents for"
            )
        if explicit:
            data = _explicit(each, asked, lifted.texts)
        elif at < len(raw):
            data = value(raw[at], lifted.raw)
            at += 1
        else:
            raise _unfit(each, asked, "unable to find data for input tensor", " in request.")
        tensors.append(Tensor(each.name, each.datatype, _shape(each), data, content_type))
    if at < len(raw):
        raise InvalidRequest(
            f"got {len(raw)} raw_input_contents for the {len(tensors)} inputs for model '{asked.model_name}'"
        )
    return tensors


def _explicit(given: Any, asked: Any, texts: Sequence[memoryview]) -> Buffer:
    """Return the data of an input whose elements are values of the message."""
    filled = given.contents.ListFields()
    if not filled:
        return b""
    (descriptor, values), *more = filled
    datatypes, as_encoded = _CONTENTS[descriptor.name]
    start = "unexpected explicit tensor data for input tensor"
    if more:
        raise _unfit(given, asked, start, ", binary data was already supplied.")
    if given.datatype not in datatypes:
        end = f" of type '{datatypes[0]}', expected datatype '{given.datatype}'"
        raise _unfit(given, asked, start, end)
    if given.datatype == "BYTES":
        return pack(value(each, texts) for each in values)
    dtype = DTYPES[given.datatype]
    if as_encoded:  # a packed field of fixed size ends with the bytes of the array
        given.contents.DiscardUnknownFields()
        return memoryview(given.contents.SerializeToString())[-len(values) * dtype.itemsize :]
    array = np.fromiter(values, np.uint64 if dtype.kind == "u" else np.int64, len(values))
    narrow = array.astype(dtype)
    if (narrow != array).any():
        raise _unfit(given, asked, f"a value is out of the range of {given.datatype} in input")
    return narrow.view(np.uint8).data


def _wanted(output: Any) -> RequestedOutput:
    """Return what is wanted of an output.

    Raises:
        InvalidRequest: its parameters make no sense.
    """
    if not output.parameters:
        return RequestedOutput(output.name)
    given = parameters(output.parameters)
    if _REGION in given:
        raise Unsupported(
            f"output '{output.name}' is wanted in shared memory, where this server does not write"
        )
    if "classification" not in given:
        return RequestedOutput(output.name)
    classes = given["classification"]
    if type(classes) is not int:
        raise InvalidRequest("invalid value type for 'classification' parameter, expected int64_param.")
    if classes <= 0:
        raise InvalidRequest("invalid value for 'classification' parameter, expected > 0")
    return RequestedOutput(output.name, None, classes)


def _content_type(tensor: Any) -> str:
    given = parameters(tensor.parameters)
    if _REGION in given:
        raise Unsupported(f"input '{tensor.name}' is in shared memory, which this server does not read")
    content_type = given.get("content_type", "")
    if not isinstance(content_type, str):
        raise InvalidRequest("invalid value type for 'content_type' parameter, expected string_param.")
    return content_type


def _shape(tensor: Any) -> tuple[int, ...]:
    check_shape(tensor.name, tensor.shape)  # before a list of millions is made
    shape = tuple(tensor.shape)
    if shape and min(shape) < 0:
        raise InvalidRequest(f"input '{tensor.name}' has a negative length in its shape")
    return shape


def _unfit(given: Any, asked: Any, start: str, end: str = "") -> InvalidRequest:
    return InvalidRequest(f"{start} '{given.name}' for model '{asked.model_name}'{end}")


def _set_parameter(parameter: Any, given: Any) -> None:
    if isinstance(given, bool):
        parameter.bool_param = given
    elif isinstance(given, int) and -(1 << 63) <= given < 1 << 63:
        parameter.int64_param = given
    elif isinstance(given, float):
        parameter.double_param = given
    else:
        parameter.string_param = str(given)
