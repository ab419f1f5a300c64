"""Every datatype through a worker and back, bit for bit: identity models of Python code and ONNX Runtime."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mms_lite.engine.launcher import InlineLauncher
from mms_lite.engine.model import Model
from mms_lite.tensors import DTYPES, pack
from mms_lite.types import BYTES, InferRequest, Tensor
from mms_lite.worker import loop

RANKS = range(4)
SOURCE = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        same = [pb_utils.Tensor(each.name(), each.as_numpy()) for each in request.inputs()]
        return pb_utils.InferenceResponse(same)
"""
# NaNs that carry something, signalling ones too, infinity, -0 and the least: what arithmetic would change.
ODD_BITS = bytes.fromhex("0100a07f 0000807f 00000080 01000000 010000f0ff7f0000 ffffffff")


@st.composite
def tensors(draw: st.DrawFn, datatypes: list[str], elements: st.SearchStrategy[bytes]) -> Tensor:
    """Any bits in any shape of up to three axes, some of them empty; BYTES of these elements."""
    name = draw(st.sampled_from(datatypes))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=RANKS[-1])))
    count = int(np.prod(shape))
    if name == BYTES:
        shape = shape or (count,)
        data = pack(draw(st.lists(elements, min_size=count, max_size=count)))
    elif name == "BOOL":
        data = bytearray(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    else:
        size = count * DTYPES[name].itemsize
        data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    return Tensor(f"{name}_{len(shape)}", name, shape, data)


async def ask(model: Model, sent: Tensor, output: str) -> Tensor:
    request = InferRequest("id", "m", inputs=[sent], outputs=[output])
    (found,) = (await model.submit(request).answer()).outputs
    return found


@pytest.fixture
async def python_identity(make_model: Callable[..., Model], tmp_path: Path) -> Model:
    """A model with an input of every datatype and rank, each of which a request may leave out."""
    (tmp_path / "model.py").write_text(SOURCE)
    names = {f"{name}_{rank}": (name, rank) for name in DTYPES for rank in RANKS}
    tensors = [
        {"name": each, "data_type": f"TYPE_{'STRING' if name == BYTES else name}", "dims": [-1] * rank}
        for each, (name, rank) in names.items()
    ]
    optional = [{**each, "optional": True} for each in tensors]
    config = {"max_batch_size": 0, "input": optional, "output": tensors}
    manifest = manifest_of("python", "model.py")
    model = make_model(launcher(), path=str(tmp_path), handler="tensor", manifest=manifest, config=config)
    await model.scale(1, 1)
    return model


def launcher() -> InlineLauncher:
    return InlineLauncher(loop.run, max_frame_bytes=1 << 20)


def manifest_of(backend: str, file: str) -> dict[str, Any]:
    return {"model": {"backend": backend, "modelFiles": [file], "handlerConfig": {"allow_nan": True}}}


def content(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return tensor.datatype, tensor.shape, bytes(tensor.data)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=tensors(list(DTYPES), st.binary(max_size=6)))
@example(sent=Tensor("FP32_1", "FP32", (7,), bytearray(ODD_BITS)))
@example(sent=Tensor("FP64_2", "FP64", (1, 3), bytearray(ODD_BITS[:24])))
@example(sent=Tensor("BYTES_1", BYTES, (3,), pack([b"", b"\0", b"\xff\xfe\0"])))
async def test_python_code_gets_and_gives_every_datatype_bit_for_bit(
    python_identity: Model, sent: Tensor
) -> None:
    assert content(await ask(python_identity, sent, sent.name)) == content(sent)


ELEMENT_TYPES = {  # onnx.TensorProto
    **{"FP32": 1, "UINT8": 2, "INT8": 3, "UINT16": 4, "INT16": 5, "INT32": 6, "INT64": 7},
    **{BYTES: 8, "BOOL": 9, "FP16": 10, "FP64": 11, "UINT32": 12, "UINT64": 13},
}


@pytest.fixture
async def onnx_identities(make_model: Callable[..., Model], tmp_path: Path) -> dict[str, Model]:
    """A model for each datatype that ONNX Runtime has, with an input of any rank."""
    onnx = pytest.importorskip("onnx", reason="writes the models")
    pytest.importorskip("onnxruntime", reason="runs the models")
    models = {}
    for name, element in ELEMENT_TYPES.items():
        info = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [info("x", element, None)], [info("y", element, None)])
        opset = [onnx.helper.make_opsetid("", 17)]
        file = f"{name}.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / file)
        model = make_model(
            launcher(), path=str(tmp_path), handler="tensor", manifest=manifest_of("onnxruntime", file)
        )
        await model.scale(1, 1)
        models[name] = model
    return models


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=tensors(list(ELEMENT_TYPES), st.text("a\0é", max_size=4).map(str.encode)))
async def test_onnxruntime_gets_and_gives_its_datatypes_bit_for_bit(
    onnx_identities: dict[str, Model], sent: Tensor
) -> None:
    named = replace(sent, name="x")
    assert content(await ask(onnx_identities[sent.datatype], named, "y")) == content(sent)
