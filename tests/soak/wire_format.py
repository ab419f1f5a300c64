"""Protobuf messages as fields on the wire, and what can go wrong there: for messages that are nearly valid.

Knows no message types: bytes that can be read as a message are one.
Encoding: protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = 0, 1, 2, 3, 4, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_NUMBERS = (0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"a\0b",
    b"../../etc",
    b"%s%n{}",
    "größer".encode(),
    b"x" * 70_000,
)
_DEPTHS = (2, 10, 50, 99, 100, 101, 1000, 20_000)


@dataclass(slots=True)
class Field:
    """A field: a number of VARINT and the fixed types, bytes of LENGTH."""

    number: int
    wire_type: int
    value: int | bytes


def read(message: bytes) -> list[Field] | None:
    """Return the fields of a message, None if it is none, or has groups."""
    fields, at = [], 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if at < 0 or not number:
            return None
        if wire_type == VARINT:
            value: int | bytes
            value, at = _read_varint(message, at)
        elif wire_type in _FIXED:
            size = _FIXED[wire_type]
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        elif wire_type == LENGTH:
            size, at = _read_varint(message, at)
            value, at = message[at : at + size], at + size if at >= 0 else -1
        else:
            return None
        if not 0 <= at <= len(message):
            return None
        fields.append(Field(number, wire_type, value))
    return fields


def write(fields: Sequence[Field]) -> bytes:
    """Return a message with these fields."""
    return b"".join(map(write_field, fields))


def write_field(field: Field) -> bytes:
    """Return a field's tag and value."""
    tag = varint(field.number << 3 | field.wire_type)
    if isinstance(field.value, bytes):
        return tag + varint(len(field.value)) + field.value
    if field.wire_type == VARINT:
        return tag + varint(field.value)
    size = _FIXED[field.wire_type]
    return tag + (field.value % (1 << 8 * size)).to_bytes(size, "little")


def varint(number: int, *, longer: int = 0) -> bytes:
    """Return a number of any size, with so many bytes more than it needs."""
    encoded = bytearray()
    while number >= 0x80 or longer > 0:
        encoded.append(number & 0x7F | 0x80)
        longer -= number < 0x80
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def mutated(random: Random, message: bytes) -> bytes:
    """Return the message with one to four things wrong, on the wire or in one of its fields."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        change = _change_bytes if random.random() < 0.35 else _change_fields
        message = change(random, message)
    return message


def _change_bytes(random: Random, message: bytes) -> bytes:
    changed = bytearray(message)
    at = random.randrange(len(changed) + 1)
    until = min(len(changed), at + random.choice((1, 2, 8, 100)))
    kind = random.randrange(6)
    if kind == 0 and changed:
        for _ in range(random.choice((1, 1, 3, 30))):
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at:at] = random.randbytes(random.choice((1, 4, 50)))
    elif kind == 3:
        del changed[at:until]
    elif kind == 4:
        changed[at:at] = changed[at:until]
    elif at < len(changed):
        changed[at] = random.choice((0, 0x7F, 0x80, 0xFF))
    return bytes(changed)


def _change_fields(random: Random, message: bytes) -> bytes:
    fields = read(message)
    if not fields:
        return message + random.randbytes(random.randrange(6))
    at = random.randrange(len(fields))
    field = fields[at]
    if isinstance(field.value, bytes) and field.value and random.random() < 0.5:
        fields[at] = Field(field.number, LENGTH, _change_fields(random, field.value))
        return write(fields)
    pieces = [write_field(each) for each in fields]
    random.choice(_CHANGES)(random, field, at, pieces)
    return b"".join(pieces)


def _repeat(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    most = 1_000_000 // max(1, len(pieces[at]))
    pieces[at] *= min(random.choice((2, 2, 3, 3, 100, 100, 10_000)), max(2, most))


def _drop(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    del pieces[at]


def _reorder(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    random.shuffle(pieces)


def _renumber(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    number = random.choice((field.number ^ 1 or 2, field.number + 1, 15, 16, 536_870_911, 2**32, 2**61))
    pieces[at] = write_field(Field(number, field.wire_type, field.value))


def _retype(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    tag = varint(field.number << 3 | random.randrange(8))
    pieces[at] = tag + pieces[at][len(varint(field.number << 3 | field.wire_type)) :]


def _revalue(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    new: int | bytes = random.choice(_TEXTS) if field.wire_type == LENGTH else random.choice(_NUMBERS)
    pieces[at] = write_field(Field(field.number, field.wire_type, new))


def _lie(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    """Write another length than the value has, or a varint longer than it needs or may be."""
    tag, longer = varint(field.number << 3 | field.wire_type), random.choice((1, 3, 9, 12))
    if isinstance(field.value, bytes):
        size = len(field.value)
        lies = (max(0, size - 1), size + 1, 0, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1)
        honest = random.random() < 0.2
        length = varint(size, longer=longer) if honest else varint(random.choice(lies))
        pieces[at] = tag + length + field.value
    else:
        pieces[at] = tag + varint(field.value, longer=longer)


def _nest(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    """Put the field into itself, or groups into groups."""
    depth = random.choice(_DEPTHS)
    if random.random() < 0.3:
        end = varint(field.number << 3 | END_GROUP) * random.choice((0, depth - 1, depth, depth + 1))
        pieces[at] = varint(field.number << 3 | START_GROUP) * depth + end
        return
    nested = field.value if isinstance(field.value, bytes) else b""
    tag, inner = varint(field.number << 3 | LENGTH), [nested]
    size = len(nested)
    for _ in range(depth):
        head = tag + varint(size)
        inner.append(head)
        size += len(head)
    pieces[at] = b"".join(reversed(inner))


def _add_unknown(random: Random, field: Field, at: int, pieces: list[bytes]) -> None:
    number, wire_type = random.choice((77, 1000, 19_000)), random.choice((VARINT, FIXED64, LENGTH, FIXED32))
    value: int | bytes = random.randbytes(20) if wire_type == LENGTH else random.choice(_NUMBERS)
    pieces.insert(at, write_field(Field(number, wire_type, value)) * random.choice((1, 1, 5000)))


_CHANGES: tuple[Callable[[Random, Field, int, list[bytes]], None], ...] = (
    *(_repeat, _drop, _reorder, _renumber, _retype, _revalue, _revalue, _lie, _lie, _nest, _add_unknown),
)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a number and where it ends, which is -1 if it does not."""
    number = shift = 0
    while 0 <= at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at
    return 0, -1
