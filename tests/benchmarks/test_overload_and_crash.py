"""What is read out of the outcomes of an overload and of a crash."""

import crash
import overload
import pytest
from client import Result
from peers import Job
from wire import CUT, UNANSWERED, Outcome


def result(*outcomes: Outcome, end: float, first_after_s: float | None = None) -> Result:
    return Result(began=0.0, ended=end, cpu_s=1.0, first_after_s=first_after_s, outcomes=list(outcomes))


def test_an_overload_tells_refusals_from_answers_and_from_what_is_neither() -> None:
    outcomes = [Outcome(0.0, 0.001 * took, 503) for took in (1, 2, 3, 101)]
    outcomes += [Outcome(0.0, 2.0, 200), Outcome(0.0, 1.0, "closed"), Outcome(3.0, 4.0, CUT)]
    found = overload.summary(result(*outcomes, end=4.0, first_after_s=0.04), Job(sleep_ms=20, queue_size=100))
    assert found["refusals"] == 4
    assert found["refusal_p50_ms"] == pytest.approx(2)
    assert found["refusals_over_100_ms"] == 1
    assert found["served_per_s"] == pytest.approx(0.25)
    assert found["served_p50_ms"] == pytest.approx(2000)
    assert found["served_limit_ms"] == pytest.approx(101 * 20 * 1.1)
    assert found["first_after_ms"] == pytest.approx(40)
    assert found["broken"] == 1


def test_a_server_that_comes_back_has_a_gap_and_then_its_rate() -> None:
    """A hundred answers per second, a kill after 3 s, nothing for 1 s; five requests had waited meanwhile."""
    numbers = [number for number in range(800) if not 300 <= number < 400]
    good = [Outcome(2.98 if 400 <= n < 405 else 0.01 * n - 0.05, 0.01 * n, 200) for n in numbers]
    failed = Outcome(2.99, 3.1, 500)
    found = crash.summary(result(*good, failed, Outcome(7.95, 8.0, CUT), end=8.0), 2.995, 0.001)
    assert found["rate_before"] == pytest.approx(100, rel=0.01)
    assert (found["failed"], found["failures"], found["hanging"]) == (1, {"500": 1}, 0)
    assert found["longest_gap_ms"] == pytest.approx(1010)
    assert found["next_ok_ms"] == pytest.approx(1005)
    assert found["next_ok_of_new_ms"] == pytest.approx(1055)
    assert 0.9 <= found["recovered_s"] <= 1.0


def test_a_server_that_never_comes_back_has_no_next_answer() -> None:
    good = [Outcome(0.01 * number, 0.01 * number + 0.005, 200) for number in range(300)]
    hanging = [Outcome(3.0, 8.0, UNANSWERED), Outcome(8.0, 13.0, UNANSWERED)]
    found = crash.summary(result(*good, *hanging, end=13.0), 3.0, 0.005)
    assert found["hanging"] == 2
    assert found["next_ok_ms"] is None
    assert found["recovered_s"] is None
    assert found["longest_gap_ms"] == pytest.approx(10_005)
