"""The examples of the protocol's documents, each a request with its answer in golden/kserve."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from raw_http import Answer

from mms_lite.types import TensorSpec

FILES = sorted((Path(__file__).parents[1] / "golden" / "kserve").glob("*.json"))
GOLDEN = {file.stem: json.loads(file.read_text()) for file in FILES}

INPUT0, INPUT1 = TensorSpec("input0", "UINT32", (2, 2)), TensorSpec("input1", "BOOL", (3,))
# What the documents assume of their model, by the name of the file's model.
MODELS: dict[str, tuple[Any, ...]] = {
    "mymodel": (
        (INPUT0, INPUT1),
        (TensorSpec("output0", "FP32", (3, 2)),),
        """
        assert x["input0"].tolist() == [[1, 2], [3, 4]] and x["input1"].tolist() == [True, False, True]
        out = {"output0": np.array([[1.0, 1.1], [2.0, 2.1], [3.0, 3.1]], np.float32)}
        """,
    ),
    "classes": (
        (INPUT0,),
        (TensorSpec("output0", "FP32", (4,)),),
        "out = {'output0': np.array([1.1, 3.3, 0.5, 2.4], np.float32)}",
    ),
}


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
async def test_an_example_of_the_documents_is_answered_as_documented(
    golden: dict[str, Any],
    tensor_model: Callable[..., Awaitable[Any]],
    call: Callable[..., Awaitable[Answer]],
) -> None:
    if golden["model"]:
        await tensor_model(golden["model"], *MODELS[golden["model"]])
    asked, expected = golden["request"], golden["answer"]
    head = json.dumps(asked["json"], indent=2).encode() if "json" in asked else b""
    behind = bytes.fromhex(asked.get("binary", ""))
    length = [("inference-header-content-length", str(len(head)))] if behind else []
    answer = await call(
        asked["method"], asked["path"], head + behind, *asked.get("headers", {}).items(), *length
    )
    size = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    assert (answer.status, answer.headers.get("content-type")) == (expected["status"], expected["type"])
    assert json.loads(answer.body[:size]) == expected["json"]
    assert answer.body[size:] == bytes.fromhex(expected.get("binary", ""))
