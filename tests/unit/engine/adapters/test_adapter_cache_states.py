"""Residency under any history of operations: nothing is lost, listed wrongly or held by two."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from loraplex_common.errors import AdapterInUseError, AdapterNotFoundError, LoraplexError, SaturatedError
from loraplex_engine.adapters.adapter import Room
from loraplex_engine.messages import ResidencyState
from loraplex_engine.pages.page_pool import PageOwner
from support.adapter_cache_bench import AdapterCacheBench, anyone


class AdapterCacheMachine(RuleBasedStateMachine):
    """Any history of wants, images, loads, leases, pins and evictions beside KV pages that come and go."""

    @initialize(num_pages=st.integers(2, 8), max_resident=st.integers(1, 4))
    def start(self, num_pages: int, max_resident: int) -> None:
        self.bench = AdapterCacheBench(num_pages=num_pages, max_resident=max_resident)
        self.leases: list[str] = []
        self.loading: list[str] = []
        self.step = 0

    digests = st.sampled_from("abcd")

    @rule(digest=digests)
    def want(self, digest: str) -> None:
        if self.bench.cache.state_of(digest) is ResidencyState.ABSENT:
            self.bench.cache.states.want(digest, None)

    @rule(digest=digests, num_pages=st.integers(1, 3))
    def arrive(self, digest: str, num_pages: int) -> None:
        known = self.bench.cache.states.num_pages_of(digest)  # an image's size is its digest's
        self.bench.put_in_arena(digest, known or num_pages)

    @rule(digest=digests)
    def load(self, digest: str) -> None:
        cache = self.bench.cache
        if cache.state_of(digest) is ResidencyState.IN_ARENA and cache.load(digest, anyone) is Room.NOW:
            self.loading.append(digest)

    @rule()
    def finish_load(self) -> None:
        if self.loading:
            self.bench.cache.load_finished(self.loading.pop(0))

    @rule(digest=digests)
    def lease(self, digest: str) -> None:
        if self.bench.cache.state_of(digest) is ResidencyState.RESIDENT:
            self.bench.cache.lease(digest)
            self.leases.append(digest)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            digest = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            self.bench.cache.release(digest, self.step)

    @rule(digest=digests, operation=st.sampled_from(["evict", "pin", "unpin", "drop", "image_refused"]))
    def operate(self, digest: str, operation: str) -> None:
        try:
            owners = {"drop": self.bench.cache, "image_refused": self.bench.cache.states}
            getattr(owners.get(operation, self.bench.operations), operation)(digest)
        except LoraplexError as error:
            assert isinstance(error, AdapterNotFoundError | AdapterInUseError | SaturatedError)  # noqa: PT017

    @rule(num_pages=st.integers(1, 4))
    def use_pages_for_kv(self, num_pages: int) -> None:
        if self.bench.cache.reclaim(num_pages, anyone) is Room.NOW:
            self.bench.pool.retire(self.bench.pool.allocate(num_pages, PageOwner.KV), self.step)

    @rule(num_slots=st.integers(1, 32))
    def evict_images(self, num_slots: int) -> None:
        self.bench.cache.evict_images(num_slots, anyone)

    @rule(digest=digests)
    def bring(self, digest: str) -> None:
        """Take an adapter all the way, as soon as there is room."""
        self.bench.now_s += 1
        self.arrive(digest, 1)
        self.load(digest)
        if self.loading and self.loading[-1] == digest:
            self.bench.cache.load_finished(self.loading.pop())

    @rule(digest=digests)
    def lose(self, digest: str) -> None:
        """Let all images go, then an adapter of the device: it comes again as one that was never heard of."""
        self.evict_images(32)
        self.operate(digest, "evict")

    @rule()
    def complete_step(self) -> None:
        self.bench.pool.complete(self.step)
        self.bench.cache.complete(self.step)
        self.step += 1

    @invariant()
    def accounts_are_whole(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.pool.check_integrity()
        self.bench.cache.check_integrity()
        self.bench.arena.check_integrity()
        for digest in set(self.leases):
            status = self.bench.cache.states.status(digest)
            assert status.num_leases == self.leases.count(digest)
            assert status.state in (ResidencyState.RESIDENT, ResidencyState.DRAINING)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        while self.loading:
            self.finish_load()
        for digest in self.leases:
            self.bench.cache.release(digest, self.step)
        for digest in "abcd":
            self.bench.cache.drop(digest)
            self.bench.cache.states.image_refused(digest)
        self.complete_step()
        assert self.bench.cache.states.statuses() == []
        assert self.bench.pool.num_free == self.bench.pool.num_pages
        assert self.bench.arena.num_free == self.bench.arena.num_slots
        self.bench.arena.close()


AdapterCacheMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAdapterCacheMachine = AdapterCacheMachine.TestCase
