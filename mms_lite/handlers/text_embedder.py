"""Texts to vectors: a transformer model with the tokenizer of its archive, pooled to one vector a text.

What sentence-transformers does with such a model: tokenize, run, mean over the attention mask, L2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mms_lite.errors import BadTensor, HandlerError, InvalidArchive, InvalidRequest, OutOfMemory, ServingError
from mms_lite.handlers.model_handler import HandlerSettings, ModelHandler, Parts, single_part
from mms_lite.tensors import DTYPES, Array, describe
from mms_lite.types import BYTES, Signature, TensorSpec

_REQUIRED = ("input_ids", "attention_mask")
_KNOWN = (*_REQUIRED, "token_type_ids")
_TOKENIZER = "tokenizer.json"
_POOLINGS = ("mean", "cls", "none")
_BEGINS_JSON = re.compile(rb"\s*(\{|\[\s*[\"'])")
_KEYS = ("text", "texts", "input", "inputs")

Row = tuple[list[int], list[int]]  # token ids, type ids


class Form(Enum):
    """How a request gave its texts, and so how it is answered."""

    ONE = "one"
    SEVERAL = "several"
    TENSOR = "tensor"


@dataclass(frozen=True, slots=True)
class Texts:
    """What one request asks for."""

    texts: tuple[str, ...]
    form: Form


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEmbedderSettings(HandlerSettings):
    """Settings of `TextEmbedder`; `tokenizer` is a file of the archive, `output` the first unless named.

    Texts are cut to `max_length` tokens, after all of them was tokenized: so `max_characters` bounds what a
    request holds. `pooling` none is for models whose output is one vector a text. At most `texts_per_run` run
    together: with 1 no text is padded, which a dynamically quantized model needs to answer a text alike in
    every company (its scales follow all that runs together).
    """

    tokenizer: str = _TOKENIZER
    max_length: int = 256
    max_texts: int = 256
    max_characters: int = 100_000
    texts_per_run: int = 32
    pooling: str = "mean"
    normalize: bool = True
    output: str | None = None

    def __post_init__(self) -> None:
        HandlerSettings.__post_init__(self)
        self.require_positive("max_length", "max_texts", "max_characters", "texts_per_run")
        self.require_bool("normalize")
        if self.pooling not in _POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}, not one of {', '.join(_POOLINGS)}")


class TextEmbedder(ModelHandler):
    """Answers texts with their vectors.

    A request is a text, a JSON string or list of strings, a JSON object with one of them as `text` or
    `input`, or a BYTES tensor; the answer {"embedding": [...]}, {"embeddings": [[...], ...]}, or for a
    tensor of n texts the tensor `embedding`, FP32 [n, dimension].
    """

    settings_type = TextEmbedderSettings

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: Tokenizer
        self.dimension: int  # of a vector
        self._output: str
        self._pad_id = 0
        self._rows: int | None = None  # how many the model takes, where that is fixed
        self._length: int | None = None  # in tokens, where that is fixed

    @property
    def signature(self) -> Signature:
        """Texts in, vectors out: the model's own inputs are the tokenizer's business."""
        return Signature(
            (TensorSpec("text", BYTES, (-1,)),),
            (TensorSpec("embedding", "FP32", (-1, self.dimension)),),
            takes_tensors=True,
        )

    def prepare(self) -> None:
        """Check the model's inputs and output; open the tokenizer."""
        model = self.predictor.signature
        names = [spec.name for spec in model.inputs]
        if not set(_REQUIRED) <= set(names) <= set(_KNOWN):
            raise InvalidArchive(
                "a text embedder's model has the inputs input_ids, attention_mask and maybe token_type_ids; "
                f"this one has: {', '.join(names)}"
            )
        for spec in model.inputs:
            if DTYPES[spec.datatype].kind not in "iu" or (spec.shape is not None and len(spec.shape) != 2):
                raise InvalidArchive(f"the model's input is not tokens, whole numbers [texts,tokens]: {spec}")
        outputs = [spec.name for spec in model.outputs]
        self._output = self.settings.output or outputs[0]
        if self._output not in outputs:
            raise InvalidArchive(f"the model has no output {self._output!r}; it has: {', '.join(outputs)}")
        shape = model.inputs[0].shape or (-1, -1)
        self._rows, self._length = (None if length == -1 else length for length in shape)
        self._open_tokenizer()

    def warm_up(self) -> None:
        """Run the longest text, of the tokenizer's last word: a misfit of either fails the load."""
        last = self.tokenizer.get_vocab_size(with_added_tokens=False) - 1
        row = [max(last, 0)] * self._limit()
        try:
            hidden, mask = self._run([(row, [0] * len(row))])
        except OutOfMemory:
            raise
        except Exception as error:  # each framework has its own for an index out of range
            reason = f": {error.message}" if isinstance(error, ServingError) else ""
            raise InvalidArchive(
                f"the model cannot run {len(row)} times the last word of {self.settings.tokenizer}, "
                f"{row[0]}: max_length is over the model's own, or the tokenizer another model's{reason}"
            ) from error
        wanted = 2 if self.settings.pooling == "none" else 3
        if hidden.ndim != wanted:
            shape = "[texts,dimension]" if wanted == 2 else "[texts,tokens,dimension]"
            raise InvalidArchive(
                f"the output {self._output!r} is {describe(hidden)}; pooling {self.settings.pooling!r} "
                f"needs {shape}"
            )
        self.dimension = self._pool(hidden, mask).shape[1]

    def decode(self, parts: Parts) -> Texts:
        """Return a request's texts."""
        value = single_part(parts, "text", "input")
        if isinstance(value, (str, bytes, bytearray)) and not value:
            found = "has no body" if "body" in parts else "is a form without a text"
            raise InvalidRequest(f"the request {found}: send text/plain, or JSON as application/json")
        if isinstance(value, (bytes, bytearray)):
            value = _read(value)
        if isinstance(value, dict):
            value = _member(value)
        form = Form.ONE
        if isinstance(value, np.ndarray):
            form, value = Form.TENSOR, _elements(value)
        elif isinstance(value, list):
            form = Form.SEVERAL
        else:
            value = [value]
        if not value:
            raise InvalidRequest("the request's list of texts is empty")
        if len(value) > self.settings.max_texts:
            raise InvalidRequest(
                f"the request has {len(value)} texts; the model takes up to {self.settings.max_texts}"
            )
        texts = tuple(_text(each, place) for place, each in enumerate(value))
        characters, most = sum(map(len, texts)), self.settings.max_characters
        if characters > most:
            raise InvalidRequest(
                f"the request has {characters} characters of text; the model takes up to {most}"
            )
        return Texts(texts, form)

    def predict(self, items: list[Texts]) -> list[Any]:
        """Answer the texts of all requests together."""
        vectors = self.embed([text for item in items for text in item.texts])
        ends = np.cumsum([len(item.texts) for item in items])[:-1]
        return [_answer(item.form, rows) for item, rows in zip(items, np.split(vectors, ends), strict=True)]

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of texts, [n, dimension]."""
        rows = [(each.ids, each.type_ids) for each in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))  # like lengths pad little
        vectors = np.empty((len(rows), self.dimension), np.float32)
        step = min(self.settings.texts_per_run, self._rows or len(rows))
        for start in range(0, len(rows), step):
            chosen = order[start : start + step]
            vectors[chosen] = self._pool(*self._run([rows[place] for place in chosen]))
        return vectors

    def _run(self, rows: Sequence[Row]) -> tuple[Array, Array]:
        """Return the model's output and the attention mask, one row for each of `rows`."""
        width = self._length or max(1, *(len(ids) for ids, _ in rows))
        shape = (self._rows or len(rows), width)
        tokens = {name: np.zeros(shape, np.int64) for name in _KNOWN}
        tokens["input_ids"][:] = self._pad_id
        for place, (ids, type_ids) in enumerate(rows):
            tokens["input_ids"][place, : len(ids)] = ids
            tokens["attention_mask"][place, : len(ids)] = 1
            tokens["token_type_ids"][place, : len(ids)] = type_ids
        inputs = {
            spec.name: tokens[spec.name].astype(DTYPES[spec.datatype])
            for spec in self.predictor.signature.inputs
        }
        return self.infer(inputs)[self._output][: len(rows)], tokens["attention_mask"][: len(rows)]

    def _pool(self, hidden: Array, mask: Array) -> NDArray[np.float32]:
        """Return one vector for each row of hidden states, [n, tokens, dimension] or pooled already."""
        vectors = hidden.astype(np.float32)
        if self.settings.pooling == "cls":
            vectors = vectors[:, 0]
        elif self.settings.pooling == "mean":
            weights = mask[:, :, None].astype(np.float32)
            vectors = (vectors * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
        if self.settings.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _limit(self) -> int:
        """Return how many tokens of a text count."""
        stated: int = self.settings.max_length
        return min(stated, self._length or stated)

    def _open_tokenizer(self) -> None:
        name = self.settings.tokenizer
        try:
            path = self.package.file(name)
        except InvalidArchive as error:
            needs = "text_embedder needs" if name == _TOKENIZER else "the handler config names as tokenizer"
            raise InvalidArchive(
                f"the archive has no {name}, which {needs}: pack it with model-archiver --extra-file {name}"
            ) from error
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
            self._pad_id = (self.tokenizer.padding or {}).get("pad_id", 0)
            self.tokenizer.no_padding()  # what the file says of both is for another use of the model
            self.tokenizer.enable_truncation(self._limit())
            self.tokenizer.encode("")
        except Exception as error:  # the library raises no type of its own
            raise InvalidArchive(
                f"the tokenizer {self.settings.tokenizer} cannot be used: {error}"
            ) from error


def _read(body: bytes | bytearray) -> Any:
    """Return what a body without a content type holds: JSON if it is of the embedder's own, else a text.

    Raises:
        InvalidRequest: it begins as that JSON does, and is none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        if _BEGINS_JSON.match(body):
            raise InvalidRequest(
                f"the body looks like JSON and is not: {error}; send text as text/plain"
            ) from error
        return body
    texts = isinstance(found, list) and all(isinstance(each, str) for each in found)
    own = isinstance(found, dict) and any(key in found for key in _KEYS)
    return found if isinstance(found, str) or texts or own else body


def _member(value: dict[str, Any]) -> Any:
    found = [key for key in _KEYS if key in value]
    if len(found) != 1 or not isinstance(value[found[0]], (str, list)):
        raise InvalidRequest(
            'the JSON object should hold the text, or a list of texts, as "text" or "input"; '
            f"it has: {', '.join(map(repr, value)) or 'nothing'}"
        )
    return value[found[0]]


def _elements(array: Array) -> list[Any]:
    if array.dtype != np.object_:
        raise BadTensor(f"the model takes texts, as a BYTES tensor; got {describe(array)}")
    return list(array.reshape(-1))


def _text(value: Any, place: int) -> str:
    try:
        if isinstance(value, (bytes, bytearray)):
            value = value.decode("utf-8")
        if not isinstance(value, str):
            raise InvalidRequest(f"text {place} is not a string but {str(value)[:40]}")
        value.encode("utf-8")  # JSON can hold half a surrogate pair
    except UnicodeError as error:
        raise InvalidRequest(f"text {place} is not UTF-8: {error}") from error
    if not value:
        raise InvalidRequest(f"text {place} is empty")
    return value


def _answer(form: Form, vectors: NDArray[np.float32]) -> dict[str, Any] | HandlerError:
    if not np.isfinite(vectors).all():
        return HandlerError("the model answered with numbers that are not finite (NaN)")
    if form is Form.TENSOR:
        return {"embedding": vectors}
    if form is Form.SEVERAL:
        return {"embeddings": vectors.tolist()}
    return {"embedding": vectors[0].tolist()}
