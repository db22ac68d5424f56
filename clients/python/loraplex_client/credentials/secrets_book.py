"""API keys and Valkey's passwords: each lies with its holder; the servers that check it have its hash."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Final

from loraplex_client.credentials.parties import HEALTH_CHECKER, LOG_READER, VALKEY, Party
from loraplex_client.credentials.private_files import write_private

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

API_KEY: Final = "api-key"
KEYS_FILE: Final = "api-keys"
VALKEY_PASSWORD: Final = "valkey-password"
VALKEY_USERS: Final = "users.acl"
KEY_PREFIX: Final = "lpx_"
"""Makes a key that lies where it should not recognisable for scanners of secrets."""


class SecretsBook:
    """The secrets below a folder of credentials.

    Args:
        path: The folder.
        parties: Services and users that take part.
        pause: Called between writing what lets callers in and what they call with.
    """

    def __init__(self, path: Path, parties: tuple[Party, ...], *, pause: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._pause = pause
        self._callers = tuple(party for party in parties if party.role is not None)
        self._servers = tuple(party for party in parties if party.admits)
        self._users = tuple(party for party in parties if party.valkey_rights)
        self._has_valkey = VALKEY in parties

    def files(self) -> list[Path]:
        """Return every file that there has to be."""
        return [
            *(self._path / party.folder / API_KEY for party in self._callers),
            *(self._path / party.folder / KEYS_FILE for party in self._servers),
            *(self._path / party.folder / VALKEY_PASSWORD for party in self._users if self._has_valkey),
            *([self._path / VALKEY.folder / VALKEY_USERS] if self._has_valkey else []),
        ]

    def write(self, *, renews: bool, drops_old: bool) -> None:
        """Write all files: first what lets callers in, then what they call with; at last what lets no other caller in.

        Whenever it is cut short, every secret that lies with its holder is good.

        Args:
            renews: Whether secrets are drawn anew; else those that are there stay.
            drops_old: Whether only the present ones are good afterwards; else those before are, too.
        """
        self._write(renews=renews, drops_old=drops_old and not renews)
        if renews and drops_old:
            self._pause()
            self._write(renews=False, drops_old=True)

    def _write(self, *, renews: bool, drops_old: bool) -> None:
        drawn: dict[Path, str] = {}
        good: dict[Path, list[str]] = {}
        for file in self._secret_files():
            old = [_sha256(file.read_text().strip())] if file.exists() else []
            drawn[file] = KEY_PREFIX + secrets.token_urlsafe(32) if renews else file.read_text().strip()
            good[file] = list(dict.fromkeys([_sha256(drawn[file]), *([] if drops_old else old)]))
        new = {_sha256(secret) for secret in drawn.values()} if renews else set()
        for server in self._servers:
            write_private(self._path / server.folder / KEYS_FILE, self._keys_file(server, good, new))
        if self._has_valkey:
            write_private(self._path / VALKEY.folder / VALKEY_USERS, self._valkey_users(good))
        if renews:
            self._pause()
            for file, secret in drawn.items():
                write_private(file, secret + "\n")

    def _secret_files(self) -> list[Path]:
        return [file for file in self.files() if file.name in (API_KEY, VALKEY_PASSWORD)]

    def _keys_file(self, server: Party, good: dict[Path, list[str]], new: set[str]) -> str:
        """Return a server's keys file: our lines, less those that an operator has removed, and then all other lines."""
        file = self._path / server.folder / KEYS_FILE
        before = file.read_text().splitlines() if file.exists() else None
        lines = [f"# Who may call {server.folder}, by the hash of the key. Made by `loraplex credentials make`."]
        ours = {lines[0]}
        for party in self._callers:
            if party.role in server.admits:
                hashes = good[self._path / party.folder / API_KEY]
                made = [(digest, f"sha256:{digest} {party.folder} {party.role}") for digest in hashes]
                lines += [line for digest, line in made if before is None or digest in new or line in before]
                ours |= {line for line in before or () if line.endswith(f" {party.folder} {party.role}")}
        lines += [line for line in before or () if line not in ours]
        return "\n".join(lines) + "\n"

    def _valkey_users(self, good: dict[Path, list[str]]) -> str:
        lines = [LOG_READER, HEALTH_CHECKER]
        for party in self._users:
            passwords = " ".join(f"#{digest}" for digest in good[self._path / party.folder / VALKEY_PASSWORD])
            lines.append(f"user {party.folder} reset on {passwords} {party.valkey_rights}")
        return "\n".join(lines) + "\n"


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
