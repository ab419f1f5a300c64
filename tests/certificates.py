"""Keys and certificates that tests make for themselves, and what a client needs to trust them."""

import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

HOST = "localhost"


class Pair:
    """A private key and its certificate for localhost; `issuer` signs it, else it signs itself."""

    def __init__(
        self, *, kind: str = "ec", name: str = HOST, issuer: "Pair | None" = None, ca: bool = False
    ) -> None:
        self.key: Any = (
            ec.generate_private_key(ec.SECP256R1())
            if kind == "ec"
            else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )
        is_address = name[:1].isdigit()
        alternative = x509.IPAddress(ipaddress.ip_address(name)) if is_address else x509.DNSName(name)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.timezone.utc)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer is None else issuer.certificate.subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self.key if issuer is None else issuer.key, hashes.SHA256())
        )

    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self, *, pkcs8: bool = True, password: str = "") -> bytes:
        form = PrivateFormat.PKCS8 if pkcs8 else PrivateFormat.TraditionalOpenSSL
        lock = BestAvailableEncryption(password.encode()) if password else NoEncryption()
        return self.key.private_bytes(Encoding.PEM, form, lock)

    def write(self, folder: Path, *chain: "Pair") -> dict[str, Path]:
        """Write PEM files into the folder; return them by the names of their options."""
        files = {"private_key_file": folder / "key.pem", "certificate_file": folder / "certificate.pem"}
        files["private_key_file"].write_bytes(self.key_pem())
        files["certificate_file"].write_bytes(b"".join(each.pem() for each in (self, *chain)))
        return files


def client_context(trusted: Pair | None = None) -> ssl.SSLContext:
    """Return a client's context that trusts one certificate alone, or whoever answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if trusted is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=trusted.pem().decode())
    return context
