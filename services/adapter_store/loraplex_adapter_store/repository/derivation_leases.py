"""One derivation of an image at a time across replicas: which replica derives it, and how the others get it.

A replica takes a lease before it derives. One that finds the lease taken says that it waits, and takes the finished pages out
of Valkey, where the holder has put them for a while; if no replica waits, the holder puts nothing there. The lease ends soon
after its holder has died, and a replica that has waited long enough derives by itself: a lease spares work, and nothing depends
on it.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common import geometry_wire
from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait
from loraplex_common.tree_digest import tree_sha256
from loraplex_common.valkey_errors import ALLOWED_WHEN_FULL

from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

    from loraplex_adapter_store.page_image import ImageKey

_log = get_logger()
LEASE_S: Final = 3.0
RENEW_S: Final = 1.0
WAIT_S: Final = 5.0
"""Longest time for which a replica waits for another one's image."""
LOOK_S: Final = 0.02
MAX_READS: Final = 2
"""Images that are read at once."""
KEPT_S: Final = 10
"""Seconds for which finished pages stay in Valkey."""
PART_BYTES: Final = 4 * 1024 * 1024

_RENEW: Final = (
    ALLOWED_WHEN_FULL
    + """
-- KEYS: lease.  ARGV: token, lease (ms)
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
)
_RELEASE: Final = (
    ALLOWED_WHEN_FULL
    + """
-- KEYS: lease.  ARGV: token
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
)


class Turn:
    """What becomes of a derivation.

    Attributes:
        pages: The pages as another replica has derived them, ``[num_pages, page_bytes]``; None if this one is to derive.
        tree_sha256: Their tree digest, checked.
        derived: Set by the holder: its pages and their tree digest.
    """

    def __init__(self) -> None:
        self.pages: NDArray[np.uint8] | None = None
        self.tree_sha256 = ""
        self.derived: tuple[NDArray[np.uint8], str] | None = None


class DerivationLeases:
    """Leases in Valkey; without Valkey every replica derives for itself."""

    def __init__(self, client: keys.Client) -> None:
        self._client = client
        self._reading = asyncio.Semaphore(MAX_READS)

    @asynccontextmanager
    async def turn(self, key: ImageKey) -> AsyncIterator[Turn]:
        """Hold the lease of an image in the block, or have its pages from the replica that held it."""
        name, token, turn = _name(key), secrets.token_hex(16), Turn()
        is_holder = False
        try:
            is_holder = await self._take(name, token, key, turn)
        except LoraplexError as error:
            _log.debug("an image is derived without a lease", revision=key.digest, error=error.message)
        renewing = (
            asyncio.create_task(self._renew(name, token), name=f"lease of {key.digest[:12]}") if is_holder else None
        )
        try:
            yield turn
            if is_holder and turn.derived is not None:
                await self._hand_on(name, key, *turn.derived)
        finally:
            if renewing is not None:
                await cancel_and_wait(renewing)
                await asyncio.shield(self._release(name, token))

    async def _take(self, name: str, token: str, key: ImageKey, turn: Turn) -> bool:
        """Return whether this replica holds the lease now; wait for the pages of the one that does."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + WAIT_S
        while True:
            with keys.translated():
                if await self._client.set(_lease(name), token, nx=True, px=round(LEASE_S * 1000)):
                    return True
                await self._client.set(_waiting(name), b"1", px=round(LEASE_S * 1000))
            await asyncio.sleep(LOOK_S)
            if await self._read(name, key, turn) or loop.time() >= give_up_at:
                return False

    async def _read(self, name: str, key: ImageKey, turn: Turn) -> bool:
        """Take finished pages; False if there are none, or not these."""
        with keys.translated():
            if not await self._client.hexists(_pages(name), "tree_sha256"):
                return False
            async with self._reading:
                fields = await self._client.hgetall(_pages(name))
        root = fields.pop(b"tree_sha256", b"").decode()
        data = b"".join(fields.get(b"%d" % number, b"") for number in range(len(fields)))
        if not data or len(data) % key.geometry.page_bytes:
            return False
        pages = np.frombuffer(data, dtype=np.uint8).reshape(-1, key.geometry.page_bytes)
        if await asyncio.to_thread(tree_sha256, pages) != root:
            _log.warning("an image of another replica is damaged, and derived anew", revision=key.digest)
            return False
        turn.pages, turn.tree_sha256 = pages, root
        return True

    async def _hand_on(self, name: str, key: ImageKey, pages: NDArray[np.uint8], root: str) -> None:
        """Put finished pages where replicas that wait find them; the digest last, as it makes them valid."""
        try:
            with keys.translated():
                if not await self._client.exists(_waiting(name)):
                    return
                data = np.ascontiguousarray(pages).reshape(-1)
                parts = [data[start : start + PART_BYTES].data for start in range(0, len(data), PART_BYTES)]
                await self._client.delete(_pages(name))
                for number, part in enumerate(parts):
                    await self._client.hset(_pages(name), str(number), part)
                    await self._client.expire(_pages(name), KEPT_S)
                await self._client.hset(_pages(name), "tree_sha256", root)
        except LoraplexError as error:  # full, or away
            _log.info("an image is not handed on to other replicas", revision=key.digest, error=error.message)

    async def _renew(self, name: str, token: str) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                with keys.translated():
                    await self._client.eval(_RENEW, 1, _lease(name), token, round(LEASE_S * 1000))
            except LoraplexError as error:
                _log.debug("the lease of an image is not renewed", name=name, error=error.message)

    async def _release(self, name: str, token: str) -> None:
        try:
            with keys.translated():
                await self._client.eval(_RELEASE, 1, _lease(name), token)
        except LoraplexError as error:
            _log.debug("the lease of an image ends by itself", name=name, error=error.message)


def _name(key: ImageKey) -> str:
    geometry = geometry_wire.to_message(key.geometry).SerializeToString(deterministic=True)
    return f"{key.digest}-{key.rank}-{hashlib.sha256(geometry).hexdigest()[:16]}"


def _lease(name: str) -> str:
    return f"loraplex:store:deriving:{{{name}}}"


def _waiting(name: str) -> str:
    return f"{_lease(name)}:waiting"


def _pages(name: str) -> str:
    return f"{_lease(name)}:pages"
