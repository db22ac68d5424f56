"""Credentials for private sources: callers name them, only the store knows their content."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError, StoreUnavailableError
from loraplex_common.watched_files import WatchedFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_WORDS: Final = 4
"""Words of a line: the name and up to three of the credential."""


class CredentialsFileError(ValueError):
    """The credentials file cannot be used; the message names file and line, never a secret."""


@dataclass(frozen=True, slots=True)
class Credential:
    """One line of the credentials file.

    Attributes:
        name: What callers call it.
        words: Its content; what they mean depends on the source.
    """

    name: str
    words: tuple[str, ...] = field(repr=False)

    @property
    def token(self) -> str:
        """The only word, for a hub or a registry.

        Raises:
            InvalidParameterError: If it is of another kind.
        """
        if len(self.words) != 1:
            raise self._unfit("one word, its token")
        return self.words[0]

    @property
    def keys(self) -> tuple[str, str, str | None]:
        """Access key, secret key and session token, for object storage.

        Raises:
            InvalidParameterError: If it is of another kind.
        """
        if len(self.words) not in (2, 3):
            raise self._unfit("an access key, a secret key and, if there is one, a session token")
        return self.words[0], self.words[1], self.words[2] if len(self.words) == 3 else None

    @property
    def login(self) -> tuple[str, str] | None:
        """User and password, for a registry; None if it is a token."""
        return (self.words[0], self.words[1]) if len(self.words) == 2 else None

    def _unfit(self, wanted: str) -> InvalidParameterError:
        return InvalidParameterError(
            f"credential {self.name!r} has {len(self.words)} words; this source takes {wanted}", field="credential_ref"
        )


class Credentials:
    """Secrets by name; the file is read again when it changes.

    Args:
        read: Reads all of them from their file.
        watched: The same, kept until the file changes.
    """

    def __init__(
        self, read: Callable[[], dict[str, Credential]], watched: WatchedFiles[dict[str, Credential]] | None
    ) -> None:
        self._read = read
        self._watched = watched

    @classmethod
    def from_file(cls, path: Path | None) -> Credentials:
        """Read lines of a name and up to three words; one with ``#`` first is a comment; ``None`` means no credentials.

        Raises:
            CredentialsFileError: If the file cannot be read or a line is malformed.
        """
        if path is None:
            return cls(dict, None)

        def read() -> dict[str, Credential]:
            return _read(path)

        try:
            return cls(read, WatchedFiles([path], read, what=str(path), clock=time.monotonic))
        except OSError as error:
            raise CredentialsFileError(f"{path}: {error.strerror}") from error

    def get(self, name: str) -> Credential | None:
        """Return a credential; None if no name is given.

        Raises:
            InvalidParameterError: If there is no such credential.
        """
        return _chosen(name, {} if self._watched is None else self._watched.value())

    def get_now(self, name: str) -> Credential | None:
        """Return a credential as the file has it at this moment; for one that a server has refused.

        Raises:
            InvalidParameterError: If there is no such credential any more.
            StoreUnavailableError: If the file cannot be used.
        """
        try:
            return _chosen(name, self._read())
        except CredentialsFileError as error:
            raise StoreUnavailableError(f"the store's credentials file cannot be used: {error}") from error


def _read(path: Path) -> dict[str, Credential]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise CredentialsFileError(f"{path}: {error.strerror}") from error
    found: dict[str, Credential] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if not 2 <= len(words) <= MAX_WORDS:
            raise CredentialsFileError(
                f"{path}:{number}: expected 'NAME TOKEN', 'NAME USER PASSWORD' or 'NAME ACCESS_KEY SECRET_KEY [TOKEN]'"
            )
        found[words[0]] = Credential(words[0], tuple(words[1:]))
    return found


def _chosen(name: str, credentials: dict[str, Credential]) -> Credential | None:
    if not name:
        return None
    if name not in credentials:
        raise InvalidParameterError(f"the store knows no credential {name[:80]!r}", field="credential_ref")
    return credentials[name]
