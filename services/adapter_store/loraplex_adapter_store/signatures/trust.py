"""The file that says what is asked of signatures, and which keys are trusted: TOML; docs/signatures.md describes it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

SOURCES: Final = ("dir", "hf", "s3", "oci", "upload", "push")
"""The kinds of sources: what stands before the first colon of a revision's source."""
DEFAULT: Final = "default"
MAX_FILE_BYTES: Final = 1024 * 1024


class TrustFileError(ValueError):
    """The file cannot be used; the message names file and key, and quotes no value."""


class Mode(Enum):
    """What is asked of the imports of one kind of source."""

    OFF = "off"
    """A signature is not looked at."""
    WARN = "warn"
    """Files without a trusted signature are imported with a warning."""
    REQUIRE = "require"
    """Files without a trusted signature are refused before they are parsed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signer:
    """A signer that is trusted: the holder of one key, or of any certificate below an authority.

    Attributes:
        name: The operator's name for it.
        public_key: The key, PEM; empty if there are certificates.
        certificates: Authorities, PEM; empty if there is a key.
        subjects: Subjects (RFC 4514) that a signing certificate may have; none means any.
    """

    name: str
    public_key: bytes = b""
    certificates: bytes = b""
    subjects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trust:
    """The content of the file."""

    modes: Mapping[str, Mode]
    signers: tuple[Signer, ...]


def read_trust(path: Path) -> Trust:
    """Read the file.

    Raises:
        OSError: If it cannot be read.
        TrustFileError: If it cannot be used.
    """
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise TrustFileError(f"{path}: more than {MAX_FILE_BYTES} bytes")
    try:
        return parse_trust(data.decode())
    except UnicodeDecodeError:
        raise TrustFileError(f"{path}: no text in UTF-8") from None
    except ValueError as error:
        raise TrustFileError(f"{path}: {error}") from None


def parse_trust(text: str) -> Trust:
    """Return what a file's text says.

    Raises:
        ValueError: If it cannot be used.
    """
    tables = tomllib.loads(text)
    _check_keys("the file", tables, ("sources", "signers"))
    modes = _modes(_table("sources", tables.get("sources", {})))
    signers = tuple(_signer(name, table) for name, table in _table("signers", tables.get("signers", {})).items())
    if not signers and any(mode is not Mode.OFF for mode in modes.values()):
        raise ValueError("no signer is trusted, so that nothing could be imported; add [signers.NAME]")
    return Trust(modes, signers)


def _modes(table: Mapping[str, Any]) -> dict[str, Mode]:
    _check_keys("[sources]", table, (DEFAULT, *SOURCES))
    found: dict[str, Mode] = {}
    for name, value in table.items():
        try:
            found[name] = Mode(value)
        except ValueError:
            raise ValueError(f"[sources] {name}: none of {', '.join(mode.value for mode in Mode)}") from None
    default = found.get(DEFAULT, Mode.REQUIRE)
    return {source: found.get(source, default) for source in SOURCES}


def _signer(name: str, value: Any) -> Signer:
    table = _table(f"signers.{name}", value)
    _check_keys(f"[signers.{name}]", table, ("public_key", "certificates", "subjects"))
    if ("public_key" in table) == ("certificates" in table):
        raise ValueError(f"[signers.{name}]: either public_key or certificates, in PEM, is needed")
    subjects = table.get("subjects", [])
    if not isinstance(subjects, list) or not all(isinstance(each, str) and each for each in subjects):
        raise ValueError(f"[signers.{name}] subjects: not a list of texts")
    if "subjects" in table and ("public_key" in table or not subjects):
        raise ValueError(f"[signers.{name}] subjects: belong to certificates, and are at least one")
    return Signer(
        name=name,
        public_key=_pem(name, "public_key", table),
        certificates=_pem(name, "certificates", table),
        subjects=tuple(subjects),
    )


def _pem(name: str, key: str, table: Mapping[str, Any]) -> bytes:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"[signers.{name}] {key}: not a text")
    if "PRIVATE KEY" in value:
        raise ValueError(f"[signers.{name}] {key}: a private key; the store needs the public one only")
    return value.encode()


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"[{name}]: not a table")
    return value


def _check_keys(where: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(table.keys() - set(known)):
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; known are {', '.join(known)}")
