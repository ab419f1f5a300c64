"""The manifest's keys for models without code: when they count, their order and their checks."""

import json
from typing import Any

import pytest

from model_archiver.manifest import (
    DEFAULT_HANDLER,
    READY_MADE,
    FileRecord,
    Manifest,
    ManifestError,
    ManifestModel,
)

SHA256 = "0123456789abcdef" * 4
MANIFEST = Manifest(
    model=ManifestModel(
        name="net",
        handler="image_classifier",
        backend="openvino",
        model_files=("m.xml", "m.bin"),
        labels="names.txt",
        handler_config={"size": 224},
        samples=("samples/cat.png",),
    ),
    files={"m.xml": FileRecord(bytes=7, sha256=SHA256)},
)


def document(**changed: Any) -> dict[str, Any]:
    model = {"modelFiles": ["m.xml"], **changed.pop("model", {})}
    return {"model": model, **changed}


def test_every_key_survives_writing_and_parsing() -> None:
    assert Manifest.parse(MANIFEST.to_json()) == MANIFEST


def test_our_keys_follow_those_of_mms() -> None:
    written = json.loads(MANIFEST.to_json())
    assert list(written) == [
        "runtime", "model", "modelServerVersion", "implementationVersion", "specificationVersion", "files",
    ]  # fmt: skip
    assert list(written["model"]) == [
        "modelName", "handler", "backend", "modelFiles", "labels", "handlerConfig", "samples",
    ]  # fmt: skip
    assert written["files"] == {"m.xml": {"bytes": 7, "sha256": SHA256}}


def test_model_files_need_no_handler_and_nothing_else() -> None:
    manifest = Manifest.parse(json.dumps(document()))
    assert manifest.model == ManifestModel(model_files=("m.xml",))
    assert manifest.files == {}
    assert DEFAULT_HANDLER in READY_MADE


@pytest.mark.parametrize("model_files", [None, []])
def test_without_model_files_the_keys_are_others_and_stay_in_the_raw_object(model_files: Any) -> None:
    model = {"modelFiles": model_files, "labels": ["a"], "backend": 5, "handlerConfig": "x", "samples": 1}
    manifest = Manifest.parse(json.dumps({"model": model, "files": ["a"]}))
    assert manifest.model == ManifestModel()
    assert manifest.files == {}
    assert manifest.raw["model"] == model


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"modelFiles": "m.xml"}}, "The manifest's model.modelFiles is not a list."),
        ({"model": {"modelFiles": 5}}, "The manifest's model.modelFiles is not a list."),
        ({"model": {"modelFiles": 0}}, "The manifest's model.modelFiles is not a list."),
        ({"model": {"modelFiles": {}}}, "The manifest's model.modelFiles is not a list."),
        ({"model": {"modelFiles": [5]}}, "The manifest's model.modelFiles is not the name of a file."),
        ({"model": {"modelFiles": ["../m.xml"]}}, "model.modelFiles names '../m.xml', which is refused"),
        ({"model": {"modelFiles": ["/m.xml"]}}, "which is refused: its name is an absolute path."),
        ({"model": {"backend": 5}}, "The manifest's model.backend is not a string."),
        ({"model": {"labels": ["a"]}}, "The manifest's model.labels is not the name of a file."),
        ({"model": {"labels": 3}}, "The manifest's model.labels is not the name of a file."),
        ({"model": {"labels": "a/../b"}}, "The manifest's model.labels names 'a/../b', which is refused"),
        ({"model": {"handlerConfig": []}}, "The manifest's model.handlerConfig is not an object."),
        ({"model": {"samples": "a"}}, "The manifest's model.samples is not a list."),
        ({"model": {"samples": {}}}, "The manifest's model.samples is not a list."),
        ({"model": {"samples": [""]}}, "The manifest's model.samples names '', which is refused"),
        ({"files": []}, "The manifest's files is not an object."),
        ({"files": {"../m": {"bytes": 1, "sha256": SHA256}}}, "manifest's files names '../m', which is"),
        ({"files": {"m": 5}}, "The manifest's files.m is not an object."),
        ({"files": {"m": {"sha256": SHA256}}}, "The manifest's files.m.bytes is not a number of bytes."),
        ({"files": {"m": {"bytes": -1, "sha256": SHA256}}}, "files.m.bytes is not a number of bytes."),
        ({"files": {"m": {"bytes": True, "sha256": SHA256}}}, "files.m.bytes is not a number of bytes."),
        ({"files": {"m": {"bytes": 1}}}, "The manifest's files.m.sha256 is not 64 hexadecimal digits."),
        ({"files": {"m": {"bytes": 1, "sha256": SHA256.upper()}}}, "sha256 is not 64 hexadecimal digits."),
    ],
)  # fmt: skip
def test_a_key_of_the_wrong_type_or_a_name_that_leaves_the_archive_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(json.dumps(document(**changed)))
    assert message in str(caught.value)
