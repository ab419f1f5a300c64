"""Who may manage, and the file in which the token lives."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from mms_lite.address import Address
from mms_lite.errors import ConfigError, Forbidden, Unauthorized
from mms_lite.frontends.auth import Authoriser, is_local, read_token
from mms_lite.frontends.message import HttpRequest

GUARDED = Authoriser(b"secret")
AFAR = "192.0.2.7:4000"
HERE = ["127.0.0.1:4000", "127.9.8.7:4000", "[::1]:4000", "[::ffff:127.0.0.1]:4000", ""]


def request(remote: str = AFAR, *headers: tuple[str, str]) -> HttpRequest:
    return HttpRequest("GET", "/models", remote=remote, headers=headers)


def refused(request: HttpRequest) -> bool:
    try:
        GUARDED.check(request)
    except Unauthorized as error:
        assert "Authorization: Bearer" in error.message
        assert "secret" not in error.message
        return True
    return False


def test_without_a_token_everybody_may_manage() -> None:
    Authoriser().check(request(AFAR))


def asked_by_page(
    origin: str | None, *, host: str = "127.0.0.1:8081", site: str | None = None, allowed: str | None = None
) -> None:
    given = {"Host": host, "Origin": origin, "Sec-Fetch-Site": site}
    headers = [(name, value) for name, value in given.items() if value is not None]
    Authoriser(None, allowed, frozenset(("localhost", "ours"))).check(request(HERE[0], *headers))


@pytest.mark.parametrize(
    "origin", ["https://evil.test", "null", "http://127.0.0.1:8080", "http://127.0.0.1", ""]
)
def test_a_web_page_of_another_site_may_not_manage(origin: str) -> None:
    with pytest.raises(Forbidden, match="cors_allowed_origin"):
        asked_by_page(origin)
    with pytest.raises(Forbidden):
        asked_by_page(origin, allowed="https://ours.test")


@pytest.mark.parametrize(
    ("origin", "site"), [("http://evil.test:8081", "same-origin"), (None, "same-origin")]
)
def test_a_name_of_another_site_that_leads_here_does_not_help(origin: str | None, site: str) -> None:
    with pytest.raises(Forbidden):
        asked_by_page(origin, host="evil.test:8081", site=site)
    with pytest.raises(Forbidden):
        asked_by_page("http://evil.test:8081", host="evil.test:8081")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_simple_request_of_another_site_is_refused_by_where_it_comes_from(site: str) -> None:
    with pytest.raises(Forbidden):
        asked_by_page(None, site=site)


def test_a_web_page_that_may_is_let_pass() -> None:
    asked_by_page(None)
    asked_by_page(None, host="any.test")  # no browser
    for host in ("127.0.0.1:8081", "[::1]:8081", "localhost:8081", "OURS:8081", "ours"):
        asked_by_page(f"http://{host.lower()}", host=host)
        asked_by_page(None, host=host, site="same-origin")
    asked_by_page("https://ours.test", allowed="https://ours.test", site="cross-site")
    asked_by_page("https://any.test", allowed="*", site="cross-site")


@pytest.mark.parametrize("remote", HERE)
def test_who_is_on_this_machine_needs_no_token(remote: str) -> None:
    assert not refused(request(remote))


@pytest.mark.parametrize(
    "remote", [AFAR, "[2001:db8::1]:4000", "[::ffff:192.0.2.7]:4000", "0.0.0.0:1", "[fe80::1%eth0]:1"]
)
def test_who_is_elsewhere_needs_it(remote: str) -> None:
    assert refused(request(remote))
    assert not refused(request(remote, ("Authorization", "Bearer secret")))


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "x-forwarded-for", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Proto"]
)
@pytest.mark.parametrize("remote", HERE)
def test_who_comes_through_a_proxy_on_this_machine_needs_it(header: str, remote: str) -> None:
    assert refused(request(remote, (header, "127.0.0.1")))
    assert not refused(request(remote, (header, "127.0.0.1"), ("authorization", "Bearer secret")))


@pytest.mark.parametrize("value", ["Bearer secret", "bearer secret", "BEARER  secret "])
def test_the_scheme_is_read_in_any_case(value: str) -> None:
    assert not refused(request(AFAR, ("AUTHORIZATION", value)))


@pytest.mark.parametrize(
    "value",
    [
        "",
        "secret",
        "Bearer",
        "Bearer ",
        "Bearer Secret",
        "Bearer secre",
        "Bearer secrets",
        "Basic secret",
        "Bearer s\udcffcret",
        "Bearer s\u00e9cret",
    ],
)
def test_what_is_not_the_token_is_refused(value: str) -> None:
    assert refused(request(AFAR, ("Authorization", value)))


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.1.2.3:1", True),
        ("https://[::1]:1", True),
        ("http://[::ffff:127.0.0.1]:1", True),
        ("http://LocalHost:1", True),
        ("unix:/tmp/s", True),
        ("http://0.0.0.0:1", False),
        ("http://[::]:1", False),
        ("http://192.0.2.7:1", False),
        ("http://localhost.example:1", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(address: str, local: bool) -> None:
    assert is_local(Address.parse(address)) is local


@pytest.mark.parametrize("default_place", [True, False])
def test_a_token_is_made_once_and_kept(tmp_path: Path, default_place: bool) -> None:
    path = tmp_path / "token"

    made = read_token(path, default_place=default_place)

    assert re.fullmatch(rb"[\w-]{43}", made)
    assert path.read_bytes() == made + b"\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_token(path, default_place=default_place) == made
    assert read_token(tmp_path / "other", default_place=default_place) != made


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_the_first_line_of_the_file_is_the_token(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    path.write_text("  my token\t\r\nand a note\n")
    path.chmod(mode)
    assert read_token(path, default_place=True) == b"my token"


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o660, 0o604, 0o601])
@pytest.mark.parametrize("default_place", [True, False])
def test_a_file_that_others_can_read_or_write_is_refused(
    tmp_path: Path, mode: int, default_place: bool
) -> None:
    path = tmp_path / "token"
    path.write_text("token\n")
    path.chmod(mode)
    advice = "set management_token_file" if default_place else "mend it"
    with pytest.raises(ConfigError, match=rf"others can read or write it \(mode {mode:04o}.*; .*{advice}"):
        read_token(path, default_place=default_place)
    assert path.read_text() == "token\n"


@pytest.mark.parametrize("owner", [0, 12345, 54321])
def test_whose_file_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int) -> None:
    path = tmp_path / "token"
    path.write_text("token\n")
    path.chmod(0o600)
    real = os.fstat

    def owned(fd: int) -> os.stat_result:
        fields = list(real(fd))
        fields[4] = owner
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", owned)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if owner == 54321:
        with pytest.raises(ConfigError, match=r"another user; remove it, or set management_token_file"):
            read_token(path, default_place=True)
    else:
        assert read_token(path, default_place=True) == b"token"


def test_a_link_counts_only_where_the_user_has_named_it(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("token\n")
    real.chmod(0o600)
    link.symlink_to(real)
    assert read_token(link, default_place=False) == b"token"
    with pytest.raises(ConfigError, match="it is a link; remove it"):
        read_token(link, default_place=True)


@pytest.mark.parametrize("default_place", [True, False])
def test_no_token_is_written_through_a_dangling_link(tmp_path: Path, default_place: bool) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="token file"):
        read_token(link, default_place=default_place)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "content", ["", "\n", " \t\nsecond line\n", "x" * 4097, "s\u00e9cret\n", "se\0cret\n"]
)
def test_a_file_without_a_usable_token_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="must have 1 to 4096 printable"):
        read_token(path, default_place=False)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "token"
    make(path, 0o600)
    with pytest.raises(ConfigError, match="it is no plain file"):
        read_token(path, default_place=False)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot make the token file .*: No such file or directory"):
        read_token(tmp_path / "none" / "token", default_place=False)


def test_a_full_disk_leaves_no_empty_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="No space left"):
        read_token(tmp_path / "token", default_place=True)
    assert list(tmp_path.iterdir()) == []
