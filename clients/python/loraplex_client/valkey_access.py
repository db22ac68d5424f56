"""How Valkey is reached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ValkeyAccess:
    """Where Valkey is and what it asks for.

    Attributes:
        url: May hold a password, if it comes from the environment.
        password_file: Holds it instead.
        tls_ca: Authorities to trust, PEM, for a ``rediss://`` URL.
    """

    url: str
    password_file: Path | None = None
    tls_ca: Path | None = None
