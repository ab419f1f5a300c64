"""What handlers see of a batch, and the metric lines they cause."""

import logging
import math
import time
from unittest.mock import MagicMock

import pytest

from mms_lite.worker.context import (
    Context,
    Headers,
    RequestProcessor,
    RequestProcessors,
)
from mms_lite.worker.metrics_store import MAX_METRICS, Dimension, MetricsStore, Units

NOW_S = 1795243439.9


def loaded(gpu=None):
    return Context("echo", "/models/echo", {"model": {}}, 4, gpu, "1.1.11")


def with_batch(size=2, headers=None, deadlines=()):
    context = loaded()
    context.begin_batch([f"id{i}" for i in range(size)], headers or [()] * size, deadlines)
    return context


def lines(store):
    return store.lines(NOW_S, "vm")


# --- Context: the model's part


def test_system_properties_are_those_of_mms():
    assert loaded(gpu=1).system_properties == {
        "model_dir": "/models/echo",
        "gpu_id": 1,
        "batch_size": 4,
        "server_name": "MMS",
        "server_version": "1.1.11",
    }
    assert (loaded().model_name, loaded().manifest) == ("echo", {"model": {}})


@pytest.mark.parametrize(("given", "seen"), [(None, None), (-1, None), (0, 0), (3, 3)])
def test_gpu_id_is_none_on_the_cpu(given, seen):
    assert loaded(gpu=given).system_properties.get("gpu_id") == seen


def test_at_load_there_is_no_request_and_setters_do_nothing():
    context = loaded()
    assert context.request_ids is None
    assert context.request_processor is None
    context.set_response_status(404, "no")
    context.set_all_response_status(404, "no")
    context.set_response_content_type(0, "a/b")
    context.set_response_header(0, "x", "y")
    assert context.get_response_status(0) == (200, None)
    assert context.get_response_headers(0) == {}
    assert context.get_response_content_type(0) is None
    assert context.get_request_id() is None
    assert context.get_request_header(0, "x") is None
    assert context.get_all_request_header(0) == {}
    assert context.remaining_ms() is None


def test_metrics_work_at_load():
    context = loaded()
    context.metrics.add_time("LoadTime", 2)
    assert lines(context.metrics) == [
        "LoadTime.Milliseconds:2|#ModelName:echo,Level:Model|#hostname:vm,timestamp:1795243439"
    ]


def test_contexts_compare_by_what_they_hold():
    assert loaded() == loaded()
    assert loaded() != loaded(gpu=1)
    assert loaded() != "a context"


# --- Context: the request's part


def test_request_ids_are_by_index():
    context = with_batch()
    assert context.request_ids == {0: "id0", 1: "id1"}
    assert (context.get_request_id(), context.get_request_id(1)) == ("id0", "id1")
    assert context.get_request_id(9) is None


def test_request_headers_ignore_case_and_keep_the_clients_spelling():
    context = with_batch(2, [[("X-Trace", "7"), ("content-type", "text/csv")], []])
    assert context.get_request_header(0, "Content-Type") == "text/csv"
    assert context.get_request_header(0, "x-trace") == "7"
    assert context.get_request_header(1, "x-trace") is None
    headers = context.get_all_request_header(0)
    assert isinstance(headers, dict)
    assert list(headers) == ["X-Trace", "content-type"]
    assert "x-TRACE" in headers
    assert headers["x-trace"] == "7"


def test_a_header_sent_twice_has_its_last_value():
    context = with_batch(1, [[("X-A", "1"), ("x-a", "2")]])
    assert context.get_request_header(0, "X-a") == "2"


def test_content_types_of_parts_stand_among_the_headers():
    context = with_batch(1, [[("img", {"content-type": "image/png"}), ("Host", "h")]])
    assert context.get_request_header(0, "img").get("content-type") == "image/png"


def test_headers_behave_as_a_dict_on_a_miss():
    headers = Headers({"A": 1})
    assert headers.get("b") is None
    assert headers.get(None, 5) == 5
    assert None not in headers
    with pytest.raises(KeyError, match="b"):
        headers["b"]


def test_status_is_set_for_one_or_all():
    context = with_batch()
    context.set_response_status(code=404, phrase="Gone fishing", idx=1)
    assert context.get_response_status(0) == (200, None)
    assert context.get_response_status(1) == (404, "Gone fishing")
    context.set_all_response_status(507)
    assert context.get_response_status(0) == context.get_response_status(1) == (507, "")


@pytest.mark.parametrize("code", [0, 100, 199, 600, "x"])
def test_a_status_that_http_cannot_carry_is_refused(code):
    with pytest.raises(ValueError, match=r"is not a final HTTP status|invalid literal"):
        with_batch().set_response_status(code)


def test_a_status_may_be_text():
    context = with_batch()
    context.set_response_status("418")
    assert context.response(0) == (418, "", [])


def test_no_content_type_leaves_it_unset():
    context = with_batch()
    context.set_response_content_type(0, None)
    assert context.get_response_content_type(0) is None
    assert context.response(0) == (200, "", [])


@pytest.mark.parametrize("bad", ["a\r\nX: y", "a\nb", "a\0b"])
def test_what_would_split_the_response_is_refused(bad):
    context = with_batch()
    with pytest.raises(ValueError, match="the reason phrase holds a line break or NUL"):
        context.set_response_status(200, bad)
    with pytest.raises(ValueError, match="the value of header X holds a line break or NUL"):
        context.set_response_header(0, "X", bad)
    with pytest.raises(ValueError, match="is not a header name"):
        context.set_response_header(0, bad, "y")
    with pytest.raises(ValueError, match="the value of header content-type holds"):
        context.set_response_content_type(0, bad)
    context.get_response_headers(1)["X"] = bad
    with pytest.raises(ValueError, match="the value of header X holds"):
        context.response(1)
    assert context.response(0) == (200, "", [])


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\tb"])
def test_a_header_needs_a_name(name):
    with pytest.raises(ValueError, match="is not a header name"):
        with_batch().set_response_header(0, name, "y")


def test_header_values_become_text():
    context = with_batch()
    context.set_response_header(0, "X-Count", 3)
    context.get_response_headers(0)["X-Float"] = 0.5
    assert context.get_response_headers(0)["x-count"] == "3"
    assert context.response(0) == (200, "", [("X-Count", "3"), ("X-Float", "0.5")])


def test_a_header_set_twice_in_two_spellings_is_sent_once():
    context = with_batch()
    context.set_response_content_type(0, "text/plain")
    context.set_response_header(0, "Content-Type", "image/png")
    assert context.get_response_content_type(0) == "image/png"
    assert context.response(0)[2] == [("Content-Type", "image/png")]


def test_content_type_takes_a_request_id_as_in_mms_1_0():
    context = with_batch()
    context.set_response_content_type("id1", "a/b")
    assert context.get_response_content_type("id1") == "a/b"
    assert context.get_response_content_type(1) == "a/b"
    assert context.get_response_content_type(0) is None
    with pytest.raises(KeyError, match="no request other"):
        context.set_response_content_type("other", "a/b")


def test_an_index_outside_the_batch_is_an_error():
    with pytest.raises(IndexError):
        with_batch().set_response_status(404, idx=2)


def test_remaining_ms_counts_down_to_the_deadline(monkeypatch):
    now = time.monotonic()
    context = with_batch(3, deadlines=[now + 1.5, None, now - 1])
    monkeypatch.setattr(time, "monotonic", lambda: now + 0.5)
    assert context.remaining_ms() == pytest.approx(1000, abs=1)
    assert isinstance(context.remaining_ms(), int)
    assert context.remaining_ms(1) is None
    assert context.remaining_ms(2) == 0
    assert with_batch().remaining_ms(1) is None


def test_nothing_of_a_batch_is_left_in_the_next():
    context = with_batch(2, [[("X", "1")], [("X", "2")]], [time.monotonic() + 9, None])
    context.set_all_response_status(500, "bad")
    context.set_response_header(0, "X", "y")
    context.metrics.add_counter("n", 1)
    old = context.request_processor
    context.request_ids[7] = "stray"
    context.begin_batch(["new"], [()])
    old[0].report_status(404)
    assert context.request_ids == {0: "new"}
    assert context.get_all_request_header(0) == {}
    assert context.response(0) == (200, "", [])
    assert context.remaining_ms() is None
    assert lines(context.metrics) == []
    assert len(context.request_processor) == 1


def test_parameters_and_wanted_outputs_are_those_of_each_request_and_of_no_other_batch():
    context = loaded()
    assert (context.get_request_parameters(), context.get_requested_outputs()) == ({}, None)
    parameters, outputs = [{"top": 3}, {}], [["y"], None]
    context.begin_batch(["a", "b"], [(), ()], parameters=parameters, outputs=outputs)
    context.set_response_parameter(1, "seen", 2)
    assert [context.get_request_parameters(n) for n in range(2)] == parameters
    assert [context.get_requested_outputs(n) for n in range(2)] == outputs
    assert [context.response_parameters(n) for n in range(2)] == [{}, {"seen": 2}]
    context.begin_batch(["c"], [()])
    assert (context.get_request_parameters(), context.get_requested_outputs()) == ({}, None)
    assert context.response_parameters(0) == {}


@pytest.mark.parametrize("value", [[1], None, 2**70, float("inf"), "half \ud800"])
def test_a_parameter_that_no_answer_can_carry_is_refused(value):
    context = loaded()
    context.begin_batch(["a"], [()])
    with pytest.raises(ValueError, match=r"^the answer's parameter 'it' is "):
        context.set_response_parameter(0, "it", value)
    assert context.response_parameters(0) == {}


@pytest.mark.parametrize(("headers", "deadlines"), [([], ()), ([(), ()], ()), ([()], [None, None])])
def test_a_batch_has_headers_and_deadlines_for_each_request(headers, deadlines):
    with pytest.raises(ValueError, match="one header list and one deadline per request"):
        loaded().begin_batch(["a"], headers, deadlines)


# --- RequestProcessor


def test_the_list_of_processors_serves_handlers_of_mms_1_0():
    context = with_batch(2, [[("A", "1")], [("A", "2")]])
    processors = context.request_processor
    assert isinstance(processors, list)
    processors.report_status(500, "Unknown inference error")
    processors.add_response_property("k", "v")
    assert [context.response(i) for i in (0, 1)] == [(500, "Unknown inference error", [("k", "v")])] * 2
    assert processors.get_request_property("a") == "1"
    assert processors.get_request_properties() == {"A": "1"}
    assert processors.get_response_status_code() == 500
    assert processors.get_response_status_phrase() == "Unknown inference error"
    assert processors.get_response_headers() == {"k": "v"}
    assert processors.get_response_header("k") == "v"


def test_a_request_id_as_key_means_that_request_as_in_mms_1_0():
    context = with_batch(2, [[("A", "1")], [("A", "2")]])
    processors = context.request_processor
    assert processors.get_request_property("id1") == {"A": "2"}
    context.set_response_content_type("id0", "a/b")
    processors.add_response_property("id1", {"content-type": "c/d"})
    assert processors.get_response_header() == {
        "id0": {"content-type": "a/b"},
        "id1": {"content-type": "c/d"},
    }
    assert context.get_response_content_type("id1") == "c/d"
    processors.add_response_property("id1", "the value of an odd header")
    assert context.get_response_headers(0)["id1"] == "the value of an odd header"


def test_a_handlers_tests_may_put_a_stand_in_for_the_processors():
    context = loaded()
    context.request_processor = stand_in = MagicMock()
    context.request_processor.report_status(500, "no")
    stand_in.report_status.assert_called_once_with(500, "no")
    context.set_response_status(404, "lost", 3)
    stand_in.__getitem__.assert_called_with(3)
    context.metrics = metrics = MagicMock()
    context.metrics.add_counter("n", 1)
    metrics.add_counter.assert_called_once_with("n", 1)


def test_tests_of_handlers_may_set_the_processors():
    context = loaded()
    context.request_processor = RequestProcessor({"A": "1"})
    assert context.get_request_header(0, "A") == "1"
    context.request_processor = [RequestProcessor({}), RequestProcessor({"A": "2"})]
    assert isinstance(context.request_processor, RequestProcessors)
    assert context.get_request_header(1, "A") == "2"
    context.request_processor = None
    assert context.request_processor is None


# --- MetricsStore


def test_the_line_of_one_request_is_that_of_mms():
    store = MetricsStore({0: "7e0b"}, "echo")
    store.add_time("PredictionTime", 0.03)
    assert lines(store) == [
        "PredictionTime.Milliseconds:0.03|#ModelName:echo,Level:Model"
        "|#hostname:vm,requestID:7e0b,timestamp:1795243439"
    ]


def test_a_line_names_one_request_or_the_whole_batch():
    store = MetricsStore({0: "a", 1: "b"}, "echo")
    store.add_counter("n", 1, idx=1)
    store.add_counter("n", 1)
    store.add_counter("n", 1, idx=9)
    assert lines(store) == [
        "n.Count:1|#ModelName:echo,Level:Model|#hostname:vm,requestID:b,timestamp:1795243439",
        "n.Count:2|#ModelName:echo,Level:Model|#hostname:vm,requestID:a,b,timestamp:1795243439",
    ]


def heads(store):
    return [line.split("|")[0] for line in lines(store)]


def test_units_have_their_long_names():
    store = MetricsStore({0: "a"}, "echo")
    store.add_time("t", 1)
    store.add_time("t", 1, None, "s")
    for unit in ("MB", "kB", "GB", "B"):
        store.add_size("s", 2, 0, unit)
    store.add_size("d", 3)
    store.add_percent("p", 4)
    store.add_metric("m", 5)
    store.add_metric("m", 6, unit="Furlongs")
    assert heads(store) == [
        "t.Milliseconds:1",
        "t.Seconds:1",
        "s.Megabytes:2",
        "s.Kilobytes:2",
        "s.Gigabytes:2",
        "s.Bytes:2",
        "d.Megabytes:3",
        "p.Percent:4",
        "m.unit:5",
        "m.Furlongs:6",
    ]
    assert Units().units[None] == "unit"


def test_counters_add_up_and_the_rest_replaces():
    store = MetricsStore({0: "a"}, "echo")
    for value in (1, 2):
        store.add_counter("n", value)
        store.add_time("t", value)
    assert heads(store) == ["n.Count:3", "t.Milliseconds:2"]


def test_an_unknown_unit_is_refused():
    store = MetricsStore({0: "a"}, "echo")
    with pytest.raises(ValueError) as caught:
        store.add_time("t", 1, unit="ns")
    assert str(caught.value) == "the unit for a timed metric should be one of ['ms', 's']"
    with pytest.raises(ValueError) as caught:
        store.add_size("s", 1, unit="TB")
    assert str(caught.value) == "The unit for size based metric is one of ['MB','kB', 'GB', 'B']"


EVERY_METHOD = ["add_counter", "add_time", "add_size", "add_percent", "add_metric", "add_error"]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_method_takes_dimensions_and_leaves_the_callers_list_alone(method):
    store = MetricsStore({0: "a"}, "echo")
    mine = [Dimension("Stage", "pre")]
    getattr(store, method)("x", 1, dimensions=mine)
    level = "Error" if method == "add_error" else "Model"
    assert f"|#Stage:pre,ModelName:echo,Level:{level}|#" in lines(store)[0]
    assert len(mine) == 1
    with pytest.raises(ValueError, match="Please provide a list of dimensions"):
        getattr(store, method)("x", 1, dimensions="Stage")


def test_dimensions_tell_metrics_apart():
    store = MetricsStore({0: "a"}, "echo")
    store.add_counter("n", 1, dimensions=[Dimension("k", "1")])
    store.add_counter("n", 1, dimensions=[Dimension("k", "2")])
    store.add_counter("n", 1, dimensions=[Dimension("k", "1")])
    assert heads(store) == ["n.Count:2", "n.Count:1"]


def test_an_error_is_text_of_the_model_and_of_no_request():
    store = MetricsStore({0: "a"}, "echo")
    store.add_error("BadImage", "not a JPEG: 0x00|\nrest")
    assert lines(store) == [
        "BadImage.Error:not a JPEG: 0x00__rest|#ModelName:echo,Level:Error|#hostname:vm,timestamp:1795243439"
    ]


class Scalar:
    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (True, "1"),
        (-0.5, "-0.5"),
        ("12", "12.0"),
        (1e20, "100000000000000000000"),
        (1e-7, "0.0000001"),
        (2**64, "18446744073709552000"),
        (Scalar(0.25), "0.25"),
    ],
)
def test_numbers_are_written_without_exponent(value, text):
    store = MetricsStore({0: "a"}, "echo")
    store.add_metric("m", value)
    assert heads(store) == [f"m.unit:{text}"]


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 10**5000, None, "many", [], object(), Scalar(math.nan)],
    ids=lambda value: type(value).__name__,  # pytest cannot print an int of 5000 digits
)
@pytest.mark.parametrize("method", EVERY_METHOD[:-1])
def test_what_is_no_finite_number_is_left_out_with_one_warning(method, value, caplog):
    store = MetricsStore({0: "a"}, "echo")
    store.add_percent("before", 1)
    getattr(store, method)("x", value)
    getattr(store, method)("x", value)
    with caplog.at_level(logging.WARNING):
        assert heads(store) == ["before.Percent:1"]
        assert heads(store) == ["before.Percent:1"]
    assert [r.getMessage() for r in caplog.records] == ["model echo: 2 metric values were not finite numbers"]


def test_errors_of_any_value_are_one_line():
    store = MetricsStore({0: "a"}, "echo")
    for name, value in [
        ("a", math.nan),
        ("b", 10**5000),
        ("c", 7),
        ("d", ValueError("x\ud800")),
        ("e", "y" * 999),
    ]:
        store.add_error(name, value)
    assert heads(store) == ["a.Error:nan", "b.Error:int", "c.Error:7", "d.Error:x_", "e.Error:" + "y" * 256]


def test_a_counter_that_overflows_is_left_out():
    store = MetricsStore({0: "a"}, "echo")
    store.add_counter("n", 1.7e308)
    store.add_counter("n", 1.7e308)
    assert lines(store) == []


def test_names_cannot_break_a_line_apart():
    store = MetricsStore({0: "a"}, "a|b")
    store.add_metric("x:1|#\ny", 1, unit="u,v", dimensions=[Dimension("k#", "v|w\u2028")])
    assert lines(store) == [
        "x_1___y.u_v:1|#k_:v_w_,ModelName:a_b,Level:Model|#hostname:vm,requestID:a,timestamp:1795243439"
    ]


def test_a_batch_holds_a_bounded_number_of_metrics(caplog):
    store = MetricsStore({0: "a"}, "echo")
    for number in range(MAX_METRICS + 5):
        store.add_counter(f"n{number}", 1)
    store.add_counter("n0", 1)
    with caplog.at_level(logging.WARNING):
        written = heads(store)
        lines(store)
    assert len(written) == MAX_METRICS == 10_000
    assert written[0] == "n0.Count:2"
    assert [r.getMessage() for r in caplog.records] == [
        "model echo: 5 metrics over the limit of 10000 in one batch were dropped"
    ]
