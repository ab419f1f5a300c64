"""Keys and certificates from files, and what a client meets that shakes hands over a real socket."""

import builtins
import ipaddress
import socket
import ssl
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from certificates import HOST, Pair, client_context
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates

from mms_lite.address import Address
from mms_lite.config import Config
from mms_lite.errors import ConfigError
from mms_lite.tls import server_identity

LIMIT_S = 10.0


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str | None, str | None, bytes]:
    """Return version, protocol and certificate that the two agree on.

    Raises:
        ssl.SSLError: as the client sees it.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT_S)
    theirs.settimeout(LIMIT_S)

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as secured:
                secured.recv(1)
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=HOST) as secured:
            return secured.version(), secured.selected_alpn_protocol(), secured.getpeercert(True) or b""
    finally:
        ours.close()
        thread.join(LIMIT_S)


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.pem().decode())


def keystore(path: Path, pair: Pair, *others: Pair, password: bytes = b"changeit") -> Path:
    certificates = [other.certificate for other in others]
    lock = BestAvailableEncryption(password)
    path.write_bytes(serialize_key_and_certificates(b"first", pair.key, pair.certificate, certificates, lock))
    return path


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_client_may_speak_tls_1_2_or_1_3(tmp_path: Path, pair: Pair, version: str) -> None:
    client = client_context(pair)
    client.minimum_version = client.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    client.set_alpn_protocols(["h2", "http/1.1"])

    assert shake(server_identity(Config(**pair.write(tmp_path))).context, client) == (
        version,
        "http/1.1",
        der(pair),
    )


def test_tls_1_1_is_refused(tmp_path: Path, pair: Pair) -> None:
    client = client_context(pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("ALL:@SECLEVEL=0")

    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        shake(server_identity(Config(**pair.write(tmp_path))).context, client)


def test_a_client_that_speaks_only_http_2_is_served_without_alpn(tmp_path: Path, pair: Pair) -> None:
    client = client_context(pair)
    client.set_alpn_protocols(["h2"])
    assert shake(server_identity(Config(**pair.write(tmp_path))).context, client)[1] is None


@pytest.mark.parametrize("kind", ["rsa", "ec"])
@pytest.mark.parametrize("pkcs8", [True, False])
def test_keys_in_pem(tmp_path: Path, kind: str, pkcs8: bool) -> None:
    pair = Pair(kind=kind)
    files = pair.write(tmp_path)
    files["private_key_file"].write_bytes(pair.key_pem(pkcs8=pkcs8))
    assert shake(server_identity(Config(**files)).context, client_context(pair))[2] == der(pair)


def test_a_chain_is_sent_whole_from_pem_and_from_a_keystore(tmp_path: Path) -> None:
    root = Pair(name="root", ca=True)
    middle = Pair(name="middle", issuer=root, ca=True)
    leaf = Pair(issuer=middle)
    stranger = Pair(name="stranger")
    from_keystore = {"keystore": keystore(tmp_path / "store", leaf, stranger, root, middle)}

    for settings in (leaf.write(tmp_path, middle), from_keystore):
        assert shake(server_identity(Config(**settings)).context, client_context(root))[2] == der(leaf)


def test_a_keystore_wins_over_pem_files_and_leaves_nothing_on_disk(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Pair()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    written: list[tuple[int, bytes]] = []
    load = ssl.SSLContext.load_cert_chain

    def spy(self: ssl.SSLContext, file: str, **options: Any) -> None:
        written.append((Path(file).stat().st_mode & 0o777, Path(file).read_bytes()))
        load(self, file, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    store = keystore(tmp_path / "store", other, password=b"pass word")
    config = Config(keystore=store, keystore_pass="pass word", **pair.write(tmp_path))

    assert shake(server_identity(config).context, client_context(other))[2] == der(other)

    ((mode, text),) = written
    assert mode == 0o600
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in text
    assert list(scratch.iterdir()) == []


def test_a_keystore_of_openssl_with_old_ciphers(tmp_path: Path, pair: Pair) -> None:
    files = pair.write(tmp_path)
    store = tmp_path / "store"
    command = ["openssl", "pkcs12", "-export", "-legacy", "-passout", "pass:changeit", "-out", str(store)]
    command += ["-inkey", str(files["private_key_file"]), "-in", str(files["certificate_file"])]
    try:
        made = subprocess.run(command, capture_output=True, check=False, timeout=LIMIT_S)
    except FileNotFoundError:
        pytest.skip("there is no openssl command")
    if made.returncode:
        pytest.skip("this openssl cannot write old ciphers")
    assert shake(server_identity(Config(keystore=store)).context, client_context(pair))[2] == der(pair)


def test_without_files_a_certificate_is_made_for_this_start(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(inference_address=Address.parse("https://10.1.2.3:0"))
    context = server_identity(config).context
    made = shake(context, client_context())[2]

    assert "made a self-signed certificate" in caplog.text
    names = x509.load_der_x509_certificate(made).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert HOST in names.value.get_values_for_type(x509.DNSName)
    assert ipaddress.ip_address("10.1.2.3") in names.value.get_values_for_type(x509.IPAddress)
    pinned = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    pinned.load_verify_locations(cadata=made)
    assert shake(context, pinned)[2] == made
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server_identity(config).context, pinned)


def test_the_same_key_and_chain_come_as_pem(tmp_path: Path) -> None:
    root = Pair(name="root", ca=True)
    leaf = Pair(issuer=root)
    files = leaf.write(tmp_path, root)
    from_files = server_identity(Config(**files))
    from_keystore = server_identity(Config(keystore=keystore(tmp_path / "store", leaf, root)))
    made = server_identity(Config())

    assert from_files.pem == from_keystore.pem == (leaf.key_pem(), leaf.pem() + root.pem())
    assert "PRIVATE KEY" not in repr(made)
    shown = shake(made.context, client_context())[2]
    assert ssl.PEM_cert_to_DER_cert(made.pem[1].decode()) == shown


def _encrypted(files: dict[str, Path], pair: Pair) -> None:
    files["private_key_file"].write_bytes(pair.key_pem(password="secret"))


def _encrypted_pkcs1(files: dict[str, Path], pair: Pair) -> None:
    files["private_key_file"].write_bytes(pair.key_pem(password="secret", pkcs8=False))


def _other_key(files: dict[str, Path], _pair: Pair) -> None:
    files["private_key_file"].write_bytes(Pair().key_pem())


def _other_kind(files: dict[str, Path], _pair: Pair) -> None:
    files["private_key_file"].write_bytes(Pair(kind="rsa").key_pem())


def _swapped(files: dict[str, Path], _pair: Pair) -> None:
    files["private_key_file"], files["certificate_file"] = (
        files["certificate_file"],
        files["private_key_file"],
    )


def _junk(files: dict[str, Path], _pair: Pair) -> None:
    files["certificate_file"].write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")


def _no_key(files: dict[str, Path], _pair: Pair) -> None:
    files["private_key_file"].unlink()


def _no_certificate(files: dict[str, Path], _pair: Pair) -> None:
    del files["certificate_file"]


def _folder(files: dict[str, Path], _pair: Pair) -> None:
    files["certificate_file"] = files["certificate_file"].parent


def _key_is_no_certificate(files: dict[str, Path], _pair: Pair) -> None:
    files["certificate_file"] = files["private_key_file"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_encrypted, "the private key in .* is encrypted"),
        (_encrypted_pkcs1, "the private key in .* is encrypted"),
        (_other_key, "cannot be used: they do not belong together"),
        (_other_kind, "cannot be used: they do not belong together"),
        (_swapped, "private_key_file .* holds no private key"),
        (_key_is_no_certificate, "certificate_file .* holds no certificate"),
        (_junk, "cannot be used: "),
        (_no_key, "cannot read private_key_file .*: No such file"),
        (_no_certificate, "certificate_file is not set"),
        (_folder, "cannot read certificate_file .*: Is a directory"),
    ],
)
def test_pem_files_that_cannot_be_used(
    tmp_path: Path, pair: Pair, spoil: Callable[[dict[str, Path], Pair], None], says: str
) -> None:
    files = pair.write(tmp_path)
    spoil(files, pair)
    with pytest.raises(ConfigError, match=says):
        server_identity(Config(**files))


def test_keystores_that_cannot_be_used(tmp_path: Path, pair: Pair) -> None:
    store = keystore(tmp_path / "store", pair)
    empty, java, junk = tmp_path / "empty", tmp_path / "java", tmp_path / "junk"
    empty.write_bytes(
        pkcs12.serialize_key_and_certificates(
            None, None, None, [pair.certificate], BestAvailableEncryption(b"changeit")
        )
    )
    java.write_bytes(b"\xfe\xed\xfe\xed\x00\x00\x00\x02")
    junk.write_bytes(store.read_bytes()[:100])
    for settings, says in [
        ({"keystore": store, "keystore_pass": "wrong"}, "keystore_pass is wrong"),
        ({"keystore": store, "keystore_type": "JKS"}, "only the type PKCS12 is read"),
        ({"keystore": java}, "only the type PKCS12 is read"),
        ({"keystore": junk}, "it is no PKCS12 file"),
        ({"keystore": empty}, "holds no private key"),
        ({"keystore": tmp_path / "none"}, "cannot read keystore .*: No such file"),
    ]:
        with pytest.raises(ConfigError, match=says):
            server_identity(Config(**settings))


@pytest.mark.parametrize("settings", [{}, {"keystore": True}])
def test_a_missing_library_is_named(
    tmp_path: Path, pair: Pair, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = keystore(tmp_path / "store", pair)
    files = pair.write(tmp_path)
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "cryptography":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install cryptography"):
        server_identity(Config(**dict.fromkeys(settings, store)))
    server_identity(Config(**files))  # PEM files need none
