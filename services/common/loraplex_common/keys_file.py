"""The file that lists the callers to let in: ``KEY NAME [ROLE] [group=GROUP] [priority=CLASS]``, ``#`` for comments.

KEY is a secret that callers send, or ``sha256:HEX`` of one, so that the file holds no secret, or ``cn=NAME`` or
``san=NAME`` of a client certificate. ROLE is one of `Role`, ``tenant`` if left out.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from loraplex_common.auth import HIGHEST_PRIORITY, NORMAL_PRIORITY, Principal, Role, lookup_key
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from pathlib import Path

SYNTAX: Final = "KEY NAME [" + "|".join(Role) + "] [group=GROUP] [priority=batch|normal|high]"
PRIORITIES: Final = {"batch": 1, "normal": NORMAL_PRIORITY, "high": HIGHEST_PRIORITY}
_NAME: Final = re.compile(r"[\x21-\x7e]{1,128}")

_log = get_logger()


class KeysFileError(ValueError):
    """The keys file cannot be used; the message names file and line, never a key."""


class KeysFile:
    """A keys file, and its state when it was last read.

    Args:
        path: Path of the file. A mounted secret may be a link that is replaced: the link is followed at each read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None

    def read(self) -> dict[bytes, Principal]:
        """Return the principals to let in, by the values that `Authenticator` looks up.

        Raises:
            KeysFileError: If the file is missing, empty, or a line is malformed or repeats a key.
        """
        try:
            # The state is read before the text, so a change in between is seen next time.
            self._seen = self._state()
            text = self._path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise KeysFileError(f"{self._path}: {cause}") from error
        return parse_keys(text, str(self._path))

    def read_if_changed(self) -> dict[bytes, Principal] | None:
        """Return the present principals; None if the file is unchanged, or cannot be used, which is logged once."""
        try:
            state = self._state()
        except OSError:
            state = ()
        if state == self._seen:
            return None
        try:
            principals = self.read()
        except KeysFileError as error:
            self._seen = state
            _log.error(
                "the keys file has changed and cannot be used; the keys known before stay good", cause=str(error)
            )
            return None
        _log.info("the keys file was read again", num_keys=len(principals))
        return principals

    def _state(self) -> tuple[int, ...]:
        status = os.stat(self._path)
        return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def parse_keys(text: str, where: str) -> dict[bytes, Principal]:
    """Return the principals of a keys file's text, by the values that `Authenticator` looks up.

    Args:
        text: Content of the file.
        where: Name of the file, for messages.

    Raises:
        KeysFileError: If it holds no keys, or a line is malformed or repeats a key.
    """
    principals: dict[bytes, Principal] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key, principal = _entry(words)
        except ValueError as error:
            raise KeysFileError(f"{where}:{number}: {error}") from None
        if key in principals:
            raise KeysFileError(f"{where}:{number}: this key appears twice")
        principals[key] = principal
    if not principals:
        # An empty file would let every caller in, which is hardly what its author meant.
        raise KeysFileError(f"{where}: holds no keys")
    return principals


def _entry(words: list[str]) -> tuple[bytes, Principal]:
    if len(words) < 2:
        raise ValueError(f"expected '{SYNTAX}'")
    key, name, *rest = words
    if not _NAME.fullmatch(name):
        raise ValueError("NAME must be 1 to 128 printable ASCII characters")
    role = Role(rest.pop(0)) if rest and rest[0] in set(Role) else Role.TENANT
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    if len(options) != len(rest) or set(options) - {"group", "priority"}:
        raise ValueError(f"expected '{SYNTAX}'")
    if options and role not in (Role.TENANT, Role.ADMIN):
        raise ValueError(f"group= and priority= go with tenants and admins, not with the role {role}")
    group = options.get("group", "")
    if "group" in options and not _NAME.fullmatch(group):
        raise ValueError("GROUP must be 1 to 128 printable ASCII characters")
    default = "high" if role is Role.ADMIN else "normal"
    priority = PRIORITIES.get(options.get("priority", default))
    if priority is None:
        raise ValueError(f"priority must be one of {', '.join(PRIORITIES)}")
    return lookup_key(key), Principal(name=name, role=role, group=group, highest_priority=priority)
