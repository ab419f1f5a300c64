"""What MMS reads from a request: the body, or the fields of a form, as raw parts.

Parts over 1 MB are taken apart on a thread, so that nobody else's request waits for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_plus, unquote_to_bytes

import json5
import multipart

from mms_lite.errors import InvalidRequest
from mms_lite.frontends.message import HttpRequest
from mms_lite.shared import SharedBytes
from mms_lite.types import BYTES, Tensor

_THREAD_BYTES = 1 << 20
_PIECE_BYTES = 64 * 1024  # in pieces of this size the parser copies within the processor's cache
_MAX_FIELDS = 1000
_MAX_PART_HEADER_BYTES = 8192
_MAX_PART_HEADERS = 32
_MAX_LENIENT_BYTES = 2048


async def read_parts(request: HttpRequest, *, with_query: bool) -> list[Tensor]:
    """Return the request's raw parts; of those with one name the last (MMS reference, section 4.1).

    Raises:
        InvalidRequest: a form cannot be read, or a name cannot be a part's.
    """
    kind, options = content_type(request)
    query = [_part(name, bytearray(value.encode())) for name, value in request.query] if with_query else []
    if kind.lower() == "multipart/form-data" and options.get("boundary"):
        parts = await _off_loop(_multipart, request.body_view, options["boundary"])
    elif kind.lower() == "application/x-www-form-urlencoded" and (form := request.own_body).isascii():
        # Else it is what `curl --data-binary @photo` sends without a content type: no form at all.
        parts = await _off_loop(_urlencoded, form)
    elif not query:
        return [Tensor("body", BYTES, (), request.body, kind)]
    else:
        parts = [_part("body", request.body, kind)]
    return _last_of_each_name([*query, *parts])


async def read_json(body: bytearray) -> dict[str, Any]:
    """Return a body that must be a JSON object.

    Raises:
        InvalidRequest: it is not one.
    """
    try:
        value = await _off_loop(json.loads, body)
    except (ValueError, RecursionError) as error:
        value = await _lenient_json(body)
        if value is None:
            raise InvalidRequest(f"The request's body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The request's body is not a JSON object.")
    return value


async def _lenient_json(body: bytearray) -> Any:
    """Return what only MMS's parser takes for JSON (single quotes, bare keys, comments), or None."""
    if len(body) > _MAX_LENIENT_BYTES:  # the parser is slow
        return None
    try:
        return await asyncio.to_thread(json5.loads, body.decode())
    except (ValueError, RecursionError):
        return None


def content_type(request: HttpRequest) -> tuple[str, dict[str, str]]:
    """Return the media type as the client spelt it, without parameters, and the parameters."""
    header = request.header("content-type")
    if not header:
        return "", {}
    kind, semicolon, _ = header.partition(";")
    return kind.strip(), dict(multipart.parse_options_header(header)[1]) if semicolon else {}


async def _off_loop(parse: Any, body: bytearray | memoryview, *args: Any) -> Any:
    if len(body) > _THREAD_BYTES:
        return await asyncio.to_thread(parse, body, *args)
    return parse(body, *args)


def _multipart(body: memoryview, boundary: str) -> list[Tensor]:
    try:
        parser = multipart.PushMultipartParser(
            boundary,
            content_length=len(body),
            max_header_size=_MAX_PART_HEADER_BYTES,
            max_header_count=_MAX_PART_HEADERS,
            max_segment_count=_MAX_FIELDS,
            strict=True,
        )
        return list(_segments(parser, body))
    except multipart.MultipartError as error:
        raise InvalidRequest(f"The multipart body cannot be read: {error}") from error


def _segments(parser: multipart.PushMultipartParser, body: memoryview) -> Iterable[Tensor]:
    name, kind, data = "", "", bytearray()
    with parser:
        for start in range(0, len(body), _PIECE_BYTES):
            for event in parser.parse(bytes(body[start : start + _PIECE_BYTES])):
                if isinstance(event, multipart.MultipartSegment):
                    name, data = event.name, bytearray()
                    is_file = event.filename is not None
                    kind = (event.content_type or "application/octet-stream") if is_file else ""
                elif event is not None:
                    data += event
                else:
                    yield _part(name, data, kind)
            if parser.closed:
                return


def _urlencoded(body: bytearray) -> list[Tensor]:
    fields = body.split(b"&", _MAX_FIELDS)
    if len(fields) > _MAX_FIELDS:
        raise InvalidRequest(f"The form has more than {_MAX_FIELDS} fields.")
    parts = []
    for field in fields:
        name, equals, value = field.partition(b"=")
        if name or equals:
            data = bytearray(unquote_to_bytes(bytes(value.replace(b"+", b" "))))
            parts.append(_part(unquote_plus(name.decode("utf-8", "replace")), data))
    return parts


def _part(name: str, data: bytearray | SharedBytes, kind: str = "") -> Tensor:
    if "\0" in name:
        raise InvalidRequest("A field's name contains a NUL character.")
    return Tensor(name, BYTES, (), data, kind)


def _last_of_each_name(parts: Iterable[Tensor]) -> list[Tensor]:
    return list({part.name: part for part in parts}.values())
