"""Reads a signature by means of the `model_signing` library: its signer, and the digests of the files that it is of.

The library compares a signature with a directory. Imports are in memory, and of only some of an author's files. So it is
given, in the place of the directory's digests, an object that keeps those which it is compared with.
"""

from __future__ import annotations

import base64
import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from loraplex_adapter_store.checkpoint.bounds import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_adapter_store.signatures.trust import Signer

MAX_VALUES: Final = 10_000
"""Values in a signature's JSON: what is signed is one text in it."""
MAX_TOLD: Final = 160
"""Characters of the library's own words in a message."""

_SIGSTORE_CLIENT: Final = "model_signing._signing.sign_sigstore"


class LibraryMissingError(ValueError):
    """The library is not installed."""


class NotTrustedError(Exception):
    """A signature is not the signer's."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What a verified signature says.

    Attributes:
        signer: The signer: the operator's name of the key, with the subject of the certificate if there is one.
        digests: Name of a file -> algorithm (``sha256``, ``blake2b``, ``blake3``) and digest.
    """

    signer: str
    digests: Mapping[str, tuple[str, bytes]]


def check_signer(signer: Signer) -> None:
    """Raise an error if a signer's key or certificates cannot be used.

    Raises:
        LibraryMissingError: If the library is not installed.
        ValueError: If they are malformed, or of a kind that is not supported.
    """
    config = _library().Config()
    try:
        with _in_memory(signer.public_key or signer.certificates) as path:
            _use(config, signer, path)
    except Exception as error:  # what the library's parsers raise has no class in common
        what = "public_key" if signer.public_key else "certificates"
        raise ValueError(f"[signers.{signer.name}] {what}: {_told(error)}") from None


def statement_of(signature: bytes, signer: Signer) -> Statement:
    """Return what a signature says, if a signer made it; blocks.

    Args:
        signature: A Sigstore bundle as JSON, untrusted; its length has been checked.
        signer: The signer.

    Raises:
        NotTrustedError: If the signature is malformed or not the signer's, or its signer hashed parts of files.
    """
    taken = _Taken()
    try:
        bundle = parse_json(signature, what="the signature", max_values=MAX_VALUES)
        config = _library().Config()
        with _in_memory(signer.public_key or signer.certificates) as key, _in_memory(signature) as path:
            _use(config, signer, key)
            config.set_hashing_config(taken)
            config.verify(Path(), path)
        name = _name(signer, bundle)
    except Exception as error:  # as above; what is not verified is not trusted, whatever the reason
        raise NotTrustedError(_told(error)) from error
    if taken.signed is None:
        raise NotTrustedError("the library did not compare it")
    method = taken.signed.serialization_type.get("method")
    if method != "files":
        raise NotTrustedError(f"it is of {method}, not of whole files; sign with the default serialization")
    found = {
        str(each.identifier): (str(each.digest.algorithm), bytes(each.digest.digest_value))
        for each in taken.signed.resource_descriptors()
    }
    return Statement(name, found)


class _Taken:
    """Stands where the library hashes a directory, and keeps the verified manifest that the result is compared with."""

    def __init__(self) -> None:
        self.signed: Any = None

    def add_ignored_paths(self, **_: Any) -> None:
        """Ignore nothing: which files matter is decided later."""

    def hash(self, *_: Any, **__: Any) -> _Taken:
        """Return what is compared."""
        return self

    def __ne__(self, other: object) -> bool:
        self.signed = other
        return False

    __hash__ = None  # type: ignore[assignment]


def _library() -> Any:
    """Import the library: only stores that check signatures load its modules."""
    try:
        with _without_sigstore_client():
            return importlib.import_module("model_signing.verifying")
    except ImportError as error:
        raise LibraryMissingError(
            f"signatures need the libraries of loraplex[signatures] ({error}): pip install 'loraplex[signatures]'"
        ) from error


@contextmanager
def _without_sigstore_client() -> Iterator[None]:
    """Have an import of the library leave out Sigstore's client, which signers by key or certificate do not need.

    The client brings 350 modules, and the image of the store does not have it (``SIGSTORE_CLIENT`` in deploy/lock.py).
    """
    if _SIGSTORE_CLIENT in sys.modules:
        yield
        return
    sys.modules[_SIGSTORE_CLIENT] = ModuleType(_SIGSTORE_CLIENT)
    try:
        yield
    finally:
        del sys.modules[_SIGSTORE_CLIENT]


def _use(config: Any, signer: Signer, path: Path) -> None:
    if signer.public_key:
        config.use_elliptic_key_verifier(public_key=path)
    else:
        config.use_certificate_verifier(certificate_chain=[path])  # an empty list would mean the system's authorities


def _name(signer: Signer, bundle: Any) -> str:
    """Return the name of the signer of a verified signature.

    Raises:
        ValueError: If the certificate's subject is none of those that are trusted.
    """
    if not signer.certificates:
        return signer.name
    x509 = importlib.import_module("cryptography.x509")
    chain = bundle["verificationMaterial"]["x509CertificateChain"]["certificates"]
    subject = x509.load_der_x509_certificate(base64.b64decode(chain[0]["rawBytes"])).subject.rfc4514_string()
    if signer.subjects and subject not in signer.subjects:
        raise ValueError(f"its certificate is of {subject}, which is none of the trusted subjects")
    return f"{signer.name} ({subject})"


@contextmanager
def _in_memory(data: bytes) -> Iterator[Path]:
    """Give out the path of a file that no file system holds: the library reads paths only."""
    descriptor = os.memfd_create("loraplex-signature", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _told(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= MAX_TOLD else words[: MAX_TOLD - 3] + "..."
