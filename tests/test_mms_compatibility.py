"""docs/mms-compatibility.md: its tables can be read, and every test that they name exists."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "mms-compatibility.md").read_text(encoding="utf-8")
CLASSES = {"KEEP", "FIX", "DROP"}


class Row(NamedTuple):
    number: str
    mms: str
    kind: str
    ours: str
    tests: list[str]


def read_row(line: str) -> Row:
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert len(cells) == 5, line
    number, mms, kind, ours, tests = cells
    named = [each for each in re.split(r",\s*", tests) if each]
    assert all(re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`", each) for each in named), line
    return Row(number, mms, kind, ours, [each.strip("`") for each in named])


ROWS = [read_row(line) for line in PAGE.splitlines() if re.match(r"\| [\d.]+-\d+ \|", line)]


@cache
def defined_in(file: str) -> frozenset[str]:
    """Return the tests that a file defines; none if it does not exist."""
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree.body if isinstance(node, functions))


def test_every_line_of_a_table_is_a_row() -> None:
    heads = [line for line in PAGE.splitlines() if line.startswith("| number |")]
    lines = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith("|---")]
    assert len(ROWS) > 200
    assert len(lines) == len(ROWS) + len(heads)


def test_numbers_are_unique_and_rise_within_their_chapter() -> None:
    chapters: dict[str, list[int]] = {}
    for chapter, line in re.findall(r"^(?:## ([\d.]+)\. |\| ([\d.]+-\d+) \|)", PAGE, re.MULTILINE):
        if chapter:
            assert chapter not in chapters
            chapters[chapter] = []
        else:
            number, _, row = line.rpartition("-")
            assert number == list(chapters)[-1], line
            chapters[number].append(int(row))
    assert all(rows == list(range(1, len(rows) + 1)) for rows in chapters.values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
def test_a_row_says_what_both_do_and_names_tests_that_exist(row: Row) -> None:
    assert row.mms
    assert row.ours
    assert row.kind in CLASSES
    assert row.tests or row.kind == "DROP", "a row without a test"
    for each in row.tests:
        file, _, name = each.partition("::")
        assert name in defined_in(file), f"{each} does not exist"


def test_all_twenty_known_weaknesses_are_there() -> None:
    weaknesses = [row for row in ROWS if row.number.startswith("14-")]
    assert [row.number for row in weaknesses] == [f"14-{number}" for number in range(1, 21)]
    assert {row.kind for row in weaknesses} == {"FIX"}


def test_rows_that_other_rows_point_at_exist() -> None:
    known = {row.number for row in ROWS}
    pointed = {
        number for row in ROWS for number in re.findall(r"(?<![\w`-])\d+(?:\.\d)?-\d+(?![\w-])", row.ours)
    }
    assert pointed
    assert pointed <= known


def test_the_highlights_stay_few() -> None:
    head, _, rest = PAGE.partition("## What will look different")
    assert "mms-side-by-side.md" in head
    assert 0 < rest.partition("\n## ")[0].count("\n- ") <= 12
