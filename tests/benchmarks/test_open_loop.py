"""Requests at fixed moments: latency counts from when they were due; the generator knows when it was late."""

import socket
import threading

import open_loop
from answering import BUSY, OK, Target, always, server
from open_loop import OpenLoop, Schedule

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nphoto"


def test_every_request_of_the_schedule_is_sent_and_counted() -> None:
    with server(always(OK)) as address:
        found = OpenLoop(address, REQUEST, Schedule(400, 0.25, connections=8, grace_s=30)).run()
    assert found["statuses"] == {"200": 100}
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["p999_ms"] <= found["max_ms"]
    assert found["answered_per_s"] <= 400 / 0.9


def test_a_stalled_server_is_charged_for_all_who_waited() -> None:
    """One connection, ten requests 10 ms apart; the first answer comes when the last request is due."""
    everything_due = threading.Event()
    timer = threading.Timer(0.1, everything_due.set)

    def script(connection: socket.socket, number: int) -> bool:
        if number == 1:
            timer.start()
            everything_due.wait()
        connection.sendall(OK)
        return True

    with server(script) as address:
        found = OpenLoop(address, REQUEST, Schedule(100, 0.1, connections=1, grace_s=30)).run()
    assert found["statuses"] == {"200": 10}
    # Due after 0, 10, 20 ... ms, and none answered before 100 ms: the fifth has waited for 60 ms.
    assert found["p50_ms"] >= 45
    assert found["max_ms"] >= 100


def test_refusals_have_no_latency_and_hanging_requests_are_counted() -> None:
    with server(always(BUSY)) as address:
        refused = OpenLoop(address, REQUEST, Schedule(100, 0.05, connections=2, grace_s=30)).run()
    assert refused["statuses"] == {"503": 5}
    assert refused["p50_ms"] is None
    with server(lambda connection, _: True) as address:
        hanging = OpenLoop(address, REQUEST, Schedule(100, 0.05, connections=2, grace_s=0.05)).run()
    assert hanging["statuses"] == {"unanswered": 5}
    assert hanging["answered_per_s"] == 0


def test_a_run_in_which_the_generator_was_late_is_void() -> None:
    """No process can send one request each nanosecond."""
    with server(always(OK)) as address:
        found = OpenLoop(address, REQUEST, Schedule(1e9, 5e-6, connections=2, grace_s=30)).run()
    assert found["statuses"] == {"200": 5000}
    assert found["late_p99_ms"] > open_loop.LATE_MS
    assert found["void"]


def test_the_generators_process_reports_what_it_did() -> None:
    with server(always(OK)) as address:
        found = open_loop.schedule(Target(*address), b"a photo", Schedule(200, 0.1, connections=4))
    assert found["statuses"] == {"200": 20}
    assert found["rate"] == 200
    assert found["priority"]
