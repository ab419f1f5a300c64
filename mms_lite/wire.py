"""How requests and answers become frames and come back: the one place that knows a frame's meta block.

Hot fields are struct-packed and strings go as one NUL-joined block; rare fields are one JSON blob that is
empty on the hot path. Times cross as remaining milliseconds, never as clock readings.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mms_lite.errors import HandlerError, InvalidRequest, ServingError, from_wire
from mms_lite.shared import LEAST_BYTES, Arena, SharedBytes
from mms_lite.transport import Buffer, Frame, ProtocolError, frame_bytes
from mms_lite.types import InferRequest, ModelSpec, Signature, Tensor, TensorSpec

_COUNT = struct.Struct("!I")
# job, remaining ms (-1: no limit), tensors, shape bytes, string bytes, JSON bytes, and which of the tensors
# have a reference to shared memory for a buffer (a bit for each, the lowest for the first)
_JOB = struct.Struct("!QqIIIII")
_REFERENCE = struct.Struct("!QQ")  # offset, bytes
_OUTCOME = struct.Struct(
    "!QIBHIIII"
)  # job, seq, final, status (0: error), tensors, shape, string, JSON bytes
_IDS = struct.Struct("!Q")
_ONE = _COUNT.pack(1)
_RAW_PART = bytes(8)  # the shape of a single one: rank 0
_MOST_SHARED = 32  # tensors of a request, the first, that may lie in shared memory: bits of a field
_MAX_REMAINING_MS = 2**63 - 1  # what the field holds


@dataclass(slots=True)
class Item:
    """One request of a batch as the worker sees it. `remaining_ms` is the client's wish, or None."""

    job_id: int
    remaining_ms: int | None
    request: InferRequest


@dataclass(slots=True)
class Outcome:
    """What a worker says of one job: outputs and what the handler chose, or an error."""

    job_id: int
    outputs: Sequence[Tensor] = ()
    status: int = 200
    reason: str = ""
    headers: Sequence[tuple[str, str]] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    error: ServingError | None = None
    seq: int = 0
    final: bool = True


def _pack_strings(strings: list[str]) -> bytes:
    block = "\0".join(strings)
    if block.count("\0") != len(strings) - 1:
        raise InvalidRequest("a name, header or identifier contains a NUL character")
    try:
        return block.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidRequest("a name, header or identifier is not valid Unicode") from error


def _unpack_strings(block: bytes) -> list[str]:
    return block.decode("utf-8", "surrogateescape").split("\0")


def _pack_shapes(tensors: Sequence[Tensor]) -> bytes:
    if len(tensors) == 1 and not tensors[0].shape:
        return _RAW_PART
    flat: list[int] = []
    for tensor in tensors:
        flat.append(len(tensor.shape))
        flat.extend(tensor.shape)
    try:
        return struct.pack(f"!{len(flat)}q", *flat)
    except struct.error as error:
        raise InvalidRequest("a tensor's shape has a dimension that no tensor has") from error


def _unpack_shapes(block: bytes) -> list[tuple[int, ...]]:
    if block == _RAW_PART:
        return [()]
    flat = struct.unpack(f"!{len(block) // 8}q", block)
    shapes, at = [], 0
    while at < len(flat):
        rank = flat[at]
        if not 0 <= rank < len(flat) - at:
            raise ValueError(f"a shape of rank {rank}")
        shapes.append(flat[at + 1 : at + 1 + rank])
        at += 1 + rank
    return shapes


def _pack_json(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":")).encode() if value else b""
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"a parameter cannot be sent: {error}") from error


def _unpack_json(block: bytes) -> dict[str, Any]:
    value = json.loads(block)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _check(meta: bytes, end: int, counts: tuple[int, int], strings: tuple[list[str], int]) -> None:
    if end > len(meta) or counts[0] != counts[1] or len(strings[0]) < strings[1]:
        raise ValueError("its parts do not add up")


def _add_strings(strings: list[str], tensors: Sequence[Tensor], pairs: Sequence[tuple[str, str]]) -> None:
    for tensor in tensors:
        strings += (tensor.name, tensor.datatype, tensor.content_type)
    for pair in pairs:
        strings += pair


def _tensors(strings: list[str], shapes: list[tuple[int, ...]], buffers: Sequence[bytearray]) -> list[Tensor]:
    return [
        Tensor(strings[3 * i], strings[3 * i + 1], shape, buffers[i], strings[3 * i + 2])
        for i, shape in enumerate(shapes)
    ]


def _pairs(flat: list[str]) -> list[tuple[str, str]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def share(request: InferRequest, arena: Arena) -> InferRequest:
    """Return the request with its large tensors in shared memory, as far as there is room.

    They are there, too, that came through a reader of HTTP or gRPC which does not receive into it.
    """
    places: dict[int, SharedBytes] = {}
    for index, tensor in enumerate(request.inputs):
        data = tensor.data
        if type(data) is SharedBytes or len(data) < LEAST_BYTES:
            continue
        view = memoryview(data).cast("B")
        place = arena.take(len(view))
        if place is not None:
            place.view[:] = view
            places[index] = place
    if not places:
        return request
    inputs = [
        replace(tensor, data=places[index]) if index in places else tensor
        for index, tensor in enumerate(request.inputs)
    ]
    return replace(request, inputs=inputs)


def encode_item(
    job_id: int, remaining_ms: int | None, request: InferRequest
) -> tuple[bytes, Sequence[Buffer]]:
    """Return one request's part of a BATCH frame's meta block, and its buffers.

    Raises:
        InvalidRequest: a string of the request cannot cross.
    """
    inputs = request.inputs
    extra = b""
    if request.outputs is not None or request.parameters:
        extra = _pack_json(_rare(request))
    strings = [request.id, request.model, request.version or ""]
    _add_strings(strings, inputs, request.headers)
    names, shapes = _pack_strings(strings), _pack_shapes(inputs)
    remaining = -1 if remaining_ms is None else min(max(0, remaining_ms), _MAX_REMAINING_MS)
    buffers = [t.data for t in inputs]
    shared = 0
    for index, data in enumerate(buffers):
        if type(data) is not SharedBytes:
            continue
        if index < _MOST_SHARED:
            shared |= 1 << index
            buffers[index] = _REFERENCE.pack(data.offset, len(data))
        else:
            buffers[index] = data.view
    head = _JOB.pack(job_id, remaining, len(inputs), len(shapes), len(names), len(extra), shared)
    return head + shapes + names + extra, buffers


def _rare(request: InferRequest) -> dict[str, Any]:
    rare: dict[str, Any] = {}
    if request.outputs is not None:
        rare["outputs"] = list(request.outputs)
    if request.parameters:
        rare["parameters"] = dict(request.parameters)
    return rare


def join_batch(parts: Sequence[tuple[bytes, Sequence[Buffer]]]) -> tuple[bytes, Sequence[Buffer]]:
    """Join what `encode_item` made into one BATCH frame's meta block and buffers."""
    if len(parts) == 1:
        return _ONE + parts[0][0], parts[0][1]
    meta = _COUNT.pack(len(parts)) + b"".join([m for m, _ in parts])
    return meta, [b for _, buffers in parts for b in buffers]


def decode_batch(frame: Frame, shared: memoryview | None = None) -> list[Item]:
    """Read a BATCH frame; what it refers to in `shared` memory is copied out of it.

    Raises:
        ProtocolError: the meta block is not one.
    """
    try:
        return _decode_items(frame, shared)
    except (struct.error, ValueError, IndexError, TypeError, RecursionError) as error:
        raise ProtocolError(f"malformed BATCH frame: {error}") from error


def _decode_items(frame: Frame, shared: memoryview | None) -> list[Item]:
    meta, buffers = frame.meta, frame.buffers
    (count,) = _COUNT.unpack_from(meta)
    at, used, items = _COUNT.size, 0, []
    for _ in range(count):
        job_id, remaining, tensor_count, shape_bytes, string_bytes, json_bytes, referring = _JOB.unpack_from(
            meta, at
        )
        at += _JOB.size
        shapes = _unpack_shapes(meta[at : at + shape_bytes])
        at += shape_bytes
        strings = _unpack_strings(meta[at : at + string_bytes])
        at += string_bytes
        rare = _unpack_json(meta[at : at + json_bytes]) if json_bytes else {}
        at += json_bytes
        _check(meta, at, (len(shapes), tensor_count), (strings, 3 + 3 * tensor_count))
        if referring:
            _fetch(buffers, used, tensor_count, referring, shared)
        request = InferRequest(
            id=strings[0],
            model=strings[1],
            version=strings[2] or None,
            inputs=_tensors(strings[3:], shapes, buffers[used : used + tensor_count]),
            outputs=rare.get("outputs"),
            parameters=rare.get("parameters", {}),
            headers=_pairs(strings[3 + 3 * tensor_count :]),
        )
        used += tensor_count
        items.append(Item(job_id, None if remaining < 0 else remaining, request))
    return items


def _fetch(
    buffers: list[bytearray], first: int, count: int, referring: int, shared: memoryview | None
) -> None:
    """Put what references stand for in their place, among the `count` buffers from `first` on."""
    if referring >> count:
        raise ValueError(f"references in place of buffers {referring:b} of {count}")
    for index in range(count):
        if referring >> index & 1:
            buffers[first + index] = _copy(shared, buffers[first + index])


def _copy(shared: memoryview | None, reference: bytearray) -> bytearray:
    offset, size = _REFERENCE.unpack(reference)
    if shared is None or offset + size > len(shared):
        raise ValueError(f"{size} bytes at {offset} of shared memory")
    return bytearray(shared[offset : offset + size])


def encode_outcome(outcome: Outcome) -> tuple[bytes, list[Buffer]]:
    """Return an OUTCOME frame's meta block and buffers."""
    rare = outcome.error.to_wire() if outcome.error is not None else outcome.parameters
    strings = [outcome.reason]
    _add_strings(strings, outcome.outputs, outcome.headers)
    names, shapes, extra = _pack_strings(strings), _pack_shapes(outcome.outputs), _pack_json(rare)
    status = 0 if outcome.error is not None else outcome.status
    head = _OUTCOME.pack(
        outcome.job_id,
        outcome.seq,
        outcome.final,
        status,
        len(outcome.outputs),
        len(shapes),
        len(names),
        len(extra),
    )
    return head + shapes + names + extra, [t.data for t in outcome.outputs]


def encode_outcome_within(outcome: Outcome, most_bytes: int) -> tuple[bytes, list[Buffer]]:
    """Do as `encode_outcome`; an answer whose frame would be over the limit becomes an error that says so."""
    meta, buffers = encode_outcome(outcome)
    size = frame_bytes(meta, buffers)
    if size <= most_bytes:
        return meta, buffers
    text = f"The answer takes {size} bytes on its way from the model; max_frame_bytes is {most_bytes}."
    return encode_outcome(Outcome(outcome.job_id, error=HandlerError(text)))


def decode_outcome(frame: Frame) -> Outcome:
    """Read an OUTCOME frame.

    Raises:
        ProtocolError: the meta block is not one.
    """
    meta = frame.meta
    try:
        job_id, seq, final, status, count, shape_bytes, string_bytes, json_bytes = _OUTCOME.unpack_from(meta)
        at = _OUTCOME.size
        shapes = _unpack_shapes(meta[at : at + shape_bytes])
        at += shape_bytes
        strings = _unpack_strings(meta[at : at + string_bytes])
        at += string_bytes
        rare = _unpack_json(meta[at : at + json_bytes]) if json_bytes else {}
        _check(meta, at + json_bytes, (len(shapes), count), (strings, 1 + 3 * count))
        if status and not 200 <= status <= 599:
            raise ValueError(f"status {status}")
        if count == 1 and len(strings) == 4 and status and not rare:  # nearly always: one output, no headers
            reason, name, datatype, content_type = strings
            output = Tensor(name, datatype, shapes[0], frame.buffers[0], content_type)
            return Outcome(job_id, [output], status, reason, seq=seq, final=bool(final))
        if status == 0:
            return Outcome(job_id, error=from_wire(rare), seq=seq, final=bool(final))
        return Outcome(
            job_id,
            outputs=_tensors(strings[1:], shapes, frame.buffers),
            status=status,
            reason=strings[0],
            headers=_pairs(strings[1 + 3 * count :]),
            parameters=rare,
            seq=seq,
            final=bool(final),
        )
    except (struct.error, ValueError, IndexError, TypeError, RecursionError) as error:
        raise ProtocolError(f"malformed OUTCOME frame: {error}") from error


def encode_load(spec: ModelSpec, *, instance: int, device: int | None) -> bytes:
    """Return the meta block of a LOAD frame: the model for one worker, by its number, and that one's GPU."""
    settings = {
        "name": spec.name,
        "path": spec.path,
        "handler": spec.handler,
        "batch_size": spec.batch_size,
        "device": device,
        "manifest": spec.manifest,
        "decode_input_request": spec.decode_input_request,
        "isolate_failures": spec.isolate_failures,
        "config": spec.config,
        "instance": instance,
        "scratch": spec.scratch,
    }
    return encode_json(settings)


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Return the meta block of a frame whose meta is one JSON object (LOAD, LOADED)."""
    return json.dumps(value).encode()


def decode_json(frame: Frame) -> dict[str, Any]:
    """Read a JSON meta block.

    Raises:
        ProtocolError: it is not a JSON object.
    """
    try:
        value = json.loads(frame.meta)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed {frame.kind.name} frame: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"malformed {frame.kind.name} frame: not an object")
    return value


def encode_lines(lines: Sequence[str]) -> bytes:
    """Return the meta block of a METRICS frame; a line break in a line makes two of it."""
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def decode_lines(frame: Frame) -> list[str]:
    """Read the meta block of a METRICS frame."""
    return frame.meta.decode("utf-8", "replace").split("\n")


def encode_signature(signature: Signature) -> dict[str, Any]:
    """Return what a LOADED frame says of a model's inputs and outputs."""
    sides = {"inputs": signature.inputs, "outputs": signature.outputs}
    said = {side: [[s.name, s.datatype, s.shape] for s in specs] for side, specs in sides.items()}
    return {**said, "takes_tensors": signature.takes_tensors}


def decode_signature(loaded: Mapping[str, Any]) -> Signature:
    """Read what `encode_signature` wrote.

    Raises:
        ProtocolError: it is not that.
    """
    try:
        sides = [
            tuple(
                TensorSpec(str(name), str(datatype), None if shape is None else tuple(map(int, shape)))
                for name, datatype, shape in loaded.get(side, ())
            )
            for side in ("inputs", "outputs")
        ]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"malformed LOADED frame: {error}") from error
    return Signature(sides[0], sides[1], loaded.get("takes_tensors") is True)


def decode_completed(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a LOADED frame says that the model adds to its configuration, by field.

    Raises:
        ProtocolError: it is not that.
    """
    config = loaded.get("config", {})
    if not isinstance(config, dict):
        raise ProtocolError("malformed LOADED frame: its config is not an object")
    return config


def encode_ids(job_ids: Iterable[int]) -> bytes:
    """Return the meta block of a STARTED or CANCEL frame."""
    return b"".join(map(_IDS.pack, job_ids))


def decode_ids(frame: Frame) -> list[int]:
    """Read the meta block of a STARTED or CANCEL frame.

    Raises:
        ProtocolError: the length is not a multiple of an id's.
    """
    try:
        return [n for (n,) in _IDS.iter_unpack(frame.meta)]
    except struct.error as error:
        raise ProtocolError(f"malformed {frame.kind.name} frame: {error}") from error
