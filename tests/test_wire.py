"""Requests and answers come back from the wire as they went in; a malformed frame is a ProtocolError."""

import contextlib
import dataclasses
import json
import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mms_lite import errors, wire
from mms_lite.errors import InvalidRequest, ServingError, from_wire
from mms_lite.shared import Arena, SharedBytes, read_only
from mms_lite.transport import Frame, FrameKind, ProtocolError
from mms_lite.types import InferRequest, Tensor
from mms_lite.wire import Item, Outcome

# What crosses: all of Unicode but NUL. Undecodable bytes of a header are lone surrogates of U+DC80..U+DCFF.
plain = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
escaped = st.binary(max_size=8).map(lambda b: b.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
text = st.one_of(plain, escaped)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
tensors = st.builds(
    Tensor,
    name=text,
    datatype=st.sampled_from(["BYTES", "FP32", "INT64"]),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(tuple),
    data=st.binary(max_size=40).map(bytearray),
    content_type=text,
)
pairs = st.lists(st.tuples(text, text), max_size=4)
requests = st.builds(
    InferRequest,
    id=text,
    model=text,
    version=st.none() | text.filter(bool),
    inputs=st.lists(tensors, max_size=3),
    outputs=st.none() | st.lists(st.text(max_size=5), max_size=3),
    parameters=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    headers=pairs,
)
items = st.builds(
    Item,
    job_id=st.integers(0, 2**64 - 1),
    remaining_ms=st.none() | st.integers(0, 2**62),
    request=requests,
)


def batch_frame(sent: list[Item]) -> Frame:
    meta, buffers = wire.join_batch(
        [wire.encode_item(item.job_id, item.remaining_ms, item.request) for item in sent]
    )
    return Frame(FrameKind.BATCH, 1, meta, [bytearray(b) for b in buffers])


def outcome_frame(outcome: Outcome) -> Frame:
    meta, buffers = wire.encode_outcome(outcome)
    return Frame(FrameKind.OUTCOME, 1, meta, [bytearray(b) for b in buffers])


@settings(max_examples=200, deadline=None)
@given(st.lists(items, max_size=4))
def test_a_batch_comes_back_as_it_was_sent(sent: list[Item]) -> None:
    assert wire.decode_batch(batch_frame(sent)) == sent


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Outcome,
        job_id=st.integers(0, 2**64 - 1),
        outputs=st.lists(tensors, max_size=3),
        status=st.integers(200, 599),
        reason=text,
        headers=pairs,
        parameters=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
        seq=st.integers(0, 2**32 - 1),
        final=st.booleans(),
    )
)
def test_an_outcome_comes_back_as_it_was_sent(sent: Outcome) -> None:
    got = wire.decode_outcome(outcome_frame(sent))
    assert dataclasses.replace(got, headers=list(got.headers)) == sent


kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, ServingError)]


@pytest.mark.parametrize("kind", kinds, ids=lambda k: k.__name__)
@settings(max_examples=20, deadline=None)
@given(
    message=st.text(max_size=30),
    details=st.dictionaries(st.from_regex("[a-l]{1,5}", fullmatch=True), json_values),
)
def test_an_error_comes_back_as_its_own_kind(
    kind: type[ServingError], message: str, details: dict[str, Any]
) -> None:
    sent = kind(message, **details)
    got = wire.decode_outcome(outcome_frame(Outcome(3, error=sent, seq=2, final=False)))
    assert type(got.error) is kind
    assert (got.job_id, got.seq, got.final) == (3, 2, False)
    assert got.error is not None
    assert (got.error.message, got.error.details) == (message, details)


def test_an_error_of_an_unknown_code_is_a_plain_one() -> None:
    error = from_wire({"code": "from_the_future", "message": "news"})
    assert type(error) is ServingError
    assert error.message == "news"


FIELDS = ["id", "model", "version", "name", "content type", "header name", "header value"]


def request_with(field: str, value: str) -> InferRequest:
    given_for = {name: value if name == field else "fine" for name in FIELDS}
    return InferRequest(
        id=given_for["id"],
        model=given_for["model"],
        version=given_for["version"],
        inputs=[Tensor(given_for["name"], "BYTES", (), bytearray(), given_for["content type"])],
        headers=[(given_for["header name"], given_for["header value"])],
    )


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "bad", ["a\0b", "\0", "\ud800"], ids=["NUL within", "NUL alone", "half a surrogate pair"]
)
def test_a_string_that_cannot_cross_is_the_clients_error(field: str, bad: str) -> None:
    # JSON lets a client send both: {"id": "\u0000"}, {"id": "\ud800"}.
    with pytest.raises(InvalidRequest):
        wire.encode_item(1, None, request_with(field, bad))


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object()], ids=["set", "bytes", "object"])
def test_a_parameter_that_json_cannot_hold_is_the_clients_error(value: Any) -> None:
    with pytest.raises(InvalidRequest):
        wire.encode_item(1, None, InferRequest(id="1", model="m", parameters={"p": value}))


def test_a_dimension_that_no_frame_can_hold_is_the_clients_error() -> None:
    tensor = Tensor("x", "FP32", (2**63,), bytearray())
    with pytest.raises(InvalidRequest):
        wire.encode_item(1, None, InferRequest(id="1", model="m", inputs=[tensor]))


BATCH = batch_frame([Item(1, 5, request_with("id", "one")), Item(2, None, request_with("id", "two"))])
OUTCOME = outcome_frame(
    Outcome(1, outputs=[Tensor("o", "FP32", (2, 3), bytearray(24))], headers=[("a", "b")])
)


@pytest.mark.parametrize("cut", range(len(BATCH.meta)))
def test_a_truncated_batch_is_a_protocol_error(cut: int) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_batch(Frame(FrameKind.BATCH, 1, BATCH.meta[:cut], BATCH.buffers))


@pytest.mark.parametrize("cut", range(len(OUTCOME.meta)))
def test_a_truncated_outcome_is_a_protocol_error(cut: int) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_outcome(Frame(FrameKind.OUTCOME, 1, OUTCOME.meta[:cut], OUTCOME.buffers))


def test_missing_buffers_are_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        wire.decode_batch(Frame(FrameKind.BATCH, 1, BATCH.meta, BATCH.buffers[:1]))
    with pytest.raises(ProtocolError):
        wire.decode_outcome(Frame(FrameKind.OUTCOME, 1, OUTCOME.meta, []))


def outcome_meta(status: int, shapes: bytes = b"", strings: bytes = b"", rare: bytes = b"") -> bytes:
    count = 1 if shapes else 0
    head = struct.pack("!QIBHIIII", 1, 0, 1, status, count, len(shapes), len(strings), len(rare))
    return head + shapes + strings + rare


@pytest.mark.time_limit(2)
@pytest.mark.parametrize("rank", [-1, -2, -(2**63), 5, 2**62])
def test_a_shape_of_an_impossible_rank_is_a_protocol_error(rank: int) -> None:
    meta = outcome_meta(200, struct.pack("!2q", 1, 1)[:0] + struct.pack("!q", rank), b"\0o\0FP32\0")
    with pytest.raises(ProtocolError):
        wire.decode_outcome(Frame(FrameKind.OUTCOME, 1, meta, [bytearray()] * 8))


@pytest.mark.parametrize(
    ("status", "rare"),
    [
        (0, b"[]"),
        (0, b"5"),
        (0, b""),
        (0, b"{"),
        (0, b'{"code": [], "message": "m"}'),
        (0, b'{"code": "load_failed", "message": "m", "details": 5}'),
        (0, b'{"code": "load_failed", "message": "m", "details": {"message": "twice"}}'),
        (0, b'{"code": "load_failed", "message": "m", "details": {"self": 1}}'),
        (200, b"[]"),
        (200, b"\xff"),
    ],
)
def test_an_outcome_whose_json_is_not_ours_raises_nothing_but_a_protocol_error(
    status: int, rare: bytes
) -> None:
    with contextlib.suppress(ProtocolError):
        wire.decode_outcome(Frame(FrameKind.OUTCOME, 1, outcome_meta(status, rare=rare), []))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_batch_with_flipped_bytes_raises_nothing_but_a_protocol_error(data: st.DataObject) -> None:
    meta = bytearray(BATCH.meta)
    for _ in range(data.draw(st.integers(1, 4))):
        meta[data.draw(st.integers(0, len(meta) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        wire.decode_batch(Frame(FrameKind.BATCH, 1, bytes(meta), BATCH.buffers))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
@example(b"[]")
@example(b"null")
@example(b"\xff{}")
@example(b"[" * 200)
def test_noise_in_place_of_a_meta_block_raises_nothing_but_a_protocol_error(noise: bytes) -> None:
    for kind, decode in [
        (FrameKind.BATCH, wire.decode_batch),
        (FrameKind.OUTCOME, wire.decode_outcome),
        (FrameKind.LOADED, wire.decode_json),
        (FrameKind.CANCEL, wire.decode_ids),
    ]:
        with contextlib.suppress(ProtocolError):
            decode(Frame(kind, 1, noise, []))


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_ids_come_back_as_they_were_sent(ids: list[int]) -> None:
    assert wire.decode_ids(Frame(FrameKind.CANCEL, 0, wire.encode_ids(ids), [])) == ids


@given(st.lists(plain.map(lambda line: line.replace("\n", "")), min_size=1, max_size=5))
def test_metric_lines_come_back_as_they_were_sent(lines: list[str]) -> None:
    assert wire.decode_lines(Frame(FrameKind.METRICS, 0, wire.encode_lines(lines), [])) == lines


@pytest.mark.parametrize(
    ("meta", "lines"),
    [(wire.encode_lines(["half a pair \ud800"]), ["half a pair \\ud800"]), (b"\xff\n", ["\ufffd", ""])],
    ids=["what cannot be sent", "noise"],
)
def test_metric_lines_that_are_no_text_are_shown_all_the_same(meta: bytes, lines: list[str]) -> None:
    assert wire.decode_lines(Frame(FrameKind.METRICS, 0, meta, [])) == lines


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5))
def test_json_comes_back_as_it_was_sent(value: dict[str, Any]) -> None:
    assert wire.decode_json(Frame(FrameKind.LOAD, 0, wire.encode_json(value), [])) == value
    assert json.loads(wire.encode_json(value)) == value


@pytest.mark.parametrize("status", [1, 100, 199, 600, 65535])
def test_a_status_that_no_answer_can_have_is_refused(status: int) -> None:
    meta, buffers = wire.encode_outcome(Outcome(1, status=status))
    with pytest.raises(ProtocolError):
        wire.decode_outcome(Frame(FrameKind.OUTCOME, 1, meta, list(map(bytearray, buffers))))


def shared_item(job_id: int, body: SharedBytes, *others: Tensor) -> Item:
    inputs = [*others, Tensor("body", "BYTES", (), body, "image/jpeg")]
    return Item(job_id, None, InferRequest("id", "m", inputs=inputs))


@pytest.fixture
def arena() -> Arena:
    arena = Arena.create(4 << 20)
    if arena is None:
        pytest.skip("this system has no memory that processes share")
    return arena


def test_a_body_in_shared_memory_crosses_as_a_reference_and_is_copied_out(arena: Arena) -> None:
    sent = []
    for number in range(3):
        body = arena.take(50_000)
        assert body is not None
        body.view[:] = bytes([number]) * 50_000
        query = Tensor("query", "BYTES", (), bytearray(b"q"))
        sent.append(shared_item(number, body, *[query] * number))
    sent.append(
        Item(3, None, InferRequest("id", "m", inputs=[Tensor("body", "BYTES", (), bytearray(b"small"))]))
    )
    frame = batch_frame(sent)
    assert sum(map(len, frame.buffers)) < 200
    received = wire.decode_batch(frame, read_only(arena.fd))
    bodies = [item.request.inputs[-1].data for item in received]
    assert bodies == [bytes([number]) * 50_000 for number in range(3)] + [b"small"]
    assert {type(body) for body in bodies} == {bytearray}
    assert [len(item.request.inputs) for item in received] == [1, 2, 3, 1]


def test_a_reference_to_what_is_not_there_breaks_the_protocol(arena: Arena) -> None:
    body = arena.take(50_000)
    assert body is not None
    memory = read_only(arena.fd)
    with pytest.raises(ProtocolError):  # a worker that was given no memory
        wire.decode_batch(batch_frame([shared_item(1, body)]))
    with pytest.raises(ProtocolError):
        wire.decode_batch(batch_frame([shared_item(1, body)]), memory[:40_000])
    for reference in (b"", bytes(15), struct.pack("!QQ", 1 << 63, 1 << 63)):
        frame = batch_frame([shared_item(1, body)])
        frame.buffers[0] = bytearray(reference)
        with pytest.raises(ProtocolError):
            wire.decode_batch(frame, memory)
    frame = batch_frame([shared_item(1, body), shared_item(2, body)])
    at = 4 + wire._JOB.size - 4
    meta = bytearray(frame.meta)
    assert meta[at : at + 4] == bytes([0, 0, 0, 1])
    meta[at : at + 4] = bytes([0, 0, 0, 2])  # that of the next request
    with pytest.raises(ProtocolError):
        wire.decode_batch(dataclasses.replace(frame, meta=bytes(meta)), memory)


def test_parts_of_a_body_in_shared_memory_cross_as_references(arena: Arena) -> None:
    body = arena.take(40_000)
    assert body is not None
    body.view[:] = bytes(range(250)) * 160
    tensors = [Tensor(str(n), "UINT8", (100,), body.part(100 * n, 100 * n + 100)) for n in range(40)]
    tensors[1] = Tensor("1", "UINT8", (3,), b"own")
    meta, buffers = wire.join_batch([wire.encode_item(1, None, InferRequest("i", "m", inputs=tensors))])
    assert [len(each) for each in buffers] == [16, 3] + [16] * 30 + [100] * 8
    frame = Frame(FrameKind.BATCH, 1, bytes(meta), [bytearray(each) for each in buffers])
    (item,) = wire.decode_batch(frame, read_only(arena.fd))
    for sent, came in zip(tensors, item.request.inputs, strict=True):
        expected = sent.data.view if isinstance(sent.data, SharedBytes) else sent.data
        assert bytes(came.data) == bytes(expected)


def test_large_tensors_are_moved_into_shared_memory_as_far_as_there_is_room(arena: Arena) -> None:
    there = arena.take(50_000)
    assert there is not None
    tensors = [
        Tensor("small", "UINT8", (100,), bytes(100)),
        Tensor("view", "UINT8", (200_000,), memoryview(bytes(range(200)) * 1000)),
        Tensor("there", "UINT8", (50_000,), there),
        Tensor("huge", "UINT8", (1 << 20,), bytearray(1 << 20)),  # over a sixteenth of the memory
    ]
    request = InferRequest("i", "m", inputs=tensors)
    shared = wire.share(request, arena)
    assert [type(each.data) is SharedBytes for each in shared.inputs] == [False, True, True, False]
    assert bytes(shared.inputs[1].data.view) == bytes(range(200)) * 1000
    assert shared.inputs[2].data is there
    assert wire.share(shared, arena) is shared
    assert type(request.inputs[1].data) is memoryview
