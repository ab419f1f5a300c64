"""Java properties: what java.util.Properties.load reads, this reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mms_lite.errors import ConfigError
from mms_lite.properties import parse_properties


def escape(text: str, *, key: bool) -> str:
    """Spell `text` as java.util.Properties.store does."""
    spelled = []
    for index, char in enumerate(text):
        if char in "\t\n\r\f":
            spelled.append("\\" + {"\t": "t", "\n": "n", "\r": "r", "\f": "f"}[char])
        elif char in "\\=:#!" or (char == " " and (key or index == 0)):
            spelled.append("\\" + char)
        elif " " <= char <= "~":
            spelled.append(char)
        else:
            data = char.encode("utf-16-be")
            spelled.extend(f"\\u{data[i : i + 2].hex()}" for i in range(0, len(data), 2))
    return "".join(spelled)


TEXTS = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \\=:#!\t\n\r\f"), max_size=20)


@given(st.dictionaries(TEXTS.filter(bool), TEXTS), st.sampled_from(["=", ":", " = ", "\t"]))
def test_what_java_stores_comes_back(entries: dict[str, str], separator: str) -> None:
    lines = (f"{escape(k, key=True)}{separator}{escape(v, key=False)}" for k, v in entries.items())
    assert parse_properties("\n".join(lines)) == entries


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse_properties(text)
    except ConfigError as err:
        assert err.message == "Malformed \\uxxxx encoding."


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a=1", {"a": "1"}),
        ("a:1", {"a": "1"}),
        ("a 1", {"a": "1"}),
        ("  a \t=\f 1", {"a": "1"}),
        ("a==1", {"a": "=1"}),
        ("a : = 1", {"a": "= 1"}),
        ("a=1 ", {"a": "1 "}),
        ("a", {"a": ""}),
        ("=1", {"": "1"}),
        ("# a=1\n ! b=2\n\n \t\nc=3", {"c": "3"}),
        ("# a \\\nb=1", {"b": "1"}),
        ("a=1\\\n   2\\\n#3", {"a": "12#3"}),
        ("a=1\\\n\nb=2", {"a": "1", "b": "2"}),
        ("a=1\\\\\nb=2", {"a": "1\\", "b": "2"}),
        ("a=1\\", {"a": "1"}),
        ("\\\n#a=1", {"#a": "1"}),
        ("a=1\r\nb=2\rc=3\nd=4", {"a": "1", "b": "2", "c": "3", "d": "4"}),
        ("a=\x0b\x85\u2028", {"a": "\x0b\x85\u2028"}),
        ("a\\ b\\=c=1", {"a b=c": "1"}),
        ("a=\\t\\n\\q\\\\", {"a": "\t\nq\\"}),
        ("a=\\u00e4\\ud83d\\ude00", {"a": "\u00e4\U0001f600"}),
        ("a=1\na=2", {"a": "2"}),
    ],
)
def test_a_file_means_what_java_reads_in_it(text: str, entries: dict[str, str]) -> None:
    assert parse_properties(text) == entries


def test_a_broken_unicode_escape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Malformed \\uxxxx encoding\."):
        parse_properties("a=\\u12g4")
