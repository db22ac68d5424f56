"""Credentials made in a folder of a test, and what openssl says of them."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from loraplex_client.credentials.folder import CredentialsFolder
from loraplex_client.credentials.parties import PARTIES

if TYPE_CHECKING:
    from pathlib import Path


HOLDERS = [party for party in PARTIES if party.has_certificate]
SERVERS = [party for party in PARTIES if party.admits]
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def folder(path: Path) -> CredentialsFolder:
    """Return a folder of credentials that does not wait between the steps of a renewal."""
    return CredentialsFolder(path / "made", pause=lambda _seconds: None)


def content(path: Path) -> dict[str, bytes]:
    """Return all files below a folder by their paths."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def verifies(certificate: Path, ca: Path, *options: str) -> bool:
    """Return whether openssl accepts a certificate."""
    command = ["openssl", "verify", "-x509_strict", "-CAfile", str(ca), *options, str(certificate)]
    return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0


def key_of(made: Path, holder: str) -> str:
    """Return the header with the API key of a holder."""
    return f"Bearer {(made / holder / 'api-key').read_text().strip()}"
