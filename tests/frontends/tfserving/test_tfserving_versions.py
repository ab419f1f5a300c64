"""The numbers by which versions are known to the TensorFlow Serving API, and its description."""

import json
import re

import pytest
from openapi_spec_validator import validate

from mms_lite.frontends.tfserving import paths
from mms_lite.frontends.tfserving.rest import _MODEL, _PREDICT
from mms_lite.frontends.tfserving.service import numbers


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        (["1", "2", "10"], {"1": 1, "2": 2, "10": 10}),
        (["1.0"], {"1.0": 1}),
        (["2.3.1"], {"2.3.1": 2}),
        (["1", "1.0"], {"1": 1}),
        (["1.0", "1.1", "2.0"], {"2.0": 2}),
        (["01", "1.0"], {"1.0": 1}),
        (["latest", "v1", "1.0-rc", "", "0", "-1", "1e3", "²"], {}),
        ([str(1 << 63), str((1 << 63) - 1)], {str((1 << 63) - 1): (1 << 63) - 1}),
    ],
    ids=str,
)
def test_the_number_of_a_version(versions: list[str], found: dict[str, int]) -> None:
    assert numbers(versions) == found


def test_the_description_is_valid_and_names_routes_that_there_are() -> None:
    found = paths()
    validate({"openapi": "3.0.1", "info": {"title": "t", "version": "1"}, "paths": found})
    assert json.loads(json.dumps(found)) == found
    for path, operations in found.items():
        route = re.sub(r"\{(\w+)\}", lambda name: "1" if name[1] == "version" else "m", path)
        if not path.startswith("/v1/config"):
            expected = _PREDICT if "post" in operations else _MODEL
            assert expected.fullmatch(route), path
