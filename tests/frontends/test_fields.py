"""Lifting fields: what protobuf reads in the rest, with the values put back, is what it read in the whole."""

import random
from typing import Any

import pytest

pytest.importorskip("google.protobuf", reason="needs the grpc extra")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mms_lite.frontends import fields

# The shapes of ModelInferRequest (raw_input_contents = 7) and of PredictRequest (a map of messages, 2.2.4).
_PROTO = """
name: "fields.proto" package: "t" syntax: "proto3"
message_type { name: "Request"
  field { name: "name" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "inputs" number: 2 type: TYPE_MESSAGE type_name: ".t.Request.Entry" label: LABEL_REPEATED }
  field { name: "numbers" number: 3 type: TYPE_INT64 label: LABEL_REPEATED }
  field { name: "fixed" number: 4 type: TYPE_FIXED32 label: LABEL_OPTIONAL }
  field { name: "raw" number: 7 type: TYPE_BYTES label: LABEL_REPEATED }
  nested_type { name: "Entry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".t.Tensor" label: LABEL_OPTIONAL } } }
message_type { name: "Tensor"
  field { name: "dtype" number: 1 type: TYPE_INT32 label: LABEL_OPTIONAL }
  field { name: "content" number: 4 type: TYPE_BYTES label: LABEL_OPTIONAL }
  field { name: "strings" number: 8 type: TYPE_BYTES label: LABEL_REPEATED } }
"""
RAW, CONTENT = (7,), (2, 2, 4)


def _request() -> Any:
    from google.protobuf import text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_PROTO, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Request"))


Request = _request()


def parsed(message: bytes) -> Any:
    """Read a message without the fields that protobuf does not know; None if it refuses it."""
    try:
        found = Request.FromString(message)
    except DecodeError:
        return None
    found.DiscardUnknownFields()
    return found


def put_back(message: bytes, path: tuple[int, ...]) -> Any:
    """Lift, have protobuf read the rest, and put the values where they belong."""
    rest, lifted = fields.lift(message, path, least_bytes=0)
    found = parsed(rest)
    if found is not None and path == RAW:
        found.raw[:] = [bytes(fields.value(each, lifted)) for each in found.raw]
    elif found is not None:
        for tensor in found.inputs.values():
            tensor.content = bytes(fields.value(tensor.content, lifted))
    return found


def same(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return left is right
    return bool(left.SerializeToString(deterministic=True) == right.SerializeToString(deterministic=True))


def varint(number: int, extra: int = 0) -> bytes:
    """Encode a number, in `extra` more bytes than it takes."""
    encoded = [number >> shift & 0x7F for shift in range(0, max(7, number.bit_length()), 7)] + [0] * extra
    return bytes([*(byte | 0x80 for byte in encoded[:-1]), encoded[-1]])


_EXTRA = st.sampled_from([0] * 12 + [1, 3, 8])
_NUMBERS = st.sampled_from([1, 2, 2, 3, 4, 4, 7, 7, 8, 0, 15, 16, 5000, (1 << 29) - 1, 1 << 29])


@st.composite
def wire_fields(draw: Any, payloads: st.SearchStrategy[bytes]) -> bytes:
    """One field, mostly right."""
    number, kind = draw(_NUMBERS), draw(st.sampled_from([2] * 12 + [0, 1, 5, 0, 3, 4, 6, 7]))
    tag = varint(number << 3 | kind, draw(_EXTRA))
    if kind == 2:
        payload = draw(payloads)
        off = draw(st.sampled_from([0] * 30 + [-1, 1, 1 << 20, 1 << 31, 1 << 63]))
        return tag + varint(max(0, len(payload) + off), draw(_EXTRA)) + payload
    if kind == 0:
        return tag + varint(draw(st.integers(0, (1 << 64) - 1)), draw(_EXTRA))
    if kind == 3:
        return tag + draw(payloads) + varint(number << 3 | 4)
    return tag + bytes({1: 8, 5: 4}.get(kind, 0))


def messages() -> st.SearchStrategy[bytes]:
    text = st.sampled_from([b"", b"a", b"b", b"\xff", b"\0\0\0\0", b"\1\0\0\0"]) | st.binary(max_size=200)
    return st.recursive(
        text, lambda inner: st.lists(wire_fields(inner), max_size=5).map(b"".join), max_leaves=30
    )


@pytest.mark.parametrize("path", [RAW, CONTENT])
@settings(max_examples=600, deadline=None)
@given(message=messages() | st.binary(max_size=64))
@example(message=b"\x11" + b"\x3a\x02ab" * 2)  # values of fixed size that look like fields
@example(message=b"\x15" + b"\x3a\x02ab")
@example(message=b"\x18" + b"\xba" * 9 + b"\x01")
@example(message=varint(RAW[0] << 3 | 2, 4) + b"\x01a")  # tags and lengths that are longer than they need be
@example(message=varint(RAW[0] << 3 | 2, 5) + b"\x01a")
@example(message=b"\x3a" + varint(1, 4) + b"a")
@example(message=b"\x3a" + varint(1, 5) + b"a")
@example(message=varint(1 << 32 | RAW[0] << 3 | 2) + b"\x01a\x3a\x01b")
@example(message=b"\x3a" + varint(1 << 32 | 1) + b"a")
@example(message=b"\x3a\x01a\x02\x00")  # there is no field 0
def test_any_bytes_are_read_or_refused_as_by_protobuf(path: tuple[int, ...], message: bytes) -> None:
    assert same(put_back(message, path), parsed(message))


@pytest.mark.parametrize("path", [RAW, CONTENT])
@settings(max_examples=200, deadline=None)
@given(names=st.lists(st.text(max_size=2), max_size=4), seed=st.integers(0, 1 << 30))
def test_a_damaged_message_is_read_or_refused_as_by_protobuf(
    path: tuple[int, ...], names: list[str], seed: int
) -> None:
    chance = random.Random(seed)
    made = Request(name="m", numbers=[1, -1], fixed=3)
    for name in names:
        made.raw.append(chance.randbytes(chance.choice([0, 1, 4, 127, 128, 300])))
        made.inputs[name].content = chance.randbytes(chance.choice([0, 4, 127, 128, 300]))
        made.inputs[name].strings.append(b"s")
    message = bytearray(made.SerializeToString())
    for _ in range(chance.choice([0, 1, 1, 3])):
        message[chance.randrange(len(message))] = chance.randrange(256)
    del message[len(message) - chance.choice([0, 0, 1, 5]) :]
    assert same(put_back(bytes(message), path), parsed(bytes(message)))


def test_values_are_views_of_the_message_and_the_rest_is_small() -> None:
    message = Request(name="m", raw=[b"a" * 150_000, b"", b"b" * 150_000]).SerializeToString()
    rest, lifted = fields.lift(message, RAW)
    assert [bytes(each[:1]) for each in lifted] == [b"a", b"", b"b"]
    assert all(each.obj is message for each in lifted)
    assert len(rest) < 30


def test_values_deep_in_a_map_are_lifted_with_the_lengths_around_them_made_right() -> None:
    made = Request(name="m")
    for name in "xy":
        made.inputs[name].dtype = 1
        made.inputs[name].content = name.encode() * 150_000
    rest, lifted = fields.lift(made.SerializeToString(), CONTENT)
    found = Request.FromString(rest)
    assert len(rest) < 60
    assert {name: bytes(fields.value(each.content, lifted)) for name, each in found.inputs.items()} == {
        "x": b"x" * 150_000,
        "y": b"y" * 150_000,
    }


def test_a_value_that_looks_like_a_placeholder_is_itself() -> None:
    message = Request(raw=[b"\1\0\0\0", b"x" * 150_000]).SerializeToString()
    rest, lifted = fields.lift(message, RAW)
    assert [bytes(fields.value(each, lifted))[:4] for each in Request.FromString(rest).raw] == [
        b"\1\0\0\0",
        b"xxxx",
    ]


@pytest.mark.parametrize(
    "message",
    [
        Request(raw=[b"small"]).SerializeToString(),
        Request(name="n" * 150_000).SerializeToString(),
        Request(raw=[b""] * 70_000).SerializeToString(),
        b"\x0b\x0c" + Request(raw=[b"x" * 150_000]).SerializeToString(),
        Request(raw=[b"x" * 150_000]).SerializeToString()[:-1],
    ],
    ids=["small", "without the field", "too many fields", "a group", "cut off"],
)
def test_other_messages_stay_whole(message: bytes) -> None:
    assert fields.lift(message, RAW) == (message, [])


@pytest.mark.parametrize("size", [0, 127, 128, 16_384, 1 << 30])
def test_the_head_of_a_field_is_what_protobuf_writes(size: int) -> None:
    head = fields.field(5000, size)
    assert head == varint(5000 << 3 | 2) + varint(size)
    if size <= 16_384:
        assert Request.FromString(fields.field(7, size) + bytes(size)).raw == [bytes(size)]
