"""The page that Prometheus scrapes: what it says after real traffic, and that the documentation knows it."""

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import parser
from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser
from raw_http import Stub
from raw_http import request as raw_request

from mms_lite import __version__
from mms_lite.errors import LoadError
from mms_lite.frontends.message import HttpRequest, HttpResponse
from mms_lite.frontends.prometheus import Prometheus
from mms_lite.types import VersionState

DOC = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
# What Prometheus sends.
ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=0.0.4;q=0.4,*/*;q=0.1"
)
MOODY = """
    def handle(data, context):
        if data is None:
            return None
        if data[0]["body"] == b"teapot":
            context.set_response_status(418)
        if data[0]["body"] == b"bad":
            raise ValueError("bad")
        return [item["body"] for item in data]
"""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
Call = Callable[..., Awaitable[Any]]


@pytest.fixture
def scrape(inline: Any) -> Callable[..., Awaitable[HttpResponse]]:
    async def get(method: str = "GET", *headers: tuple[str, str]) -> HttpResponse:
        request = HttpRequest(method, "/metrics", headers=headers)
        response = await Prometheus(inline.engine).handle(request, ["metrics"])
        assert response is not None
        return response

    return get


Scrape = Callable[..., Awaitable[HttpResponse]]


def text(response: HttpResponse) -> str:
    return b"".join(response.body).decode()


def families(page: str) -> list[Metric]:
    return list(parser.text_string_to_metric_families(page))


def samples(page: str) -> Samples:
    found = [sample for family in families(page) for sample in family.samples]
    values = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}
    assert len(values) == len(found), "a series is there twice"
    return values


class Page:
    """Look series up: `page("mms_requests_total", code="200")` is the sum of those with these labels."""

    def __init__(self, response: HttpResponse) -> None:
        self.samples = samples(text(response))

    def __call__(self, name: str, **labels: str) -> float:
        found = [
            v for (n, pairs), v in self.samples.items() if n == name and labels.items() <= dict(pairs).items()
        ]
        assert found, f"no {name} with {labels}"
        return sum(found)

    def labels(self, name: str) -> list[dict[str, str]]:
        return [dict(pairs) for n, pairs in self.samples if n == name]


async def test_what_was_asked_is_what_is_counted(model: Call, merged: Call, scrape: Scrape) -> None:
    await model("moody", MOODY)
    for body, times in ((b"good", 5), (b"teapot", 2), (b"bad", 1)):
        for _ in range(times):
            await merged("POST", "/predictions/moody", body)
    await merged("POST", "/predictions/moody", b"x", ("X-Request-Timeout-Ms", "soon"))
    await merged("POST", "/predictions/made-up", b"x")
    await merged("GET", "/ping")
    page = Page(await scrape())
    by_code = {
        (labels["model"], labels["version"], labels["protocol"], labels["code"]): page(
            "mms_requests_total", **labels
        )
        for labels in page.labels("mms_requests_total")
    }
    assert by_code == {
        ("moody", "1", "mms", "200"): 5,
        ("moody", "1", "mms", "418"): 2,
        ("moody", "1", "mms", "503"): 1,
        ("moody", "1", "mms", "400"): 1,
        ("", "", "mms", "404"): 1,
    }
    of = {"model": "moody", "version": "1"}
    for name in ("mms_queue_seconds", "mms_request_seconds", "mms_inference_seconds", "mms_batch_size"):
        assert page(f"{name}_count", **of) == page(f"{name}_bucket", le="+Inf", **of) == 8
    assert page("mms_batch_size_sum", **of) == page("mms_batch_size_bucket", le="1.0", **of) == 8
    assert 0 < page("mms_inference_seconds_sum", **of) <= page("mms_request_seconds_sum", **of)
    assert page("mms_refusals_total", **of) == page("mms_requests_cancelled_total", **of) == 0
    assert page("mms_model_ready", **of) == 1
    assert page("mms_build_info", version=__version__) == 1


async def test_gauges_tell_what_is_now(
    inline: Any, merged: Call, scrape: Scrape, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    inline.defaults["queue_size"] = 1
    await inline.load("gate", workers=1)
    gate = tmp_path / "gate"
    asked = [asyncio.create_task(merged("POST", "/predictions/gate", str(gate).encode()))]
    await wait_until(gate.with_suffix(".started").exists)
    asked.append(asyncio.create_task(merged("POST", "/predictions/gate", str(gate).encode())))
    await wait_until(lambda: inline.engine.describe("gate").queue_depth == 1)
    assert (await merged("POST", "/predictions/gate", b"x")).status == 503
    page = Page(await scrape())
    assert (page("mms_queue_depth"), page("mms_requests_in_flight")) == (1, 1)
    assert (page("mms_workers"), page("mms_workers", state="busy")) == (1, 1)
    assert page("mms_refusals_total", reason="queue_full") == page("mms_refusals_total") == 1
    assert page("mms_requests_total", model="gate", code="503") == 1
    gate.touch()
    assert [answer.status for answer in await asyncio.gather(*asked)] == [200, 200]
    page = Page(await scrape())
    assert (page("mms_queue_depth"), page("mms_requests_in_flight")) == (0, 0)
    assert (page("mms_workers"), page("mms_workers", state="ready")) == (1, 1)


async def test_a_model_that_failed_is_not_ready(
    inline: Any, scrape: Scrape, wait_until: Callable[..., Any]
) -> None:
    await inline.load("bad_init", wait=False)
    await wait_until(lambda: inline.engine.describe("bad_init").state is VersionState.FAILED)
    page = Page(await scrape())
    assert (page("mms_model_ready"), page("mms_workers", state="failed")) == (0, 1)


async def test_a_model_without_workers_takes_no_requests_and_is_not_ready(
    inline: Any, merged: Call, scrape: Scrape
) -> None:
    await inline.load("echo", workers=0)
    assert (await merged("POST", "/predictions/echo", b"x")).status == 503
    assert Page(await scrape())("mms_model_ready") == 0


async def test_what_of_a_repository_failed_has_series(inline: Any, scrape: Scrape) -> None:
    inline.store.add("bad_init")
    inline.defaults["handler"] = "service:handle"
    inline.store.put("bad.mar", {"service.py": "raise OSError('gone')", "MAR-INF/MANIFEST.json": "{}"})
    with pytest.raises(LoadError):
        await inline.engine.load_model("bad")
    page = Page(await scrape())
    assert page("mms_model_ready", model="bad") == 0
    assert page("mms_workers", model="bad") == 0


async def test_a_client_that_leaves_was_answered_nothing(
    inline: Any, merged: Call, scrape: Scrape, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    await inline.load("gate")
    gate = tmp_path / "gate"
    asked = asyncio.create_task(merged("POST", "/predictions/gate", str(gate).encode()))
    await wait_until(gate.with_suffix(".started").exists)
    asked.cancel()
    await asyncio.wait([asked])
    gate.touch()
    page = Page(await scrape())
    assert page("mms_requests_cancelled_total", model="gate") == 1
    assert page.labels("mms_requests_total") == []


async def test_an_answer_counts_for_the_version_that_gave_it(
    inline: Any, merged: Call, scrape: Scrape, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    for version in ("1", "2"):
        await inline.load("gate", version=version)
    gate = tmp_path / "gate"
    asked = asyncio.create_task(merged("POST", "/predictions/gate", str(gate).encode()))
    await wait_until(gate.with_suffix(".started").exists)
    inline.engine.set_default("gate", "2")
    gate.touch()
    assert (await asked).status == 200
    page = Page(await scrape())
    assert [labels["version"] for labels in page.labels("mms_requests_total")] == ["1"]


async def test_an_unloaded_model_leaves_no_series(inline: Any, merged: Call, scrape: Scrape) -> None:
    await inline.load("echo")
    await merged("POST", "/predictions/echo", b"x")
    assert "echo" in text(await scrape())
    await inline.engine.unload("echo")
    assert "echo" not in text(await scrape())


async def test_a_name_of_any_letters_survives_both_formats(model: Call, scrape: Scrape) -> None:
    name = 'sch"ön\\n}{='
    await model(name, MOODY)
    page = Page(await scrape())
    assert {labels["model"] for labels in page.labels("mms_model_ready")} == {name}
    opened = text(await scrape("GET", ("Accept", ACCEPT)))
    found = {family.name: family for family in openmetrics_parser.text_string_to_metric_families(opened)}
    assert {sample.labels["model"] for sample in found["mms_model_ready"].samples} == {name}


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;version=..", "text/plain; version=0.0.4; charset=utf-8"),
        (ACCEPT, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        (
            "Application/OpenMetrics-Text;version=x",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    ],
)
async def test_the_format_is_the_one_that_is_asked_for(
    model: Call, merged: Call, scrape: Scrape, accept: str | None, kind: str
) -> None:
    await model("moody", MOODY)
    await merged("POST", "/predictions/moody", b"x")
    response = await scrape("GET", *([("accept", accept)] if accept else []))
    assert (response.status, dict(response.headers)) == (200, {"Content-Type": kind})
    page = text(response)
    assert page.endswith("# EOF\n") == ("openmetrics" in kind)
    read = openmetrics_parser if "openmetrics" in kind else parser
    names = {sample.name for family in read.text_string_to_metric_families(page) for sample in family.samples}
    assert {"mms_requests_total", "mms_batch_size_bucket", "mms_build_info"} <= names


async def test_other_methods_and_paths(inline: Any, scrape: Scrape) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        response = await scrape(method)
        assert (response.status, dict(response.headers)["Allow"]) == (405, "GET, HEAD")
    for parts in (["metrics", "x"], ["metric"], [""], ["predictions", "metrics"]):
        assert await Prometheus(inline.engine).handle(HttpRequest("GET", "/"), parts) is None


async def test_over_a_socket_a_head_has_the_page_s_length_and_no_body(
    inline: Any, listen: Any, connect: Any
) -> None:
    await inline.load("echo")
    page = Prometheus(inline.engine)

    async def answer(request: HttpRequest) -> HttpResponse:
        response = await page.handle(request, request.path.split("/")[1:])
        assert response is not None
        return response

    client = await connect(await listen(Stub(answer)))
    got = await client.ask("GET", "/metrics")
    assert (got.status, got.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'mms_model_ready{model="echo",version="1"} 1.0' in got.body.decode()
    await client.send(raw_request("HEAD", "/metrics"))
    head = await client.response(head_only=True)
    assert (head.status, head.body, int(head.headers["content-length"]) > 1000) == (200, b"", True)


async def test_each_series_is_documented_and_each_documented_series_is_there(
    inline: Any, merged: Call, scrape: Scrape
) -> None:
    await inline.load("echo")
    await merged("POST", "/predictions/echo", b"x")
    status = inline.engine.describe("echo")
    page = families(text(await scrape()))
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+?) \| ([\w, ]*?) ?\|", DOC.read_text(), re.MULTILINE)
    documented = {
        name: (kind.split(",")[0], set(filter(None, labels.split(", ")))) for name, kind, labels in rows
    }
    yielded = {}
    for family in page:
        counter = family.type == "counter" and not family.name.endswith("_total")
        name = family.name + ("_total" if counter else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        yielded[name] = (family.type, labels)
    if sys.platform != "linux":
        documented = {name: row for name, row in documented.items() if not name.startswith("process_")}
    # A worker on a thread has no memory of its own: the family is there, without a sample.
    assert status.workers[0].memory_bytes == 0
    assert yielded["mms_worker_resident_memory_bytes"] == ("gauge", set())
    yielded["mms_worker_resident_memory_bytes"] = ("gauge", {"model", "version", "worker"})
    assert yielded == documented


async def test_the_memory_of_a_worker_is_that_of_its_process(processes: Any) -> None:
    await processes.load("echo")
    response = await Prometheus(processes.engine).handle(HttpRequest("GET", "/metrics"), ["metrics"])
    page = Page(response)
    assert page("mms_worker_resident_memory_bytes", model="echo", version="1", worker="W-echo-0") > 1_000_000
    assert page("process_resident_memory_bytes") > 1_000_000


async def test_however_many_scrape_a_page_is_made_once_in_a_while(inline, monkeypatch):
    snapshots = []
    taken = inline.engine.metrics
    monkeypatch.setattr(inline.engine, "metrics", lambda: snapshots.append(1) or taken())
    page = Prometheus(inline.engine, reuse_s=60)
    asked = [page.handle(HttpRequest("GET", "/metrics"), ["metrics"]) for _ in range(10)]
    answers = await asyncio.gather(*asked)
    assert len({id(answer.body[0]) for answer in answers}) == 1
    assert len(snapshots) == 1
    page = Prometheus(inline.engine, reuse_s=0)
    for _ in range(2):
        await page.handle(HttpRequest("GET", "/metrics"), ["metrics"])
    assert len(snapshots) == 3
