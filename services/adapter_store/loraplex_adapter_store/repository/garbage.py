"""Deletes revisions that no name refers to and no engine holds."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import LoraplexError
from loraplex_common.housekeeping import keep_doing
from loraplex_common.log import get_logger

from loraplex_adapter_store.repository import keys, scripts
from loraplex_adapter_store.repository.engines import RENEW_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from loraplex_adapter_store.repository.blobs import Blobs
    from loraplex_adapter_store.repository.engines import EngineHoldings

_log = get_logger()
LOCK_S: Final = 60.0
SETTLE_S: Final = 1.2 * RENEW_S
BATCH: Final = 100


class GarbageCollector:
    """Runs in every replica; a lock per revision keeps them apart.

    Args:
        on_garbage: Called with each digest without references, so that caches forget it and engines are told.
    """

    def __init__(
        self,
        client: keys.Client,
        blobs: Blobs,
        holdings: EngineHoldings,
        *,
        interval_s: float,
        on_garbage: Callable[[str], Awaitable[None]],
    ) -> None:
        self._client = client
        self._blobs = blobs
        self._holdings = holdings
        self._interval_s = interval_s
        self._on_garbage = on_garbage
        self._settle_s = 0.0

    async def run(self) -> None:
        """Collect for ever; a failure of Valkey, or of one revision, is logged and the next turn tries again."""
        await keep_doing(self._turn, name="garbage collection")

    async def _turn(self) -> None:
        await asyncio.sleep(self._settle_s or self._interval_s)
        # An engine's holdings may have expired while no replica could renew them: after a failure, wait until all
        # could.
        self._settle_s = SETTLE_S
        await self.collect()
        self._settle_s = 0.0

    async def collect(self) -> int:
        """Delete the revisions that are due; return how many."""
        now = round(time.time() * 1000)
        with keys.translated():
            due = await self._client.zrangebyscore(keys.GARBAGE, 0, now, start=0, num=BATCH)
        if not due:
            return 0
        held = await self._holdings.leases()
        collected = 0
        for digest in (raw.decode() for raw in due):
            if digest in held:  # try again later; the engine may still need to fetch it
                with keys.translated():
                    due_ms = now + round(self._interval_s * 1000)
                    await self._client.eval(scripts.POSTPONE, 1, keys.GARBAGE, digest, due_ms)
                await self._on_garbage(digest)
                continue
            collected += await self._collect(digest, now)
        return collected

    async def _collect(self, digest: str, now: int) -> int:
        own = (keys.references, keys.collecting, keys.revision, keys.text_parts)
        names = [keys.GARBAGE, *(key(digest) for key in own)]
        with keys.translated():
            if not await self._client.eval(
                scripts.BEGIN_COLLECTION, len(names), *names, digest, now, round(LOCK_S * 1000)
            ):
                return 0
            try:
                await self._blobs.delete(digest)
            except LoraplexError:
                # A tier is away: an import of the revision need not wait for the lock's end.
                await self._client.delete(keys.collecting(digest))
                raise
            names = [keys.GARBAGE, keys.collecting(digest)]
            await self._client.eval(scripts.END_COLLECTION, len(names), *names, digest)
        await self._on_garbage(digest)
        _log.info("revision collected", revision=digest)
        return 1
