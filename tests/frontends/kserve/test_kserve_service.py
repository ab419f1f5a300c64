"""What the KServe v2 protocol checks, asks and says of models, whatever transport it came by."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mms_lite.errors import (
    BadTensor,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    QueueFull,
)
from mms_lite.frontends.kserve import models
from mms_lite.frontends.kserve.classification import classify, read_labels
from mms_lite.frontends.kserve.errors import of_lookup, of_request
from mms_lite.frontends.kserve.expected import Expected
from mms_lite.frontends.kserve.service import KServeService, RequestedOutput
from mms_lite.metrics import VersionMetrics
from mms_lite.shared import Arena, SharedBytes
from mms_lite.tensors import pack, to_array, to_tensor
from mms_lite.types import BYTES, InferRequest, ModelSpec, Signature, Tensor, TensorSpec

A, B, TEXT = TensorSpec("A", "FP32", (-1, 16)), TensorSpec("B", "INT32", (-1,)), TensorSpec("T", BYTES, (-1,))
OUT = TensorSpec("OUT", "FP32", (-1, 16))
NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended"
    " to each input shape. If you want to specify the full shape including the batch dim in your input dims"
    " config, try setting max_batch_size to zero. See the model configuration docs for more info on"
    " max_batch_size."
)


def spec_of(config: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
    return ModelSpec("X", "1", "/nowhere", config=config, **fields)


def expected(
    *inputs: TensorSpec, config: dict[str, Any] | None = None, outputs: Sequence[TensorSpec] = (OUT,)
) -> Expected:
    return Expected.of(spec_of(config), Signature(inputs, tuple(outputs), True))


def zeros(name: str, shape: tuple[int, ...], kind: Any = np.float32) -> Tensor:
    return to_tensor(name, np.zeros(shape, kind))


def refused(model: Expected, *inputs: Tensor) -> str:
    with pytest.raises(BadTensor) as caught:
        model.check(inputs)
    return caught.value.message


BATCHED = {"max_batch_size": 8}
OPTIONAL = {"max_batch_size": 0, "input": [{"name": "A"}, {"name": "B", "optional": True}]}
MISSING = "Please provide all required input(s)."


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((), f"expected 2 inputs but got 0 inputs for model 'X'. Got input(s) [], but missing required"
             f" input(s) ['A','B']. {MISSING}"),
        (("A",), f"expected 2 inputs but got 1 inputs for model 'X'. Got input(s) ['A'], but missing required"
                 f" input(s) ['B']. {MISSING}"),
        (("A", "B", "C"), "expected 2 inputs but got 3 inputs for model 'X'. Got input(s) ['A','B','C'], but"
                          f" missing required input(s) []. {MISSING}"),
        (("A", "Z"), "unexpected inference input 'Z', allowed inputs are: A, B"),
        (("A", "A"), "input 'A' already exists in request"),
    ],
)  # fmt: skip
def test_inputs_are_those_of_the_model(inputs: tuple[str, ...], said: str) -> None:
    assert refused(expected(A, B), *(zeros(name, (1, 16)) for name in inputs)) == said


def test_optional_inputs_may_be_missing_and_required_ones_not() -> None:
    model = expected(A, B, config=OPTIONAL)
    model.check([zeros("A", (1, 16))])
    counts = "expected number of inputs between 1 and 2 but got 0 inputs for model 'X'."
    assert refused(model).startswith(f"{counts} Got input(s) [], but missing required input(s) ['A'].")
    assert "missing required input(s) ['A']" in refused(model, zeros("B", (1,), np.int32))


def test_a_datatype_is_the_models() -> None:
    said = "inference input 'A' data-type is 'INT32', but model 'X' expects 'FP32'"
    assert refused(expected(A), zeros("A", (1, 16), np.int32)) == said


@pytest.mark.parametrize("shape", [(1, 15), (16,), (1, 1, 16)])
def test_a_shape_is_the_models(shape: tuple[int, ...]) -> None:
    spelt = ",".join(map(str, shape))
    said = f"unexpected shape for input 'A' for model 'X'. Expected [-1,16], got [{spelt}]."
    assert refused(expected(A), zeros("A", shape)) == said
    assert refused(expected(A, config=BATCHED), zeros("A", shape)) in (
        f"{said} {NOTE}", "inference request batch-size must be <= 8 for 'X'"
    )  # fmt: skip


def test_any_rank_fits_an_input_of_any() -> None:
    model = expected(TensorSpec("A", "FP32", None))
    model.check([zeros("A", ())])
    model.check([zeros("A", (1, 2, 3))])


def test_a_batch_is_not_larger_than_the_model_takes() -> None:
    model = expected(A, config=BATCHED)
    model.check([zeros("A", (8, 16))])
    assert refused(model, zeros("A", (9, 16))) == "inference request batch-size must be <= 8 for 'X'"


def test_inputs_have_the_same_batch() -> None:
    model = expected(A, B, config=BATCHED)
    said = "input 'B' batch size does not match other inputs for 'X'"
    assert refused(model, zeros("A", (2, 16)), zeros("B", (3,), np.int32)) == said
    said = "input 'B' has no shape but model requires batch dimension for 'X'"
    assert refused(model, zeros("A", (2, 16)), zeros("B", (), np.int32)) == said


def test_the_bytes_are_those_of_the_shape() -> None:
    short = Tensor("A", "FP32", (1, 16), bytes(60))
    said = "input byte size mismatch for input 'A' for model 'X'. Expected 64, got 60"
    assert refused(expected(A), short) == said
    wide = Tensor("A", "FP32", (1, 16), memoryview(np.zeros(15, np.float32)))
    assert refused(expected(A), wide) == said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pack([b"a"]), "expected 2 string elements for inference input 'T' for model 'X', got 1"),
        (
            pack([b"a", b"b", b"c"]),
            "unexpected number of string elements 3 for inference input 'T' for model 'X', expecting 2",
        ),
        (
            pack([b"a"]) + b"\1\0",
            "incomplete string length indicator for inference input 'T' for model 'X', expecting 4 bytes but",
        ),
        (
            pack([b"a"]) + b"\5\0\0\0abc",
            "incomplete string data for inference input 'T' for model 'X', expecting string of length 5 but",
        ),
    ],
)
def test_text_has_as_many_elements_as_the_shape(data: bytes, said: str) -> None:
    assert refused(expected(TEXT), Tensor("T", BYTES, (2,), data)).startswith(said)


def test_outputs_are_those_of_the_model() -> None:
    model = expected(A)
    with pytest.raises(BadTensor, match=r"^unexpected inference output 'Z', allowed outputs are: OUT$"):
        model.check_outputs(["Z"])
    with pytest.raises(BadTensor, match=r"^output 'OUT' already exists in request$"):
        model.check_outputs(["OUT", "OUT"])


def test_a_handler_of_bodies_takes_any_names_and_what_it_makes_of_arrays() -> None:
    model = Expected.of(spec_of(), Signature())
    model.check([Tensor("photo", BYTES, (1,), pack([b"a"])), zeros("scale", ())])
    assert refused(model).startswith("expected 1 inputs but got 0 inputs")
    assert refused(model, Tensor("body", BYTES, (2,), pack([b"a"]))).startswith("expected 2 string elements")
    assert refused(model, Tensor("body", "FP8", (2,), b"ab")) == "invalid datatype for input body: FP8"


@pytest.mark.parametrize(
    ("spec", "config", "body", "shape"),
    [
        (TensorSpec("A", "FP32", (4,)), None, bytes(16), (4,)),
        (TensorSpec("A", "FP32", (-1, 4)), None, bytes(32), (2, 4)),
        (TensorSpec("A", "FP32", (-1, -1, 4)), None, bytes(32), (1, 2, 4)),
        (TensorSpec("A", "UINT8", (-1, -1)), BATCHED, bytes(7), (1, 7)),
        (TensorSpec("A", "UINT8", (-1, 0)), None, b"", (0, 0)),
        (TensorSpec("T", BYTES, (-1, 1)), BATCHED, b"abc", (1, 1)),
    ],
)
def test_a_body_without_json_has_the_shape_that_its_size_tells(
    spec: TensorSpec, config: Any, body: bytes, shape: tuple[int, ...]
) -> None:
    tensor = expected(spec, config=config, outputs=[spec]).raw_input(bytearray(body))
    assert tensor.shape == shape
    expected(spec, config=config).check([tensor])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((A, B), "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'X' model"),
        (
            (TensorSpec("A", "FP32", (-1, -1, -1)),),
            "The shape of the raw input 'A' can not be deduced because there are more than one",
        ),
        (
            (TensorSpec("T", BYTES, (2,)),),
            "For BYTE datatype raw input 'T', the model must have input shape [1]",
        ),
        ((A,), "The body of the raw input 'A' is empty"),
    ],
)
def test_a_body_without_json_that_tells_no_shape_is_refused(
    inputs: tuple[TensorSpec, ...], said: str
) -> None:
    with pytest.raises(BadTensor) as caught:
        expected(*inputs).raw_input(bytearray(0 if inputs == (A,) else 8))
    assert caught.value.message.startswith(said)


def test_few_of_the_names_that_a_client_makes_up_are_shown() -> None:
    names = [f"{at:05}" + "n" * 1000 for at in range(20_000)]
    for model in (expected(A, B), expected(*[TensorSpec(name, "FP32", (1,)) for name in names])):
        said = refused(model, *[zeros(name, (1,)) for name in names[:19_000]])
        assert "19000 inputs" in said and "more]" in said
        assert len(said) < 3000
    assert len(refused(expected(A), zeros(names[0], (1,)))) < 300
    assert len(refused(expected(A), *[zeros(names[0], (1,))] * 2)) < 300
    with pytest.raises(BadTensor) as caught:
        expected(A).check_outputs(names[:1])
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("model", "count", "said"),
    [
        (
            expected(A, B),
            3,
            "expected 2 inputs but got 3 inputs for model 'X'. Got input(s) ['0','1','2'], but",
        ),
        (Expected.of(spec_of(), Signature()), 1025, "the model takes at most 1024 inputs, got 1025"),
    ],
)
def test_more_inputs_than_a_model_takes_are_refused_by_their_names(
    model: Expected, count: int, said: str
) -> None:
    model.check_count([str(at) for at in range(count - 1)])
    with pytest.raises(BadTensor) as caught:
        model.check_count([str(at) for at in range(count)])
    assert caught.value.message.startswith(said)


def asked(**fields: Any) -> InferRequest:
    inputs = [to_tensor(name, np.ones((1, 4), np.float32)) for name in ("x", "y")]
    return InferRequest(fields.pop("id", ""), "double", inputs=inputs, **fields)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"timeout": "1"}, "Unable to parse 'timeout'"),
        ({"timeout": -1}, "Unable to parse 'timeout'"),
        ({"timeout": True}, "Unable to parse 'timeout'"),
        ({"priority": 1.5}, "Unable to parse 'priority'"),
        ({"sequence_id": 1.5}, "Unable to parse 'sequence_id'"),
        ({"sequence_start": 1}, "Unable to parse 'sequence_start'"),
        ({"triton_x": 1}, "parameter keys starting with 'triton_' are reserved for Triton usage"),
        ({"x": [1]}, "Unable to parse 'parameters': 'x' is no text, number or boolean"),
        ({"x": {"deep": {}}}, "Unable to parse 'parameters': 'x' is no text, number or boolean"),
        ({"x": None}, "Unable to parse 'parameters': 'x' is no text, number or boolean"),
        ({"x": math.nan}, "Unable to parse 'parameters': 'x' is no finite number"),
        ({"x": 10**400}, "Unable to parse 'parameters': 'x' is beyond 64 bits"),
        ({str(at): at for at in range(1001)}, "a request has at most 1000 parameters"),
        ({"x": "y" * 65_000, "z": "y" * 1000}, "the parameters of a request have at most 65536 characters"),
    ],
)
async def test_a_parameter_that_is_not_as_it_must_be_is_refused(
    service: KServeService, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await service.infer(asked(parameters=parameters), None)
    assert caught.value.message.startswith(said)


async def test_models_get_the_parameters_that_are_not_ours(
    service: KServeService, monkeypatch: pytest.MonkeyPatch, double: None
) -> None:
    seen: list[InferRequest] = []
    infer = service.engine.infer

    async def remember(request: InferRequest) -> Any:
        seen.append(request)
        return await infer(request)

    monkeypatch.setattr(service.engine, "infer", remember)
    given = {"timeout": 10_000_000, "priority": 1, "binary_data_output": True, "sequence_id": 7, "mine": "x"}
    both = [RequestedOutput("minus"), RequestedOutput("twice")]
    before = time.monotonic()
    await service.infer(asked(parameters=given), both, call_id="ours")
    await service.infer(asked(deadline=before + 5, parameters=given), both[:1])
    first, second = seen
    assert first.parameters == {"sequence_id": 7, "mine": "x"}
    assert first.deadline is not None and before + 10 <= first.deadline < before + 60
    assert second.deadline == before + 5
    # All outputs are no choice of some, so that such requests share a batch.
    assert (first.id, first.outputs, second.outputs) == ("ours", None, ["minus"])


async def test_a_timeout_in_microseconds_is_a_deadline(
    service: KServeService, inline: Any, tmp_path: Path
) -> None:
    await inline.load("gate")
    gate = tmp_path / "open"
    body = Tensor("body", BYTES, (1,), pack([str(gate).encode()]))
    with pytest.raises(DeadlineExceeded):
        await service.infer(InferRequest("", "gate", inputs=[body], parameters={"timeout": 20_000}), None)
    await asyncio.to_thread(gate.touch)


@pytest.mark.usefixtures("double")
async def test_a_timeout_beyond_all_measure_is_none(service: KServeService) -> None:
    answer = await service.infer(asked(parameters={"timeout": 10**400}), None)
    assert [each.name for each in answer.outputs] == ["twice", "minus"]


async def test_what_a_model_misses_is_not_said_of_the_model_itself(
    service: KServeService, inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await inline.load("echo")
    gone: list[str] = []

    async def fail(request: InferRequest) -> Any:
        if gone:
            await inline.engine.unload(gone[0])
        raise ModelNotFound("Model not found: other", name="other")

    monkeypatch.setattr(service.engine, "infer", fail)
    request = InferRequest("", "echo", inputs=[Tensor("body", BYTES, (1,), pack([b"x"]))])
    with pytest.raises(ModelNotFound, match="Model not found: other"):
        await service.infer(request, None)
    gone.append("echo")
    with pytest.raises(ModelNotFound, match="Request for unknown model: 'echo' is not found"):
        await service.infer(request, None)


async def test_many_texts_are_looked_at_in_a_thread(
    service: KServeService, inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await inline.load("echo")
    where: list[threading.Thread] = []
    check = Expected.check

    def remember(model: Expected, inputs: Sequence[Tensor]) -> None:
        where.append(threading.current_thread())
        check(model, inputs)

    monkeypatch.setattr(Expected, "check", remember)
    photo = Tensor("body", BYTES, (1,), pack([bytes(2 << 20)]))
    await service.infer(InferRequest("", "echo", inputs=[photo]), None)
    with pytest.raises(BadTensor, match="at most 100 bodies"):
        texts = Tensor("body", BYTES, (20_000,), bytes(80_000))
        await service.infer(InferRequest("", "echo", inputs=[texts]), None)
    here = threading.current_thread()
    assert [each is here for each in where] == [True, False]


async def test_a_handler_of_bodies_has_one_output(service: KServeService, inline: Any) -> None:
    await inline.load("echo")
    request = InferRequest("", "echo", inputs=[Tensor("body", BYTES, (1,), pack([b"x"]))])
    answer = await service.infer(request, [RequestedOutput("body")])
    assert [each.name for each in answer.outputs] == ["body"]
    with pytest.raises(BadTensor, match="unexpected inference output 'z', allowed outputs are: body"):
        await service.infer(request, [RequestedOutput("z")])


async def test_the_outputs_of_a_handler_that_knows_arrays_are_those_of_its_answer(
    service: KServeService, model: Callable[..., Awaitable[Any]]
) -> None:
    await model("pair", "def handle(data, _): return data and [{'a': d['x'], 'b': d['x'] * 2} for d in data]")
    request = InferRequest("", "pair", inputs=[zeros("x", (1, 2))])
    for names in (["b"], ["b", "a"]):
        answer = await service.infer(request, [RequestedOutput(name) for name in names])
        assert [each.name for each in answer.outputs] == names
    with pytest.raises(BadTensor, match="unexpected inference output 'z', allowed outputs are: a, b"):
        await service.infer(request, [RequestedOutput("z")])


async def test_the_outputs_that_a_request_wants_have_a_bound(
    service: KServeService, model: Callable[..., Awaitable[Any]]
) -> None:
    await model(
        "any", "def handle(data, _): return data and [{f'{n:x}': d['x'] for n in range(2000)} for d in data]"
    )
    request = InferRequest("", "any", inputs=[zeros("x", (1, 1))])
    wanted = [RequestedOutput(f"{number:x}") for number in range(1025)]
    assert len((await service.infer(request, wanted[:-1])).outputs) == 1024
    with pytest.raises(BadTensor, match="a request wants at most 1024 outputs, got 1025"):
        await service.infer(request, wanted)
    with pytest.raises(BadTensor, match="at most 1024 outputs"):
        expected(A).check_outputs([each.name for each in wanted])


async def test_texts_beside_arrays_keep_their_place_in_shared_memory(
    arena: Arena,
    placed: Callable[[bytes], SharedBytes],
    service: KServeService,
    model: Callable[..., Awaitable[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[InferRequest] = []
    ask = service.engine.infer

    async def remember(request: InferRequest) -> Any:
        asked.append(request)
        return await ask(request)

    await model("size", "def handle(data, _): return data and [str(len(each['text'][0])) for each in data]")
    monkeypatch.setattr(service.engine, "infer", remember)
    text = Tensor("text", BYTES, (1,), placed(pack([b"x" * 50_000])))
    answer = await service.infer(InferRequest("", "size", inputs=[text, zeros("x", (1, 1))]), None)
    assert list(to_array(answer.outputs[0])) == [b"50000"]
    assert isinstance(asked[0].inputs[0].data, SharedBytes)
    del text
    asked.clear()
    assert arena.used_bytes == 0


async def test_a_model_without_workers_is_not_ready(service: KServeService, inline: Any) -> None:
    await inline.load("echo", workers=0)
    assert service.model_ready("echo", None) is False
    await inline.engine.scale("echo", 1, 1)
    assert service.model_ready("echo", None) is True
    await inline.engine.scale("echo", 0, 0)
    assert service.model_ready("echo", None) is False
    with pytest.raises(ModelNotReady):
        await service.infer(InferRequest("", "echo", inputs=[]), None)
    ((_, metrics),) = inline.engine.statistics("echo")
    assert metrics.refusals["no_workers"] == 1


@pytest.mark.usefixtures("double")
async def test_the_id_of_a_request_has_a_bound(service: KServeService) -> None:
    assert (await service.infer(asked(id="x" * 1024), None)).id == "x" * 1024
    with pytest.raises(InvalidRequest, match="the id of a request has at most 1024 characters"):
        await service.infer(asked(id="x" * 1025), None)


@pytest.mark.usefixtures("double")
async def test_a_model_that_is_loaded_anew_is_checked_anew(
    service: KServeService, tensor_model: Callable[..., Awaitable[Any]], inline: Any
) -> None:
    await service.infer(asked(), None)
    await inline.engine.unload("double")
    (inline.store.folder / "double").rename(inline.store.folder / "old")
    x = TensorSpec("x", "FP32", (-1, 4))
    await tensor_model("double", [x], [x], "out = x")
    with pytest.raises(BadTensor, match="expected 1 inputs but got 2 inputs"):
        await service.infer(asked(), None)


def classes(array: Any, count: int, labels: Sequence[str] = (), *, batched: bool = False) -> Any:
    found = to_array(classify(to_tensor("y", np.array(array)), count, labels, batched=batched))
    return np.vectorize(bytes.decode, otypes=[object])(found).tolist()


def test_the_highest_elements_come_first_with_index_and_label() -> None:
    scores = np.array([1, 5, 10, 4], np.float32)
    assert classes(scores, 2) == ["10.000000:2", "5.000000:1"]
    assert classes(scores, 2, ["a", "b", "apple"]) == ["10.000000:2:apple", "5.000000:1:b"]
    assert classes(scores, 9, ["a", "b"]) == ["10.000000:2", "5.000000:1:b", "4.000000:3", "1.000000:0:a"]


def test_the_highest_of_each_row_and_of_equal_ones_the_first() -> None:
    rows = np.array([[3, 7, 7], [0, -1, -2]], np.int64)
    assert classes(rows, 2, batched=True) == [["7:1", "7:2"], ["0:0", "-1:1"]]
    assert classes(rows, 2) == ["7:1", "7:2"]
    assert classes(np.array([255, 1], np.uint8), 1) == ["255:0"]


def test_the_classes_of_many_rows_have_a_bound() -> None:
    scores = np.zeros((1000, 101), np.uint8)
    assert np.shape(classes(scores, 100, batched=True)) == (1000, 100)
    with pytest.raises(BadTensor, match="output 'y' would be 101000 classes; 100000 are the most"):
        classes(scores, 101, batched=True)


async def test_a_large_output_is_classified_in_a_thread(
    service: KServeService, tensor_model: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = TensorSpec("x", "UINT8", (-1, -1))
    await tensor_model("same", [x], [x], "out = x")
    where: list[threading.Thread] = []

    def remember(*args: Any, **more: Any) -> Tensor:
        where.append(threading.current_thread())
        return classify(*args, **more)

    monkeypatch.setattr("mms_lite.frontends.kserve.service.classify", remember)
    for columns in (10, 10_000):
        inputs = [zeros("x", (2, columns), np.uint8)]
        request = InferRequest("", "same", inputs=inputs)
        (output,) = (await service.infer(request, [RequestedOutput("x", classification=1)])).outputs
        assert output.shape == (2, 1)
    assert [each is threading.current_thread() for each in where] == [True, False]


def test_text_has_no_order() -> None:
    with pytest.raises(
        BadTensor, match="class result not available for output due to unsupported type 'BYTES'"
    ):
        classify(Tensor("y", BYTES, (1,), pack([b"a"])), 1, (), batched=False)


async def test_labels_of_an_archive_are_found(
    service: KServeService, tensor_model: Callable[..., Awaitable[Any]], inline: Any
) -> None:
    x = TensorSpec("x", "FP32", (-1, 3))
    manifest = {"model": {"modelName": "named", "handler": "service", "labels": "labels.txt"}}
    inline.store.put(
        "named", {"labels.txt": "cat\ndog\nbird\n", "MAR-INF/MANIFEST.json": json.dumps(manifest)}
    )
    await tensor_model("named", [x], [x], "out = x")
    scores = to_tensor("x", np.array([[0.1, 0.7, 0.2], [1, 0, 0]], np.float32))
    request = InferRequest("", "named", inputs=[scores])
    answer = await service.infer(request, [RequestedOutput("x", classification=1)])
    (found,) = answer.outputs
    assert (found.shape, to_array(found).tolist()) == ((2, 1), [[b"0.700000:1:dog"], [b"1.000000:0:cat"]])


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        ({"labelsByOutput": {"y": ["a", "b"]}}, ["a", "b"]),
        ({"labelsByOutput": {"z": ["a", "b"]}}, []),
        ({"labels": "labels.json"}, ["a", "ü"]),
        ({"labels": "labels.json", "handlerConfig": {"label_offset": 1}}, ["", "a", "ü"]),
        ({"labels": "missing.txt"}, []),
        ({"labels": "../secret.txt"}, []),
        ({"labels": "broken.json"}, []),
        ({}, []),
        (None, []),
    ],
)
def test_labels_are_those_of_the_model_and_of_no_other_file(
    tmp_path: Path, model: Any, labels: list[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "labels.json").write_text('["a", "ü"]', encoding="utf-8")
    (folder / "broken.json").write_text("{")
    assert read_labels(ModelSpec("m", "1", str(folder), manifest={"model": model}), "y") == labels


def test_a_models_metadata_are_its_tensors_and_what_runs_it() -> None:
    signature = Signature((A, TensorSpec("any", "INT64", None)), (OUT,), True)
    found = models.metadata(spec_of(manifest={"model": {"backend": "onnx"}}), signature, ["1", "2"])
    assert found == {
        "name": "X",
        "versions": ["1", "2"],
        "platform": "onnx",
        "inputs": [
            {"name": "A", "datatype": "FP32", "shape": [-1, 16]},
            {"name": "any", "datatype": "INT64", "shape": [-1]},
        ],
        "outputs": [{"name": "OUT", "datatype": "FP32", "shape": [-1, 16]}],
    }
    assert (
        models.metadata(spec_of({"platform": "", "backend": "python"}), signature, [])["platform"] == "python"
    )
    assert models.metadata(spec_of(), Signature(), [])["inputs"] == [
        {"name": "body", "datatype": "BYTES", "shape": [-1]}
    ]


def test_the_configuration_of_a_repository_is_told_as_it_is() -> None:
    config = {"name": "X", "max_batch_size": 8, "input": [{"name": "A", "dims": [16]}]}
    assert models.config(spec_of(config), Signature((A,), (OUT,), True)) == config


def test_a_configuration_is_made_for_other_models() -> None:
    spec = spec_of(batch_size=4, max_batch_delay_ms=2, max_workers=3)
    found = models.config(spec, Signature((A,), (OUT,), True))
    any_number = 2**31 - 1  # as the metadata and the checks have it: batch_size bounds joining alone
    assert (found["max_batch_size"], found["input"][0]["dims"]) == (any_number, [16])
    assert found["dynamic_batching"]["preferred_batch_size"] == [4]
    alone = models.config(spec_of(), Signature((A,), (OUT,), True))
    assert (alone["max_batch_size"], "dynamic_batching" in alone) == (any_number, False)
    assert found["input"][0]["data_type"] == "TYPE_FP32"
    assert found["dynamic_batching"]["max_queue_delay_microseconds"] == 2000
    assert found["instance_group"][0]["count"] == 3
    fixed = models.config(spec, Signature((TensorSpec("A", "FP32", (16,)),), (OUT,), True))
    assert (fixed["max_batch_size"], fixed["input"][0]["dims"]) == (0, [16])
    assert "dynamic_batching" not in fixed
    bodies = models.config(spec, Signature())
    assert (bodies["max_batch_size"], bodies["input"][0]["data_type"]) == (0, "TYPE_STRING")


def test_statistics_add_up() -> None:
    seen = VersionMetrics()
    for rows, seconds in ((1, 0.5), (4, 1.0), (4, 1.0)):
        seen.end_batch(rows, seconds, answered=rows)
    seen.end_batch(4, 7.0, answered=0)
    for _ in range(3):
        seen.end_job(1.0, queued_s=0.25, failed=False)
    seen.end_job(2.0, queued_s=1.5, failed=True)
    found = models.statistics(spec_of(), seen)
    assert (found["inference_count"], found["execution_count"]) == (9, 3)
    stats = found["inference_stats"]
    assert stats["success"] == {"count": 3, "ns": 3_000_000_000}
    assert stats["fail"] == {"count": 1, "ns": 2_000_000_000}
    assert stats["queue"] == {"count": 3, "ns": 750_000_000}
    assert stats["compute_infer"] == {"count": 3, "ns": 2_250_000_000}
    assert [(each["batch_size"], each["compute_infer"]) for each in found["batch_stats"]] == [
        (1, {"count": 1, "ns": 500_000_000}), (4, {"count": 2, "ns": 2_000_000_000})
    ]  # fmt: skip
    assert found["last_inference"] >= 1_600_000_000_000


def test_what_is_not_ready_is_said_with_its_reason() -> None:
    error = of_lookup(ModelNotReady("model X is loading"), "X", "1")
    assert (
        error.message == "Request for unknown model: 'X' version 1 is not at ready state: model X is loading"
    )


def test_a_full_queue_names_the_request_and_keeps_its_numbers() -> None:
    error = of_request(QueueFull("full", depth=3), "7")
    assert (error.message, error.details) == ("[request id: 7] full", {"depth": 3})


@pytest.mark.usefixtures("double")
async def test_versions_are_listed_by_number(service: KServeService, inline: Any) -> None:
    for version in ("10", "2"):
        await inline.engine.load(inline.options("double", version=version, replace=True))
    assert service.model_metadata("double", "")["versions"] == ["1", "2", "10"]
    assert service.model_metadata("double", "2")["versions"] == ["2"]
    assert service.model_ready("double", "-1")


async def test_a_model_that_cannot_answer_is_not_ready(service: KServeService, inline: Any) -> None:
    with pytest.raises(Exception, match="the weights are missing"):
        await inline.load("bad_init", at_startup=True)
    assert not service.model_ready("bad_init", None)
