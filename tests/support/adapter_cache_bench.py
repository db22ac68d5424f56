"""An adapter cache on pages and an arena of its own, without a scheduler."""

from __future__ import annotations

from loraplex_engine.adapters.adapter import Adapter, Room
from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.adapters.cache import AdapterCache
from loraplex_engine.loop.adapter_operations import AdapterOperations
from loraplex_engine.messages import ResidencyChanged, ResidencyState, StoreEvent
from loraplex_engine.pages.page_pool import PagePool
from support.fake_adapters import fake_spec


def anyone(_adapter: Adapter) -> bool:
    return True


class AdapterCacheBench:
    """A cache without a scheduler."""

    def __init__(self, *, num_pages: int = 8, max_resident: int = 8) -> None:
        self.now_s = 1.0
        self.pool = PagePool(num_pages)
        self.arena = HostArena(32, 64)
        self.events: list[StoreEvent] = []
        self.cache = AdapterCache(
            pool=self.pool,
            arena=self.arena,
            max_resident=max_resident,
            emit=self.events.append,
            clock=lambda: self.now_s,
        )
        self.operations = AdapterOperations(cache=self.cache, pool=self.pool)

    def put_in_arena(self, digest: str, num_pages: int = 1) -> None:
        slots = self.arena.allocate(num_pages)
        assert slots is not None
        self.cache.image_arrived(fake_spec(digest), slots)

    def make_resident(self, digest: str, num_pages: int = 1) -> None:
        self.now_s += 1
        self.put_in_arena(digest, num_pages)
        assert self.cache.load(digest, anyone) is Room.NOW
        self.cache.load_finished(digest)

    def states(self, digest: str) -> list[ResidencyState]:
        return [e.state for e in self.events if isinstance(e, ResidencyChanged) and e.digest == digest]
