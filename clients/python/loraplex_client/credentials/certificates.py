"""Reads certificates that are there already."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from loraplex_client.credentials.errors import CredentialsError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What a certificate says.

    Attributes:
        hosts: DNS names and IP addresses.
        ends: UTC.
    """

    hosts: tuple[str, ...]
    ends: datetime.datetime


def read_certificate(path: Path) -> Certificate:
    """Read one certificate, PEM.

    Raises:
        CredentialsError: If it is none.
    """
    certificate = _parsed(path)[0]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        hosts: tuple[str, ...] = ()
    else:
        dns = names.get_values_for_type(x509.DNSName)
        hosts = (*dns, *map(str, names.get_values_for_type(x509.IPAddress)))
    return Certificate(hosts=hosts, ends=certificate.not_valid_after_utc)


def read_bundle(path: Path) -> list[bytes]:
    """Return the certificates of a bundle, PEM each; none for an empty file.

    Raises:
        CredentialsError: If the file holds something else.
    """
    if not path.stat().st_size:
        return []
    return [certificate.public_bytes(Encoding.PEM) for certificate in _parsed(path)]


def belong_together(certificate: Path, key: Path) -> bool:
    """Tell whether a key, PEM, is that of a certificate.

    Raises:
        CredentialsError: If either is unreadable.
    """
    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
    except ValueError as error:
        raise CredentialsError(f"{key}: no key in PEM: {error}") from error
    return private.public_key() == _parsed(certificate)[0].public_key()


def is_signed_by(certificate: Path, authority: bytes) -> bool:
    """Tell whether a certificate is of an authority, PEM.

    Raises:
        CredentialsError: If it is none.
    """
    try:
        _parsed(certificate)[0].verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    except (InvalidSignature, ValueError, TypeError):  # another name, another key, another kind of key
        return False
    return True


def _parsed(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError as error:
        raise CredentialsError(f"{path}: no certificate in PEM: {error}") from error
