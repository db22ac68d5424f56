"""A certificate authority of our own: ECDSA P-256, as small as mutual TLS among a few services allows."""

from __future__ import annotations

import datetime
import ipaddress
import re
import secrets
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from loraplex_client.credentials.errors import CredentialsError

_LABEL: Final = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?"
_DNS_NAME: Final = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
CLOCK_SKEW: Final = datetime.timedelta(minutes=5)
"""How far the clock of a machine may be behind that of the one which issues."""
CA_LIFETIME: Final = datetime.timedelta(days=3650)


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateRequest:
    """What a certificate is to say.

    Attributes:
        common_name: Common name of the subject.
        hosts: DNS names and IP addresses at which the holder is reached; none for one that only calls.
        is_server: Whether it may answer with it, too, and not only call.
        lifetime: How long the certificate is good, from now.
    """

    common_name: str
    hosts: tuple[str, ...] = ()
    is_server: bool = True
    lifetime: datetime.timedelta


@dataclass(frozen=True, kw_only=True, slots=True)
class Issued:
    """A certificate and its private key, PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates.

    Attributes:
        certificate: Its own, PEM: what others are to trust.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key
        self.certificate = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def create(cls, *, lifetime: datetime.timedelta = CA_LIFETIME) -> Authority:
        """Make a new one, of a name that no other has: verifiers look for issuers by name."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"loraplex CA {secrets.token_hex(4)}")
        certificate = (
            _builder(name, name, key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes) -> Authority:
        """Take one up again from PEM.

        Raises:
            CredentialsError: If either is unreadable, or they do not belong together.
        """
        try:
            loaded = serialization.load_pem_private_key(key, password=None)
            parsed = x509.load_pem_x509_certificate(certificate)
        except ValueError as error:
            raise CredentialsError(f"the authority's certificate or key cannot be read: {error}") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or parsed.public_key() != loaded.public_key():
            raise CredentialsError("the authority's certificate and key do not belong together")
        return cls(parsed, loaded)

    @property
    def ends(self) -> datetime.datetime:
        """When its certificate ends."""
        return self._certificate.not_valid_after_utc

    def key(self) -> bytes:
        """Return its private key, PEM."""
        return _private_pem(self._key)

    def issue(self, request: CertificateRequest) -> Issued:
        """Sign a certificate for a new key; it ends with the authority's own at the latest."""
        key = ec.generate_private_key(ec.SECP256R1())
        lifetime = min(request.lifetime, self.ends - datetime.datetime.now(datetime.UTC))
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if request.is_server else [])]
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            _builder(_name(request.common_name), self._certificate.subject, key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        )
        if request.hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in request.hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return Issued(certificate=certificate.public_bytes(serialization.Encoding.PEM), key=_private_pem(key))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(host):
        raise CredentialsError(
            f"{host!r} is neither an IP address nor a DNS name in ASCII: give one at a time, without scheme and port"
        )
    return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
