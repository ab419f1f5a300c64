"""How user code is called: entry points, data, answers, and what goes wrong in them."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mms_lite.errors import BadTensor, HandlerError, InvalidRequest, LoadError, OutOfMemory
from mms_lite.types import InferRequest, Tensor
from mms_lite.wire import Item, Outcome
from mms_lite.worker import handler


@pytest.fixture(autouse=True)
def _forget_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(path: Path, entry: str = "service:handle", **settings: Any) -> handler.MmsHandler:
    base = {
        "name": "m",
        "path": str(path),
        "handler": entry,
        "manifest": None,
        "batch_size": 8,
        "device": None,
        "isolate_failures": True,
        "decode_input_request": True,
    }
    return handler.load({**base, **settings})


def write(folder: Path, source: str, name: str = "service.py") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    return folder


class Ran:
    """What a batch led to."""

    def __init__(self) -> None:
        self.started: list[list[int]] = []
        self.outcomes: list[Outcome] = []

    def on_started(self, job_ids: Iterable[int]) -> None:
        self.started.append(list(job_ids))

    def on_outcomes(self, outcomes: Iterable[Outcome]) -> None:
        self.outcomes.extend(outcomes)


def run(model: handler.MmsHandler, *bodies: bytes, content_type: str = "") -> list[Outcome]:
    """Run a batch and return its outcomes in the order of its items."""
    items = [
        Item(
            n,
            None,
            InferRequest(
                id=f"r{n}", model="m", inputs=[Tensor("body", "BYTES", (), bytearray(b), content_type)]
            ),
        )
        for n, b in enumerate(bodies)
    ]
    ran = Ran()
    model.run(items, ran.on_started, ran.on_outcomes)
    assert sorted(each.job_id for each in ran.outcomes) == list(range(len(bodies)))
    assert all(each.final for each in ran.outcomes)
    return sorted(ran.outcomes, key=lambda each: each.job_id)


def answer(outcome: Outcome) -> Any:
    if outcome.error is not None:
        return type(outcome.error), outcome.error.message
    return bytes(outcome.outputs[0].data), outcome.outputs[0].content_type


HANDLE = "def handle(data, context):\n    if data is None: return None\n    return "


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('[b"raw"]', (b"raw", "application/octet-stream")),
        ('[bytearray(b"raw")]', (b"raw", "application/octet-stream")),
        ('["zo\\u00eb"]', ("zoë".encode(), "text/plain; charset=utf-8")),
        ('[{"a": 1}]', (b'{\n  "a": 1\n}', "application/json")),
        ("[[1, 2]]", (b"[\n  1,\n  2\n]", "application/json")),
        ("[None]", (b"null", "application/json")),
        ("[True]", (b"true", "application/json")),
        ('[float("nan")]', (b"NaN", "application/json")),
        ('[""]', (b"", "text/plain; charset=utf-8")),
        ("[{1, 2}]", (HandlerError, "Unsupported model output data type.")),
        ('["\\ud800"]', (HandlerError, "Unsupported model output data type.")),
        ("None", (HandlerError, "Invalid model predict output")),
        ("(1,)", (HandlerError, "Invalid model predict output")),
        ("(x for x in data)", (HandlerError, "Invalid model predict output")),
        ("{0: 1}", (HandlerError, "Invalid model predict output")),
        ("[]", (HandlerError, "number of batch response mismatched")),
        ("[1, 2]", (HandlerError, "number of batch response mismatched")),
        ("1 / 0", (HandlerError, "Prediction failed")),
    ],
)
def test_what_a_handler_returns_becomes_a_body_or_an_error(
    tmp_path: Path, expression: str, expected: Any
) -> None:
    (outcome,) = run(load(write(tmp_path, HANDLE + expression)), b"x")
    assert answer(outcome) == expected


@pytest.mark.parametrize(
    "source",
    [
        "class Odd(dict):\n    def items(self): raise KeyError('odd')\n",
        "class Odd(dict):\n    def items(self): raise MemoryError\n",
        "class Odd(dict):\n    def items(self): raise RuntimeError('changed size during iteration')\n",
    ],
    ids=["KeyError", "MemoryError", "RuntimeError"],
)
def test_an_answer_that_raises_while_it_is_written_fails_alone(tmp_path: Path, source: str) -> None:
    body = source + HANDLE + "[Odd(a=1) if item['body'] == b'odd' else 'fine' for item in data]"
    good, bad = run(load(write(tmp_path, body)), b"x", b"odd")
    assert answer(good)[0] == b"fine"
    assert isinstance(bad.error, HandlerError | OutOfMemory)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.text(max_size=4) | st.integers() | st.floats() | st.booleans() | st.none(), inner
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_a_json_answer_is_spelled_as_upstream_spells_it(value: Any) -> None:
    if not isinstance(value, str):
        assert handler._body(value) == (json.dumps(value, indent=2).encode(), "application/json")


def test_the_first_call_has_no_data_and_its_answer_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, "calls = []\ndef handle(data, context):\n    calls.append(data)\n    return [len(calls)]")
    (outcome,) = run(load(tmp_path), b"x")
    assert answer(outcome)[0] == b"2"


@pytest.mark.parametrize("entry", ["service:handle", "service.py:handle", "service"])
def test_an_entry_point_is_a_module_with_or_without_suffix_and_function(tmp_path: Path, entry: str) -> None:
    write(tmp_path, HANDLE + "[b'here']")
    assert answer(run(load(tmp_path, entry), b"x")[0])[0] == b"here"


@pytest.mark.parametrize("entry", ["code/service.py:predict", "code/service:predict"])
def test_an_entry_point_may_lie_in_a_folder_and_have_any_name(tmp_path: Path, entry: str) -> None:
    write(tmp_path, HANDLE.replace("handle", "predict") + "[b'here']", "code/service.py")
    assert answer(run(load(tmp_path, entry), b"x")[0])[0] == b"here"


def test_a_handler_named_like_a_module_of_the_standard_library_is_found(tmp_path: Path) -> None:
    write(tmp_path, HANDLE + "[b'the model']", "json.py")
    assert answer(run(load(tmp_path, "json:handle"), b"x")[0])[0] == b"the model"
    assert sys.modules["json"] is json


def test_a_class_named_as_entry_point_is_initialised_and_used(tmp_path: Path) -> None:
    write(
        tmp_path,
        "class One:\n"
        "    def initialize(self, context): self.folder = context.system_properties['model_dir']\n"
        "    def handle(self, data, context): return [self.folder for _ in data]\n"
        "class Two: pass\n",
    )
    assert answer(run(load(tmp_path, "service:One"), b"x")[0])[0] == str(tmp_path).encode()


@pytest.mark.parametrize(
    ("source", "entry", "match"),
    [
        ("", "service:handle", "no function 'handle', and these classes: none"),
        ("class A: pass\nclass B: pass", "service", "these classes: A, B"),
        ("class A:\n    def handle(self, d, c): pass", "service", "no method 'initialize'"),
        ("class A:\n    def initialize(self, c): pass", "service", "no method 'handle'"),
        ("handle = 5", "service:handle", ""),
        ("", "absent:handle", "'absent' is neither in the archive nor installed"),
    ],
)
def test_an_entry_point_that_cannot_be_found_is_explained(
    tmp_path: Path, source: str, entry: str, match: str
) -> None:
    write(tmp_path, source)
    with pytest.raises((LoadError, TypeError)) as caught:
        load(tmp_path, entry)
    assert match in str(caught.value)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("import no_such_module_anywhere", ModuleNotFoundError),
        ("def handle(:", SyntaxError),
        ("raise KeyError('weights')", KeyError),
        ("def handle(data, context): raise SystemExit(3)", SystemExit),
    ],
)
def test_what_the_handlers_module_raises_passes_through(
    tmp_path: Path, source: str, kind: type[BaseException]
) -> None:
    write(tmp_path, source)
    with pytest.raises(kind):
        load(tmp_path)


def test_a_module_that_failed_to_import_is_not_taken_for_imported(tmp_path: Path) -> None:
    write(tmp_path, "raise KeyError('weights')", "odd_service.py")
    with pytest.raises(KeyError):
        load(tmp_path, "odd_service:handle")
    assert "odd_service" not in sys.modules


@pytest.mark.parametrize(
    ("data", "content_type", "seen"),
    [
        (b'{"a": 1}', "application/json", "{'a': 1}"),
        (b"text", "text/plain", "'text'"),
        (b"text", "text/plain; charset=utf-8", "'text'"),
        (b'{"a": 1}', "", "bytearray(b'{\"a\": 1}')"),
        (b"\xff", "application/octet-stream", "bytearray(b'\\xff')"),
        (b'{"a": 1}', "Application/JSON", "bytearray(b'{\"a\": 1}')"),
        (b'{"a": 1}', "application/vnd.x+json", "bytearray(b'{\"a\": 1}')"),
    ],
)
def test_a_part_is_decoded_as_its_content_type_says(
    tmp_path: Path, data: bytes, content_type: str, seen: str
) -> None:
    model = load(write(tmp_path, HANDLE + "[repr(item['body']) for item in data]"))
    assert answer(run(model, data, content_type=content_type)[0])[0].decode() == seen


def test_decoding_can_be_turned_off(tmp_path: Path) -> None:
    model = load(
        write(tmp_path, HANDLE + "[repr(item['body']) for item in data]"), decode_input_request=False
    )
    (outcome,) = run(model, b"{}", content_type="application/json")
    assert answer(outcome)[0] == b"bytearray(b'{}')"


def test_a_part_that_is_not_what_it_says_fails_and_its_mates_run_together(tmp_path: Path) -> None:
    model = load(write(tmp_path, HANDLE + "[len(data) for item in data]"))
    items = [
        Item(n, None, InferRequest(id="r", model="m", inputs=[Tensor("body", "BYTES", (), b, kind)]))
        for n, (b, kind) in enumerate([(b"1", "application/json"), (b"{", "application/json"), (b"x", "")])
    ]
    ran = Ran()
    model.run(items, ran.on_started, ran.on_outcomes)
    by_id = {each.job_id: each for each in ran.outcomes}
    assert isinstance(by_id[1].error, InvalidRequest)
    assert [bytes(by_id[n].outputs[0].data) for n in (0, 2)] == [b"2", b"2"]


def test_status_and_headers_of_a_batch_that_failed_do_not_leak_into_the_second_attempt(
    tmp_path: Path,
) -> None:
    model = load(
        write(
            tmp_path,
            "def handle(data, context):\n"
            "    if data is None: return None\n"
            "    for n, item in enumerate(data):\n"
            "        if item['body'] == b'mark': context.set_response_status(201, 'Marked', n)\n"
            "        if item['body'] == b'bad': raise ValueError\n"
            "    return ['ok' for _ in data]\n",
        )
    )
    mark, plain, bad = run(model, b"mark", b"plain", b"bad")
    assert (mark.status, mark.reason, plain.status, plain.reason) == (201, "Marked", 200, "")
    assert isinstance(bad.error, HandlerError)


def test_three_batches_in_a_row_that_had_to_be_taken_apart_name_the_handler_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load(write(tmp_path, HANDLE + "[b'x'] if len(data) == 1 else 1 / 0"))
    for _ in range(5):
        run(model, b"a", b"b")
    assert capfd.readouterr().err.count("does the handler service:handle work with batches?") == 1
    run(model, b"a")


def test_an_exit_is_not_caught(tmp_path: Path) -> None:
    model = load(write(tmp_path, HANDLE + "exit(3)"))
    with pytest.raises(SystemExit):
        run(model, b"x", b"y")


def test_a_chosen_content_type_replaces_ours_and_is_no_header(tmp_path: Path) -> None:
    source = (
        "def handle(data, context):\n"
        "    if data is None: return None\n"
        "    context.set_response_content_type(0, 'image/png')\n"
        "    context.set_response_header(0, 'X-Count', 3)\n"
        "    return [b'png']\n"
    )
    (outcome,) = run(load(write(tmp_path, source)), b"x")
    assert answer(outcome) == (b"png", "image/png")
    assert outcome.headers == [("X-Count", "3")]


def test_headers_come_after_the_content_types_of_the_parts_and_win_over_them(tmp_path: Path) -> None:
    source = "[dict(context.get_all_request_header(0), order=list(context.get_all_request_header(0)))]"
    parts = [
        Tensor("photo", "BYTES", (), bytearray(b"x"), "image/png"),
        Tensor("x-name", "BYTES", (), bytearray(b"y"), ""),
    ]
    request = InferRequest(id="r", model="m", inputs=parts, headers=[("Accept", "a/b"), ("x-name", "last")])
    ran = Ran()
    load(write(tmp_path, HANDLE + source)).run([Item(0, None, request)], ran.on_started, ran.on_outcomes)
    assert json.loads(ran.outcomes[0].outputs[0].data) == {
        "photo": {"content-type": "image/png"},
        "x-name": "last",
        "Accept": "a/b",
        "order": ["photo", "x-name", "Accept"],
    }


@pytest.mark.parametrize("expression", ["1 / 0", "None", "[]"])
def test_the_prediction_time_is_reported_on_success_only_and_the_handlers_metrics_always(
    tmp_path: Path, expression: str
) -> None:
    source = "def handle(data, context):\n    if data is None: return None\n"
    source += "    context.metrics.add_counter('Seen', 1)\n"
    source += f"    return ['fine'] if data[0]['body'] == b'good' else {expression}\n"
    model = load(write(tmp_path, source))
    run(model, b"bad")
    assert [line.partition(".")[0] for line in model.metric_lines(0, "vm")] == ["Seen"]
    run(model, b"good")
    assert [line.partition(":")[0] for line in model.metric_lines(0, "vm")] == [
        "Seen.Count",
        "PredictionTime.Milliseconds",
    ]


def test_numpy_arrays_and_integers_are_no_answers_and_its_floats_are(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    source = "__import__('numpy').array([1.5])"
    for value in (source, f"[{source}.astype(int)[0]]"):
        (outcome,) = run(load(write(tmp_path, HANDLE + value)), b"x")
        assert isinstance(outcome.error, HandlerError)
    (outcome,) = run(load(write(tmp_path, HANDLE + f"[{source}[0]]")), b"x")
    assert answer(outcome)[0] == json.dumps(numpy.float64(1.5)).encode()


def ask(model: handler.MmsHandler, **asked: Any) -> Outcome:
    tensors = pytest.importorskip("mms_lite.tensors", reason="numpy is not installed")
    x = tensors.to_tensor("x", tensors.np.arange(2))
    ran = Ran()
    item = Item(0, None, InferRequest(id="r", model="m", inputs=[x], **asked))
    model.run([item], ran.on_started, ran.on_outcomes)
    return ran.outcomes[0]


def test_a_request_of_arrays_is_answered_with_the_outputs_that_it_names(tmp_path: Path) -> None:
    model = load(write(tmp_path, HANDLE + "[{'a': each['x'], 'b': each['x'] * 2} for each in data]"))
    for wanted, names in ((None, ["a", "b"]), ([], ["a", "b"]), (["b"], ["b"]), (["b", "a"], ["b", "a"])):
        assert [tensor.name for tensor in ask(model, outputs=wanted).outputs] == names
    assert answer(ask(model, outputs=["b", "z"])) == (
        BadTensor,
        "unexpected inference output 'z', allowed outputs are: a, b",
    )
    (tmp_path / "text").mkdir()
    text = load(write(tmp_path / "text", HANDLE + "['words']"))
    assert answer(ask(text, outputs=["body"]))[0] == b"words"
    assert answer(ask(text, outputs=["a"]))[1].endswith("allowed outputs are: body")


def test_a_handler_reads_the_parameters_of_a_request_and_sets_those_of_its_answer(tmp_path: Path) -> None:
    write(
        tmp_path,
        "def handle(data, context):\n"
        "    if data is None: return None\n"
        "    top = context.get_request_parameters(0)['top']\n"
        "    context.set_response_parameter(0, 'top', top + 1)\n"
        "    return [{'a': data[0]['x'], 'b': data[0]['x']}]",
    )
    outcome = ask(load(tmp_path), parameters={"top": 3}, outputs=["a"])
    assert (outcome.error, outcome.parameters) == (None, {"top": 4})
    assert [tensor.name for tensor in outcome.outputs] == ["a"]


def test_what_a_model_needs_to_say_goodbye_is_still_there_when_it_is_let_go(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = "import os\nWORD = 'bye'\nclass Model:\n    def __del__(self): print(WORD, os.sep)\n"
    model = load(write(tmp_path, source + "model = Model()\n" + HANDLE + "[1]"))
    assert capfd.readouterr().out == ""
    model.close()
    assert capfd.readouterr().out == f"bye {'/'}\n"


def test_imported_classes_do_not_count(tmp_path: Path) -> None:
    source = "from pathlib import Path\nfrom json import JSONDecoder\nclass A:\n"
    source += "    def initialize(self, c): pass\n    def handle(self, d, c): return ['own']\n"
    write(tmp_path, source)
    assert answer(run(load(tmp_path, "service"), b"x")[0])[0] == b"own"


def test_one_class_under_two_names_is_one_class(tmp_path: Path) -> None:
    source = (
        "class A:\n    def initialize(self, c): pass\n    def handle(self, d, c): return ['a']\nAlias = A\n"
    )
    assert answer(run(load(write(tmp_path, source), "service"), b"x")[0])[0] == b"a"
