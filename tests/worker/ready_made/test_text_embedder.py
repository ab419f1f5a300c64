"""The text embedder: its texts in all forms, pooling, padding, and models that are not for it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx, which writes the models of these tests, is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the handlers extra is not installed")

import packed  # noqa: E402
from onnx import TensorProto  # noqa: E402
from onnx_files import FLOAT, INT64, Node, write  # noqa: E402

from mms_lite.errors import BackendMissing, BadTensor, HandlerError, InvalidArchive, InvalidRequest  # noqa: E402
from mms_lite.tensors import to_array  # noqa: E402
from mms_lite.types import BYTES, InferRequest, Tensor, TensorSpec  # noqa: E402
from mms_lite.wire import Item, Outcome  # noqa: E402
from mms_lite.worker.handler import MmsHandler  # noqa: E402

JSON, TEXT = "application/json", "text/plain"
WORDS = ["[PAD]", "[CLS]", "red", "green", "blue"]
# One vector a word; that of padding would show.
TABLE = np.array([[9, 9, 9], [0, 0, 0], [3, 0, 0], [0, 4, 0], [0, 0, 5]], np.float32)
RAW = {"normalize": False}


def write_tokenizer(folder: Path) -> None:
    """Write one that puts [CLS] before the words of a text, and that would pad and cut in its own way."""
    words = tokenizers.models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[PAD]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    made.enable_truncation(2)
    made.enable_padding(length=10)
    made.save(str(folder / "tokenizer.json"))


def write_lookup(
    folder: Path,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
    *,
    dims: tuple[int | str, int | str] = ("n", "t"),
    kind: int = INT64,
    table: np.ndarray = TABLE,
) -> None:
    """Write a net that gives each token its vector of a table."""
    write_tokenizer(folder)
    write(
        folder / "model.onnx",
        [Node("Gather", ["table", "input_ids"], ["hidden"])],
        {name: (kind, dims) for name in inputs},
        {"hidden": (FLOAT, (*dims, 3))},
        {"table": table},
    )


def answer(outcome: Outcome) -> Any:
    assert outcome.error is None
    return json.loads(bytes(outcome.outputs[0].data))


def embed(model: MmsHandler, *texts: str) -> list[list[float]]:
    found: list[list[float]] = answer(packed.ask(model, json.dumps(texts).encode(), kind=JSON)[0])[
        "embeddings"
    ]
    return found


def test_a_vector_is_the_mean_over_the_tokens_that_are_text(tmp_path: Path) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path, RAW)
    assert embed(model, "red", "red green blue blue") == [
        pytest.approx([1.5, 0, 0]),
        pytest.approx([0.6, 0.8, 2]),
    ]


def test_vectors_have_length_1_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path)
    assert embed(model, "red green") == [pytest.approx([0.6, 0.8, 0])]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"red green", TEXT),
        (b"red green", ""),
        (b'"red green"', JSON),
        (b'{"text": "red green"}', JSON),
        (b'{"input": "red green", "model": "m"}', JSON),
        (b'"red green"', ""),
        (b'\n{"text": "red green"}', ""),
    ],
)
def test_one_text_gives_one_vector(tmp_path: Path, body: bytes, kind: str) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path)
    assert answer(packed.ask(model, body, kind=kind)[0]) == {"embedding": pytest.approx([0.6, 0.8, 0])}


@pytest.mark.parametrize("body", [b"5", b'[red] "green"', b'"red" green', b'["red", 2]', b'{"red": 1}'])
def test_a_body_without_a_type_that_is_none_of_its_own_json_is_a_text(tmp_path: Path, body: bytes) -> None:
    write_lookup(tmp_path, table=TABLE + 1)
    model = packed.load("text_embedder", tmp_path, RAW)
    assert answer(packed.ask(model, body)[0]) == answer(packed.ask(model, body, kind=TEXT)[0])


@pytest.mark.parametrize("kind", [JSON, ""])
@pytest.mark.parametrize(
    "body", [b'["red", "blue"]', b'{"texts": ["red", "blue"]}', b'{"input": ["red", "blue"]}']
)
def test_a_list_of_texts_gives_a_list_of_vectors(tmp_path: Path, body: bytes, kind: str) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path)
    assert answer(packed.ask(model, body, kind=kind)[0]) == {"embeddings": [[1, 0, 0], [0, 0, 1]]}


@pytest.mark.parametrize(
    ("name", "value", "said"),  # of `curl -d 'red green'` and `curl -d '{"text": "red=green"}'`
    [
        ("red green", b"", "is a form without a text: send text/plain, or JSON as application/json"),
        ('{"text": "red', b'green"}', "declared as a form and looks like JSON: send it as application/json"),
    ],
)
def test_a_text_that_was_sent_as_a_form_is_told_how_to_send_it(
    tmp_path: Path, name: str, value: bytes, said: str
) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path)
    outcomes: list[Outcome] = []
    request = InferRequest(id="r", model="m", inputs=[Tensor(name, BYTES, (), bytearray(value))])
    model.run([Item(0, None, request)], lambda _: None, outcomes.extend)
    assert isinstance(outcomes[0].error, InvalidRequest)
    assert said in outcomes[0].error.message


def test_an_archive_without_a_tokenizer_says_how_to_pack_one(tmp_path: Path) -> None:
    write_lookup(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InvalidArchive) as caught:
        packed.load("text_embedder", tmp_path)
    assert caught.value.message == (
        "the archive has no tokenizer.json, which text_embedder needs: "
        "pack it with model-archiver --extra-file tokenizer.json"
    )


def test_a_tensor_of_texts_gives_a_tensor_and_the_signature_says_so(tmp_path: Path) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path)
    found = packed.ask(model, np.array([b"blue", b"red"], np.object_))[0].outputs
    assert [each.name for each in found] == ["embedding"]
    np.testing.assert_array_equal(to_array(found[0]), np.array([[0, 0, 1], [1, 0, 0]], np.float32))
    assert model.signature.inputs == (TensorSpec("text", BYTES, (-1,)),)
    assert model.signature.outputs == (TensorSpec("embedding", "FP32", (-1, 3)),)
    assert model.signature.takes_tensors


@pytest.mark.parametrize("texts_per_run", [1, 2, 32])
def test_requests_of_a_batch_are_answered_as_alone(tmp_path: Path, texts_per_run: int) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path, {"texts_per_run": texts_per_run})
    bodies = [b'["red green blue", "red"]', b'"blue"', b'["green green", "red blue", "green"]']
    together = [answer(each) for each in packed.ask(model, *bodies, kind=JSON)]
    assert together == [answer(packed.ask(model, body, kind=JSON)[0]) for body in bodies]
    assert together[1] == {"embedding": [0, 0, 1]}
    assert together[2]["embeddings"][::2] == [[0, 1, 0], [0, 1, 0]]


def test_a_text_is_cut_at_max_length(tmp_path: Path) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path, {**RAW, "max_length": 3})
    assert embed(model, "red red blue blue blue blue") == [pytest.approx([2, 0, 0])]  # [CLS] red red


def test_pooling_cls_takes_the_first_token(tmp_path: Path) -> None:
    write_lookup(tmp_path, table=TABLE + 1)
    model = packed.load("text_embedder", tmp_path, {**RAW, "pooling": "cls"})
    assert embed(model, "red", "blue") == [[1, 1, 1], [1, 1, 1]]


def test_pooling_none_takes_the_models_own_vectors(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    nodes = [
        Node("Gather", ["table", "input_ids"], ["hidden"]),
        Node("ReduceMax", ["hidden"], ["pooled"], axes=[1], keepdims=0),
    ]
    inputs = {name: (INT64, ("n", "t")) for name in ("input_ids", "attention_mask", "token_type_ids")}
    write(tmp_path / "model.onnx", nodes, inputs, {"pooled": (FLOAT, ("n", 3))}, {"table": TABLE})
    model = packed.load("text_embedder", tmp_path, {**RAW, "pooling": "none"})
    assert embed(model, "red green") == [[3, 4, 0]]
    with pytest.raises(InvalidArchive, match=r"pooling 'mean' needs \[texts,tokens,dimension\]"):
        packed.load("text_embedder", tmp_path)


def test_a_model_of_a_fixed_size_and_another_type_of_numbers_is_filled_up(tmp_path: Path) -> None:
    write_lookup(tmp_path, dims=(2, 4), kind=TensorProto.INT32)
    model = packed.load("text_embedder", tmp_path, RAW)
    assert embed(model, "red", "blue", "red green blue blue") == [
        pytest.approx([1.5, 0, 0]),
        pytest.approx([0, 0, 2.5]),
        pytest.approx([3 / 4, 1, 5 / 4]),
    ]


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"\xff\xfe", "", "text 0 is not UTF-8"),
        (b'["red", "\\ud800"]', JSON, "text 1 is not UTF-8"),
        (b"[]", JSON, "the request's list of texts is empty"),
        (b'["red", 7]', JSON, "text 1 is not a string but 7"),
        (b'["red", ""]', JSON, "text 1 is empty"),
        (b"", TEXT, "the request has no body: send text/plain, or JSON as application/json"),
        (b"", "", "the request has no body: send text/plain, or JSON as application/json"),
        (b'{"texts": ["red",]}', "", "the body looks like JSON and is not: Expecting value"),
        (b"{'text': 'red'}", JSON, "the body looks like JSON and is not: Expecting property name"),
        (b'["red', JSON, "the body looks like JSON and is not: Unterminated string"),
        (b'{"input": 7}', "", 'as "text" or "input"; it has: \'input\''),
        (b"null", JSON, "text 0 is not a string but None"),
        (b'{"texts": "red", "input": "blue"}', JSON, "as \"text\" or \"input\"; it has: 'texts', 'input'"),
        (b'{"inputs": {"a": 1}}', JSON, 'as "text" or "input"; it has: \'inputs\''),
        (b'["red", "red", "red", "red"]', JSON, "has 4 texts; the model takes up to 3"),
        (b'["' + b"red " * 6 + b'", "red"]', JSON, "has 27 characters of text; the model takes up to 20"),
    ],
)
def test_a_body_without_texts_says_why_and_fails_alone(
    tmp_path: Path, body: bytes, kind: str, said: str
) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path, {"max_texts": 3, "max_characters": 20})
    bad, good = packed.ask(model, body, b'"red"' if kind == JSON else b"red", kind=kind)
    assert isinstance(bad.error, InvalidRequest)
    assert said in bad.error.message
    assert answer(good) == {"embedding": [1, 0, 0]}


def test_a_tensor_of_numbers_is_refused(tmp_path: Path) -> None:
    write_lookup(tmp_path)
    model = packed.load("text_embedder", tmp_path)
    found = packed.ask(model, np.zeros((1, 3), np.int64))[0]
    assert isinstance(found.error, BadTensor)
    assert found.error.message == "the model takes texts, as a BYTES tensor; got INT64 [1,3]"


def test_a_vector_that_is_not_finite_is_an_error_of_that_request(tmp_path: Path) -> None:
    table = TABLE.copy()
    table[WORDS.index("blue")] = np.nan
    table[WORDS.index("green")] = 1
    write_lookup(tmp_path, table=table)
    bad, good = packed.ask(packed.load("text_embedder", tmp_path), b"blue", b"red", kind=TEXT)
    assert isinstance(bad.error, HandlerError)
    assert "not finite" in bad.error.message
    assert answer(good) == {"embedding": [1, 0, 0]}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (("input_ids",), "maybe token_type_ids; this one has: input_ids"),
        (
            ("input_ids", "attention_mask", "position_ids"),
            "this one has: input_ids, attention_mask, position",
        ),
    ],
)
def test_a_model_with_other_inputs_does_not_load(tmp_path: Path, inputs: tuple[str, ...], said: str) -> None:
    write_lookup(tmp_path, inputs)
    with pytest.raises(InvalidArchive, match=said):
        packed.load("text_embedder", tmp_path)


def test_a_tokenizer_of_more_words_than_the_model_has_does_not_load(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lookup(tmp_path, table=TABLE[:4])
    with pytest.raises(InvalidArchive, match=r"the last word of tokenizer\.json, 4: max_length is over"):
        packed.load("text_embedder", tmp_path)
    assert "Gather" in capfd.readouterr().err  # what ONNX Runtime says of it itself


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"tokenizer": "other.json"},
            "no other.json, which the handler config names as tokenizer: .*--extra-file other.json",
        ),
        ({"tokenizer": "model.onnx"}, "the tokenizer model.onnx cannot be used"),
        ({"output": "vectors"}, "no output 'vectors'; it has: hidden"),
        ({"pooling": "max"}, "pooling is 'max', not one of mean, cls, none"),
        ({"max_length": 0}, "max_length is not a positive whole number: 0"),
        ({"normalise": True}, "did you mean normalize"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    write_lookup(tmp_path)
    with pytest.raises(InvalidArchive, match=said):
        packed.load("text_embedder", tmp_path, config)


def test_without_tokenizers_the_load_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lookup(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "mms_lite.handlers.text_embedder", raising=False)
    with pytest.raises(BackendMissing, match=r"needs tokenizers.*pip install 'mms-lite\[handlers\]'"):
        packed.load("text_embedder", tmp_path)
