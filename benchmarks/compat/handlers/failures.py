"""Fail as the body's first word says; the rest of the body is the argument."""

import sys

from mms.service import PredictionException


def handle(data, context):
    """Fail, or answer with the body."""
    if data is None:
        return None
    word, _, argument = bytes(data[0].get("body", b"")).decode("utf-8").partition(" ")
    if word == "prediction":
        code, _, message = argument.partition(" ")
        raise PredictionException(message, int(code))
    if word == "prediction-default":
        raise PredictionException(argument)
    if word in ERRORS:
        raise ERRORS[word](argument)
    if word in RESULTS:
        return RESULTS[word](data)
    return [bytes(item["body"]) for item in data]


class OddError(Exception):
    """An error whose text cannot be made."""

    def __str__(self):
        raise RuntimeError("no text")


class Opaque:
    """A value that JSON does not know."""


ERRORS = {
    "value": ValueError,
    "key": KeyError,
    "assertion": AssertionError,
    "memory": MemoryError,
    "stop-iteration": StopIteration,
    "odd": OddError,
    "exit": lambda argument: SystemExit(3),
    "interrupt": KeyboardInterrupt,
    "recursion": RecursionError,
}
RESULTS = {
    "too-long": lambda data: [b"a", b"b"] * len(data),
    "too-short": lambda data: [],
    "none": lambda data: None,
    "tuple": lambda data: (b"a",) * len(data),
    "generator": lambda data: (b"a" for _ in data),
    "dict": lambda data: {0: b"a"},
    "text": lambda data: "a",
    "opaque": lambda data: [Opaque()] * len(data),
    "set": lambda data: [{1, 2}] * len(data),
    "nested-opaque": lambda data: [{"a": [Opaque()]}] * len(data),
    "nested-bytes": lambda data: [{"a": b"bytes"}] * len(data),
    "memoryview": lambda data: [memoryview(b"view")] * len(data),
    "int-keys": lambda data: [{1: "a", None: "b", 2.5: "c"}] * len(data),
    "tuple-keys": lambda data: [{(1, 2): "a"}] * len(data),
    "surrogate": lambda data: ["\ud800"] * len(data),
    "surrogate-json": lambda data: [["\ud800"]] * len(data),
    "endless": lambda data: [_endless()] * len(data),
    "stdout": lambda data: [sys.stdout.write("a line\n")] * len(data),
}


def _endless():
    ring = []
    ring.append(ring)
    return ring
