"""The OpenAPI description of the protocol's routes is valid, and is true of what they do."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from openapi_spec_validator import validate
from raw_http import Answer

from mms_lite.frontends.kserve import description
from mms_lite.frontends.kserve.errors import ERRORS

Call = Callable[..., Awaitable[Answer]]


def document() -> dict[str, Any]:
    info = {"title": "t", "version": "1"}
    return {
        "openapi": "3.0.1",
        "info": info,
        "paths": description.paths(),
        "components": description.components(),
    }


def test_it_is_a_valid_document() -> None:
    validate(document())


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [each["operationId"] for item in description.paths().values() for each in item.values()]
    assert len(set(names)) == len(names)


def test_every_component_is_used() -> None:
    used = set(re.findall(r"#/components/(\w+)/(\w+)", str(document())))
    assert used == {(section, name) for section, found in description.components().items() for name in found}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("path", description.paths())
async def test_every_path_is_served_with_its_method_alone(call: Call, path: str) -> None:
    target = path.format(model_name="double", version="1")
    (method,) = description.paths()[path]
    for asked in ("GET", "POST"):
        answer = await call(asked, target)
        settings = target.endswith(("/logging", "/trace/setting"))
        if asked.lower() == method or settings:  # settings are refused when they are sent
            assert answer.status not in (404, 405)
        else:
            assert answer.status == 405


def test_an_inference_may_end_in_every_error_that_is_not_about_loading() -> None:
    responses = description.paths()["/v2/models/{model_name}/infer"]["post"]["responses"]
    loading = {401, 403, 409}
    assert {int(status) for status in responses} == {200} | {
        status for status, _ in ERRORS.values()
    } - loading
