"""Archives from http(s) addresses: what may be fetched, and how downloads fail."""

import hashlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from certificates import Pair
from http_site import Request, Site, serve

from mms_lite.engine.repository.allow_list import AllowList, RemoteUrl
from mms_lite.engine.repository.download import Downloads
from mms_lite.errors import (
    ConfigError,
    DownloadFailed,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
)

BODY = bytes(range(256)) * 4096


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


def refuse_look_up(host: str, _port: int) -> Sequence[str]:
    raise AssertionError(f"{host} was looked up")


def downloads(allowed: str, **fields: object) -> Downloads:
    settings: dict[str, object] = {"max_bytes": 1 << 24, "timeout_s": 20.0, "resolve": refuse_look_up}
    return Downloads(AllowList.parse(allowed), **{**settings, **fields})  # type: ignore[arg-type]


def message(failure: "pytest.ExceptionInfo[Exception]") -> str:
    return str(failure.value)


# What an entry of allowed_urls permits


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("http://models.example", "http://models.example/a/b.mar"),
        ("http://models.example/", "http://models.example"),
        ("http://models.example/*", "http://models.example/m.mar"),
        ("http://models.example/.*", "http://models.example/m.mar"),
        ("http://models.example/a", "http://models.example/a"),
        ("http://models.example/a", "http://models.example/a/m.mar"),
        ("http://models.example/a/", "http://models.example/a/m.mar?version=1"),
        ("http://models.example/a/*", "http://models.example/a/m.mar"),
        ("http://models.example/a/.*", "http://models.example/a/m.mar"),
        ("http://models.example/resnet*", "http://models.example/resnet50.mar"),
        ("http://models.example/resnet.*", "http://models.example/resnet50/m.mar"),
        ("HTTP://Models.Example.:80/a", "http://models.example/a/m.mar"),
        ("http://models.example/a", "hTTp://MODELS.example.:0080/a/m.mar"),
        ("https://models.example", "https://models.example:443/m.mar"),
        ("https://models.example:443/", "https://models.example/m.mar"),
        ("http://models.example/a%62c", "http://models.example/%61b%63/m.mar"),
        ("http://models.example/%c3%a9", "http://models.example/\u00e9/m.mar"),
        ("http://models.example/a%20b", "http://models.example/a%20b/m.mar"),
        ("http://b\u00fccher.example/", "http://xn--bcher-kva.example/m.mar"),
        ("http://xn--bcher-kva.example/", "http://B\u00dcCHER.example/m.mar"),
        ("http://models.example/", "http://models\u3002example/m.mar"),
        ("http://10.0.0.5:9000/models/", "http://10.0.0.5:9000/models/m.mar"),
        ("http://10.0.0.5/", "http://\uff11\uff10.0.0.5./m.mar"),
        ("http://[::1]:9000/", "http://[0:0::0:1]:9000/m.mar"),
        ("http://other.example/, ,http://models.example/,", "http://models.example/m.mar"),
    ],
)
def test_an_entry_permits_what_lies_below_it(entry: str, url: str) -> None:
    assert AllowList.parse(entry).admit(url) == RemoteUrl.parse(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://models.example/a/m.mar",
        "http://models.example:8080/a/m.mar",
        "http://models.example:443/a/m.mar",
        "http://models.example/",
        "http://models.example/b/m.mar",
        "http://models.example/ab/m.mar",
        "http://models.example/A/m.mar",
        "http://models.example//a/m.mar",
        "http://models.example.evil.example/a/m.mar",
        "http://evil.example/a/m.mar",
        "http://evil.example/http://models.example/a/",
        "http://evil.example?http://models.example/a/",
        "http://sub.models.example/a/m.mar",
        "http://models.example@evil.example/a/m.mar",
        "http://models.example:80@evil.example/a/m.mar",
        "http://user:password@models.example/a/m.mar",
        "http://@models.example/a/m.mar",
        "http://models.example%2eevil@evil.example/a/m.mar",
        "http://models.example/a/../b/m.mar",
        "http://models.example/a/..",
        "http://models.example/a/./m.mar",
        "http://models.example/a/..;/b/m.mar",
        "http://models.example/a/..%3b/b/m.mar",
        "http://models.example/../a/m.mar",
        "http://models.example/a/%2e%2e/b/m.mar",
        "http://models.example/a/.%2E/b/m.mar",
        "http://models.example/a/%2E/m.mar",
        "http://models.example/a/..%2fb/m.mar",
        "http://models.example/a/..%5Cb/m.mar",
        "http://models.example/a%2Fb/m.mar",
        "http://models.example/a/%252e%252e/b/m.mar",
        "http://models.example/a/m.mar%00",
        "http://models.example/a/%0d%0aHost:%20evil.example",
        "ftp://models.example/a/m.mar",
        "file:///etc/passwd",
        "FILE://models.example/a/m.mar",
        "s3://models.example/a/m.mar",
        "gs://models.example/a/m.mar",
        "httpx://models.example/a/m.mar",
        "http+unix://models.example/a/m.mar",
    ],
)
def test_what_an_entry_does_not_name_is_forbidden_before_any_look_up(url: str, tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match="Models may not be loaded from") as failure:
        downloads("http://models.example/a").fetch(url, tmp_path)
    assert url in message(failure)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///m.mar",
        "http://:80/m.mar",
        "http://models.example:/m.mar",
        "http://models.example:0/m.mar",
        "http://models.example:65536/m.mar",
        "http://models.example:99999999999/m.mar",
        "http://models.example:-80/m.mar",
        "http://models.example:+80/m.mar",
        "http://models.example:8_0/m.mar",
        "http://models.example:\uff18\uff10/m.mar",
        "http://models.example:80:80/m.mar",
        "http://models.example:http/m.mar",
        "http://models..example/m.mar",
        "http://.models.example/m.mar",
        "http://models.example../m.mar",
        f"http://{'a' * 64}.example/m.mar",
        f"http://{'a.' * 200}example/m.mar",
        "http://models%2eexample/m.mar",
        "http://models.example\\@evil.example/m.mar",
        "http://models.example/a\\..\\m.mar",
        "http://models.example /m.mar",
        "http://models.example/m .mar",
        "http://models.example/m.mar\r\nHost: evil.example",
        "http://models.example\t/m.mar",
        "http://models.example/\x00m.mar",
        "http://models.example/\ud800.mar",
        "http://models.example/100%",
        "http://models.example/%zz.mar",
        "http://a\uff0fb.example/m.mar",
        "http://a\u2100b.example/m.mar",
        "http://[::1/m.mar",
        "http://::1/m.mar",
        "http://[::1]80/m.mar",
        "http://[::g]/m.mar",
        "http://[fe80::1%25eth0]/m.mar",
        "http://[127.0.0.1]/m.mar",
        "http://[v1.models]/m.mar",
        "http://models.example[::1]/m.mar",
        # what inet_aton takes for 127.0.0.1
        "http://2130706433/m.mar",
        "http://127.1/m.mar",
        "http://127.0.1/m.mar",
        "http://0x7f000001/m.mar",
        "http://0x7f.0.0.1/m.mar",
        "http://127.0.0.0x1/m.mar",
        "http://0177.0.0.1/m.mar",
        "http://127.0.0.01/m.mar",
        "http://0/m.mar",
        "http://127.0.0.256/m.mar",
        "http://127.0.0.1.1/m.mar",
        "http://models.123/m.mar",
    ],
)
def test_a_malformed_url_is_not_found(url: str, tmp_path: Path) -> None:
    allowed = "http://models.example/,http://127.0.0.1/,http://[::1]/"
    with pytest.raises(ModelNotFound) as failure:
        downloads(allowed).fetch(url, tmp_path)
    assert message(failure) == f"Invalid model url: {url}"


def test_with_no_entry_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match="allowed_urls does not permit it"):
        downloads(" , ").fetch("http://models.example/m.mar", tmp_path)


def test_a_fragment_is_refused_with_the_name_of_the_parameter(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="parameter sha256"):
        downloads("http://models.example/").fetch("http://models.example/m.mar#sha256=00", tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        "models.example",
        "//models.example/",
        "ftp://models.example/",
        "file://.*",
        "http(s)?://.*",
        "http://*",
        "http://.*",
        "http://models.example*",
        "http://models.example.*",
        "http://models.example:80*",
        "http://*.example/",
        "http://models.*/a/",
        "http://models.example/*/a",
        "http://models.example/**",
        "http://models\\.example/",
        "http://user@models.example/",
        "http://models.example:0/",
        "http://models.example/?a=b",
        "http://models.example/#a",
        "http://models.example/a/../b",
        "http://models.example/%2e%2e/*",
        "http://models.example/%4*",
        "http://127.1/",
        "http://models.example/a b",
    ],
)
def test_a_bad_entry_is_a_configuration_error_that_shows_it(entry: str) -> None:
    with pytest.raises(ConfigError) as failure:
        AllowList.parse(f"http://good.example/,{entry}")
    assert entry in message(failure) and "allowed_urls" in message(failure)


def test_what_is_asked_for_is_what_was_compared() -> None:
    url = RemoteUrl.parse("HTTP://B\u00dccher.Example.:8080/%61/\u00e9|%7e?q=a%20b")
    assert str(url) == "http://xn--bcher-kva.example:8080/a/%C3%A9%7C~?q=a%20b"


# Addresses

PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:0:127.0.0.1",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "2001:db8::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::7f00:1",
    "100::1",
]


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record where connections go, and refuse them."""
    made: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        assert 0 < timeout <= 5
        made.append(address)
        raise ConnectionRefusedError("no")

    monkeypatch.setattr(socket, "create_connection", connect)
    return made


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("others", [[], ["93.184.215.14"]])
def test_a_name_of_a_private_address_is_forbidden(
    address: str, others: list[str], tmp_path: Path, connected: list[tuple[str, int]]
) -> None:
    fetcher = downloads("http://models.example/", resolve=lambda _host, _port: [*others, address])
    with pytest.raises(Forbidden, match="not public"):
        fetcher.fetch("http://models.example/m.mar", tmp_path)
    assert connected == []


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:4700::1111", "64:ff9b::5db8:d70e", "2002:5db8:d70e::1"]
)
def test_a_connection_goes_to_the_address_that_was_checked(
    address: str, tmp_path: Path, connected: list[tuple[str, int]]
) -> None:
    asked: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return [address, "1.1.1.1"]

    with pytest.raises(DownloadFailed) as failure:
        downloads("https://models.example/", resolve=resolve).fetch("https://models.example/m.mar", tmp_path)
    assert message(failure) == "Failed to download model from: https://models.example/m.mar"
    assert asked == [("models.example", 443)]
    assert connected == [(address, 443), ("1.1.1.1", 443)]


@pytest.mark.parametrize("address", [each for each in PRIVATE if "%" not in each])
def test_a_private_address_is_connected_to_only_when_an_entry_names_it(
    address: str, tmp_path: Path, connected: list[tuple[str, int]]
) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(Forbidden):
        downloads("http://models.example/").fetch(f"http://{host}/m.mar", tmp_path)
    assert connected == []
    with pytest.raises(DownloadFailed):
        downloads(f"http://{host}/").fetch(f"http://{host}/m.mar", tmp_path)
    assert [ipaddress.ip_address(each) for each, _ in connected] == [ipaddress.ip_address(address)]


@pytest.mark.parametrize(
    "url",
    [
        "http://[::ffff:127.0.0.1]:{port}/m.mar",
        "http://[::ffff:7f00:1]:{port}/m.mar",
        "http://localhost:{port}/m.mar",
        "http://127.0.0.2:{port}/m.mar",
        "http://0.0.0.0:{port}/m.mar",
    ],
)
def test_an_entry_for_an_address_permits_no_other_spelling_of_the_machine(
    url: str, site: Site, tmp_path: Path
) -> None:
    site.put("/m.mar", BODY)
    with pytest.raises(Forbidden):
        downloads(site.origin).fetch(url.format(port=site.port), tmp_path)
    assert site.seen == []


def test_localhost_is_allowed_by_name_when_it_is_this_machine(site: Site, tmp_path: Path) -> None:
    site.put("/m.mar", BODY)
    url = f"http://LOCALHOST.:{site.port}/m.mar"
    allowed = f"http://localhost:{site.port}/"
    found = downloads(allowed, resolve=lambda _host, _port: ["127.0.0.1"]).fetch(url, tmp_path)
    assert found.path.read_bytes() == BODY
    assert site.seen[0].headers["Host"] == f"localhost:{site.port}"


def test_localhost_is_not_allowed_to_be_another_machine(tmp_path: Path) -> None:
    elsewhere = downloads("http://localhost/", resolve=lambda _host, _port: ["10.0.0.1"])
    with pytest.raises(Forbidden, match="not public"):
        elsewhere.fetch("http://localhost/m.mar", tmp_path)


def test_a_name_that_cannot_be_looked_up_is_a_failed_download(tmp_path: Path) -> None:
    def resolve(_host: str, _port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    with pytest.raises(DownloadFailed, match=r"Failed to download model from: http://models.example/m.mar\Z"):
        downloads("http://models.example/", resolve=resolve).fetch("http://models.example/m.mar", tmp_path)


# What is fetched


def test_a_download_is_written_and_hashed(site: Site, tmp_path: Path) -> None:
    url = site.put("/models/my%20m.mar", BODY) + "?token=a%2Fb"
    found = downloads(site.origin + "/models").fetch(url, tmp_path)
    assert (found.path.name, found.path.read_bytes()) == ("my_m.mar", BODY)
    assert found.sha256 == hashlib.sha256(BODY).hexdigest()
    [request] = site.seen
    assert request.path == "/models/my%20m.mar?token=a%2Fb"
    assert request.headers["Host"] == f"127.0.0.1:{site.port}"
    assert request.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "model.mar"),
        ("/a/", "model.mar"),
        ("/.hidden", "hidden"),
        ("/%F0%9F%90%88:x.mar", "__x.mar"),
        ("/" + "a" * 300 + ".mar", "a" * 96 + ".mar"),
    ],
)
def test_the_file_has_a_plain_name(path: str, name: str, site: Site, tmp_path: Path) -> None:
    assert downloads(site.origin).fetch(site.put(path, BODY), tmp_path).path.name == name


def chunked(request: Request) -> None:
    request.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")


def until_the_end(request: Request) -> None:
    request.raw(b"HTTP/1.0 200 OK\r\n\r\nabc")


def encoded(request: Request) -> None:
    request.answer(200, b"abc", Content_Encoding="gzip")


@pytest.mark.parametrize("page", [chunked, until_the_end, encoded])
def test_bodies_of_every_framing_are_taken_as_they_are(
    page: Callable[[Request], None], site: Site, tmp_path: Path
) -> None:
    site.pages["/m.mar"] = page
    assert downloads(site.origin).fetch(site.origin + "/m.mar", tmp_path).path.read_bytes() == b"abc"


def test_proxies_of_the_environment_are_not_asked(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    monkeypatch.setenv("no_proxy", "")
    assert downloads(site.origin).fetch(site.put("/m.mar", BODY), tmp_path).path.read_bytes() == BODY


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_the_list_is_followed(status: int, site: Site, tmp_path: Path) -> None:
    site.put("/b/m.mar", BODY)
    url = site.redirect("/a/old.mar", "../b/m.mar#part", status)
    found = downloads(site.origin).fetch(url, tmp_path)
    assert (found.path.name, found.path.read_bytes()) == ("old.mar", BODY)


@pytest.mark.parametrize(
    "to",
    [
        "http://evil.example/m.mar",
        "//evil.example/m.mar",
        "/\\evil.example/m.mar",
        "/b/m.mar",
        "/a/%2e%2e/b/m.mar",
        "http://169.254.169.254/latest/meta-data",
        "http://user@127.0.0.1:{port}/a/m.mar",
        "http://localhost:{port}/a/m.mar",
        "http://2130706433:{port}/a/m.mar",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a/m.mar",
        "http://[::1/m.mar",
        "http://models.example:99999/",
    ],
)
def test_a_redirect_out_of_the_list_is_forbidden(to: str, site: Site, tmp_path: Path) -> None:
    site.put("/b/m.mar", BODY)
    site.put("/a/m.mar", BODY)
    url = site.redirect("/a/old.mar", to.format(port=site.port))
    with pytest.raises(Forbidden) as failure:
        downloads(site.origin + "/a/").fetch(url, tmp_path)
    assert url in message(failure)
    assert [each.path for each in site.seen] == ["/a/old.mar"]


def test_the_address_of_a_redirect_is_checked_too(site: Site, tmp_path: Path) -> None:
    url = site.redirect("/m.mar", f"http://models.example:{site.port}/m.mar")
    allowed = f"{site.origin}/,http://models.example:{site.port}/"
    with pytest.raises(Forbidden, match="not public"):
        downloads(allowed, resolve=lambda _host, _port: ["127.0.0.1"]).fetch(url, tmp_path)
    assert len(site.seen) == 1


def test_redirects_are_followed_five_times(site: Site, tmp_path: Path) -> None:
    site.put("/5", BODY)
    for step in range(5):
        site.redirect(f"/{step}", f"/{step + 1}")
    assert downloads(site.origin).fetch(site.origin + "/0", tmp_path).path.read_bytes() == BODY
    site.redirect("/loop", "/loop")
    site.seen.clear()
    with pytest.raises(
        DownloadFailed, match=r"Failed to download model from: .*/loop \(more than 5 redirects\)"
    ):
        downloads(site.origin).fetch(site.origin + "/loop", tmp_path)
    assert len(site.seen) == 6


def test_a_redirect_without_a_place_is_a_status_like_others(site: Site, tmp_path: Path) -> None:
    site.pages["/m.mar"] = lambda request: request.answer(302)
    with pytest.raises(DownloadFailed, match=r"code: 302\Z"):
        downloads(site.origin).fetch(site.origin + "/m.mar", tmp_path)


# Failures and limits


@pytest.mark.parametrize("status", [201, 204, 206, 304, 401, 404, 500])
def test_another_status_than_200_is_told(status: int, site: Site, tmp_path: Path) -> None:
    site.pages["/m.mar"] = lambda request: request.answer(status)
    url = site.origin + "/m.mar"
    with pytest.raises(DownloadFailed) as failure:
        downloads(site.origin).fetch(url, tmp_path)
    assert message(failure) == f"Failed to download model from: {url}, code: {status}"


def test_a_port_where_nothing_listens_is_a_failed_download(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and nothing accepts there
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/m.mar"
        with pytest.raises(DownloadFailed) as failure:
            downloads(url).fetch(url, tmp_path)
    assert message(failure) == f"Failed to download model from: {url}"


def test_a_length_over_the_limit_is_refused_before_the_body_is_read(site: Site, tmp_path: Path) -> None:
    def page(request: Request) -> None:
        request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
        request.drip(b"", 0.05)

    site.pages["/m.mar"] = page
    with pytest.raises(DownloadFailed, match=r"1001 bytes; max_download_bytes is 1000"):
        downloads(site.origin, max_bytes=1000).fetch(site.origin + "/m.mar", tmp_path)


def test_a_body_of_no_stated_length_ends_at_the_limit(site: Site, tmp_path: Path) -> None:
    def page(request: Request) -> None:
        request.raw(b"HTTP/1.1 200 OK\r\n\r\n")
        request.drip(bytes(10_000), 0)

    site.pages["/m.mar"] = page
    with pytest.raises(DownloadFailed, match="max_download_bytes, 1000000"):
        downloads(site.origin, max_bytes=1_000_000).fetch(site.origin + "/m.mar", tmp_path)


def test_an_endless_chunk_is_not_gathered_in_memory(site: Site, tmp_path: Path) -> None:
    def page(request: Request) -> None:
        request.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        request.drip(bytes(10_000), 0)

    site.pages["/m.mar"] = page
    with pytest.raises(DownloadFailed, match="Failed to download model from"):
        downloads(site.origin, max_bytes=1_000_000).fetch(site.origin + "/m.mar", tmp_path)


def test_a_body_exactly_at_the_limit_is_taken(site: Site, tmp_path: Path) -> None:
    url = site.put("/m.mar", BODY)
    assert downloads(site.origin, max_bytes=len(BODY)).fetch(url, tmp_path).path.stat().st_size == len(BODY)


CUTS = {
    "in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
    "in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
    "before the last chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "in a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "in a negative chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
    "in an endless chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n",
    "in a huge chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc",
    "in the status": b"HTTP/1.1 2",
    "at once": b"",
    "with no HTTP": b"SSH-2.0-server\r\n",
    "in a long header": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100_000,
    "in many headers": b"HTTP/1.1 200 OK\r\n" + b"A: a\r\n" * 1000 + b"\r\n",
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_connection_that_is_cut_is_a_failed_download(cut: bytes, site: Site, tmp_path: Path) -> None:
    site.pages["/m.mar"] = lambda request: request.raw(cut)
    url = site.origin + "/m.mar"
    with pytest.raises(DownloadFailed) as failure:
        downloads(site.origin).fetch(url, tmp_path)
    assert message(failure).startswith(f"Failed to download model from: {url}")


DRIPS = {
    "a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"a"),
    "a status": (b"HTTP/1.1 20", b"0"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"A: a\r\n"),
    "continues": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: a\r\n"),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize(("begin", "drop"), DRIPS.values(), ids=DRIPS)
def test_a_server_that_drips_is_left_at_the_time_limit(
    begin: bytes, drop: bytes, site: Site, tmp_path: Path
) -> None:
    def page(request: Request) -> None:
        request.raw(begin)
        request.drip(drop, 0.01)

    site.pages["/m.mar"] = page
    url, started = site.origin + "/m.mar", time.monotonic()
    with pytest.raises(DownloadFailed) as failure:
        downloads(site.origin, timeout_s=0.4).fetch(url, tmp_path)
    assert message(failure) == f"Download model timeout: {url}"
    assert 0.4 <= time.monotonic() - started < 5


def test_a_server_that_falls_silent_is_left_before_the_time_limit(site: Site, tmp_path: Path) -> None:
    def page(request: Request) -> None:
        request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        request.drip(b"", 0.05)

    site.pages["/m.mar"] = page
    with pytest.raises(DownloadFailed, match="Download model timeout"):
        downloads(site.origin, timeout_s=50, idle_s=0.1).fetch(site.origin + "/m.mar", tmp_path)


def test_a_look_up_that_hangs_is_left_at_the_time_limit(tmp_path: Path) -> None:
    hang = threading.Event()

    def resolve(_host: str, _port: int) -> list[str]:
        hang.wait(20)
        return ["1.1.1.1"]

    try:
        with pytest.raises(DownloadFailed, match=r"Download model timeout: http://models.example/m.mar"):
            downloads("http://models.example/", timeout_s=0.2, resolve=resolve).fetch(
                "http://models.example/m.mar", tmp_path
            )
    finally:
        hang.set()


def test_a_stop_ends_a_slow_download(site: Site, tmp_path: Path) -> None:
    fetcher = downloads(site.origin, timeout_s=50)

    def page(request: Request) -> None:
        request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        fetcher.stop()
        request.drip(b"", 0.05)

    site.pages["/m.mar"] = page
    started = time.monotonic()
    with pytest.raises(ModelNotReady, match="the server is stopping"):
        fetcher.fetch(site.origin + "/m.mar", tmp_path)
    assert time.monotonic() - started < 5


# https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for 127.0.0.1, with its key, that nobody signed but itself."""
    pair = Pair(name="127.0.0.1", ca=True)
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(pair.key_pem() + pair.pem())
    return file


@pytest.fixture
def secure_site(certificate: Path) -> Iterator[Site]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serve(context) as running:
        yield running


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def test_https_is_fetched_where_the_certificate_is_trusted(
    trusted: None, secure_site: Site, tmp_path: Path
) -> None:
    url = secure_site.put("/m.mar", BODY)
    assert downloads(secure_site.origin).fetch(url, tmp_path).path.read_bytes() == BODY


def test_a_certificate_that_nobody_trusts_is_a_failed_download(secure_site: Site, tmp_path: Path) -> None:
    url = secure_site.put("/m.mar", BODY)
    with pytest.raises(DownloadFailed, match=r"Failed to download model from: https.*certificate"):
        downloads(secure_site.origin).fetch(url, tmp_path)
    assert secure_site.seen == []


def test_a_certificate_for_another_name_is_a_failed_download(
    trusted: None, secure_site: Site, tmp_path: Path
) -> None:
    secure_site.put("/m.mar", BODY)
    url = f"https://localhost:{secure_site.port}/m.mar"
    with pytest.raises(DownloadFailed, match=r"Failed to download model from: https.*certificate"):
        downloads(url, resolve=lambda _host, _port: ["127.0.0.1"]).fetch(url, tmp_path)
    assert secure_site.seen == []


def test_https_asked_of_a_plain_server_is_a_failed_download(site: Site, tmp_path: Path) -> None:
    url = site.put("/m.mar", BODY).replace("http:", "https:")
    with pytest.raises(DownloadFailed, match="Failed to download model from: https"):
        downloads(url).fetch(url, tmp_path)


def test_a_handshake_that_hangs_is_left_at_the_time_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel connects, nobody answers
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/m.mar"
        with pytest.raises(DownloadFailed, match="Download model timeout: https"):
            downloads(url, timeout_s=0.3).fetch(url, tmp_path)


def test_a_redirect_from_https_to_http_is_forbidden_and_the_other_way_is_not(
    trusted: None, site: Site, secure_site: Site, tmp_path: Path
) -> None:
    both = downloads(f"{site.origin},{secure_site.origin}")
    up = site.redirect("/up.mar", secure_site.put("/m.mar", BODY))
    assert both.fetch(up, tmp_path).path.read_bytes() == BODY
    down = secure_site.redirect("/down.mar", site.put("/m.mar", BODY))
    site.seen.clear()
    with pytest.raises(Forbidden, match="redirects from https to http"):
        both.fetch(down, tmp_path)
    assert site.seen == []
