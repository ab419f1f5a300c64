"""The syntax of Java properties files, as config.properties has it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mms_lite.errors import ConfigError


def parse_properties(text: str) -> dict[str, str]:
    r"""Return the entries of a Java properties file; of a key given twice, the last one.

    Source: java.util.Properties.load. Blanks at a value's end are kept.

    Raises:
        ConfigError: a `\u` escape without four hexadecimal digits.
    """
    entries = {}
    for line in _logical_lines(text):
        match = re.match(r"((?:\\.|[^\\=: \t\f])*)[ \t\f]*[=:]?[ \t\f]*", line, re.DOTALL)
        if match is not None:
            entries[_unescape(match[1])] = _unescape(line[match.end() :])
    return entries


def _logical_lines(text: str) -> Iterator[str]:
    # Not splitlines(): Java ends lines at \r, \n and \r\n only.
    lines = iter(re.split(r"\r\n|\r|\n", text))
    for first in lines:
        line = first.lstrip(" \t\f")
        if line.startswith(("#", "!")):
            continue
        parts = []
        while _is_continued(line):
            parts.append(line[:-1])
            line = next(lines, "").lstrip(" \t\f")
        logical = "".join([*parts, line])
        if logical:
            yield logical


def _is_continued(line: str) -> bool:
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _unescape(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        code = match[1]
        if code == "u":
            raise ConfigError("Malformed \\uxxxx encoding.")
        if len(code) == 5:
            return chr(int(code[1:], 16))
        return {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}.get(code, code)

    text = re.sub(r"\\(u[0-9a-fA-F]{4}|.)", plain, text, flags=re.DOTALL)
    # Java writes a character beyond U+FFFF as two escapes; join them.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
