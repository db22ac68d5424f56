"""Prefetch and eviction hints: given to the engine if it is attached here, else sent through Valkey to its replica."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from loraplex_common.errors import LoraplexError
from loraplex_common.housekeeping import Trouble

if TYPE_CHECKING:
    from loraplex_adapter_store.attach.attached import AttachedEngines
    from loraplex_adapter_store.images import ImageCache
    from loraplex_adapter_store.repository.catalog import Catalog
    from loraplex_adapter_store.repository.engines import EngineHoldings


class Hints:
    """Passes hints on; a hint may be lost, and never causes an error."""

    def __init__(
        self, attached: AttachedEngines, holdings: EngineHoldings, catalog: Catalog, images: ImageCache
    ) -> None:
        self._attached = attached
        self._holdings = holdings
        self._catalog = catalog
        self._images = images
        self._trouble = Trouble()

    async def prefetch(self, engine_id: str, digest: str, wanted_in_ms: int) -> None:
        """Bring an image near an engine by the time it will be wanted; an empty id lets the store choose the engine."""
        try:
            target = engine_id or await self._pick(digest)
            if target and not self._attached.prefetch(target, digest, wanted_in_ms):
                await self._holdings.hint(target, "prefetch", digest, wanted_in_ms)
        except LoraplexError as error:
            self._trouble.warn("a prefetch hint is lost", engine=engine_id, revision=digest, error=error.message)

    async def evict(self, engine_id: str, digest: str) -> None:
        """Tell one engine, or all, that an image will not be wanted; "all" also makes the store forget it."""
        if not engine_id:
            self._images.drop(digest)
        local = [engine_id] if engine_id else self._attached.ids()
        for target in local:
            if not await self._attached.drop(target, digest) and engine_id:
                await self._publish(engine_id, digest)
        if not engine_id:
            await self._tell_others(digest)

    async def _tell_others(self, digest: str) -> None:
        try:
            elsewhere = [e.engine_id for e in await self._holdings.registered() if e.engine_id not in self._attached]
        except LoraplexError as error:
            self._trouble.warn("an eviction hint is lost", revision=digest, error=error.message)
            return
        for engine_id in elsewhere:
            await self._publish(engine_id, digest)

    async def _publish(self, engine_id: str, digest: str) -> None:
        try:
            await self._holdings.hint(engine_id, "evict", digest)
        except LoraplexError as error:
            self._trouble.warn("an eviction hint is lost", engine=engine_id, revision=digest, error=error.message)

    async def _pick(self, digest: str) -> str | None:
        """Choose an engine by rendezvous hashing, so that one adapter always goes to the same engine."""
        known = await self._catalog.get_revisions([digest])
        if not known:
            return None
        base = known[0].base_fingerprint
        ids = self._attached.engines_for(base)
        ids = ids or [e.engine_id for e in await self._holdings.registered() if e.base_fingerprint == base]
        return max(ids, key=lambda i: hashlib.sha256(f"{i}:{digest}".encode()).digest(), default=None)
