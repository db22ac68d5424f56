"""A certificate authority for tests: everything it issues is made during the test and is in the test's own folder."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its key as PEM files."""

    cert: Path
    key: Path


class TestAuthority:
    """A certificate authority.

    Args:
        folder: Gets its certificate and all certificates that it issues.
        name: Name of the authority; two authorities of one name do not accept each other's certificates.
    """

    __test__ = False

    def __init__(self, folder: Path, name: str = "test-ca") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _subject(name)
        self._certificate = self._sign(
            self._name, self._key, [(x509.BasicConstraints(ca=True, path_length=None), True)]
        )
        self.ca = folder / f"{name}.pem"
        write(self.ca, _pem(self._certificate))

    def issue(
        self, name: str, *, uris: Sequence[str] = (), names: Sequence[x509.GeneralName] = (), stem: str | None = None
    ) -> Issued:
        """Issue a certificate for a common name, valid at the loopback; under ``stem`` over whatever is there.

        With ``names`` it is valid for them alone.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        hosts = [x509.DNSName("localhost"), x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        alternatives = x509.SubjectAlternativeName(names or [*hosts, *map(x509.UniformResourceIdentifier, uris)])
        certificate = self._sign(_subject(name), key, [(alternatives, False)])
        issued = Issued(self._folder / f"{stem or name}.pem", self._folder / f"{stem or name}.key")
        write(issued.cert, _pem(certificate))
        write(issued.key, _key_pem(key))
        return issued

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extensions: Sequence[Any]) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
        )
        for extension, is_critical in extensions:
            builder = builder.add_extension(extension, critical=is_critical)
        return builder.sign(self._key, hashes.SHA256())


def write(path: Path, data: bytes | str) -> None:
    """Replace a file in one step, as a program that rotates credentials should."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(new, path)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
