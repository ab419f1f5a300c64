import hashlib
import itertools
import json
import re
import zipfile
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from openapi_schema_validator import OAS30Validator
from openapi_spec_validator import OpenAPIV30SpecValidator
from raw_http import Answer

from mms_lite.errors import Unauthorized
from mms_lite.frontends import mms
from mms_lite.frontends.message import HttpRequest, Limits, split_target
from mms_lite.frontends.mms.answers import ERRORS
from mms_lite.frontends.mms.management import _Parameters

INFERENCE = [
    "/{model_name}/predict",
    "/ping",
    "/predictions/{model_name}",
    "/predictions/{model_name}/{version}",
    "/invocations",
    "/models/{model_name}/invoke",
]
MANAGEMENT = [
    "/models",
    "/models/{model_name}",
    "/models/{model_name}/{version}",
    "/models/{model_name}/{version}/set-default",
]
SHARED = ["/", "/api-description"]
PATHS = {
    "inference": SHARED + INFERENCE,
    "management": SHARED + MANAGEMENT,
    "merged": SHARED + INFERENCE + MANAGEMENT,
}
METHODS = ("GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS")
# What each parameter is sent with; where an enum is documented, its first choice.
SAMPLES = {
    "model_name": "echo",
    "version": "2",
    "url": "spare.mar",
    "handler": "service:handle",
    "batch_size": 2,
    "max_batch_delay": 5,
    "initial_workers": 1,
    "synchronous": True,
    "response_timeout": 1,
    "replace": True,
    "set_default": True,
    "min_worker": 2,
    "max_worker": 2,
    "limit": 5,
    "next_page_token": 0,
    "fields": {"colour": "red"},
    "X-Request-Timeout-Ms": 9000,
}


@pytest.fixture(params=list(PATHS))
def port(request):
    return request.param


@pytest.fixture
def call(request, port):
    """Call the API of one kind of address."""
    return request.getfixturevalue(port)


@pytest.fixture
def spare(inline):
    """An archive in the store that is not loaded; return its SHA-256."""
    archive = inline.store.folder / "spare.mar"
    manifest = {
        "engine": {"engineName": "MXNet"},
        "model": {"modelName": "spare", "handler": "service:handle"},
        "runtime": "python",
    }
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        file.write(inline.store.add("echo") / "service.py", "service.py")
    return hashlib.sha256(archive.read_bytes()).hexdigest()


async def document_of(call):
    return (await call("OPTIONS", "/")).json


def operations(document):
    """Return each operation with its method and path."""
    return [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def resolve(document, part):
    if "$ref" not in part:
        return part
    _, section, name = part["$ref"].rsplit("/", 2)
    return document["components"][section][name]


def target(path, parameters, values):
    """Return the path with its places filled, and the query."""
    query = {}
    for each in parameters:
        value = values.get(each["name"])
        if each["in"] == "path":
            path = path.replace(f"{{{each['name']}}}", quote(str(value), safe=""))
        elif each["in"] == "query" and value is not None:
            found = value if isinstance(value, dict) else {each["name"]: value}
            query |= {name: str(text).lower() for name, text in found.items()}
    return path + ("?" + urlencode(query) if query else "")


def sample(document, parameters, samples):
    """Return a value for every parameter."""
    values = {}
    for each in parameters:
        schema = resolve(document, each["schema"])
        values[each["name"]] = schema["enum"][0] if "enum" in schema else samples[each["name"]]
    return values


def check(document, operation, answer):
    """Assert that an answer is one that the operation is said to have."""
    where = f"{operation['operationId']} {answer.status} {answer.body!r}"
    assert answer.status != 405, where
    assert b"ResourceNotFoundException" not in answer.body, where
    assert str(answer.status) in operation["responses"], where
    response = resolve(document, operation["responses"][str(answer.status)])
    for name in set(answer.headers) - {"content-type"}:
        assert name in {header.lower() for header in response["headers"]}, where
    kind = answer.headers["content-type"]
    content = response["content"][kind if kind in response["content"] else "*/*"]
    if kind == "application/json":
        schema = {**content["schema"], "components": document["components"]}
        OAS30Validator(schema).validate(answer.json)


async def test_the_documents_are_valid(call, port):
    document = await document_of(call)
    OpenAPIV30SpecValidator(document).validate()
    assert list(document) == ["openapi", "info", "paths", "components"]
    assert document["openapi"] == "3.0.1"
    assert document["info"]["title"] == "Model Server APIs" and document["info"]["version"]
    assert list(document["paths"]) == PATHS[port]


async def test_operations_keep_the_names_that_mms_gave_them(merged):
    named = {}
    for method, path, operation in operations(await document_of(merged)):
        assert operation["operationId"] not in named
        named[operation["operationId"]] = (method, path)
    assert {
        "apiDescription": ("OPTIONS", "/"),
        "predict": ("POST", "/{model_name}/predict"),
        "ping": ("GET", "/ping"),
        "predictions": ("POST", "/predictions/{model_name}"),
        "predictionsApi": ("OPTIONS", "/predictions/{model_name}"),
        "invocations": ("POST", "/invocations"),
        "listModels": ("GET", "/models"),
        "registerModel": ("POST", "/models"),
        "describeModel": ("GET", "/models/{model_name}"),
        "setAutoScale": ("PUT", "/models/{model_name}"),
        "unregisterModel": ("DELETE", "/models/{model_name}"),
    }.items() <= named.items()
    deprecated = {o["operationId"] for _, _, o in operations(await document_of(merged)) if "deprecated" in o}
    assert deprecated == {"describeApi", "predict", "predictApi"}


async def test_where_an_address_describes_itself(call):
    document = await document_of(call)
    for method in METHODS:
        answer = await call(method, "/api-description")
        assert (answer.status, answer.json) == (200, document)
        assert answer.headers["content-type"] == "application/json"
        assert (await call(method, "/api-description/x")).status == 405
        assert (await call(method, "/")).status == (200 if method == "OPTIONS" else 405)


async def test_every_documented_operation_is_there_and_answers_as_documented(inline, call, spare):
    document = await document_of(call)

    async def ask(method, path, operation, given, *headers):
        for version in ("1", "2"):
            if not inline.engine.has_version("echo", version):
                await inline.load("echo", version=version, at_startup=True)
        where = target(path, operation.get("parameters", []), given)
        answer = await call(method, where, b"x", *headers)
        check(document, operation, answer)
        return answer

    register = {"model_name": "spare", "version": "3", "sha256": spare}
    for each in operations(document):
        _, path, operation = each
        parameters = operation.get("parameters", [])
        values = sample(document, parameters, SAMPLES | (register if path == "/models" else {}))
        headers = [(p["name"], str(values[p["name"]])) for p in parameters if p["in"] == "header"]
        in_path = {p["name"]: values[p["name"]] for p in parameters if p["in"] == "path"}
        assert (await ask(*each, values, *headers)).status == 200
        least = (await ask(*each, in_path)).status
        assert least < 300 or (least == 400 and operation["operationId"] == "registerModel")
        if "model_name" in in_path:
            unknown = await ask(*each, values | {"model_name": "nobody"}, *headers)
            assert (unknown.status, unknown.json["type"]) == (404, "ModelNotFoundException")
        for name, _ in headers:
            assert (await ask(*each, values, (name, "soon"))).status == 400


async def test_registration_by_json_is_as_documented(inline, management, spare):
    document = await document_of(management)
    operation = document["paths"]["/models"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    fields = [{"name": name, "schema": each} for name, each in schema["properties"].items()]
    samples = SAMPLES | {"model_name": "spare", "version": "3", "sha256": spare}
    given = sample(document, fields, samples)
    OAS30Validator(schema).validate(given)
    kind = ("Content-Type", "application/json")
    answer = await management("POST", "/models", json.dumps(given).encode(), kind)
    check(document, operation, answer)
    assert (answer.status, inline.engine.describe("spare", "3").is_default) == (200, True)
    del given["url"]
    answer = await management("POST", "/models", json.dumps(given).encode(), kind)
    check(document, operation, answer)
    assert answer.status == 400


async def test_the_parameters_are_those_that_the_code_reads(inline, management, monkeypatch):
    read = {}

    def follow(kind, method):
        original = getattr(_Parameters, method)

        def reading(self, name, *default):
            read.setdefault(name, (kind, *default))  # numbers and booleans are read by way of text
            return original(self, name, *default)

        monkeypatch.setattr(_Parameters, method, reading)

    for kind, method in (("string", "text"), ("integer", "integer"), ("boolean", "boolean")):
        follow(kind, method)
    document = await document_of(management)
    await inline.load("echo")
    seen = 0
    for method, path, operation in operations(document):
        parameters = operation.get("parameters", [])
        read.clear()
        await management(method, target(path, parameters, {"model_name": "echo", "version": "1"}))
        schemas = {p["name"]: p["schema"] for p in parameters if p["in"] == "query"}
        if operation["operationId"] != "describeModel":  # reads one by hand: see below
            assert {name: s["type"] for name, s in schemas.items()} == {
                n: kind for n, (kind, *_) in read.items()
            }
            assert all(read[name][1] == s["default"] for name, s in schemas.items() if "default" in s)
            seen += len(schemas)
    assert seen > 20


async def test_describing_all_versions_is_documented_and_only_that(inline, management):
    document = await document_of(management)
    (version,) = [
        each
        for each in document["paths"]["/models/{model_name}"]["get"]["parameters"]
        if each["in"] == "query"
    ]
    assert (version["name"], version["schema"]["enum"]) == ("version", ["all"])
    await inline.load("echo")
    assert isinstance((await management("GET", "/models/echo?version=all")).json, list)
    assert (await management("GET", "/models/echo?version=1")).status == 400


async def test_what_is_described_of_a_model_is_documented(management, spare):
    schemas = (await document_of(management))["components"]["schemas"]
    registered = await management("POST", "/models?url=spare.mar&initial_workers=1")
    assert registered.status == 200
    said = (await management("GET", "/models/spare")).json
    (worker,) = said["workers"]
    assert set(said) == set(schemas["Model"]["properties"]) - {"detail", "inputs", "outputs"}
    assert set(said["metrics"]) == set(schemas["Model"]["properties"]["metrics"]["properties"])
    assert set(worker) <= set(schemas["Worker"]["properties"])
    assert set(schemas["Worker"]["properties"]) - set(worker) <= {"pid", "lastExit"}


async def test_every_route_that_answers_is_documented(call):
    """Try every path of up to four of these parts; no model is loaded, so that nothing takes long."""
    document = await document_of(call)
    words = ("ping", "predictions", "invocations", "models", "invoke", "predict", "api-description")
    paths = ["/"]
    for length in (1, 2, 3):
        paths += ["/" + "/".join(parts) for parts in itertools.product((*words, "echo", "1"), repeat=length)]
    paths += [f"/models/echo/1/{word}" for word in (*words, "set-default", "1")]
    answered = set()
    for path, method in itertools.product(paths, METHODS):
        answer = await call(method, path)
        if answer.status != 405 and b"ResourceNotFoundException" not in answer.body:
            answered.add(documented_path(document, path, method))
    assert answered == set(document["paths"])


def documented_path(document, path, method):
    """Return under which path of the document a request is, or fail."""
    for template, item in document["paths"].items():
        text = " ".join(operation.get("description", "") for operation in item.values())
        rest = "(/.*)?" if "what follows in the path" in text else ""
        any_method = "Any method" in text or template == "/api-description"
        if re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)) + rest, path) and (
            method.lower() in item or any_method
        ):
            return template
    raise AssertionError(f"{method} {path} is not documented")


async def test_who_may_not_manage_gets_what_is_documented(inline):
    def nobody(request):
        raise Unauthorized("a token is needed")

    protocol = mms.protocol(inline.engine, Limits(), inference=True, management=nobody)
    document = json.loads((await protocol.handle(HttpRequest("OPTIONS", "/"))).body[0])
    for method, path, operation in operations(document):
        where = target(path, operation.get("parameters", []), SAMPLES)
        response = await protocol.handle(HttpRequest(method, split_target(where)[0]))
        assert (response.status == 401) == (path in MANAGEMENT) == ("security" in operation)
        if response.status == 401:
            headers = {name.lower(): value for name, value in response.headers}
            check(document, operation, Answer(401, headers, b"".join(response.body)))
    assert document["components"]["securitySchemes"]["bearerAuth"]["scheme"] == "bearer"


async def test_every_status_of_the_table_of_errors_is_documented(merged):
    document = await document_of(merged)
    said = {status for _, _, operation in operations(document) for status in operation["responses"]}
    errors = {str(status) for status, _ in ERRORS.values()} - {
        "415",
        "501",
    }  # which only other protocols answer
    assert {status for status in said if status[0] in "45"} == errors
    assert said - errors == {"200", "202", "210", "default"}
    assert set(document["components"]["responses"]) == errors


async def test_when_to_come_back_is_documented(inline, inference):
    await inline.load("echo", workers=0)
    document = await document_of(inference)
    answer = await inference("POST", "/predictions/echo", b"x")
    assert answer.status == 503 and "retry-after" in answer.headers
    check(document, document["paths"]["/predictions/{model_name}"]["post"], answer)


@pytest.mark.parametrize(
    "path", ["/predictions/echo", "/echo/predict", "/models/echo/invoke", "/invocations?model_name=echo"]
)
async def test_a_model_is_described(inline, inference, path):
    await inline.load("echo", version="7")
    answer = await inference("OPTIONS", path)
    assert answer.status == 200
    OpenAPIV30SpecValidator(answer.json).validate()
    assert answer.json["info"] == {"title": "RESTful API for: echo", "version": "7"}
    ((method, where, operation),) = operations(answer.json)
    assert (method, where, operation["operationId"]) == ("POST", "/predictions/echo", "echo")
    check(answer.json, operation, await inference(method, where, b"x"))


@pytest.mark.parametrize("name", ['say "hi"', "é {x}", "50% #1?", "<b>&'\\", "{model_name}", "a~b:c"])
async def test_a_description_can_hold_any_name(inline, inference, name):
    await inline.load("echo", name)
    described = (await inference("OPTIONS", "/predictions/" + quote(name, safe=""))).json
    OpenAPIV30SpecValidator(described).validate()
    assert described["info"]["title"] == f"RESTful API for: {name}"
    ((method, path, operation),) = operations(described)
    assert operation["operationId"] == name
    assert (await inference(method, path, b"x")).body == b"x"


@pytest.mark.parametrize(
    ("asked", "described", "version"),
    [("", "", "1"), ("/1", "/1", "1"), ("/2", "/2", "2"), ("/v 3%3F", "/v%203%3F", "v 3?"), ("/4", "", "1")],
)
async def test_a_version_that_is_loaded_is_described_by_its_own_path(
    inline, inference, asked, described, version
):
    for each in ("1", "2", "v 3?"):
        await inline.load("echo", version=each, workers=0)
    document = (await inference("OPTIONS", f"/predictions/echo{asked}")).json
    OpenAPIV30SpecValidator(document).validate()
    assert list(document["paths"]) == [f"/predictions/echo{described}"]
    assert document["info"]["version"] == version


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/predictions/nobody", 404, "ModelNotFoundException"),
        ("/predictions/nobody/1", 404, "ModelNotFoundException"),
        ("/nobody/predict", 404, "ModelNotFoundException"),
        ("/models/nobody/invoke", 404, "ModelNotFoundException"),
        ("/invocations", 400, "BadRequestException"),
        ("/nobody", 404, "ResourceNotFoundException"),
    ],
)
async def test_what_cannot_be_described(inference, path, status, kind):
    answer = await inference("OPTIONS", path)
    assert (answer.status, answer.json["type"]) == (status, kind)


async def test_the_page_for_users_tells_all_of_it(merged):
    page = (Path(__file__).parents[2] / "docs" / "mms-api.md").read_text()
    document = await document_of(merged)
    for _, path, operation in operations(document):
        named = path.replace("{model_name}", "NAME").replace("{version}", "VERSION")
        assert f"{named}`" in page or f":8080{named}\n" in page
        for each in operation.get("parameters", []):
            assert each["in"] == "path" or each["name"] == "fields" or f"`{each['name']}`" in page
    for code, (status, kind) in ERRORS.items():
        assert code in ("unsupported", "unsupported_media") or f"| {status} | `{kind}` |" in page
    for name in ("Model", "Worker"):
        for key in document["components"]["schemas"][name]["properties"]:
            assert f"`{key}`" in page
