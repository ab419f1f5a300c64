"""docs/protocols.md: its table of errors is the code's, row by row."""

import re
from pathlib import Path

import pytest

from mms_lite import errors
from mms_lite.errors import LoadError, ServingError
from mms_lite.frontends.kserve.errors import ERRORS, grpc_status, http_status
from mms_lite.frontends.tfserving.service import code_of, status_of

PAGE = (Path(__file__).parents[2] / "docs" / "protocols.md").read_text(encoding="utf-8")
ROWS = {
    code: cells
    for code, *cells in re.findall(
        r"^\| `(\w+)` \| [^|]+ \| (\d+) \| (\w+) \| (\d+|-) \| (\w+|-) \|$", PAGE, re.MULTILINE
    )
}
KINDS = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ServingError) and kind is not errors.ConfigError
}


def test_every_error_has_its_row() -> None:
    assert set(ROWS) == set(KINDS) == set(ERRORS)


@pytest.mark.parametrize("code", KINDS)
def test_a_row_says_what_clients_get(code: str) -> None:
    error = KINDS[code]("why")
    first = [str(http_status(error)), grpc_status(error)]
    # Nothing is loaded over v1: a reload that fails has a status of its own.
    second = ["-", "-"] if isinstance(error, LoadError) else [str(status_of(error)), code_of(error)]
    assert ROWS[code] == first + second
