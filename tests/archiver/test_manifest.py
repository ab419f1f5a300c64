"""The manifest's keys, order and checks."""

import json
from typing import Any

import pytest

from model_archiver.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestEngine,
    ManifestError,
    ManifestModel,
    ManifestPublisher,
)


def test_a_packed_model_gets_the_keys_and_order_of_model_archiver() -> None:
    manifest = Manifest(runtime="python3", model=ManifestModel(name="m", handler="svc:handle"))
    assert manifest.to_json() == (
        '{\n  "runtime": "python3",\n  "model": {\n    "modelName": "m",\n    "handler": "svc:handle"\n  },\n'
        '  "modelServerVersion": "1.0",\n  "implementationVersion": "1.0",\n'
        '  "specificationVersion": "1.0"\n}'
    )


def test_every_key_survives_writing_and_parsing() -> None:
    manifest = Manifest(
        runtime="python2",
        model=ManifestModel(
            name="m", handler="h", description="é", version="1.1", extensions={"parametersFile": "w"}
        ),
        engine=ManifestEngine(name="MXNet", version="1.9"),
        publisher=ManifestPublisher(author="a", email="a@b"),
        description="d",
        license="MIT",
    )
    assert Manifest.parse(manifest.to_json()) == manifest
    assert Manifest.parse(manifest.to_json().encode()) == manifest


def test_missing_and_null_keys_take_defaults() -> None:
    for text in ("{}", '{"runtime": null, "model": null, "engine": null, "publisher": null}'):
        manifest = Manifest.parse(text)
        assert manifest.runtime == "python"
        assert manifest.model == ManifestModel()
        assert manifest.engine is None
        assert manifest.publisher is None
        assert manifest.specification_version is None


def test_unknown_keys_stay_in_the_raw_object() -> None:
    document = {"model": {"modelName": "m", "x": [1]}, "userData": {"k": "v"}}
    assert Manifest.parse(json.dumps(document)).raw == document


def test_versions_written_as_numbers_become_strings() -> None:
    manifest = Manifest.parse('{"model": {"modelVersion": 1.0}, "modelServerVersion": 2}')
    assert (manifest.model.version, manifest.model_server_version) == ("1.0", "2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'{"model": {"modelName": "\\ud800"}}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "larger than 1048576 bytes"),
        (b'{"runtime": 3}', "manifest's runtime is not a string"),
        (b'{"model": []}', "manifest's model is not an object"),
        (b'{"model": {"modelName": 7}}', "model.modelName is not a string"),
        (b'{"model": {"handler": {}}}', "model.handler is not a string"),
        (b'{"model": {"extensions": ""}}', "model.extensions is not an object"),
        (b'{"model": {"modelVersion": true}}', "modelVersion is not a string"),
        (b'{"engine": {}}', r"^engineName is required in <engine>\.$"),
        (b'{"engine": "MXNet"}', "engine is not an object"),
        (b'{"publisher": {"email": 1}}', "publisher.email is not a string"),
    ],
)
def test_a_bad_manifest_is_refused_with_its_reason(text: bytes, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        Manifest.parse(text)


def legacy(**changed: Any) -> str:
    model = {"Model-Name": "old", "Service": "service.py", "Signature": "signature.json"}
    return json.dumps({"Model": {**model, **changed.pop("model", {})}, **changed})


def test_a_manifest_of_0_x_is_read_as_one_of_today() -> None:
    text = legacy(
        **{
            "Model-Archive-Description": "about",
            "License": "Apache 2.0",
            "Engine": {"MXNet": 0.12},
            "Created-By": {"Author": "a", "Author-Email": "b"},
            "model": {"Description": "of it", "Parameters": "p.params", "Symbol": "s.json"},
        }
    )
    manifest = Manifest.parse_legacy(text, folder="sub")
    assert manifest.model.name == "old"
    assert manifest.model.handler == "service.py"
    assert manifest.model.version == "snapshot"
    assert manifest.model.description == "of it"
    assert manifest.model.extensions == {"parametersFile": "p.params", "symbolFile": "s.json"}
    assert (manifest.runtime, manifest.specification_version, manifest.folder) == ("python", "0.1", "sub")
    assert manifest.engine is not None
    assert (manifest.engine.name, manifest.engine.version) == ("MXNet", "0.12")
    assert manifest.publisher is not None
    assert (manifest.publisher.author, manifest.publisher.email) == ("a", "b")
    assert (manifest.description, manifest.license) == ("about", "Apache 2.0")
    assert manifest.raw == json.loads(text)


@pytest.mark.parametrize(
    ("engine", "version"),
    [
        ({"MXNet": 1}, "1.0"),
        ({"MXNet": 1.2}, "1.2"),
        ({"MXNet": "1.2"}, None),
        ({"MXNet": True}, None),
        ({}, None),
    ],
)
def test_the_engine_of_0_x_counts_only_as_a_number(engine: dict[str, Any], version: str | None) -> None:
    found = Manifest.parse_legacy(legacy(Engine=engine)).engine
    assert (found and found.version) == version


def test_what_0_x_leaves_out_is_not_stated() -> None:
    manifest = Manifest.parse_legacy(legacy())
    assert (manifest.engine, manifest.publisher, manifest.model.extensions) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "Missing Model entry in manifest file."),
        ('{"model": {"handler": "h"}}', "Missing Model entry in manifest file."),
        ('{"Model": {}}', "Missing Service entry in MANIFEST.json"),
        ('{"Model": {"Service": 5}}', "The manifest's Model.Service is not a string."),
        ('{"Model": 5}', "The manifest's Model is not an object."),
        ("[]", "The manifest is not a JSON object."),
    ],
)
def test_a_manifest_of_0_x_that_cannot_be_used_says_why(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.parse_legacy(text)
    assert str(caught.value) == message
