"""Credentials for private sources: callers name them, only the store knows their content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from pathlib import Path


class CredentialsFileError(ValueError):
    """The credentials file cannot be used; the message names file and line, never a secret."""


class Credentials:
    """Secrets by name.

    Args:
        secrets: Name -> token.
    """

    def __init__(self, secrets: dict[str, str]) -> None:
        self._secrets = secrets

    @classmethod
    def from_file(cls, path: Path | None) -> Credentials:
        """Read ``NAME TOKEN`` lines; a line with ``#`` first is a comment; ``None`` as path means no credentials.

        Raises:
            CredentialsFileError: If the file cannot be read or a line is malformed.
        """
        if path is None:
            return cls({})
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise CredentialsFileError(f"{path}: {error.strerror}") from error
        secrets: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:
                raise CredentialsFileError(f"{path}:{number}: expected 'NAME TOKEN'")
            secrets[words[0]] = words[1]
        return cls(secrets)

    def get(self, name: str) -> str | None:
        """Return a secret; None if no name is given.

        Raises:
            InvalidParameterError: If there is no such credential.
        """
        if not name:
            return None
        if name not in self._secrets:
            raise InvalidParameterError(f"the store knows no credential {name[:80]!r}", field="credential_ref")
        return self._secrets[name]
