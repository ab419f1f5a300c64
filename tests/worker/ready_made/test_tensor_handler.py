"""The tensor handler: bodies and tensors in, all outputs of the model out, whatever the framework."""

import base64
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mms_lite.errors import (
    BackendMissing,
    BadTensor,
    HandlerError,
    InvalidArchive,
    InvalidRequest,
    ServingError,
    UnsupportedMedia,
)
from mms_lite.handlers import tensor
from mms_lite.handlers.package import Package
from mms_lite.handlers.tensor import TensorHandler, TensorSettings, preferred
from mms_lite.tensors import to_array, to_tensor
from mms_lite.types import InferRequest, Tensor, TensorSpec
from mms_lite.wire import Item, Outcome
from mms_lite.worker.context import Context
from mms_lite.worker.entry import Entry
from mms_lite.worker.handler import MmsHandler
from mms_lite.worker.predictor import Predictor

Arrays = dict[str, np.ndarray]


class Model:
    """A model of which a test says what it computes; it keeps the batches that it was run on."""

    metadata: Mapping[str, str] = {}

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], run: Callable[[Arrays], Arrays]
    ) -> None:
        self.inputs, self.outputs, self._run = inputs, outputs, run
        self.batches: list[Arrays] = []

    def infer(self, inputs: Mapping[str, np.ndarray], _outputs: Sequence[str]) -> Arrays:
        self.batches.append(dict(inputs))
        return self._run(dict(inputs))

    def close(self) -> None:
        pass


def doubling() -> Model:
    x, y = TensorSpec("x", "FP32", (-1, 3)), TensorSpec("y", "FP32", (-1, 3))
    return Model([x], [y], lambda arrays: {"y": arrays["x"] * 2})


def adding() -> Model:
    """a + b, and a as it came."""
    a, b = TensorSpec("a", "INT32", (-1,)), TensorSpec("b", "INT32", (-1,))
    outputs = [TensorSpec("sum", "INT32", (-1,)), TensorSpec("same", "INT32", (-1,))]
    return Model([a, b], outputs, lambda arrays: {"sum": arrays["a"] + arrays["b"], "same": arrays["a"]})


def shouting() -> Model:
    spec = TensorSpec("text", "BYTES", (-1,))

    def run(arrays: Arrays) -> Arrays:
        return {"text": np.array([each.upper() for each in arrays["text"]], np.object_)}

    return Model([spec], [spec], run)


def serve(model: Model, model_config: Mapping[str, Any] | None = None, **config: Any) -> MmsHandler:
    handler = TensorHandler()
    handler.package = Package(Path("/"), "onnxruntime", (), None, {}, model_config=model_config)
    handler.settings = TensorSettings(**config)
    handler.predictor = Predictor(model, allow_nan=handler.settings.allow_nan, batch=True)
    handler.prepare()
    context = Context("m", "/", None, 8, None, "1")
    entry = Entry(handler.handle, tensor, handler.signature)
    return MmsHandler(entry, context, name="tensor", isolate=True, decode=True)


def raw(body: bytes | str, kind: str = "", name: str = "body") -> Tensor:
    return Tensor(name, "BYTES", (), bytearray(body.encode() if isinstance(body, str) else body), kind)


def run(served: MmsHandler, *requests: Sequence[Tensor], accept: str | None = None) -> list[Outcome]:
    headers = [] if accept is None else [("Accept", accept)]
    items = [
        Item(n, None, InferRequest(id=f"r{n}", model="m", inputs=inputs, headers=headers))
        for n, inputs in enumerate(requests)
    ]
    outcomes: list[Outcome] = []
    served.run(items, lambda _: None, outcomes.extend)
    return sorted(outcomes, key=lambda each: each.job_id)


def answer(served: MmsHandler, *inputs: Tensor, accept: str | None = None) -> Any:
    """Return what a JSON answer holds, or the one error."""
    (outcome,) = run(served, inputs, accept=accept)
    if outcome.error is not None:
        return outcome.error
    assert outcome.outputs[0].content_type == "application/json"
    return json.loads(outcome.outputs[0].data)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


X = np.array([[1, 2, 3]], np.float32)
A, B = np.array([1, 2], np.int32), np.array([10, 20], np.int32)


@pytest.mark.parametrize(
    "part",
    [
        raw('{"x": [[1, 2, 3]]}', "application/json"),
        raw('{"input": [[1, 2, 3]]}', "application/json"),
        raw("[[1, 2, 3]]", "application/json"),
        raw('\ufeff {"x": [[1, 2.0, 3]]}'),
        raw("[[1, 2, 3]]", "text/plain"),
        raw("[[1, 2, 3]]", name="x"),
        raw("[[1, 2, 3]]", name="anything"),
        raw(npy(X), "application/x-npy"),
        raw(npy(X), "application/x-www-form-urlencoded"),
        raw(npy(np.asfortranarray(X).astype(">f4"))),
        raw(npy(X), "application/octet-stream", name="file"),
        raw(npz(x=X), "application/x-npz"),
        raw(npz(x=X)),
    ],
    ids=lambda part: f"{part.content_type} {part.name} {bytes(part.data[:20])!r}",
)
def test_one_input_is_read_however_it_is_sent(part: Tensor) -> None:
    assert answer(serve(doubling()), part) == {"y": [[2.0, 4.0, 6.0]]}


@pytest.mark.parametrize(
    "parts",
    [
        [raw('{"a": [1, 2], "b": [10, 20.0]}', "application/json")],
        [raw(npz(a=A, b=B))],
        [raw("[1, 2]", name="a"), raw(npy(B), "application/octet-stream", name="b")],
        [raw("m", name="model_name"), raw('{"a": [1, 2], "b": [10, 20]}')],
        [raw("m", name="model_name"), raw("[1, 2]", name="a"), raw("[10, 20]", name="b"), raw("")],
    ],
)
def test_several_inputs_are_read_by_their_names(parts: list[Tensor]) -> None:
    assert answer(serve(adding()), *parts) == {"sum": [11, 22], "same": [1, 2]}


@pytest.mark.parametrize(
    ("part", "code", "message"),
    [
        (raw(""), "invalid_request", "the request has no body; the model takes x FP32 [-1,3], as"),
        (raw(b"\x00\x01\x02\x03"), "unsupported_media", "application/json, application/x-npy or application"),
        (raw("1,2,3 and text", "text/csv"), "invalid_request", "looks like JSON and is not: Extra data"),
        (raw("a,b", "text/csv"), "unsupported_media", "of no kind that is read here"),
        (raw("[1, 2", ""), "invalid_request", "looks like JSON and is not: Expecting ',' delimiter"),
        (raw("[" * 100_000), "invalid_request", "looks like JSON and is not: maximum recursion depth"),
        (raw("{}"), "bad_tensor", "input 'x' is missing; the model takes: x FP32 [-1,3]"),
        (raw('{"z": [1]}'), "bad_tensor", "no input 'z'; the model takes: x FP32 [-1,3]"),
        (raw("[1, 2, 3]"), "bad_tensor", "the model expects FP32 [-1,3], got FP32 [3]"),
        (raw("[[1, 2]]"), "bad_tensor", "the model expects FP32 [-1,3], got FP32 [1,2]"),
        (raw("[]"), "bad_tensor", "the model expects FP32 [-1,3], got FP32 [0]"),
        (raw("[[1, 2, NaN]]"), "bad_tensor", "got no finite number: NaN at [0, 2]"),
        (raw(npy(X.astype(np.float64))), "bad_tensor", "expects FP32 [-1,3], got FP64 [1,3]"),
        (raw(npy(X * np.nan)), "bad_tensor", "input 'x' has elements that are not numbers (NaN)"),
        (raw(npy(X)[:-1]), "bad_tensor", "which is 12 bytes, and 11 bytes follow"),
        (raw(npz(z=X)), "bad_tensor", "one each of x.npy; got: 'z.npy'"),
        (raw("", name='{"x": [[1,2,3]]}'), "invalid_request", "looks like JSON: send it as application/json"),
        (raw('"\\ud800"', "application/json"), "unsupported_media", "of no kind that is read here"),
    ],
)
def test_what_cannot_be_read_is_told_to_the_client(part: Tensor, code: str, message: str) -> None:
    error = answer(serve(doubling()), part)
    assert isinstance(error, ServingError)
    assert (error.code, message in error.message) == (code, True), error.message


@pytest.mark.parametrize("body", [b"[1, 2]", npy(A)])
def test_an_array_without_a_name_is_not_guessed_at_where_there_are_several_inputs(body: bytes) -> None:
    error = answer(serve(adding()), raw(body))
    assert isinstance(error, InvalidRequest)
    assert "names no input; the model takes a INT32 [-1]; b INT32" in error.message


@pytest.mark.parametrize(
    ("model", "name"), [(doubling, "x"), (doubling, "input"), (adding, "a")], ids=["x", "input", "a"]
)
def test_a_part_beside_an_input_that_is_none_is_told_of(model: Callable[[], Model], name: str) -> None:
    error = answer(serve(model()), raw("[[1, 2, 3]]", name=name), raw("[[1, 2, 3]]", name="oops"))
    assert isinstance(error, BadTensor)
    assert "the model has no input 'oops'; the model takes: " in error.message


def test_a_model_without_inputs_is_told_of_and_answers() -> None:
    served = serve(Model([], [TensorSpec("y", "FP32", (1,))], lambda _: {"y": np.ones(1, np.float32)}))
    for nothing in ("{}", ""):
        assert answer(served, raw(nothing)) == {"y": [1.0]}
    for body in ("[1]", b"\0"):
        error = answer(served, raw(body))
        assert isinstance(error, InvalidRequest)
        assert error.message.endswith("; the model takes no inputs: send {} as application/json")


def test_texts_go_in_and_out() -> None:
    encoded = base64.b64encode(b"\xffb").decode()
    found = answer(serve(shouting()), raw(json.dumps({"text": ["a", {"b64": encoded}]})))
    assert found == {"text": ["A", {"b64": base64.b64encode(b"\xffB").decode()}]}


def test_requests_of_a_batch_run_together_and_a_bad_one_fails_alone() -> None:
    model = doubling()
    found = run(
        serve(model), [raw("[[1, 2, 3]]")], [raw("[[1]]")], [raw("[[4, 5, 6], [7, 8, 9]]")], [raw("[")]
    )
    assert [batch["x"].shape for batch in model.batches] == [(3, 3)]
    assert [each.error is None for each in found] == [True, False, True, False]
    assert json.loads(found[2].outputs[0].data) == {"y": [[8.0, 10.0, 12.0], [14.0, 16.0, 18.0]]}


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("application/x-npy", "application/x-npy"),
        ("text/html, application/x-npz", "application/x-npz"),
    ],
)
def test_the_accept_header_chooses_the_type_of_the_answer(accept: str | None, kind: str) -> None:
    (outcome,) = run(serve(doubling()), [raw(npy(X))], accept=accept)
    body = outcome.outputs[0]
    assert body.content_type == kind
    read = {
        "application/json": lambda file: np.array(json.load(file)["y"], np.float32),
        "application/x-npy": np.load,
        "application/x-npz": lambda file: np.load(file)["y"],
    }
    found = read[kind](io.BytesIO(body.data))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, X * 2)


@pytest.mark.parametrize(
    ("model", "body", "accept", "message"),
    [
        (doubling, "[[1,2,3]]", "text/html", "outputs y and can be application/json or application/x-npy or"),
        (adding, '{"a": [1], "b": [2]}', "application/x-npy", "can be application/json or application/x-npz"),
        (shouting, '["a"]', "application/x-npz", "outputs text and can be application/json; the request"),
    ],
)
def test_an_accept_header_that_nothing_fits_is_told_what_there_is(
    model: Callable[[], Model], body: str, accept: str, message: str
) -> None:
    error = answer(serve(model()), raw(body), accept=accept)
    assert isinstance(error, InvalidRequest)
    assert message in error.message


@pytest.mark.parametrize(
    ("kind", "advice"), [(np.float32, "ask for application/x-npy or application/x-npz"), (str, "send fewer")]
)
def test_an_answer_that_is_too_large_for_json_is_refused_before_it_is_one(kind: type, advice: str) -> None:
    model = doubling()
    model._run = lambda arrays: {"y": np.broadcast_to(np.zeros((), kind), (1, 4_000_001))}
    error = answer(serve(model), raw("[[1, 2, 3]]"))
    assert isinstance(error, InvalidRequest)
    assert f"the answer has 4000001 elements, and JSON at most 4000000: {advice}" in error.message
    if kind is np.float32:
        (outcome,) = run(serve(model), [raw("[[1, 2, 3]]")], accept="application/x-npy")
        assert np.load(io.BytesIO(outcome.outputs[0].data)).shape == (1, 4_000_001)


def test_infinity_goes_in_as_a_file_and_nan_does_not() -> None:
    """Masks of attention hold -Infinity; JSON has no number for it."""
    model = doubling()
    model._run = lambda arrays: {"y": np.isinf(arrays["x"])}
    assert answer(serve(model), raw(npy(np.array([[1, 2, -np.inf]], np.float32)))) == {
        "y": [[False, False, True]]
    }
    assert isinstance(answer(serve(model), raw("[[1, 2, -Infinity]]")), BadTensor)


def test_nan_in_an_answer_needs_a_file() -> None:
    model = doubling()
    model._run = lambda arrays: {"y": arrays["x"] * np.nan}
    error = answer(serve(model), raw("[[1, 2, 3]]"))
    assert isinstance(error, HandlerError)
    assert "the output 'y' holds NaN" in error.message
    (outcome,) = run(serve(model), [raw("[[1, 2, 3]]")], accept="application/x-npy")
    assert np.isnan(np.load(io.BytesIO(outcome.outputs[0].data))).all()


def test_tensors_are_answered_with_tensors() -> None:
    served = serve(adding())
    (outcome,) = run(served, [to_tensor("a", A), to_tensor("b", B)])
    found = {each.name: to_array(each) for each in outcome.outputs}
    assert {name: array.tolist() for name, array in found.items()} == {"sum": [11, 22], "same": [1, 2]}
    assert found["sum"].dtype == np.int32
    for inputs, message in (
        ([to_tensor("a", A)], "input 'b' is missing"),
        ([to_tensor("a", A), to_tensor("b", B.astype(np.int64))], "expects INT32 [-1], got INT64 [2]"),
        ([to_tensor("a", A), raw("[1, 2]", name="b")], "input 'b' is a raw part beside tensors"),
    ):
        (outcome,) = run(served, inputs)
        assert outcome.error is not None
        assert message in outcome.error.message


def test_a_request_without_inputs_is_answered_with_tensors() -> None:
    y = TensorSpec("y", "FP32", (1,))
    (outcome,) = run(serve(Model([], [y], lambda _: {"y": np.ones(1, np.float32)})), [])
    assert [(each.name, to_array(each).tolist()) for each in outcome.outputs] == [("y", [1])]
    (outcome,) = run(serve(doubling()), [])
    assert outcome.error is not None
    assert outcome.error.message == "input 'x' is missing; the model takes: x FP32 [-1,3]"


def test_tensors_are_answered_with_the_outputs_that_each_request_names() -> None:
    model = adding()
    served = serve(model)
    tensors = [to_tensor("a", A), to_tensor("b", B)]
    requests = [InferRequest(id="r", model="m", inputs=tensors, outputs=o) for o in (["same"], None, ["z"])]
    outcomes: list[Outcome] = []
    served.run([Item(n, None, each) for n, each in enumerate(requests)], lambda _: None, outcomes.extend)
    one, every, refused = sorted(outcomes, key=lambda each: each.job_id)
    assert [each.name for each in one.outputs] == ["same"]
    assert [each.name for each in every.outputs] == ["sum", "same"]
    assert refused.error is not None
    assert refused.error.message == "unexpected inference output 'z', allowed outputs are: sum, same"
    assert len(model.batches) == 1


def test_bfloat16_is_written_as_the_float32_that_it_is() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes", reason="has the type of BF16").bfloat16
    x, y = TensorSpec("x", "FP32", (-1, 3)), TensorSpec("y", "BF16", (-1, 3))
    served = serve(Model([x], [y], lambda arrays: {"y": arrays["x"].astype(bfloat16)}))
    assert answer(served, raw("[[1, 0.5, 3]]")) == {"y": [[1.0, 0.5, 3.0]]}
    (outcome,) = run(served, [raw("[[1, 2, 3]]")], accept="application/x-npy")
    assert np.load(io.BytesIO(outcome.outputs[0].data)).dtype == np.float32
    (outcome,) = run(served, [to_tensor("x", X)])
    assert outcome.outputs[0].datatype == "BF16"


def test_bfloat16_is_read_from_json_and_where_casts_are_allowed_from_files() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes", reason="has the type of BF16").bfloat16
    x, y = TensorSpec("x", "BF16", (-1, 3)), TensorSpec("y", "FP32", (-1, 3))
    model = Model([x], [y], lambda arrays: {"y": arrays["x"].astype(np.float32)})
    assert answer(serve(model), raw("[[1, 0.5, 3]]")) == {"y": [[1.0, 0.5, 3.0]]}
    assert model.batches[0]["x"].dtype == bfloat16
    assert answer(serve(model, cast=True), raw(npy(X))) == {"y": [[1.0, 2.0, 3.0]]}
    for sent, message in (
        ("[[1, NaN, 3]]", "got no finite number: NaN at [0, 1]"),
        (npy(X), 'expects BF16 [-1,3], got FP32 [1,3]; say "cast": true in the handler config'),
    ):
        error = answer(serve(model), raw(sent))
        assert isinstance(error, BadTensor)
        assert message in error.message


def test_the_handler_config_can_allow_casts_and_nan() -> None:
    wide = raw(npy(np.array([[1.0, 2.0, 0.1]])))
    assert answer(serve(doubling(), cast=True), wide) == {"y": [[2.0, 4.0, 0.2]]}
    error = answer(serve(doubling(), cast=True), raw(npy(np.array([[1.0, 2.0, 1e39]]))))
    assert "input 'x' does not fit: the model expects FP32 [-1,3], got float64 values out" in error.message
    served = serve(doubling(), allow_nan=True)
    (outcome,) = run(served, [raw("[[1, 2, NaN]]")], accept="application/x-npy")
    assert np.isnan(np.load(io.BytesIO(outcome.outputs[0].data))[0, 2])


def test_a_model_of_a_triton_repository_is_given_no_advice_about_a_handler_config() -> None:
    wide = raw(npy(np.array([[1.0, 2.0, 3.0]])))
    advice = "got FP64 [1,3]; save it as float32"
    for model_config, told in ((None, f'{advice}, or say "cast": true in the handler config'), ({}, advice)):
        assert answer(serve(doubling(), model_config), wide).message.endswith(told)


def picture(mode: str, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (4, 4), 100 if mode == "L" else (10, 20, 30)).save(file, kind)
    return file.getvalue()


def averaging(shape: tuple[int, ...]) -> Model:
    """The mean of each channel of an image [-1,channels,height,width]."""
    image, mean = TensorSpec("image", "FP32", shape), TensorSpec("mean", "FP32", (-1, shape[1]))
    return Model([image], [mean], lambda arrays: {"mean": arrays["image"].mean((2, 3))})


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "GIF"])
def test_a_model_whose_one_input_is_an_image_takes_files(kind: str) -> None:
    body = raw(picture("RGB", kind), "application/octet-stream")
    (found,) = answer(serve(averaging((-1, 3, 8, 8))), body)["mean"]
    np.testing.assert_allclose(found, [10, 20, 30], atol=3)  # WebP loses a little


def test_a_grey_image_is_scaled_as_the_config_says() -> None:
    served = serve(averaging((-1, 1, 8, 8)), image={"scale": 0.01, "mean": 0.5})
    assert answer(served, raw(picture("L", "PNG"), name="photo")) == {"mean": [[0.5]]}


def test_images_are_refused_where_they_do_not_fit_the_model() -> None:
    jpeg = raw(picture("RGB", "JPEG"), "image/jpeg")
    for model in (doubling(), adding(), averaging((-1, 4, 8, 8)), averaging((-1, 3, -1, -1))):
        error = answer(serve(model), jpeg)
        assert isinstance(error, UnsupportedMedia)
        assert error.message.endswith("as application/json, application/x-npy or application/x-npz")
    error = answer(serve(averaging((-1, 3, 8, 8))), raw(jpeg.data[:100]))
    assert isinstance(error, InvalidRequest)
    assert "image" in error.message


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (doubling(), {"image": {}}, "the model takes no images: x FP32 [-1,3]"),
        (averaging((-1, 3, 8, 8)), {"image": {"men": 1}}, "unknown key 'men'; did you mean mean?"),
        (averaging((-1, 3, 8, 8)), {"image": {"color": "GRAY"}}, "is not one for GRAY images"),
    ],
)
def test_image_settings_that_do_not_fit_the_model_fail_the_load(
    model: Model, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArchive) as caught:
        serve(model, **config)
    assert message in caught.value.message


def test_a_model_serves_without_the_libraries_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mms_lite.handlers.image_handler", None)
    served = serve(averaging((-1, 3, 1, 1)))
    assert answer(served, raw("[[[[1]], [[2]], [[3]]]]")) == {"mean": [[1.0, 2.0, 3.0]]}
    with pytest.raises(BackendMissing, match=r"pip install 'mms-lite\[handlers\]'"):
        serve(averaging((-1, 3, 1, 1)), image={})


OFFERS = ["application/json", "application/x-npy", "application/x-npz"]


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("APPLICATION/X-NPY", "application/x-npy"),
        ("application/x-npy, */*", "application/x-npy"),
        ("application/x-npz, application/x-npy", "application/x-npz"),
        ("application/x-npy;q=0.5, application/json;q=0.4", "application/x-npy"),
        ("application/x-npy; q=0.5, application/json", "application/json"),
        ("application/json;q=0, */*", "application/x-npy"),
        ("*/*, application/json;q=0.1", "application/x-npy"),
        ("application/json;q=0, application/*;q=0.1", "application/x-npy"),
        ("application/x-npz;version=1;q=1", "application/x-npz"),
        ("application/json;q=nonsense", "application/json"),
        ("text/html", None),
        ("*/*;q=0", None),
        (", ,", "application/json"),
    ],
)
def test_accept_headers_are_weighed_as_http_says(accept: str, wanted: str | None) -> None:
    assert preferred(accept, OFFERS) == wanted
