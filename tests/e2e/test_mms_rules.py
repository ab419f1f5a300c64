"""Rules of docs/mms-compatibility.md that only the whole server shows, asked byte by byte."""

import asyncio
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mms_site import Answer, Site

pytestmark = pytest.mark.time_limit(90)

# Tells what it got; a few words make it do something else.
SEEN = """
    import os, time

    def handle(data, context):
        if data is None:
            return None
        answers = []
        for index, item in enumerate(data):
            if item.get("body") == b"die":
                os._exit(7)
            if item.get("body") == b"sleep":
                time.sleep(60)
            if item.get("body") == b"raise":
                raise KeyError("a secret of the model")
            if item.get("body") == b"greet":
                context.set_response_header(index, "X-Greeting", "gr\\u00fc\\u00dfe")
            told = {name: [type(v).__name__, bytes(v).decode("latin-1") if isinstance(v, bytearray) else v]
                    for name, v in item.items()}
            headers = dict(context.get_all_request_header(index))
            answers.append({"data": told, "headers": headers, "id": context.get_request_id(index)})
        return answers
"""
ECHO = """
    def handle(data, context):
        return None if data is None else [bytes(item["body"]) for item in data]
"""
# Loads when the file `go` of the site is there.
WAITS = """
    import pathlib, time

    def handle(data, context):
        site = pathlib.Path(context.system_properties["model_dir"]).parent.parent
        while not (site / "go").exists():
            time.sleep(0.005)
        return data and ["x"] * len(data)
"""
BROKEN = """
    def handle(data, context):
        raise ValueError("the weights are missing")
"""
PREDICT = b"POST /predictions/seen HTTP/1.1\r\nHost: t\r\n"
PING = b"GET /ping HTTP/1.1\r\n"

Wait = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with the model `seen`, for most of these tests."""
    site = Site(tmp_path_factory.mktemp("rules") / "site")
    site.handler("seen", SEEN)
    site.archive("packed", ECHO)
    try:
        site.configure(load_models="seen", max_request_size=100_000, default_response_timeout_seconds=2)
        result = site.run(["mms-lite", "--start"])
        assert result.returncode == 0, result.stdout
        yield site
    finally:
        site.end()


async def send(site: Site, data: bytes, *, api: str = "inference") -> Answer:
    """Send these bytes on a connection of their own; return the first answer."""
    connection = await site.connect(api)
    try:
        await connection.send(data)
        return await asyncio.wait_for(connection.answer(), 20)
    finally:
        await connection.close()


def sized(lines: bytes, body: bytes) -> bytes:
    return PREDICT + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


# --- HTTP (3)


@pytest.mark.parametrize(
    "sent",
    [
        b"FROBNICATE /predictions/seen HTTP/1.1\r\nHost: t\r\n\r\n",
        b"get /ping HTTP/1.1\r\nHost: t\r\n\r\n",
        PING + b"\r\n",
        PING + b"Host: a\r\nHost: b\r\n\r\n",
        b"GET /ping HTTP/1.2\r\nHost: t\r\n\r\n",
        b"GET /ping HTTP/1.1\nHost: t\n\n",
        PING + b"Host: t\r\nX: a\r\n  b\r\n\r\n",
        PREDICT + b"Content-Type: a/b\r\nContent-Type: a/c\r\nContent-Length: 0\r\n\r\n",
        PREDICT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        PREDICT + b"Transfer-Encoding: gzip\r\n\r\n",
    ],
    ids=[
        *("unknown verb", "verb in small letters", "no host", "two hosts", "HTTP/1.2", "bare line feeds"),
        *("folded header", "two content types", "length and chunks", "unknown encoding"),
    ],
)
async def test_http_that_can_be_read_in_two_ways_is_refused(server: Site, sent: bytes) -> None:
    answer = await send(server, sent)

    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert answer.json == {"code": 400, "type": "BadRequestException", "message": "Invalid HTTP message."}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET http://elsewhere/ping HTTP/1.1\r\nHost: t\r\n\r\n", 200),
        (b"GET /ping\r\n\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n", 200),
        (b"GET /predictions/seen?a=%zz HTTP/1.1\r\nHost: t\r\n\r\n", 200),
        (sized(b"Expect: magic\r\n", b"x"), 200),
        (b"GET /predictions/%zz HTTP/1.1\r\nHost: t\r\n\r\n", 404),
        (b"GET /ping#part HTTP/1.1\r\nHost: t\r\n\r\n", 404),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: t\r\n\r\n", 405),
    ],
)
async def test_odd_targets_are_read_as_they_stand(server: Site, sent: bytes, status: int) -> None:
    assert (await send(server, sent)).status == status


async def test_headers_may_be_8192_bytes_long_each_and_there_may_be_100(server: Site) -> None:
    head = PING + b"Host: t\r\n"
    assert (await send(server, head + b"X: %s\r\n" % (b"a" * 8000) * 100 + b"\r\n")).status == 200
    assert (await send(server, head + b"X: %s\r\n\r\n" % (b"a" * 8200))).status == 400
    assert (await send(server, head + b"X: a\r\n" * 200 + b"\r\n")).status == 400


async def test_what_is_no_http_is_logged_as_a_get(server: Site, wait_until: Wait) -> None:
    await send(server, b"NONSENSE\r\n\r\n")

    log = server.logs / "access_log.log"
    await wait_until(lambda: '"GET / HTTP/1.0" 400 ' in log.read_text(), "its line")


async def test_request_ids_are_the_servers_one_for_each_answer(server: Site) -> None:
    connection = await server.connect()
    await connection.send(sized(b"X-Request-Id: mine\r\n", b"1") + sized(b"", b"2"))
    answers = [await connection.answer() for _ in range(2)]
    await connection.close()

    ids = [answer.headers["x-request-id"] for answer in answers]
    assert [answer.json["id"] for answer in answers] == ids
    assert len({*ids, "mine"}) == 3
    assert answers[0].json["headers"]["X-Request-Id"] == "mine"


async def test_json_is_written_plainly(server: Site) -> None:
    answer = await send(server, b"GET /predictions/%3Ca%3E&'=%C3%A9 HTTP/1.1\r\nHost: t\r\n\r\n")

    assert b"""Model not found: <a>&'=\\u00e9\"""" in answer.body


async def test_headers_reach_handlers_as_they_were_sent(server: Site) -> None:
    bare = (await send(server, b"GET /predictions/seen HTTP/1.1\r\nHost: t\r\n\r\n")).json["headers"]
    chunked = await send(
        server, PREDICT + b"Expect: 100-Else\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
    )

    assert bare == {"body": {"content-type": ""}, "Host": "t"}
    assert list(chunked.json["headers"]) == ["body", "Host", "Expect", "Transfer-Encoding"]


async def test_header_values_are_utf_8_or_else_latin_1(server: Site) -> None:
    answer = await send(server, sized(b"X-Utf: \xc3\xa4\r\nX-Latin: \xe4\r\n", b""))

    assert [answer.json["headers"][name] for name in ("X-Utf", "X-Latin")] == ["\u00e4", "\u00e4"]


async def test_header_values_of_a_handler_are_sent_as_utf_8(server: Site) -> None:
    connection = await server.connect()
    await connection.send(sized(b"", b"greet"))
    head = await connection.reader.readuntil(b"\r\n\r\n")
    await connection.close()

    assert "\r\nX-Greeting: grüße\r\n".encode() in head


async def test_a_blank_after_the_content_type_is_not_part_of_it(server: Site) -> None:
    answer = await send(server, sized(b"Content-Type: text/plain ; charset=utf-8\r\n", b"x"))

    assert answer.json["data"] == {"body": ["str", "x"]}
    assert answer.json["headers"]["body"] == {"content-type": "text/plain"}


async def test_a_body_over_the_limit_is_refused_on_both_ports_and_logged(
    server: Site, wait_until: Wait
) -> None:
    for api in ("inference", "management"):
        answer = await server.ask("POST", "/models/over", bytes(100_001), api=api)
        assert (answer.status, answer.json["type"]) == (413, "RequestEntityTooLargeException")
        assert re.fullmatch(r"[0-9a-f-]{36}", answer.headers["x-request-id"])
    log = server.logs / "access_log.log"
    await wait_until(lambda: log.read_text().count('"POST /models/over HTTP/1.1" 413 ') == 2, "two lines")


# --- Inference (4)


async def test_of_a_parameter_given_twice_the_first_names_the_model_and_the_last_is_data(
    server: Site,
) -> None:
    target = "/invocations?model_name=seen&model_name=nobody&a=1&a=2"
    answer = await server.ask("POST", target, b"x")

    assert answer.status == 200
    assert answer.json["data"]["model_name"] == ["bytearray", "nobody"]
    assert answer.json["data"]["a"] == ["bytearray", "2"]


async def test_a_semicolon_separates_no_parameters(server: Site) -> None:
    answer = await server.ask("POST", "/invocations?a=1;b=2", b"x")

    assert answer.json["data"]["a"] == ["bytearray", "1;b=2"]


async def test_an_empty_model_name_is_none(server: Site) -> None:
    for target in ("/invocations?model_name=", "/models//invoke"):
        assert (await server.ask("POST", target, b"x")).status == 200


async def test_no_model_is_called_models_for_the_old_route(server: Site) -> None:
    answer = await server.ask("POST", "/models/predict")

    assert (answer.status, answer.json["type"]) == (404, "ResourceNotFoundException")


@pytest.mark.parametrize("word", [b"die", b"sleep"])
async def test_a_worker_that_dies_or_is_too_slow_is_a_500_and_the_next_one_serves(
    server: Site, word: bytes
) -> None:
    began = time.monotonic()
    answer = await send(server, sized(b"", word))

    assert answer.status == 500
    assert answer.json == {"code": 500, "type": "InternalServerException", "message": "Worker died."}
    assert (await send(server, sized(b"", b"good"))).status == 200
    assert time.monotonic() - began < 20


async def test_the_traceback_of_a_handler_is_in_the_log_and_in_no_answer(
    server: Site, wait_until: Wait
) -> None:
    answer = await send(server, sized(b"", b"raise"))

    assert answer.json == {"code": 503, "type": "InternalServerException", "message": "Prediction failed"}
    await wait_until(lambda: "KeyError: 'a secret of the model'" in server.log(), "the traceback")
    assert "Traceback (most recent call last):" in server.log()


# --- Management (5) and start-up models (6)


async def test_a_start_up_model_has_the_defaults_of_mms_and_says_what_its_worker_is(server: Site) -> None:
    described = (await server.ask("GET", "/models/seen", api="management")).json
    (worker,) = described["workers"]

    assert [described[key] for key in ("batchSize", "maxBatchDelay", "minWorkers")] == [1, 0, 1]
    assert described["loadedAtStartup"] is True
    assert worker["id"] == "W-seen-0"
    assert worker["memoryUsage"] > 1_000_000
    started = time.strptime(worker["startTime"][:19] + " UTC", "%Y-%m-%dT%H:%M:%S %Z")
    assert time.strftime("%Y-%m-%d", started) == time.strftime("%Y-%m-%d", time.gmtime())
    assert worker["pid"] in [process.pid for process in server.workers()]


async def test_loads_and_ends_are_told_in_the_words_of_mms(server: Site, wait_until: Wait) -> None:
    assert (await server.ask("POST", "/models?url=packed.mar", api="management")).status == 200
    assert (await server.ask("DELETE", "/models/packed?synchronous=false", api="management")).status == 200

    await wait_until(lambda: " - Model packed unregistered.\n" in server.log(), "the end in the log")
    assert " - Model packed loaded.\n" in server.log()


async def test_an_archive_may_have_any_file_name(server: Site) -> None:
    (server.store / "odd.name").write_bytes((server.store / "packed.mar").read_bytes())
    assert (await server.ask("POST", "/models?url=odd.name&model_name=odd", api="management")).status == 200
    assert (await server.ask("DELETE", "/models/odd", api="management")).status == 200


async def test_of_a_store_all_archives_and_folders_are_loaded_but_hidden_ones(site: Site) -> None:
    whole = site.archive("net", ECHO)
    whole.rename(site.store / "net.model")
    site.handler("folder", ECHO)
    site.handler(".hidden", ECHO)
    for name in ("net.tar.gz", "net.zip", "notes.txt", ".net.mar"):
        (site.store / name).write_bytes(b"x")
    site.configure()

    await site.start()

    listed = (await site.ask("GET", "/models", api="management")).json["models"]
    assert listed == [
        {"modelName": "folder", "modelUrl": "folder"},
        {"modelName": "net", "modelUrl": "net.model"},
    ]


async def test_a_model_store_alone_loads_nothing(site: Site) -> None:
    site.handler("echo", ECHO)
    site.configure(load_models="")

    await site.start("--model-store", "store")

    assert (await site.ask("GET", "/models", api="management")).json == {"models": []}


async def test_ping_is_503_until_the_start_up_models_are_loaded_and_200_from_then_on(
    site: Site, wait_until: Wait
) -> None:
    site.handler("waits", WAITS)
    site.handler("broken", BROKEN)
    site.configure()
    starting = asyncio.create_task(site.mms("--start"))
    state = site.folder / ".model_server.json"
    await wait_until(lambda: state.exists() and "inference_address" in state.read_text(), "an address", 30)

    loading = await site.ask("GET", "/ping")
    assert (loading.status, loading.json) == (503, {"status": "Unhealthy"})
    (site.folder / "go").touch()
    assert (await starting).returncode == 0

    loaded = await site.ask("GET", "/ping")
    assert (loaded.status, loaded.json) == (200, {"status": "Partial Healthy"})
    await site.ask("DELETE", "/models/waits", api="management")
    assert (await site.ask("GET", "/ping")).json == {"status": "Unhealthy"}
    await site.ask("DELETE", "/models/broken", api="management")
    empty = await site.ask("GET", "/ping")
    assert (empty.status, empty.json) == (200, {"status": "Healthy"})


# --- The command line (1)


async def test_the_foreground_ends_with_the_servers_exit_code_and_takes_the_pid_file_along(
    site: Site,
) -> None:
    site.handler("broken", BROKEN)
    site.configure()

    result = await site.mms("--foreground")

    assert result.returncode == 3
    assert "Model broken: FAILED: ValueError: the weights are missing" in result.stdout
    assert not (site.folder / ".model_server.pid").exists()


# --- Metrics (10) and downloads (5.1)


async def test_the_load_of_the_host_is_written_from_the_start(server: Site, wait_until: Wait) -> None:
    log = server.logs / "mms_metrics.log"
    line = r" - (\w+\.\w+):[\d.]+\|#Level:Host\|#hostname:[^,|]+,timestamp:\d+\n"

    await wait_until(lambda: "MemoryUtilization.Percent" in log.read_text(), "a sample")

    names = [name for name in re.findall(line, log.read_text()) if name.startswith(("CPU", "Disk", "Mem"))]
    assert names[:7] == [
        *("CPUUtilization.Percent", "DiskAvailable.Gigabytes", "DiskUsage.Gigabytes"),
        *("DiskUtilization.Percent", "MemoryAvailable.Megabytes", "MemoryUsed.Megabytes"),
        "MemoryUtilization.Percent",
    ]


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    """Serve a folder by HTTP; give its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    def make(*arguments: Any) -> Quiet:
        return Quiet(*arguments, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as files:
        thread = threading.Thread(target=files.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{files.server_address[1]}"
        files.shutdown()
        thread.join()


async def test_models_come_from_the_addresses_that_allowed_urls_permits(site: Site) -> None:
    site.archive("far", ECHO).rename(site.folder / "far.mar")
    with serving_files(site.folder) as origin:
        site.configure(allowed_urls=f"{origin}/", load_models=f"start={origin}/far.mar")
        assert "Model start: ready" in await site.start()
        answer = await site.ask("POST", f"/models?url={origin}/far.mar&initial_workers=1", api="management")
        missing = await site.ask("POST", f"/models?url={origin}/none.mar", api="management")
        refused = await site.ask("POST", "/models?url=http://127.0.0.2:1/far.mar", api="management")
    assert (answer.status, answer.json) == (200, {"status": "Workers scaled"})
    assert (await site.ask("POST", "/predictions/far", b"x")).body == b"x"
    assert (missing.status, missing.json["type"]) == (400, "DownloadModelException")
    assert missing.json["message"] == f"Failed to download model from: {origin}/none.mar, code: 404"
    assert (refused.status, refused.json["type"]) == (403, "ForbiddenException")
