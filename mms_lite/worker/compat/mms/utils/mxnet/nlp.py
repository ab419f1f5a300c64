"""mms.utils.mxnet.nlp: sentences to numbers."""

import bisect
from typing import Any


def encode_sentences(
    sentences: list[list[str]],
    vocab: dict[str, int] | None = None,
    invalid_label: int = -1,
    invalid_key: str = "\n",
    start_label: int = 0,
) -> tuple[list[list[int]], dict[str, int]]:
    """Return the sentences as numbers, and the vocabulary.

    A given vocabulary is not extended: unknown words become invalid_label. Without one, words are numbered
    from start_label in the order they come, invalid_label left out.
    """
    if vocab is not None:
        return [[vocab.get(word, invalid_label) for word in sentence] for sentence in sentences], vocab
    vocab, number = {invalid_key: invalid_label}, start_label
    for sentence in sentences:
        for word in sentence:
            if word not in vocab:
                number += number == invalid_label
                vocab[word] = number
                number += 1
    return [[vocab[word] for word in sentence] for sentence in sentences], vocab


def pad_sentence(
    sentence: list[int],
    buckets: list[int],
    invalid_label: int = -1,
    data_name: str = "data",
    layout: str = "NT",
) -> Any:
    """Return a DataBatch with the sentence filled up to the smallest bucket that holds it.

    `buckets` are lengths in rising order; layout "NT" declares the shape (1, length), "TN" (length, 1).
    Raises: ValueError if no bucket is long enough.
    """
    at = bisect.bisect_left(buckets, len(sentence))
    if at == len(buckets):
        raise ValueError(f"no bucket holds {len(sentence)} words")
    import mxnet

    length = buckets[at]
    padded = mxnet.nd.array([sentence + [invalid_label] * (length - len(sentence))], dtype="float32")
    shape = (1, length) if layout == "NT" else (length, 1)
    declared = mxnet.io.DataDesc(name=data_name, shape=shape, layout=layout)
    return mxnet.io.DataBatch([padded], pad=0, bucket_key=length, provide_data=[declared])
