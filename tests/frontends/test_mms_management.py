import asyncio
import json
import re
import zipfile
from dataclasses import replace

import pytest

from mms_lite.engine.repository.mar import Defaults, MarRepository
from mms_lite.errors import Unauthorized
from mms_lite.frontends import mms
from mms_lite.frontends.message import HttpRequest, Limits
from mms_lite.types import VersionState

JSON = ("Content-Type", "application/json")


@pytest.fixture
def echo(inline):
    """The url of a model that is not loaded."""
    inline.store.add("echo")
    return "echo"


def register(**given):
    return "/models?" + "&".join(f"{key}={value}" for key, value in given.items())


async def test_register_without_workers_by_default(inline, management, echo):
    answer = await management("POST", register(url=echo, model_name="m", handler="service:handle"))
    assert (answer.status, answer.json) == (200, {"status": 'Model "m" registered'})
    assert inline.engine.describe("m").workers == ()


async def test_register_and_wait(inline, management, merged, echo):
    target = register(url=echo, model_name="m", handler="service:handle", initial_workers=2, batch_size=4)
    answer = await management("POST", target + "&max_batch_delay=7&response_timeout=2")
    assert (answer.status, answer.json) == (200, {"status": "Workers scaled"})
    spec = inline.engine.describe("m").spec
    assert (spec.batch_size, spec.max_batch_delay_ms, spec.min_workers) == (4, 7, 2)
    assert spec.response_timeout_s == 120  # minutes in the query
    assert (await merged("POST", "/predictions/m", b"hi")).body == b"hi"


async def test_register_in_the_background(inline, management, echo, wait_until):
    target = register(
        url=echo, handler="service:handle", model_name="m", initial_workers=1, synchronous="False"
    )
    answer = await management("POST", target)
    assert (answer.status, answer.json) == (202, {"status": "Processing worker updates..."})
    await wait_until(inline.engine.ready)


async def test_register_by_json_ignores_the_query(inline, management, echo):
    given = {
        "url": echo,
        "model_name": "j",
        "handler": "service:handle",
        "initial_workers": "1",
        "response_timeout": 3,
        "synchronous": "true",
        "batch_size": None,
    }
    answer = await management("POST", "/models?model_name=q&url=none", json.dumps(given).encode(), JSON)
    assert answer.status == 200
    spec = inline.engine.describe("j").spec
    assert (spec.response_timeout_s, spec.max_batch_delay_ms, spec.batch_size) == (3, 0, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"{'url': 'echo', 'model_name': 'm', 'handler': 'service:handle'}",
        b"{url: 'echo', model_name: 'm', handler: 'service:handle', batch_size: '2',}",
        b"// ours\n{url: 'echo', /* and */ model_name: 'm', handler: 'service:handle'}",
    ],
)
async def test_register_by_json_that_gson_takes(inline, management, echo, body):
    answer = await management("POST", "/models", body, JSON)
    assert (answer.status, answer.json) == (200, {"status": 'Model "m" registered'})


@pytest.mark.parametrize(
    "body",
    [
        b"{'a'",
        b"{url= 'echo'; model_name => 'm'}",
        b"{a: 1} {",
        b"{" + b"a: {" * 2000,
        b"'" * 100_000,
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
    ],
)
async def test_register_with_a_body_that_is_no_json_object(management, body):
    answer = await management("POST", "/models", body, JSON)
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")


@pytest.mark.parametrize(
    ("given", "status", "kind", "message"),
    [
        ({}, 400, "BadRequestException", "Parameter url is required."),
        ({"url": "none", "runtime": "perl"}, 400, "BadRequestException", "Invalid RuntimeType value: perl"),
        ({"url": "none"}, 404, "ModelNotFoundException", "Model not found in model store: none"),
        ({"url": "../x"}, 404, "ModelNotFoundException", "Relative path is not allowed in url: ../x"),
        ({"url": "a..b.mar"}, 404, "ModelNotFoundException", "Relative path is not allowed in url: a..b.mar"),
        ({"url": "."}, 404, "ModelNotFoundException", "Model not found in model store: ."),
        ({"url": "/etc"}, 404, "ModelNotFoundException", "Model not found in model store: /etc"),
        ({"url": ""}, 400, "BadRequestException", "Parameter url is required."),
        ({"url": "echo"}, 400, "InvalidModelException", "Model name is not defined."),
        ({"url": "echo", "model_name": "m"}, 400, "InvalidModelException", "Model handler is not defined."),
        (
            {"url": "echo", "batch_size": "many"},
            400,
            "BadRequestException",
            "Parameter batch_size is not a whole number: many",
        ),
        (
            {"url": "echo", "max_batch_delay": "9" * 400},
            400,
            "BadRequestException",
            f"Parameter max_batch_delay is too large: {'9' * 400}",
        ),
    ],
)
async def test_register_what_cannot_be(management, echo, given, status, kind, message):
    answer = await management("POST", register(**given))
    assert answer.json == {"code": status, "type": kind, "message": message}
    assert answer.status == status


async def test_register_with_values_that_mean_none(inline, management, echo):
    given = {"url": echo, "handler": "service:handle", "batch_size": 0, "initial_workers": -1}
    target = register(**given, model_name="m", response_timeout=-1, max_batch_delay="")
    answer = await management("POST", target)
    assert (answer.status, answer.json) == (200, {"status": 'Model "m" registered'})
    described = (await management("GET", "/models/m")).json
    assert (described["batchSize"], described["maxBatchDelay"], described["workers"]) == (1, 0, [])
    assert inline.engine.describe("m").spec.response_timeout_s == inline.defaults["response_timeout_s"]


async def test_register_ignores_a_form(management, echo):
    kind = ("Content-Type", "application/x-www-form-urlencoded")
    answer = await management("POST", "/models", f"url={echo}".encode(), kind)
    message = "Parameter url is required. (The body is not application/json, so not read.)"
    assert (answer.status, answer.json["message"]) == (400, message)


@pytest.mark.parametrize(
    ("method", "target", "message"),
    [
        ("PUT", "/models/echo?min_workers=5", "Unknown parameter min_workers; did you mean min_worker?"),
        ("PUT", "/models/echo?synchronus=true", "Unknown parameter synchronus; did you mean synchronous?"),
        (
            "POST",
            "/models?url=echo&initial_worker=2",
            "Unknown parameter initial_worker; did you mean initial_workers?",
        ),
    ],
)
async def test_a_parameter_with_a_typing_error_is_refused(inline, management, method, target, message):
    await inline.load("echo", workers=2)
    answer = await management(method, target)
    assert (answer.status, answer.json["message"]) == (400, message)
    assert len(inline.engine.describe("echo").workers) == 2


async def test_other_unknown_parameters_are_ignored_as_in_mms(inline, management):
    await inline.load("echo")
    assert (await management("PUT", "/models/echo?min_worker=1&colour=red&synchronous=true")).status == 200


async def test_register_takes_the_name_and_version_of_the_archive(inline, management):
    service = (inline.store.add("echo") / "service.py").read_text()
    for version in ("1.0", "2.0"):
        model = {"modelName": "net", "modelVersion": version, "handler": "service:handle"}
        with zipfile.ZipFile(inline.store.folder / f"net-{version}.mar", "w") as archive:
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model}))
            archive.writestr("service.py", service)
        answer = await management("POST", register(url=f"net-{version}.mar", model_name=""))
        assert (answer.status, answer.json) == (200, {"status": 'Model "net" registered'})
        assert (await management("POST", register(url=f"net-{version}.mar"))).status == 409
    described = (await management("GET", "/models/net?version=all")).json
    assert [(each["modelVersion"], each["modelUrl"]) for each in described] == [
        ("1.0", "net-1.0.mar"),
        ("2.0", "net-2.0.mar"),
    ]


async def test_register_in_the_background_what_does_not_start(inline, management, wait_until):
    inline.store.add("bad_init")
    given = {"url": "bad_init", "model_name": "bad", "handler": "service:handle", "initial_workers": 1}
    answer = await management("POST", register(**given, synchronous="false"))
    assert (answer.status, answer.json) == (202, {"status": "Processing worker updates..."})
    await wait_until(lambda: inline.engine.describe("bad").state is VersionState.FAILED)
    described = (await management("GET", "/models/bad")).json
    assert (described["status"], described["detail"]) == ("FAILED", "RuntimeError: the weights are missing")
    assert [worker["status"] for worker in described["workers"]] == ["FAILED"]


async def test_register_without_a_store(tmp_path, inline, management):
    repository = MarRepository(None, tmp_path, Defaults(**inline.defaults))
    inline.engine._lifecycle._repository = repository
    answer = await management("POST", register(url="m.mar"))
    assert (answer.status, answer.json["message"]) == (404, "Model store has not been configured.")


async def test_register_from_another_host(management):
    answer = await management("POST", register(url="http://other/m.mar"))
    assert (answer.status, answer.json["type"]) == (403, "ForbiddenException")


async def test_register_twice(inline, management):
    await inline.load("echo")
    answer = await management("POST", register(url="echo", model_name="echo", handler="service:handle"))
    assert answer.json == {
        "code": 409,
        "type": "ConflictStatusException",
        "message": "Model echo is already registered.",
    }


async def test_register_what_does_not_start(inline, management):
    folder = inline.store.folder / "bad"
    folder.mkdir()
    (folder / "service.py").write_text("def handle(data, context):\n    raise KeyError('weights')\n")
    answer = await management(
        "POST", register(url="bad", model_name="bad", handler="service:handle", initial_workers=1)
    )
    assert (answer.status, answer.json["type"]) == (500, "InternalServerException")
    assert answer.json["message"] == "Failed to start workers: KeyError: 'weights'"
    assert (await management("GET", "/models/bad")).status == 404


async def test_a_client_that_leaves_does_not_undo_a_registration(inline, management, echo, wait_until):
    target = register(url=echo, model_name="m", handler="service:handle", initial_workers=1)
    asking = asyncio.ensure_future(management("POST", target))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    await wait_until(lambda: inline.engine.models() and inline.engine.ready())


async def test_scale(inline, management, wait_until):
    await inline.load("echo")
    answer = await management("PUT", "/models/echo?min_worker=2&synchronous=true")
    assert (answer.status, answer.json) == (200, {"status": "Workers scaled"})
    assert len(inline.engine.describe("echo").workers) == 2
    answer = await management("PUT", "/models/echo?min_worker=0&number_gpu=1&timeout=3")
    assert (answer.status, answer.json) == (202, {"status": "Processing worker updates..."})
    await wait_until(lambda: not inline.engine.describe("echo").workers)
    assert (await management("PUT", "/models/echo?synchronous=true")).status == 200
    assert len(inline.engine.describe("echo").workers) == 1


async def test_scaling_that_did_not_get_everywhere_is_partial_success(inline, management, monkeypatch):
    status = await inline.load("echo")

    async def scale(*args, **kwargs):
        return replace(status, workers=())

    monkeypatch.setattr(inline.engine, "scale", scale)
    answer = await management("PUT", "/models/echo?min_worker=1&synchronous=true")
    assert (answer.status, answer.reason) == (210, "Partial Success")
    assert answer.json == {"status": "Workers scaling in progress..."}


async def test_scaling_that_fails_keeps_the_model_and_the_workers_it_had(inline, management, ask):
    folder = inline.store.folder / "m"
    await inline.load("echo", "m")
    (folder / "service.py").write_text("raise RuntimeError('the file has changed')")
    answer = await management("PUT", "/models/m?min_worker=2&synchronous=true")
    assert (answer.status, answer.json) == (210, {"status": "Workers scaling in progress..."})
    described = (await management("GET", "/models/m")).json
    assert [worker["status"] for worker in described["workers"]] == ["READY", "FAILED"]
    assert (await inline.engine.infer(ask("m", b"still"))).status == 200


async def test_scaling_that_leaves_no_worker_is_an_error_and_keeps_the_model(inline, management):
    await inline.load("bad_init", "m", workers=0)
    answer = await management("PUT", "/models/m?synchronous=true")
    assert (answer.status, answer.json["type"]) == (500, "InternalServerException")
    assert answer.json["message"] == "Failed to start workers: RuntimeError: the weights are missing"
    assert (await management("GET", "/models/m")).json["status"] == "FAILED"


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("/models/none?min_worker=2&max_worker=1", 400, "max_worker cannot be less than min_worker."),
        ("/models/none?min_worker=2", 404, "Model not found: none"),
        ("/models/none?min_worker=x", 400, "Parameter min_worker is not a whole number: x"),
        ("/models/none?min_worker=-1", 400, "a model has between 0 and 1024 workers"),
    ],
)
async def test_scale_what_cannot_be(management, target, status, message):
    answer = await management("PUT", target)
    assert (answer.status, answer.json["message"]) == (status, message)


async def test_describe(inline, management):
    await inline.load("echo", batch_size=3, max_batch_delay_ms=5)
    described = (await management("GET", "/models/echo")).json
    (worker,) = described.pop("workers")
    assert described == {
        "modelName": "echo",
        "modelVersion": "1",
        "modelUrl": "echo",
        "runtime": "python",
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 3,
        "maxBatchDelay": 5,
        "status": "READY",
        "defaultVersion": True,
        "loadedAtStartup": False,
        "metrics": {"rejectedRequests": 0, "waitingQueueSize": 0, "requests": 0, "requestsInFlight": 0},
    }
    assert worker["status"] == "READY" and worker["gpu"] is False and worker["memoryUsage"] == 0
    assert worker["restarts"] == 0 and "lastExit" not in worker
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", worker["startTime"])


async def test_describe_counts_what_was_asked_and_what_was_refused(inline, merged):
    await inline.load("echo")
    assert (await merged("POST", "/predictions/echo", b"x")).status == 200
    await merged("PUT", "/models/echo?min_worker=0&synchronous=true")
    assert (await merged("POST", "/predictions/echo", b"x")).status == 503
    counted = (await merged("GET", "/models/echo")).json["metrics"]
    assert (counted["requests"], counted["rejectedRequests"]) == (2, 1)


async def test_what_mms_describes_comes_in_its_order(inline, management):
    await inline.load("echo")
    keys = list((await management("GET", "/models/echo")).json)
    known = ["modelName", "modelVersion", "modelUrl", "runtime", "minWorkers", "maxWorkers", "batchSize"]
    known.append("maxBatchDelay")
    assert [key for key in keys if key in known] == known
    assert keys[-1] == "workers" and keys.index("loadedAtStartup") > keys.index("maxBatchDelay")


async def test_describe_one_version(inline, management):
    for version in ("1", "2"):
        await inline.load("echo", version=version)
    assert (await management("GET", "/models/echo")).json["modelVersion"] == "1"
    assert (await management("GET", "/models/echo/2")).json["modelVersion"] == "2"
    answer = await management("GET", "/models/echo/3")
    assert (answer.status, answer.json["type"]) == (404, "ModelNotFoundException")
    assert answer.json["message"] == "Model not found: echo, version 3"


async def test_describe_all_versions(inline, management):
    for version in ("2", "10"):
        await inline.load("echo", version=version)
    described = (await management("GET", "/models/echo?version=all")).json
    assert [(each["modelVersion"], each["defaultVersion"]) for each in described] == [
        ("2", True),
        ("10", False),
    ]
    answer = await management("GET", "/models/none?version=all")
    assert (answer.status, answer.json["message"]) == (404, "Model not found: none")
    answer = await management("GET", "/models/echo?version=2")
    assert answer.status == 400 and "/models/echo/2" in answer.json["message"]


async def test_another_version_becomes_the_default_when_told(inline, management, merged):
    for version in ("1", "2"):
        await inline.load("echo", version=version)
    assert (await management("GET", "/models/echo")).json["modelVersion"] == "1"
    answer = await management("PUT", "/models/echo/2/set-default")
    assert (answer.status, answer.json) == (200, {"status": 'Model "echo": version 2 is the default'})
    assert (await management("GET", "/models/echo")).json["modelVersion"] == "2"
    assert (await management("DELETE", "/models/echo/2")).status == 200
    assert (await management("GET", "/models/echo")).json["modelVersion"] == "1"


@pytest.mark.parametrize(
    ("method", "target", "status", "kind"),
    [
        ("PUT", "/models/echo/9/set-default", 404, "ModelNotFoundException"),
        ("PUT", "/models/none/1/set-default", 404, "ModelNotFoundException"),
        ("GET", "/models/echo/1/set-default", 405, "MethodNotAllowedException"),
        ("PUT", "/models/echo/1/other", 404, "ResourceNotFoundException"),
        ("POST", "/models/echo/1", 405, "MethodNotAllowedException"),
        ("DELETE", "/models/echo/9", 404, "ModelNotFoundException"),
        ("PUT", "/models/echo/9?min_worker=2", 404, "ModelNotFoundException"),
    ],
)
async def test_versions_that_are_not_there(inline, management, method, target, status, kind):
    await inline.load("echo")
    answer = await management(method, target)
    assert (answer.status, answer.json["type"]) == (status, kind)


@pytest.mark.parametrize("given", [{"wait": False}, {"workers": 0}])
async def test_a_version_without_workers_cannot_be_the_default(inline, management, given):
    await inline.load("echo")
    await inline.load("bad_init", version="2", name="echo", **given)
    answer = await management("PUT", "/models/echo/2/set-default")
    assert (answer.status, answer.json["type"]) == (503, "ServiceUnavailableException")
    assert answer.json["message"] == "version 2 of model echo is not ready: it has no workers"
    assert (await management("GET", "/models/echo")).json["modelVersion"] == "1"


async def test_scale_one_version(inline, management):
    for version in ("1", "2"):
        await inline.load("echo", version=version)
    assert (await management("PUT", "/models/echo/2?min_worker=2&synchronous=true")).status == 200
    assert [len((await management("GET", f"/models/echo/{v}")).json["workers"]) for v in "12"] == [1, 2]


async def test_register_a_version_beside_and_another_in_its_place(inline, management, merged, echo):
    target = register(url=echo, model_name="m", handler="service:handle", initial_workers=1)
    assert (await management("POST", f"{target}&version=1")).status == 200
    assert (await management("POST", f"{target}&version=1")).status == 409
    assert (await management("POST", f"{target}&version=2&set_default=true")).status == 200
    assert (await management("GET", "/models/m")).json["modelVersion"] == "2"
    await management("PUT", "/models/m/1?min_worker=2&synchronous=true")
    before = {worker.started_at for worker in inline.engine.describe("m", "1").workers}
    other = register(url=echo, model_name="m", handler="service:handle")
    answer = await management("POST", f"{other}&version=1&replace=true")
    assert (answer.status, answer.json) == (200, {"status": "Workers scaled"})
    after = (await management("GET", "/models/m/1")).json
    assert after["minWorkers"] == len(after["workers"]) == 2  # as many as what it replaced
    assert before.isdisjoint(worker.started_at for worker in inline.engine.describe("m", "1").workers)
    assert (await management("GET", "/models/m")).json["modelVersion"] == "2"


async def test_a_replacement_in_the_background_answers_at_once(inline, management, echo, wait_until):
    await inline.load("echo", workers=1)
    (before,) = inline.engine.describe("echo").workers
    target = register(
        url=echo, handler="service:handle", model_name="echo", replace="true", synchronous="false"
    )
    answer = await management("POST", target)
    assert (answer.status, answer.json) == (202, {"status": "Processing worker updates..."})

    await wait_until(lambda: before.started_at != inline.engine.describe("echo").workers[0].started_at)


async def test_who_may_not_manage_is_asked_on_every_route(inline):
    asked = []

    def nobody(request: HttpRequest) -> None:
        asked.append(request.path)
        raise Unauthorized("a token is needed")

    await inline.load("echo")
    protocol = mms.protocol(inline.engine, Limits(), inference=True, management=nobody)
    closed = ["/models", "/models/", "/models/echo", "/models/none", "/models/echo/1"]
    closed.append("/models/echo/1/set-default")
    for path in closed:
        for method in ("GET", "PUT", "POST", "DELETE", "PATCH"):
            answer = await protocol.handle(HttpRequest(method, path, "id"))
            assert answer.status == 401
    assert len(asked) == 5 * len(closed)
    for path in ("/ping", "/predictions/echo", "/models/echo/invoke", "/nothing"):
        assert (await protocol.handle(HttpRequest("POST", path, "id"))).status != 401
    assert len(asked) == 5 * len(closed)


async def test_list_in_pages(inline, management):
    for name in ("c", "a", "b"):
        await inline.load("echo", name, workers=0)

    async def page(query):
        listed = (await management("GET", f"/models{query}")).json
        return [each["modelName"] for each in listed["models"]], listed.get("nextPageToken")

    assert (await management("GET", "/models")).json["models"][0] == {"modelName": "a", "modelUrl": "a"}
    assert await page("?limit=2") == (["a", "b"], "2")
    assert await page("?limit=2&next_page_token=2") == (["c"], None)
    assert await page("?limit=3") == (["a", "b", "c"], None)
    for query in ("", "?limit=0", "?limit=-1", "?limit=1000", "?next_page_token=-5"):
        assert await page(query) == (["a", "b", "c"], None)
    assert await page("?next_page_token=9") == ([], None)


@pytest.mark.parametrize("query", ["limit=x", "limit=1.5", "next_page_token=x", "limit=99999999999"])
async def test_a_page_whose_numbers_are_none(management, query):
    answer = await management("GET", f"/models?{query}")
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")


async def test_of_a_limit_given_twice_the_first_counts(inline, management):
    for name in ("a", "b"):
        await inline.load("echo", name, workers=0)
    assert (await management("GET", "/models?limit=1&limit=2")).json["nextPageToken"] == "1"


async def test_a_name_with_versions_is_listed_once(inline, management):
    for version in ("1", "2"):
        await inline.load("echo", version=version, workers=0)
    assert len((await management("GET", "/models")).json["models"]) == 1


async def test_unregister(inline, management):
    for version in ("1", "2"):
        await inline.load("echo", version=version)
    answer = await management("DELETE", "/models/echo/1")
    assert (answer.status, answer.json) == (200, {"status": 'Model "echo" version 1 unregistered'})
    assert (await management("GET", "/models/echo")).json["modelVersion"] == "2"
    answer = await management("DELETE", "/models/echo")
    assert (answer.status, answer.json) == (200, {"status": 'Model "echo" unregistered'})
    answer = await management("DELETE", "/models/echo")
    assert (answer.status, answer.json["message"]) == (404, "Model not found: echo")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/models", 405),
        ("DELETE", "/models/", 405),
        ("POST", "/models/m", 405),
        ("GET", "/models/a/b", 404),
        ("GET", "/ping", 404),
        ("GET", "/", 405),
    ],
)
async def test_routes_that_are_none(management, method, path, status):
    assert (await management(method, path)).status == status


async def test_a_merged_address_has_both_and_inference_first(inline, merged):
    await inline.load("echo")
    assert (await merged("GET", "/ping")).status == 200
    assert (await merged("GET", "/models/echo")).json["modelName"] == "echo"
    assert (await merged("POST", "/models/echo/invoke", b"x")).body == b"x"
    assert (await merged("GET", "/models/predict")).json["message"] == "Model not found: predict"
