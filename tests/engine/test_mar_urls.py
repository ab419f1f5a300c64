"""Models of the repository that come from http(s) addresses or have a checksum."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_site import Request, Site, serve

from mms_lite.engine.repository.allow_list import AllowList
from mms_lite.engine.repository.download import Downloads
from mms_lite.engine.repository.mar import Defaults, MarRepository, startup_models
from mms_lite.errors import (
    DownloadFailed,
    Forbidden,
    InvalidArchive,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
)
from mms_lite.types import LoadOptions

SERVICE = "def handle(data, context):\n    return data\n"


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def models(tmp_path: Path, work: Path, site: Site) -> MarRepository:
    store = tmp_path / "store"
    store.mkdir()
    defaults = Defaults(workers=1, queue_size=10, response_timeout_s=1, load_timeout_s=1)
    allowed = AllowList.parse(f"{site.origin}/models/")
    return MarRepository(store, work, defaults, Downloads(allowed, max_bytes=1 << 20, timeout_s=20))


def packed(tmp_path: Path, name: str | None = "noop") -> bytes:
    """Return an archive; its manifest has the name, or there is no manifest."""
    file = tmp_path / "packed"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("service.py", SERVICE)
        if name:
            model = {"modelName": name, "handler": "service:handle"}
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
    return file.read_bytes()


def test_an_archive_from_a_url_is_like_one_of_the_store(
    models: MarRepository, site: Site, tmp_path: Path, work: Path
) -> None:
    url = site.put("/models/m.mar", packed(tmp_path))
    spec = models.read(LoadOptions(url=url))
    assert (spec.name, spec.handler, spec.url, spec.owns_path) == ("noop", "service:handle", url, True)
    assert Path(spec.path, "service.py").read_text() == SERVICE
    assert [each.resolve() for each in work.iterdir()] == [Path(spec.path)]  # the download is gone
    models.discard(spec)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("spell", [str.lower, str.upper])
def test_an_archive_of_the_checksum_is_loaded(
    spell: object, models: MarRepository, site: Site, tmp_path: Path
) -> None:
    body = packed(tmp_path)
    (tmp_path / "store" / "m.mar").write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    sha256 = digest.upper() if spell is str.upper else digest
    for url in (site.put("/models/m.mar", body), "m.mar"):
        assert models.read(LoadOptions(url=url, sha256=sha256)).name == "noop"


def test_an_archive_of_another_checksum_is_refused_with_both(
    models: MarRepository, site: Site, tmp_path: Path, work: Path
) -> None:
    body = packed(tmp_path)
    (tmp_path / "store" / "m.mar").write_bytes(body)
    for url in (site.put("/models/m.mar", body), "m.mar"):
        with pytest.raises(InvalidArchive) as failure:
            models.read(LoadOptions(url=url, sha256="Ab" * 32))
        found = hashlib.sha256(body).hexdigest()
        assert failure.value.message == f"m.mar has the SHA-256 {found}, not {'ab' * 32}."
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("sha256", ["", "ab", "g" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "\uff11" * 64])
def test_what_is_no_checksum_is_an_invalid_request(sha256: str, models: MarRepository, site: Site) -> None:
    with pytest.raises(InvalidRequest, match="sha256"):
        models.read(LoadOptions(url=f"{site.origin}/models/m.mar", sha256=sha256))
    assert site.seen == []


def test_a_folder_or_a_pipe_has_no_checksum(models: MarRepository, tmp_path: Path) -> None:
    (tmp_path / "store" / "folder").mkdir()
    os.mkfifo(tmp_path / "store" / "pipe.mar")
    for url in ("folder", "pipe.mar"):
        with pytest.raises(InvalidRequest, match=f"{url} is no archive"):
            models.read(LoadOptions(url=url, sha256="a" * 64))


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("{site}/other/m.mar", Forbidden),
        ("https://models.example/m.mar", Forbidden),
        ("file:///etc/passwd", Forbidden),
        ("S3://bucket/m.mar", Forbidden),
        ("http://models.example:99999/m.mar", ModelNotFound),
        ("{site}/models/m.mar#sha256=00", InvalidRequest),
        ("{site}/models/missing.mar", DownloadFailed),
        ("{site}/models/text.mar", InvalidArchive),
        ("{site}/models/cut.mar", DownloadFailed),
        ("{site}/models/nameless.mar", InvalidArchive),
        ("{site}/models/large.mar", DownloadFailed),
        ("http:/models.example/m.mar", ModelNotFound),
    ],
)
def test_a_failure_leaves_no_file(
    url: str, error: type[Exception], models: MarRepository, site: Site, tmp_path: Path, work: Path
) -> None:
    site.put("/models/text.mar", b"no archive")
    site.put("/models/nameless.mar", packed(tmp_path, None))
    site.put("/models/large.mar", bytes((1 << 20) + 1))
    site.pages["/models/cut.mar"] = lambda request: request.answer(200, b"PK", Content_Length="100")
    with pytest.raises(error) as failure:
        models.read(LoadOptions(url=url.format(site=site.origin)))
    assert type(failure.value) is error
    assert str(tmp_path) not in str(failure.value)
    assert list(work.iterdir()) == []


def test_without_downloads_no_url_is_fetched(site: Site, work: Path) -> None:
    defaults = Defaults(workers=1, queue_size=10, response_timeout_s=1, load_timeout_s=1)
    with pytest.raises(Forbidden, match="allowed_urls"):
        MarRepository(None, work, defaults).read(LoadOptions(url=site.origin + "/models/m.mar"))
    assert site.seen == []


def test_a_url_needs_no_model_store(site: Site, tmp_path: Path, work: Path) -> None:
    url = site.put("/m.mar", packed(tmp_path))
    defaults = Defaults(workers=1, queue_size=10, response_timeout_s=1, load_timeout_s=1)
    downloads = Downloads(AllowList.parse(site.origin), max_bytes=1 << 20, timeout_s=20)
    assert MarRepository(None, work, defaults, downloads).read(LoadOptions(url=url)).name == "noop"


def test_a_work_folder_that_cannot_be_written_is_told_without_its_path(
    models: MarRepository, site: Site, work: Path
) -> None:
    url = site.put("/models/m.mar", b"abc")
    work.rmdir()
    with pytest.raises(Exception, match="cannot read the model") as failure:
        models.read(LoadOptions(url=url))
    assert str(work) not in str(failure.value)


def test_at_start_a_nameless_archive_is_called_as_its_url_ends(
    models: MarRepository, site: Site, tmp_path: Path
) -> None:
    site.put("/models/squeeze%20net_v1.1.mar", packed(tmp_path, None))
    [options] = startup_models(f"{site.origin}/models/squeeze%20net_v1.1.mar?token=a=b")
    options = LoadOptions(url=options.url, handler="service:handle", at_startup=True)
    assert models.read(options).name == "squeeze_net_v1_1"


def test_a_redirect_does_not_change_the_derived_name(
    models: MarRepository, site: Site, tmp_path: Path
) -> None:
    site.put("/models/blob", packed(tmp_path, None))
    url = site.redirect("/models/mine.mar", "/models/blob")
    assert models.read(LoadOptions(url=url, handler="service:handle", at_startup=True)).name == "mine"


@pytest.mark.parametrize(
    ("item", "name", "url", "sha256"),
    [
        ("m.mar", None, "m.mar", None),
        ("n=m.mar", "n", "m.mar", None),
        ("a=b=c.mar", "a=b", "c.mar", None),
        ("https://h/m.mar", None, "https://h/m.mar", None),
        ("n=https://h/m.mar", "n", "https://h/m.mar", None),
        ("https://h/m.mar?a=b&c=d/e=f", None, "https://h/m.mar?a=b&c=d/e=f", None),
        ("n=https://h/m.mar?a=b#sha256=0A", "n", "https://h/m.mar?a=b", "0A"),
        ("https://h/m.mar#sha256=0A", None, "https://h/m.mar", "0A"),
        ("https://h/m.mar#sha256=", None, "https://h/m.mar", ""),
        ("https://h/m.mar#part", None, "https://h/m.mar#part", None),
        ("m.mar#sha256=0A", None, "m.mar", "0A"),
    ],
)
def test_an_item_of_load_models_may_have_a_name_and_a_checksum(
    item: str, name: str | None, url: str, sha256: str | None
) -> None:
    assert startup_models(f" {item} ,,n=, ") == [
        LoadOptions(url=url, name=name, sha256=sha256, at_startup=True)
    ]


def test_closing_ends_the_downloads_that_run(models: MarRepository, site: Site, work: Path) -> None:
    def page(request: Request) -> None:
        request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nPK")
        models.close()
        request.drip(b"", 0.05)

    site.pages["/models/m.mar"] = page
    with pytest.raises(ModelNotReady, match="stopping"):
        models.read(LoadOptions(url=site.origin + "/models/m.mar"))
    assert list(work.iterdir()) == []
