"""Large bytes fields of protobuf messages taken from, and put among, the wire's bytes without a copy.

Apart because protobuf's parser copies a field twice before Python has it, and knows no other way. Lifting
is never needed: a message that is small, odd or wrong is left whole to protobuf, whose rules alone count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mms_lite.errors import InvalidRequest, RequestTooLarge

LEAST_BYTES = 128 * 1024  # of a message for which the walk costs less than the copies
MOST_PARSED_BYTES = 16 << 20  # by protobuf, which makes of each empty field some hundred bytes
_MOST_FIELDS = 4096  # to walk over: the bound on what a message of tiny fields costs here
_MOST_ELEMENTS = 1 << 16  # the same for a message that is too large without
_PLACEHOLDER_BYTES = 4
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types; those of groups are left to protobuf
_MOST_VARINT_BYTES = 10
_MOST_SIZE_BYTES = 5  # of a tag or a length


class _Unusual(Exception):
    """The message is not one from which anything is lifted."""


def lift(
    message: bytes, path: Sequence[int], *, least_bytes: int = LEAST_BYTES, most_fields: int = _MOST_FIELDS
) -> tuple[bytes, list[memoryview]]:
    """Return a message with placeholders in a bytes field, and the field's values as views of `message`.

    `path` are the numbers of the fields that lead to it, the last its own. Either every value of it is
    lifted or none is: a message of fewer than `least_bytes`, without the field, or not of plain form is
    returned as it is, with an empty list. So what protobuf then reads in the field goes through `value`.
    Encoding: protobuf.dev/programming-guides/encoding.
    """
    if len(message) < least_bytes:
        return message, []
    lifting = _Lifting(most_fields)
    try:
        pieces = lifting.pieces(memoryview(message), path, 0)
    except _Unusual:
        return message, []
    return (b"".join(pieces), lifting.values) if lifting.values else (message, [])


def lighten(message: bytes, path: Sequence[int], *, advice: str) -> tuple[bytes, list[memoryview]]:
    """Return a message that protobuf can be had to read, as `lift` does; it is the rest of another lift.

    That takes up to a tenth of a second. `path` leads to elements of any size; they are lifted where too much
    would be left with them. `advice` says what a client should do.

    Raises:
        InvalidRequest, RequestTooLarge: what it would make is many times its size.
    """
    try:
        for _ in _Lifting(_MOST_FIELDS).fields(memoryview(message)):
            pass
    except _Unusual:
        raise InvalidRequest(f"the message has more than {_MOST_FIELDS} fields, or is none") from None
    if len(message) <= MOST_PARSED_BYTES:
        return message, []
    rest, lifted = lift(message, path, most_fields=_MOST_ELEMENTS)
    if len(rest) > MOST_PARSED_BYTES:
        raise RequestTooLarge(
            f"The message has {len(rest)} bytes of single values; {MOST_PARSED_BYTES} are the most. {advice}"
        )
    return rest, lifted


def value(read: bytes, lifted: Sequence[memoryview]) -> bytes | memoryview:
    """Return the field's value for what protobuf read in it, once `lift` has returned `lifted`."""
    return lifted[int.from_bytes(read, "little")] if lifted and read else read


def field(number: int, size: int) -> bytes:
    """Return what precedes the bytes of a field of wire type LEN: its tag and their number."""
    return _varint(number << 3 | _LENGTH) + _varint(size)


class _Lifting:
    """One message's way through `lift`: the values so far, and how many fields may still come."""

    __slots__ = ("_left", "values")

    def __init__(self, most_fields: int) -> None:
        self.values: list[memoryview] = []
        self._left = most_fields

    def pieces(self, message: memoryview, path: Sequence[int], depth: int) -> list[bytes | memoryview]:
        """Return the bytes of a message with placeholders, in pieces; `depth` says where in the path it is.

        Raises:
            _Unusual: leave it.
        """
        wanted, pieces, copied = path[depth] << 3 | _LENGTH, list[bytes | memoryview](), 0
        for tag, start, inner, end in self.fields(message):
            if tag != wanted:
                continue
            pieces.append(message[copied:start])
            copied = end
            if depth == len(path) - 1:
                pieces += field(path[depth], _PLACEHOLDER_BYTES), self._placeholder()
                self.values.append(message[inner:end])
            else:
                nested = self.pieces(message[inner:end], path, depth + 1)
                pieces += field(path[depth], sum(map(len, nested))), *nested
        pieces.append(message[copied:])
        return pieces

    def _placeholder(self) -> bytes:
        return len(self.values).to_bytes(_PLACEHOLDER_BYTES, "little")

    def fields(self, message: memoryview) -> Iterator[tuple[int, int, int, int]]:
        """Yield of each field its tag, where it starts, and where its value starts (LEN only) and ends."""
        at, size = 0, len(message)
        while at < size:
            self._left -= 1
            start = at
            tag, at = _read_size(message, at)
            inner, end = _extent(message, tag & 7, at)
            if self._left < 0 or end > size:
                raise _Unusual
            yield tag, start, inner, end
            at = end


def _extent(message: memoryview, wire_type: int, at: int) -> tuple[int, int]:
    """Return where the value after a tag starts and ends, which may be past the message's end."""
    if wire_type == _LENGTH:
        size, at = _read_size(message, at)
        return at, at + size
    if wire_type == _VARINT:
        return at, _varint_end(message, at, _MOST_VARINT_BYTES)
    if wire_type == _FIXED32:
        return at, at + 4
    if wire_type == _FIXED64:
        return at, at + 8
    raise _Unusual


def _read_size(message: memoryview, at: int) -> tuple[int, int]:
    """Return a tag or length, and where it ends."""
    if at < len(message) and message[at] < 0x80:
        return message[at], at + 1
    end, number = _varint_end(message, at, _MOST_SIZE_BYTES), 0
    for byte in reversed(message[at:end]):
        number = number << 7 | byte & 0x7F
    return number, end


def _varint_end(message: memoryview, at: int, most: int) -> int:
    for end, byte in enumerate(message[at : at + most], at + 1):
        if byte < 0x80:
            return end
    raise _Unusual


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
