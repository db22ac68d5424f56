"""Decides whether files may be imported by their signature, before anything else reads them."""

from __future__ import annotations

import hashlib
import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_folder import CONFIG_FILE, READ_FILES, SIGNATURE_FILE, check_present
from loraplex_common.errors import AdapterUntrustedError, LoraplexError
from loraplex_common.watched_files import WatchedFiles

from loraplex_adapter_store.signatures.bundles import NotTrustedError, Statement, check_signer, statement_of
from loraplex_adapter_store.signatures.trust import Mode, Trust, TrustFileError, read_trust

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loraplex_adapter_store.imports.files import CheckpointFiles

_REMEDY: Final = (
    f"sign the adapter's folder and keep the signature in it: python -m model_signing sign key --private_key KEY "
    f"--signature DIR/{SIGNATURE_FILE} DIR"
)
_PUSH_REMEDY: Final = (
    "a push carries no signature; upload a signed folder, or let the store's operator say "
    'push = "off" in --trusted-signers'
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    Attributes:
        signer: Name of the signer of the files; empty if no trusted signature was found or looked for.
        warning: What is wrong with the signature, of a source that is only warned about; may be empty.
    """

    signer: str = ""
    warning: str = ""


class Signatures:
    """Checks signatures by what the operator trusts.

    Args:
        trust: Gives what is trusted; None if signatures are not looked at.
    """

    def __init__(self, trust: Callable[[], Trust] | None = None) -> None:
        self._trust = trust

    @classmethod
    def from_file(cls, path: Path | None) -> Signatures:
        """Read ``--trusted-signers``, again whenever it changes; None means that signatures are not looked at.

        Raises:
            TrustFileError: If the file cannot be used, or the library for it is missing.
        """
        if path is None:
            return cls()

        def read() -> Trust:
            trust = read_trust(path)
            for signer in trust.signers:
                try:
                    check_signer(signer)
                except ValueError as error:
                    raise TrustFileError(f"{path}: {error}") from error
            return trust

        try:
            return cls(WatchedFiles([path], read, what=str(path), clock=time.monotonic).value)
        except OSError as error:
            raise TrustFileError(f"{path}: {error.strerror}") from error

    def reads(self, kind: str) -> bool:
        """Return whether the signature is wanted of a kind of source."""
        return self._trust is not None and self._trust().modes[kind] is not Mode.OFF

    def check(self, files: CheckpointFiles) -> Verdict:
        """Return the signer of some files; blocks.

        Raises:
            AdapterUntrustedError: If no trusted signature is of these files, and their source needs one.
        """
        kind = files.source.partition(":")[0]
        if self._trust is None or (mode := (trust := self._trust()).modes[kind]) is Mode.OFF:
            return Verdict()
        try:
            return Verdict(_signer_of(files, trust))
        except AdapterUntrustedError as error:
            if mode is Mode.REQUIRE:
                raise
            return Verdict(warning=error.message)


def _signer_of(files: CheckpointFiles, trust: Trust) -> str:
    if not files.signature:
        names = ", ".join(signer.name for signer in trust.signers)
        remedy = _PUSH_REMEDY if files.source == "push" else _REMEDY
        raise AdapterUntrustedError(f"{files.source}: not signed ({SIGNATURE_FILE}); trusted are {names}: {remedy}")
    reasons: list[str] = []
    for signer in trust.signers:
        try:
            statement = statement_of(files.signature, signer)
        except NotTrustedError as error:
            reasons.append(f"{signer.name}: {error}")
            continue
        _check_files(files, statement)
        return statement.signer
    raise AdapterUntrustedError(
        f"{files.source}: {SIGNATURE_FILE} is of no trusted signer ({'; '.join(reasons)}): {_REMEDY}"
    )


def _check_files(files: CheckpointFiles, statement: Statement) -> None:
    """Raise `AdapterUntrustedError` unless the files are what was signed: none more, none less, none other.

    Signed files that no import reads are left out: the README, for example.
    """
    contents = {CONFIG_FILE: files.config, files.weights_file: files.weights} | files.texts
    where = f"{files.source}: {SIGNATURE_FILE} is of {statement.signer}, but"
    try:
        signed = set(check_present(name for name in statement.digests if name in READ_FILES))
    except LoraplexError:
        signed = set()
    if unsigned := sorted(contents.keys() - signed):
        raise AdapterUntrustedError(f"{where} {unsigned[0]} is not among the files that were signed: {_REMEDY}")
    if missing := sorted(signed - contents.keys()):
        raise AdapterUntrustedError(f"{where} {missing[0]}, which was signed, is missing: fetch the folder again")
    for name, data in contents.items():
        algorithm, digest = statement.digests[name]
        if _digest(algorithm, data) != digest:
            raise AdapterUntrustedError(
                f"{where} {name} is not what was signed: fetch the folder again, or sign it as it is"
            )


def _digest(algorithm: str, data: bytes | bytearray) -> bytes:
    """Return a digest; empty for an algorithm that is unknown, which equals none."""
    match algorithm:
        case "sha256" | "blake2b":
            return hashlib.new(algorithm, data).digest()
        case "blake3":
            blake3: bytes = importlib.import_module("blake3").blake3(data).digest()
            return blake3
    return b""
