"""What all backends have in common: right answers, clear refusals, and nothing left behind."""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny import TinyModel, answer

from mms_lite.errors import BackendMissing, BadTensor, InvalidArchive
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import BACKENDS, BackendSettings, open_backend
from mms_lite.worker.predictor import Predictor

FRAMEWORKS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "opencv": "cv2",
    "torch": "torch",
    "mxnet": "mxnet",
}
ROWS = np.arange(15, dtype=np.float32).reshape(5, 3) % 4  # exact in bfloat16 too, and so is the answer
Inputs = Mapping[str, np.ndarray]


@pytest.fixture(params=BACKENDS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> TinyModel:
    """The tiny model in a backend's format."""
    try:
        maker = importlib.import_module(f"tiny_{request.param}")
    except ModuleNotFoundError as error:
        if error.name == f"tiny_{request.param}":
            raise
        pytest.skip(f"{error.name} is not installed")
    model: TinyModel = maker.make(tmp_path)
    return model


@pytest.fixture
def predictor(tiny: TinyModel) -> Iterator[Predictor]:
    predictor = open_tiny(tiny)
    yield predictor
    predictor.close()


def settings_of(tiny: TinyModel) -> BackendSettings:
    inputs, outputs = (
        tuple(
            TensorSpec(each["name"], each["datatype"], tuple(each["shape"]))
            for each in tiny.stated.get(side, ())
        )
        for side in ("inputs", "outputs")
    )
    return BackendSettings(files=tiny.files, threads=2, inputs=inputs, outputs=outputs)


def open_tiny(tiny: TinyModel) -> Predictor:
    return Predictor(open_backend(tiny.backend, settings_of(tiny)))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_batch_of_any_size_is_answered(tiny: TinyModel, predictor: Predictor, rows: int) -> None:
    predictor.warm_up()
    x = ROWS[:rows]
    found = predictor.infer({tiny.input: x})
    assert list(found) == [tiny.output]
    assert found[tiny.output].dtype == np.float32
    assert found[tiny.output].tolist() == answer(x).tolist()


def test_the_signature_is_what_the_model_or_the_archive_says(tiny: TinyModel, predictor: Predictor) -> None:
    assert predictor.signature.inputs == (TensorSpec(tiny.input, "FP32", (-1, 3)),)
    (output,) = predictor.signature.outputs
    assert (output.name, output.datatype) == (tiny.output, "FP32")
    assert output.shape in {(-1, 2), None}
    assert predictor.batches


def test_requests_of_one_two_and_one_rows_each_get_their_own(tiny: TinyModel, predictor: Predictor) -> None:
    requests = [ROWS[:1], ROWS[1:3], ROWS[3:4]]
    answers = predictor.infer_each([{tiny.input: x} for x in requests])
    assert [each[tiny.output].tolist() for each in answers] == [answer(x).tolist() for x in requests]


def test_an_answer_is_not_changed_by_the_next_nor_the_input_by_the_model(
    tiny: TinyModel, predictor: Predictor
) -> None:
    received = np.frombuffer(ROWS[:2].tobytes(), np.float32).reshape(2, 3)  # as from the wire: read-only
    first = predictor.infer({tiny.input: received})[tiny.output]
    predictor.infer({tiny.input: ROWS[2:4]})
    assert first.tolist() == answer(ROWS[:2]).tolist()
    assert received.tolist() == ROWS[:2].tolist()


# name -> inputs given the input's name, the outputs asked for, what the message says
BAD: dict[str, tuple[Callable[[str], Inputs], list[str] | None, str]] = {
    "rank": (lambda x: {x: ROWS[0]}, None, r"input '{x}' .*expects FP32 \[-1,3\], got FP32 \[3\]"),
    "length": (lambda x: {x: ROWS[:, :2]}, None, r"input '{x}' .*expects FP32 \[-1,3\], got FP32 \[5,2\]"),
    "datatype": (
        lambda x: {x: ROWS.astype(np.int64)},
        None,
        r"input '{x}' .*FP32 \[-1,3\], got INT64 \[5,3\]",
    ),
    "missing": (lambda x: {}, None, r"input '{x}' is missing; the model takes: {x} FP32 \[-1,3\]"),
    "unknown": (
        lambda x: {x: ROWS, "more": ROWS},
        None,
        r"no input 'more'; the model takes: {x} FP32 \[-1,3\]",
    ),
    "output": (
        lambda x: {x: ROWS},
        ["more"],
        r"unexpected inference output 'more', allowed outputs are: {y}",
    ),
    "NaN": (lambda x: {x: np.full((1, 3), np.nan, np.float32)}, None, r"input '{x}' .*NaN"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_request_is_told_what_is_wrong_and_harms_no_other(
    tiny: TinyModel, predictor: Predictor, fault: str
) -> None:
    inputs, outputs, says = BAD[fault]
    says = says.replace("{x}", tiny.input).replace("{y}", tiny.output)
    with pytest.raises(BadTensor, match=says):
        predictor.infer(inputs(tiny.input), outputs)
    good: Inputs = {tiny.input: ROWS[:1]}
    if outputs is None:
        refused, answered = predictor.infer_each([inputs(tiny.input), good])
        assert isinstance(refused, BadTensor)
        assert answered[tiny.output].tolist() == answer(ROWS[:1]).tolist()
    assert predictor.infer(good)[tiny.output].tolist() == answer(ROWS[:1]).tolist()


def test_no_rows_are_answered_with_none_where_the_framework_has_such_arrays(
    tiny: TinyModel, predictor: Predictor
) -> None:
    if tiny.backend in ("opencv", "mxnet"):
        with pytest.raises(
            BadTensor, match=rf"input '{tiny.input}' is empty, which \w+ does not take: got FP32 \[0,3\]"
        ):
            predictor.infer({tiny.input: ROWS[:0]})
    else:
        assert predictor.infer({tiny.input: ROWS[:0]})[tiny.output].shape == (0, 2)
    assert predictor.infer({tiny.input: ROWS})[tiny.output].tolist() == answer(ROWS).tolist()


def test_what_the_predictor_lets_through_the_framework_refuses_and_goes_on(tiny: TinyModel) -> None:
    """A model whose archive says nothing of its shapes gets what the client sends."""
    backend = open_backend(tiny.backend, settings_of(tiny))
    with pytest.raises(BadTensor):
        backend.infer({tiny.input: np.zeros((2, 7), np.float32)}, [tiny.output])
    found = backend.infer({tiny.input: ROWS}, [tiny.output])
    assert found[tiny.output].tolist() == answer(ROWS).tolist()
    backend.close()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "random": lambda whole: np.random.default_rng(1).bytes(2000),
    "a PNG": lambda whole: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100),
    "JSON": lambda whole: b'{"model": "tiny", "layers": []}\n',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_no_model_are_refused_without_telling_where_they_are(
    tiny: TinyModel, damage: str
) -> None:
    files = tiny.files if damage in {"truncated", "empty"} else tiny.files[:1]  # bare weights have no kind
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(DAMAGE[damage](whole))
        with pytest.raises(InvalidArchive) as caught:
            open_tiny(tiny)
        assert str(file.parent) not in caught.value.message
        file.write_bytes(whole)
    open_tiny(tiny).close()


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, extra = BACKENDS[backend]
    for name in [each for each in sys.modules if each.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, FRAMEWORKS[backend], None)
    with pytest.raises(BackendMissing) as caught:
        open_backend(backend, BackendSettings(files=(tmp_path / "model",)))
    assert caught.value.message == (
        f"the backend {backend} needs {FRAMEWORKS[backend]}, which is not installed: "
        f"pip install 'mms-lite[{extra}]'"
    )


def test_closed_models_leave_no_threads(tiny: TinyModel) -> None:
    def open_ask_close() -> int:
        predictor = open_tiny(tiny)
        predictor.infer({tiny.input: ROWS})
        predictor.close()
        del predictor
        gc.collect()
        return psutil.Process().num_threads()

    first = open_ask_close()  # with what frameworks start once
    assert [open_ask_close() for _ in range(3)][-1] <= first


def test_an_unknown_backend_is_refused_with_the_names_of_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidArchive, match=r"no backend 'caffe2'; there are: onnxruntime, openvino, "):
        open_backend("caffe2", BackendSettings(files=(tmp_path / "model",)))
