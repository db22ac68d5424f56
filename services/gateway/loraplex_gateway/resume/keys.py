"""The key that seals resume tokens: one for all gateways of a deployment, from a file or agreed on in Valkey."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import LoraplexError
from loraplex_common.housekeeping import Trouble
from loraplex_common.log import get_logger
from loraplex_common.tasks import deliver_cancellation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from redis.asyncio import Redis

VALKEY_KEY: Final = "loraplex:resume-key"
KEY_BYTES: Final = 32
MIN_KEY_CHARS: Final = 32
CHECK_FILE_S: Final = 1.0
AGREE_EVERY_S: Final = 10.0
TIMEOUT_S: Final = 2.0
MAX_KEYS: Final = 4
"""Keys that open tokens: the present one and those before it."""

_log = get_logger()


class ResumeKeyError(ValueError):
    """The resume key file cannot be used; the message names the file, never a key."""


class ResumeKeyFile:
    """A file of keys, one a line: the first seals, all of them open. Read again when it changes.

    Args:
        path: Where it is.
        clock: Monotonic seconds.

    Raises:
        ResumeKeyError: If it is missing, empty or holds a key that is too short.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._check_at = clock() + CHECK_FILE_S
        self._seen = self._state()
        self._keys = self._read()

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys; what cannot be read is logged, and what was known before stays good."""
        now = self._clock()
        if now < self._check_at:
            return self._keys
        self._check_at = now + CHECK_FILE_S
        state = self._state()
        if state != self._seen:
            self._seen = state
            try:
                self._keys = self._read()
            except ResumeKeyError as error:
                _log.error(
                    "the resume key file has changed and cannot be used; the keys known before stay good",
                    cause=str(error),
                )
            else:
                _log.info("the resume key file was read again", num_keys=len(self._keys))
        return self._keys

    def _read(self) -> tuple[bytes, ...]:
        try:
            lines = self._path.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise ResumeKeyError(f"{self._path}: {cause}") from error
        if not lines or any(len(line) < MIN_KEY_CHARS for line in lines):
            raise ResumeKeyError(
                f"{self._path}: expected one key a line, each of at least {MIN_KEY_CHARS} characters "
                "(openssl rand -hex 32); the first seals, all of them open"
            )
        return tuple(hashlib.sha256(line.encode()).digest() for line in lines)

    def _state(self) -> tuple[int, ...]:
        try:
            status = os.stat(self._path)
        except OSError:
            return ()
        return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


class ResumeKeys:
    """The keys of a gateway. Without a file and without Valkey its tokens are good on this gateway alone.

    Args:
        file: Keys that the operator gives.
        valkey: Where gateways agree on a key otherwise.
    """

    def __init__(self, *, file: ResumeKeyFile | None = None, valkey: Redis | None = None) -> None:
        self._file = file
        self._valkey = valkey if file is None else None
        self._own: tuple[bytes, ...] = (secrets.token_bytes(KEY_BYTES),)
        self._trouble = Trouble()

    @property
    def sealing(self) -> bytes:
        """The key for new tokens."""
        return self.opening[0]

    @property
    def opening(self) -> tuple[bytes, ...]:
        """All keys whose tokens are good."""
        return self._own if self._file is None else self._file.keys

    async def agree(self) -> bool:
        """Take the key that all gateways share in Valkey, or offer ours; return whether that was possible.

        A key that Valkey has lost is written again by the gateways that know it; the first one to write counts.
        """
        if self._valkey is None:
            return True
        try:
            async with asyncio.timeout(TIMEOUT_S):
                shared = await self._valkey.get(VALKEY_KEY)
                if shared is None:
                    await self._valkey.set(VALKEY_KEY, self._own[0], nx=True)
                    shared = await self._valkey.get(VALKEY_KEY)
        except (LoraplexError, TimeoutError) as error:
            self._trouble.warn(
                "gateways cannot agree on a resume key; new tokens may be good here only", cause=str(error)
            )
            return False
        self._trouble.over("gateways agree on the resume key again")
        if isinstance(shared, bytes) and len(shared) >= KEY_BYTES and shared != self._own[0]:
            self._own = (shared, *(key for key in self._own if key != shared))[:MAX_KEYS]
        return True

    async def run(self) -> None:
        """Keep in step with the other gateways for ever."""
        while True:
            await self.agree()
            deliver_cancellation()
            await asyncio.sleep(AGREE_EVERY_S)
