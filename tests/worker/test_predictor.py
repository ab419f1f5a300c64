"""The Predictor's own work on a backend that says and counts what it is asked: checks, batches, warm-up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mms_lite.errors import BadTensor, HandlerError, OutOfMemory, ServingError
from mms_lite.types import BYTES, TensorSpec
from mms_lite.worker.backends import Answer, Request
from mms_lite.worker.predictor import Predictor

A = TensorSpec("a", "FP32", (-1, 2))
B = TensorSpec("b", "INT64", (-1,))
Inputs = Mapping[str, np.ndarray]


class Sum:
    """A backend: `y` is a row's sum plus b. It keeps what it was asked."""

    metadata: Mapping[str, str] = {"graph": "sum"}

    def __init__(
        self, inputs: Sequence[TensorSpec] = (A, B), outputs: Sequence[TensorSpec] | None = None
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs or (TensorSpec("y", "FP32", (-1,)), TensorSpec("twice", "FP32", (-1,)))
        self.asked: list[tuple[dict[str, np.ndarray], list[str]]] = []
        self.fault: Exception | None = None
        self.closed = False

    def infer(self, inputs: Inputs, outputs: Sequence[str]) -> dict[str, Any]:
        self.asked.append((dict(inputs), list(outputs)))
        if self.fault is not None:
            raise self.fault
        y = inputs["a"].sum(-1) + inputs["b"]
        found = {"y": y.astype(np.float32), "twice": (2 * y).astype(np.float32)}
        return {name: found[name] for name in outputs}

    def close(self) -> None:
        self.closed = True


def row(first: float, b: int, rows: int = 1) -> dict[str, np.ndarray]:
    return {"a": np.full((rows, 2), first, np.float32), "b": np.full(rows, b, np.int64)}


def values(answers: Sequence[dict[str, np.ndarray] | ServingError], output: str = "y") -> list[Any]:
    return [each[output].tolist() if isinstance(each, dict) else type(each).__name__ for each in answers]


def test_requests_that_fit_together_run_once_and_each_gets_its_rows() -> None:
    backend = Sum()
    answers = Predictor(backend, batch=True).infer_each([row(1, 0), row(2, 10, rows=2), row(3, 20)])
    assert values(answers) == [[2], [14, 14], [26]]
    assert values(answers, "twice") == [[4], [28, 28], [52]]
    assert [inputs["a"].shape for inputs, _ in backend.asked] == [(4, 2)]


def test_a_bad_request_gets_its_error_and_the_others_run_without_it() -> None:
    backend = Sum()
    bad = {"a": np.ones((1, 3), np.float32), "b": np.ones(1, np.int64)}
    answers = Predictor(backend, batch=True).infer_each([row(1, 0), bad, {}, row(2, 0)])
    assert values(answers) == [[2], "BadTensor", "BadTensor", [4]]
    assert len(backend.asked) == 1


def test_requests_of_different_lengths_are_different_batches() -> None:
    a = TensorSpec("a", "FP32", (-1, -1))
    backend = Sum((a, B))
    long = {"a": np.ones((1, 5), np.float32), "b": np.zeros(1, np.int64)}
    assert values(Predictor(backend, batch=True).infer_each([row(1, 0), long, row(2, 0), long])) == [
        [2],
        [5],
        [4],
        [5],
    ]
    assert [inputs["a"].shape for inputs, _ in backend.asked] == [(2, 2), (2, 5)]


@pytest.mark.parametrize(
    "inputs",
    [
        (TensorSpec("a", "FP32", (1, 2)), TensorSpec("b", "INT64", (1,))),  # the batch is fixed
        (A, TensorSpec("b", "INT64", ())),  # one that has no rows
        (A, TensorSpec("b", "INT64", None)),  # one whose rows are not known to be rows
    ],
)
def test_requests_that_cannot_be_joined_run_alone(inputs: Sequence[TensorSpec]) -> None:
    backend = Sum(inputs)
    scalar = inputs[1].shape in {(), None}
    requests = [{**row(n, 0), **({"b": np.array(n)} if scalar else {})} for n in (1, 2)]
    expected = [[3], [6]] if scalar else [[2], [4]]
    assert values(Predictor(backend, batch=True).infer_each(requests)) == expected
    assert len(backend.asked) == 2


def test_inputs_of_one_request_with_different_numbers_of_rows_are_not_joined_with_others() -> None:
    backend = Sum()
    odd = {"a": np.ones((3, 2), np.float32), "b": np.ones(1, np.int64)}
    assert values(Predictor(backend, batch=True).infer_each([row(1, 0), odd, row(2, 0)])) == [
        [2],
        [3, 3, 3],
        [4],
    ]
    assert [len(inputs["a"]) for inputs, _ in backend.asked] == [2, 3]


def test_a_model_that_answers_a_batch_with_other_rows_is_told_of() -> None:
    class First(Sum):
        def infer(self, inputs: Inputs, outputs: Sequence[str]) -> dict[str, Any]:
            return {name: found[:1] for name, found in super().infer(inputs, outputs).items()}

    with pytest.raises(HandlerError, match=r"the output 'y' has the shape \[1\] for a batch of 2 rows"):
        Predictor(First(), batch=True).infer_each([row(1, 0), row(2, 0)])


def test_a_fault_of_the_model_reaches_the_caller() -> None:
    backend = Sum()
    backend.fault = OutOfMemory("no room")
    with pytest.raises(OutOfMemory, match="no room"):
        Predictor(backend, batch=True).infer_each([row(1, 0), row(2, 0)])


def test_only_the_outputs_that_are_asked_for_are_computed() -> None:
    backend = Sum()
    predictor = Predictor(backend, batch=True)
    assert list(predictor.infer(row(1, 0), ["twice"])) == ["twice"]
    assert list(predictor.infer(row(1, 0))) == ["y", "twice"]
    wanting = [Request(row(1, 0), outputs=["twice"])] * 2
    assert [each["twice"].tolist() for each in predictor.infer_each(wanting)] == [[4], [4]]
    assert [outputs for _, outputs in backend.asked] == [["twice"], ["y", "twice"], ["twice"]]


def test_requests_of_one_batch_get_the_outputs_that_each_names_in_its_order() -> None:
    backend = Sum()
    requests = [
        Request(row(1, 0), outputs=["twice", "y", "twice"]),
        Request(row(2, 0), outputs=["y"]),
        Request(row(3, 0), outputs=["z"]),
    ]
    both, one, refused = Predictor(backend, batch=True).infer_each(requests)
    assert [(name, array.tolist()) for name, array in both.items()] == [("twice", [4]), ("y", [2])]
    assert [(name, array.tolist()) for name, array in one.items()] == [("y", [4])]
    assert refused.message == "unexpected inference output 'z', allowed outputs are: y, twice"
    assert [outputs for _, outputs in backend.asked] == [["y", "twice"]]


def test_what_no_request_of_a_batch_wants_is_not_computed() -> None:
    spec = TensorSpec("more", "FP32", (-1,))
    backend = Sum(outputs=[TensorSpec("y", "FP32", (-1,)), spec, TensorSpec("twice", "FP32", (-1,))])
    requests = [Request(row(1, 0), outputs=["twice"]), Request(row(2, 0), outputs=["y"])]
    assert all(isinstance(each, dict) for each in Predictor(backend, batch=True).infer_each(requests))
    assert [outputs for _, outputs in backend.asked] == [["y", "twice"]]


class OneByOne(Sum):
    """A backend that answers the requests of a batch itself; `b` may be left out."""

    optional = frozenset({"b"})
    config: Mapping[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[Request]] = []

    def infer_requests(self, requests: Sequence[Request]) -> list[Answer | ServingError]:
        self.batches.append(list(requests))
        return [Answer({"y": each["a"].sum(-1)}, parameters={"id": each.id}) for each in requests]


def test_a_backend_may_take_the_requests_of_a_batch_as_they_came() -> None:
    backend = OneByOne()
    predictor = Predictor(backend, batch=True)
    requests = [
        Request(row(1, 0), id="first", parameters={"top": 1}),
        Request({"a": np.ones((2, 7), np.float32)}),
        Request({"a": np.ones((2, 2), np.float32)}, outputs=["y"]),
    ]
    first, bad, last = predictor.infer_each(requests)
    assert (first["y"].tolist(), first.parameters) == ([2], {"id": "first"})
    assert isinstance(bad, BadTensor)
    assert last["y"].tolist() == [2, 2]
    ((one, other),) = backend.batches
    assert (one.id, one.outputs, one.parameters) == ("first", (), {"top": 1})
    assert (list(other), other.outputs) == (["a"], ("y",))


def test_the_backend_gets_arrays_in_c_order() -> None:
    backend = Sum()
    turned = np.ones((2, 4), np.float32).T
    Predictor(backend).infer({"a": turned, "b": np.zeros(4, np.int64)})
    assert backend.asked[0][0]["a"].flags.c_contiguous


def test_nan_goes_in_only_where_it_is_allowed_and_infinity_always() -> None:
    with pytest.raises(BadTensor, match=r"input 'a' has elements that are not numbers \(NaN\)"):
        Predictor(Sum()).infer(row(np.nan, 0))
    assert np.isnan(Predictor(Sum(), allow_nan=True).infer(row(np.nan, 0))["y"]).all()
    assert np.isinf(Predictor(Sum()).infer(row(np.inf, 0))["y"]).all()


def test_bfloat16_is_searched_for_nan_like_other_floats() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes", reason="has the type of BF16").bfloat16
    predictor = Predictor(Sum((TensorSpec("a", "BF16", (-1, 2)), B)))
    predictor.check(row(1, 0) | {"a": np.ones((1, 2), bfloat16)})
    with pytest.raises(BadTensor, match="not numbers"):
        predictor.check(row(1, 0) | {"a": np.array([[1, np.nan]], bfloat16)})


def test_an_input_of_any_rank_and_one_of_text_are_checked_for_their_datatype() -> None:
    predictor = Predictor(Sum((TensorSpec("a", "FP32", None), TensorSpec("b", BYTES, (-1,)))))
    text = np.array([b"x"], np.object_)
    predictor.check({"a": np.ones((1, 1, 1), np.float32), "b": text})
    predictor.check({"a": np.ones(3, np.float32), "b": np.array(["x"])})
    with pytest.raises(
        BadTensor, match=r"input 'a' does not fit: the model expects FP32 \[...\], got FP64 \[3\]"
    ):
        predictor.check({"a": np.ones(3), "b": text})
    with pytest.raises(BadTensor, match=r"input 'b' .*expects BYTES \[-1\], got INT64 \[1\]"):
        predictor.check({"a": np.ones(3, np.float32), "b": np.ones(1, np.int64)})


def test_what_the_model_says_of_one_input_can_be_asked() -> None:
    predictor = Predictor(Sum())
    assert predictor.input("b") == B
    with pytest.raises(BadTensor, match=r"no input 'c'; the model takes: a FP32 \[-1,2\]; b INT64 \[-1\]"):
        predictor.input("c")


def test_a_warm_up_runs_one_row_of_zeros() -> None:
    backend = Sum()
    Predictor(backend, batch=True).warm_up()
    ((inputs, outputs),) = backend.asked
    assert {name: array.tolist() for name, array in inputs.items()} == {"a": [[0, 0]], "b": [0]}
    assert outputs == ["y", "twice"]


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("a", "FP32", (-1, -1)),  # who knows how long
        TensorSpec("a", "FP32", None),
        TensorSpec("a", BYTES, (-1, 2)),
        TensorSpec("a", "FP32", (1, 1 << 40)),  # more than a warm-up should take
    ],
)
def test_no_warm_up_where_only_the_user_knows_an_input(spec: TensorSpec) -> None:
    backend = Sum((spec, B))
    Predictor(backend).warm_up()
    assert backend.asked == []


def test_closing_lets_go_of_the_backend() -> None:
    backend = Sum()
    Predictor(backend).close()
    assert backend.closed


def test_a_scalar_stays_a_scalar() -> None:
    backend = Sum((A, TensorSpec("b", "INT64", ())))
    Predictor(backend).infer({"a": np.ones((1, 2), np.float32), "b": np.array(5)})
    assert backend.asked[0][0]["b"].shape == ()


class Mixing:
    """A backend whose rows depend on each other, or whose first axis is no batch."""

    metadata: Mapping[str, str] = {}
    inputs = (TensorSpec("x", "FP32", (-1, 3)),)
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)

    def __init__(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        self._run = run

    def infer(self, inputs: Inputs, outputs: Sequence[str]) -> dict[str, Any]:
        return {"y": self._run(inputs["x"])}

    def close(self) -> None:
        """Nothing to let go of."""


@pytest.mark.parametrize(
    "run",
    [
        lambda x: np.argwhere(x > 0).astype(np.float32),  # as many rows as there are positive numbers
        lambda x: (x @ x.T)[:, :2],  # every row with every other
        lambda x: x[:, :2] - x[:, :2].mean(0),  # against the mean of all
        lambda x: x[:, : 1 + int(x[0, 2] > 0.5)],  # as wide as the first row says
    ],
    ids=["found places", "product", "centred", "ragged"],
)
def test_requests_are_not_joined_where_a_row_alone_has_another_answer(
    run: Callable[[np.ndarray], np.ndarray],
) -> None:
    predictor = Predictor(Mixing(run))
    predictor.warm_up()
    requests = [{"x": np.array([[1, 2, 3]], np.float32)}, {"x": np.array([[-4, 5, 6]], np.float32)}]
    together = values(predictor.infer_each(requests))
    assert together == [values(predictor.infer_each([each]))[0] for each in requests]


def test_requests_are_joined_where_rows_were_seen_to_be_independent() -> None:
    backend = Sum()
    predictor = Predictor(backend)
    predictor.warm_up()
    backend.asked.clear()
    assert values(predictor.infer_each([row(1, 0), row(2, 10)])) == [[2], [14]]
    assert len(backend.asked) == 1


def test_a_batch_that_is_denied_is_never_made() -> None:
    backend = Sum()
    predictor = Predictor(backend, batch=False)
    predictor.warm_up()
    backend.asked.clear()
    assert values(predictor.infer_each([row(1, 0), row(2, 10)])) == [[2], [14]]
    assert len(backend.asked) == 2


LIMITED = {"name": "m", "max_batch_size": 4}


def test_a_limit_of_rows_holds_for_each_request_and_for_those_that_are_joined() -> None:
    backend = Sum()
    predictor = Predictor(backend, batch=True, config=LIMITED)
    answers = predictor.infer_each([row(1, 0, rows=count) for count in (2, 1, 2, 5, 4, 1)])
    assert [len(each["y"]) if isinstance(each, dict) else each.message for each in answers] == [
        *(2, 1, 2),
        "inference request batch-size must be <= 4 for 'm'",
        *(4, 1),
    ]
    assert [len(inputs["a"]) for inputs, _ in backend.asked] == [3, 2, 4, 1]
    with pytest.raises(BadTensor, match="batch-size must be <= 4"):
        predictor.infer(row(1, 0, rows=5))


def test_inputs_of_a_model_with_a_limit_of_rows_agree_about_them() -> None:
    odd = {"a": np.ones((2, 2), np.float32), "b": np.ones(1, np.int64)}
    for backend in (Sum(), OneByOne()):
        backend.config = LIMITED
        predictor = Predictor(backend, batch=True, config=LIMITED)
        _, refused = predictor.infer_each([row(1, 0), odd])
        assert isinstance(refused, BadTensor)
        assert refused.message == "input 'b' batch size does not match other inputs for 'm'"


def test_a_backend_that_takes_requests_gets_no_more_rows_together_than_its_own_limit() -> None:
    backend = OneByOne()
    backend.config = LIMITED
    predictor = Predictor(backend, batch=True, config={"max_batch_size": 0})
    answers = predictor.infer_each([row(1, 0, rows=count) for count in (2, 1, 2, 5, 4, 1)])
    assert [[len(each["a"]) for each in batch] for batch in backend.batches] == [[2, 1], [2], [4], [1]]
    assert [isinstance(each, BadTensor) for each in answers] == [False, False, False, True, False, False]
