"""Two shapes of one tensor: what clients send and get, and what the model takes and gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mms_lite.errors import BadTensor, HandlerError, ServingError
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import Answer, Request
from mms_lite.worker.predictor import Predictor
from mms_lite.worker.reshaping import reshaped

Shape = tuple[int, ...]


class Same:
    """A backend whose output y is its input x. It keeps what it was given."""

    metadata: Mapping[str, str] = {}

    def __init__(self, x: Shape, y: Shape) -> None:
        self.inputs = (TensorSpec("x", "FP32", x), TensorSpec("other", "INT64", (-1,)))
        self.outputs = (TensorSpec("y", "FP32", y),)
        self.given: list[np.ndarray] = []
        self.answer_shape: Shape | None = None

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        x = inputs["x"]
        self.given.append(x)
        return {name: x if self.answer_shape is None else x.reshape(self.answer_shape) for name in outputs}

    def close(self) -> None:
        pass


class OneByOne(Same):
    """The same, asked request by request; `other` may be left out."""

    optional = frozenset({"other"})
    config: Mapping[str, Any] = {}

    def infer_requests(self, requests: Sequence[Request]) -> list[Answer | ServingError]:
        said = [(self.infer(each, ["y"]), each.id, each.outputs) for each in requests]
        return [Answer(y, parameters={"id": id, "wants": len(wants)}) for y, id, wants in said]


def config(x: tuple[Shape, Shape], y: tuple[Shape, Shape] | None = None) -> dict[str, Any]:
    """Return a configuration: dims and reshape of x and of y; y has none unless it is given."""
    stated = {"name": "x", "dims": list(x[0]), "reshape": {"shape": list(x[1])}}
    output: dict[str, Any] = {"name": "y", "dims": [-1]}
    if y is not None:
        output = {"name": "y", "dims": list(y[0]), "reshape": {"shape": list(y[1])}}
    return {"input": [stated, {"name": "other", "dims": [-1]}], "output": [output]}


@pytest.mark.parametrize(
    ("dims", "shape", "batch", "seen", "sent"),
    [
        ((3, 2), (1, 3, 2), (), (3, 2), (3, 2)),
        ((1,), (), (-1,), (-1, 1), (5, 1)),
        ((4,), (2, 2), (-1,), (-1, 4), (3, 4)),
        ((-1,), (-1, 1), (-1,), (-1, -1), (2, 7)),
        ((2, 4, -1, 6), (8, -1, 1, 6), (), (2, 4, -1, 6), (2, 4, 5, 6)),
        ((-1, -1), (1, -1, -1, 1), (), (-1, -1), (3, 0)),
    ],
)
def test_clients_send_and_get_dims_and_the_model_sees_the_other_shape(
    dims: Shape, shape: Shape, batch: Shape, seen: Shape, sent: Shape
) -> None:
    backend = Same((*batch, *shape), (*batch, *shape))
    predictor = Predictor(reshaped(backend, config((dims, shape), (dims, shape))), batch=bool(batch))
    assert predictor.signature.inputs == (TensorSpec("x", "FP32", seen), backend.inputs[1])
    assert predictor.signature.outputs == (TensorSpec("y", "FP32", seen),)
    x = np.arange(np.prod(sent), dtype=np.float32).reshape(sent)
    found = predictor.infer({"x": x, "other": np.zeros(1, np.int64)})["y"]
    (given,) = backend.given
    assert given.shape == (*sent[: len(batch)], *_filled(shape, sent[len(batch) :], dims))
    assert given.base is not None and np.shares_memory(given, x) is bool(x.size)
    assert np.shares_memory(found, x) is bool(x.size)
    np.testing.assert_array_equal(found, x)


def _filled(shape: Shape, sent: Shape, dims: Shape) -> Shape:
    lengths = [have for want, have in zip(dims, sent, strict=True) if want == -1]
    return tuple(lengths.pop(0) if length == -1 else length for length in shape)


def test_what_clients_send_is_checked_against_what_they_see() -> None:
    predictor = Predictor(reshaped(Same((1, 3), (1, 3)), config(((3,), (1, 3)))))
    with pytest.raises(BadTensor, match=r"the model expects FP32 \[3\], got FP32 \[1,3\]"):
        predictor.infer({"x": np.ones((1, 3), np.float32), "other": np.zeros(1, np.int64)})


def test_joined_requests_are_reshaped_together_and_get_their_own_rows() -> None:
    backend = Same((-1, 2, 2), (-1, 2, 2))
    predictor = Predictor(reshaped(backend, config(((4,), (2, 2)), ((4,), (2, 2)))), batch=True)
    rows = [np.full((count, 4), count, np.float32) for count in (1, 2)]
    first, second = predictor.infer_each([{"x": x, "other": np.zeros(len(x), np.int64)} for x in rows])
    assert [each.shape for each in backend.given] == [(3, 2, 2)]
    assert (first["y"].tolist(), second["y"].tolist()) == ([[1] * 4], [[2] * 4] * 2)


def test_a_model_that_takes_requests_one_by_one_gets_all_that_they_say() -> None:
    backend = OneByOne((-1, 2, 2), (-1, 2, 2))
    predictor = Predictor(reshaped(backend, config(((4,), (2, 2)), ((4,), (2, 2)))), batch=True)
    x = np.ones((2, 4), np.float32)
    first, second = predictor.infer_each([Request({"x": x}, id="a", outputs=["y"]), Request({"x": x[:1]})])
    assert [each.shape for each in backend.given] == [(2, 2, 2), (1, 2, 2)]
    assert (first["y"].shape, first.parameters) == ((2, 4), {"id": "a", "wants": 1})
    assert (second["y"].shape, second.parameters) == ((1, 4), {"id": "", "wants": 0})


@pytest.mark.parametrize("answer", [(1, 6), (3, 2, 1), (6,)])
@pytest.mark.parametrize("kind", [Same, OneByOne])
def test_an_output_of_another_shape_than_configured_is_an_error_of_its_request(
    kind: type[Same], answer: Shape
) -> None:
    backend = kind((-1, 6), (-1, 3, 1))
    backend.answer_shape = answer
    predictor = Predictor(reshaped(backend, config(((6,), (6,)), ((3,), (3, 1)))), batch=True)
    request = {"x": np.ones((1, 6), np.float32), "other": np.zeros(1, np.int64)}
    told = f"the output 'y' has the shape {list(answer)}, which is not [-1, 3, 1], as configured"
    try:
        (found,) = predictor.infer_each([request])
    except HandlerError as error:
        found = error
    assert isinstance(found, HandlerError)
    assert found.message == told


def test_a_model_without_two_shapes_is_left_as_it_is() -> None:
    backend = Same((3,), (3,))
    assert reshaped(backend, None) is backend
    assert reshaped(backend, {"input": [{"name": "x", "dims": [3]}], "output": []}) is backend
