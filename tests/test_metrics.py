"""The numbers themselves: what falls into which bucket, and that a snapshot stands still."""

from hypothesis import given
from hypothesis import strategies as st

from mms_lite import errors
from mms_lite.errors import DeadlineExceeded, ModelNotReady, QueueFull, ServingError
from mms_lite.metrics import LATENCIES_S, REASONS, ROWS, Histogram, VersionMetrics


def test_bounds_rise_and_are_those_that_are_documented() -> None:
    assert (LATENCIES_S[0], LATENCIES_S[-1]) == (0.0005, 60.0)
    assert (ROWS[0], ROWS[-1], len(ROWS)) == (1.0, 1024.0, 11)
    assert sorted(set(LATENCIES_S)) == list(LATENCIES_S)


def test_a_value_on_a_bound_counts_below_it_and_one_above_all_in_the_last_place() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, 900.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]


@given(st.lists(st.floats(min_value=0, max_value=100)))
def test_counts_are_those_of_counting_by_hand(values: list[float]) -> None:
    histogram = Histogram(LATENCIES_S)
    for value in values:
        histogram.observe(value)
    ends = [*LATENCIES_S, float("inf")]
    for place, (low, high) in enumerate(zip([-1.0, *LATENCIES_S], ends, strict=True)):
        assert histogram.counts[place] == sum(low < value <= high for value in values)
    assert abs(histogram.sum - sum(values)) < 1e-6


def test_a_copy_stands_still_while_counting_goes_on() -> None:
    metrics = VersionMetrics(cancelled=3, restarts=4)
    histograms = ("queue_s", "batch_wait_s", "inference_s", "total_s", "batch_rows")
    for number, name in enumerate(histograms):
        for _ in range(number + 1):
            getattr(metrics, name).observe(1.0)
    metrics.count("mms", "200")
    metrics.refuse(QueueFull("full"))
    copy = metrics.copy()
    metrics.count("mms", "200")
    metrics.refuse(QueueFull("full"))
    metrics.cancelled += 1
    for name in histograms:
        getattr(metrics, name).observe(1.0)
    assert [sum(getattr(copy, name).counts) for name in histograms] == [1, 2, 3, 4, 5]
    assert [getattr(copy, name).sum for name in histograms] == [1, 2, 3, 4, 5]
    assert (copy.requests, copy.refusals["queue_full"]) == ({("mms", "200"): 1}, 1)
    assert (copy.cancelled, copy.restarts) == (3, 4)


def test_versions_share_no_numbers() -> None:
    first, second = VersionMetrics(), VersionMetrics()
    first.queue_s.observe(1.0)
    first.count("mms", "200")
    first.refuse(QueueFull("full"))
    assert (second.requests, sum(second.queue_s.counts), sum(second.refusals.values())) == ({}, 0, 0)


def test_every_reason_is_there_from_the_start_and_is_the_code_of_an_error_or_no_workers() -> None:
    metrics = VersionMetrics()
    assert metrics.refusals == dict.fromkeys(REASONS, 0)
    for error in (
        QueueFull("full"),
        ModelNotReady("loading"),
        ModelNotReady("none", no_workers=True),
        DeadlineExceeded("late", by="client"),
    ):
        metrics.refuse(error)
    assert metrics.refusals == dict.fromkeys(REASONS, 1)
    codes = {
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ServingError)
    }
    assert set(REASONS) - codes == {"no_workers"}


def test_sizes_of_batches_are_told_apart_up_to_a_number_of_them_and_then_roughly() -> None:
    metrics = VersionMetrics()
    for rows in range(1, 5001):
        metrics.end_batch(rows, 0.5, answered=rows)
    assert len(metrics.batches) <= 1024 + 64
    assert metrics.batches[1000] == (1, 0.5)
    assert metrics.batches[2048] == (1024, 512.0)  # those of 1025 to 2048 rows
    assert sum(count for count, _ in metrics.batches.values()) == 5000
    assert metrics.answered_rows == sum(range(1, 5001))


def test_a_batch_of_which_nothing_was_answered_is_timed_and_no_execution() -> None:
    metrics = VersionMetrics()
    metrics.end_batch(4, 0.5, answered=0)
    metrics.end_batch(4, 0.5, answered=3)
    assert (metrics.batches, metrics.answered_rows) == ({4: (1, 0.5)}, 3)
    assert (sum(metrics.inference_s.counts), metrics.batch_rows.sum) == (2, 8)
