"""Keys, certificates, and adapters' folders that are signed with them by the `model_signing` library."""

from __future__ import annotations

import datetime
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from loraplex_common.adapter_folder import SIGNATURE_FILE
from model_signing import hashing, signing

if TYPE_CHECKING:
    from collections.abc import Mapping


_hashing: Any = hashing  # its types are half there
_signing: Any = signing


@dataclass(frozen=True)
class Key:
    """A key pair in PEM."""

    private: ec.EllipticCurvePrivateKey

    @property
    def public_pem(self) -> str:
        """What signers' files say."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.private.public_key().public_bytes(serialization.Encoding.PEM, form).decode()

    def write(self, directory: Path) -> Path:
        """Write the private key to a file."""
        plain = serialization.NoEncryption()
        path = directory / "private.pem"
        path.write_bytes(
            self.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        )
        return path


@functools.cache
def key(name: str) -> Key:
    """Return a key that tests call by a name."""
    return Key(ec.generate_private_key(ec.SECP256R1()))


@dataclass(frozen=True)
class Authority:
    """An authority, and a certificate below it."""

    pem: str
    certificate: bytes
    key: Key


@functools.cache
def authority(subject: str = "trainer") -> Authority:
    """Return a new authority that has certified a key for signing."""
    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    ca = _certificate(root_name, root_name, root, root.public_key(), is_authority=True)
    certificate = _certificate(name, root_name, root, leaf.public_key(), is_authority=False)
    return Authority(ca.decode(), certificate, Key(leaf))


def _certificate(
    name: x509.Name,
    issuer: x509.Name,
    by: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    *,
    is_authority: bool,
) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    used_for = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    usage = x509.KeyUsage(digital_signature=True, key_cert_sign=is_authority, crl_sign=is_authority, **used_for)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
    )
    return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def signed(files: Mapping[str, bytes], by: Key | Authority, *, algorithm: str = "sha256") -> dict[str, bytes]:
    """Return an adapter's files with their signature."""
    with tempfile.TemporaryDirectory(prefix="loraplex-signed-") as name:
        folder, keys = Path(name, "adapter"), Path(name)
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        config = _signing.Config()
        hashed = _hashing.Config().use_file_serialization(hashing_algorithm=algorithm)
        config.set_hashing_config(hashed)
        if isinstance(by, Key):
            config.use_elliptic_key_signer(private_key=by.write(keys))
        else:
            (keys / "leaf.pem").write_bytes(by.certificate)
            (keys / "ca.pem").write_text(by.pem)
            config.use_certificate_signer(
                private_key=by.key.write(keys),
                signing_certificate=keys / "leaf.pem",
                certificate_chain=[keys / "ca.pem"],
            )
        config.sign(folder, keys / SIGNATURE_FILE)
        return dict(files) | {SIGNATURE_FILE: (keys / SIGNATURE_FILE).read_bytes()}


def trust_text(modes: Mapping[str, str], **signers: Key | Authority) -> str:
    """Return a file of trusted signers."""
    lines = ["[sources]", *(f'{source} = "{mode}"' for source, mode in modes.items())]
    for name, signer in signers.items():
        kind, pem = ("public_key", signer.public_pem) if isinstance(signer, Key) else ("certificates", signer.pem)
        lines += [f"[signers.{name}]", f'{kind} = """', pem.strip(), '"""']
    return "\n".join(lines) + "\n"
