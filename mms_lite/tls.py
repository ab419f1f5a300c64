"""What TLS needs: keys and certificates from PEM or PKCS12 files, or a certificate made for this start.

Only the `cryptography` library reads PKCS12 and makes certificates; PEM files are read without it.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import secrets
import socket
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mms_lite.config import Config
from mms_lite.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.x509 import Certificate, GeneralName

_JAVA_STORES = (b"\xfe\xed\xfe\xed", b"\xce\xce\xce\xce")  # JKS, JCEKS
_VALID_DAYS = 365
_RSA_BITS = 2048

_log = logging.getLogger("mms_lite.server")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server shows its clients: as https listeners take it, and as gRPC does.

    `pem` is the private key, not encrypted, and the certificate with its chain.
    """

    context: ssl.SSLContext
    pem: tuple[bytes, bytes] = field(repr=False)


def server_identity(config: Config) -> Identity:
    """Return what a server serves TLS with; its context is for TLS 1.2 and 1.3, HTTP/1.1.

    A keystore wins over PEM files, as in MMS. With neither, a self-signed certificate is made and a warning
    logged.

    Raises:
        ConfigError: a file cannot be read or used, or a library is missing.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if config.keystore is not None:
        kept = _read_keystore(config.keystore, config.keystore_type, config.keystore_pass)
        return Identity(context, _load(context, *kept))
    if config.private_key_file is not None and config.certificate_file is not None:
        return Identity(context, _load_pem(context, config.private_key_file, config.certificate_file))
    if config.private_key_file is not None or config.certificate_file is not None:
        missing = "certificate_file" if config.certificate_file is None else "private_key_file"
        raise ConfigError(f"https needs private_key_file and certificate_file; {missing} is not set")
    return Identity(context, _load(context, *_self_signed(_hosts(config))))


def _load_pem(context: ssl.SSLContext, key: Path, certificate: Path) -> tuple[bytes, bytes]:
    """Give the context the key and the certificate of these files, and return what is in them."""

    def refuse() -> str:
        raise ConfigError(
            f"the private key in {key} is encrypted; decrypt it: openssl pkey -in {key} -out NEW_FILE"
        )

    key_pem, chain_pem = _read(key, "private_key_file"), _read(certificate, "certificate_file")
    if b"PRIVATE KEY-----" not in key_pem:
        raise ConfigError(f"private_key_file {key} holds no private key in PEM format")
    if b"CERTIFICATE-----" not in chain_pem:
        raise ConfigError(f"certificate_file {certificate} holds no certificate in PEM format")
    try:
        context.load_cert_chain(certificate, key, password=refuse)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            why = "they do not belong together"
        else:
            why = _words(error)
        raise ConfigError(
            f"private_key_file {key} and certificate_file {certificate} cannot be used: {why}"
        ) from error
    return key_pem, chain_pem


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {option} {path}: {error.strerror}") from error


def _read_keystore(path: Path, kind: str, password: str) -> tuple[PrivateKeyTypes, list[Certificate]]:
    """Return the first private key of a PKCS12 file and its certificate with the chain behind it."""
    data = _read(path, "keystore")
    if kind.strip().upper() not in ("PKCS12", "P12", "PFX") or data.startswith(_JAVA_STORES):
        raise ConfigError(
            f"keystore {path}: only the type PKCS12 is read; convert it: keytool -importkeystore"
            f" -srckeystore {path} -destkeystore NEW_FILE -deststoretype PKCS12"
        )
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import pkcs12
    except ImportError as error:
        raise ConfigError("a keystore needs a library: pip install cryptography") from error
    try:
        key, certificate, others = pkcs12.load_key_and_certificates(data, password.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"keystore {path} cannot be read: keystore_pass is wrong, or it is no PKCS12 file"
        ) from error
    if key is None or certificate is None:
        raise ConfigError(f"keystore {path} holds no private key with its certificate")
    return key, _chain(certificate, others)


def _chain(certificate: Certificate, others: Sequence[Certificate]) -> list[Certificate]:
    """Return the certificate and its issuers among the others, in the order in which TLS sends them."""
    chain = [certificate]
    while True:
        issuers = (c for c in others if c.subject == chain[-1].issuer and c not in chain)
        issuer = next(issuers, None)
        if issuer is None:
            return chain
        chain.append(issuer)


def _load(context: ssl.SSLContext, key: PrivateKeyTypes, chain: Sequence[Certificate]) -> tuple[bytes, bytes]:
    """Give the context a key that is in memory, and return it and its certificates in PEM.

    OpenSSL takes files only: this one lives for a moment. The key in it is encrypted, so that not even a
    crash leaves it readable on the disk.
    """
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    password = secrets.token_hex(24)
    lock = BestAvailableEncryption(password.encode())
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
    chain_pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    try:
        with tempfile.NamedTemporaryFile(prefix="mms-lite-", suffix=".pem") as file:  # 0600
            file.write(locked + chain_pem)
            file.flush()
            context.load_cert_chain(file.name, password=password)
    except ssl.SSLError as error:
        raise ConfigError(f"the keystore's key and certificate cannot be used: {_words(error)}") from error
    except OSError as error:
        raise ConfigError(f"cannot write a temporary file: {error.strerror}") from error
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), chain_pem


def _words(error: ssl.SSLError) -> str:
    return (error.reason or "no valid PEM").replace("_", " ").lower()


def _self_signed(hosts: Sequence[str]) -> tuple[PrivateKeyTypes, list[Certificate]]:
    """Return a new key, and a certificate for these hosts that it has signed itself."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import rsa
    except ImportError as error:
        raise ConfigError(
            "https without private_key_file and certificate_file makes a certificate, which needs a library:"
            " pip install cryptography"
        ) from error
    key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)  # what every client knows
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mms-lite")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([_general_name(h) for h in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    _log.warning(
        "https without private_key_file and certificate_file: made a self-signed certificate for this start,"
        " which no client can verify; its SHA-256 fingerprint is %s.",
        certificate.fingerprint(hashes.SHA256()).hex(),
    )
    return key, [certificate]


def _hosts(config: Config) -> list[str]:
    """Return the names under which clients may know this server, each once."""
    addresses = (
        config.inference_address,
        config.management_address,
        config.metrics_address,
        config.grpc_address,
    )
    hosts = [a.host for a in addresses if a is not None and a.scheme == "https"]
    hosts += ["localhost", "127.0.0.1", "::1", socket.gethostname()]
    return [host for host in dict.fromkeys(hosts) if host.isascii()]


def _general_name(host: str) -> GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return x509.DNSName(host)
