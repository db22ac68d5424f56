"""Residency: states, leases, generations, eviction, pins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from loraplex_common.errors import AdapterInUseError, AdapterNotFoundError, ConflictError, LoraplexError, SaturatedError
from loraplex_engine.adapter_cache import AdapterCache
from loraplex_engine.adapter_operations import AdapterOperations
from loraplex_engine.arena import HostArena
from loraplex_engine.messages import ResidencyChanged, ResidencyState, StoreEvent, WantImage
from loraplex_engine.page_pool import PageOwner, PagePool
from loraplex_engine.residency import TRANSITIONS, Adapter, Room
from support.fake_runner import fake_spec

if TYPE_CHECKING:
    from collections.abc import Iterator


def anyone(_adapter: Adapter) -> bool:
    return True


class Bench:
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


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.cache.check_integrity()
    bench.pool.check_integrity()
    bench.arena.check_integrity()
    bench.arena.close()


def test_an_adapter_goes_from_wanted_to_resident(bench: Bench) -> None:
    bench.cache.want("a", 5.0)
    bench.make_resident("a", 3)

    assert WantImage("a", 5.0) in bench.events
    state = ResidencyState
    assert bench.states("a") == [state.WANTED, state.IN_ARENA, state.LOADING, state.RESIDENT]
    assert bench.pool.num_adapter == 3


def test_an_illegal_move_raises() -> None:
    for state, allowed in TRANSITIONS.items():
        for target in set(ResidencyState) - allowed:
            with pytest.raises(RuntimeError, match="cannot go"):
                Adapter("a", state=state).move_to(target)


def test_only_a_resident_adapter_can_be_leased(bench: Bench) -> None:
    bench.put_in_arena("a")

    with pytest.raises(RuntimeError, match="cannot be leased"):
        bench.cache.lease("a")


def test_a_leased_adapter_is_not_evicted(bench: Bench) -> None:
    bench.make_resident("a", 4)
    bench.cache.lease("a")

    assert bench.cache.reclaim(5, anyone) is Room.NO
    bench.cache.release("a", last_step=-1)
    assert bench.cache.reclaim(5, anyone) is Room.NOW
    assert bench.states("a")[-1] is ResidencyState.IN_ARENA


def test_returning_a_lease_that_was_not_taken_raises(bench: Bench) -> None:
    bench.make_resident("a")

    with pytest.raises(RuntimeError, match="no lease"):
        bench.cache.release("a", last_step=0)


def test_the_least_recently_used_goes_first_and_none_in_vain(bench: Bench) -> None:
    for digest in "abc":
        bench.make_resident(digest, 2)
    bench.cache.lease("a")
    bench.cache.release("a", last_step=-1)

    assert bench.cache.reclaim(100, anyone) is Room.NO
    assert bench.cache.num_resident == 3
    assert bench.cache.reclaim(4, anyone) is Room.NOW

    assert bench.cache.state_of("b") is ResidencyState.IN_ARENA
    assert bench.cache.state_of("a") is bench.cache.state_of("c") is ResidencyState.RESIDENT


def test_pages_of_an_adapter_that_a_step_reads_come_soon(bench: Bench) -> None:
    bench.make_resident("a", 6)
    index = bench.cache.lease("a")
    bench.cache.release("a", last_step=3)

    assert bench.cache.reclaim(8, anyone) is Room.SOON
    assert bench.cache.take_unloads() == []
    bench.pool.complete(3)
    bench.cache.complete(3)

    assert bench.cache.reclaim(8, anyone) is Room.NOW
    assert bench.cache.take_unloads() == [index]


def test_a_full_table_evicts_for_its_index(bench: Bench) -> None:
    small = Bench(max_resident=1)
    small.make_resident("a")
    small.put_in_arena("b")

    assert small.cache.load("b", lambda _: False) is Room.NO
    assert small.cache.load("b", anyone) is Room.NOW

    assert small.cache.state_of("a") is ResidencyState.IN_ARENA
    small.arena.close()


def test_an_evicted_adapter_comes_back_from_the_arena_as_a_new_generation(bench: Bench) -> None:
    bench.make_resident("a")
    first = bench.cache.status("a").generation

    bench.operations.evict("a")
    assert bench.cache.load("a", anyone) is Room.NOW

    assert bench.cache.status("a").generation > first
    assert not any(isinstance(event, WantImage) for event in bench.events)


def test_evicting_a_leased_adapter_drains_it(bench: Bench) -> None:
    bench.make_resident("a", 2)
    bench.cache.lease("a")

    status = bench.operations.evict("a")
    assert status.state is ResidencyState.DRAINING
    with pytest.raises(RuntimeError, match="cannot be leased"):
        bench.cache.lease("a")

    bench.cache.release("a", last_step=-1)
    assert bench.cache.state_of("a") is ResidencyState.IN_ARENA
    assert bench.pool.num_adapter == 0


def test_dropping_an_adapter_that_is_being_loaded_waits_for_the_load(bench: Bench) -> None:
    bench.put_in_arena("a", 2)
    bench.cache.load("a", anyone)

    bench.cache.drop("a")
    assert bench.cache.state_of("a") is ResidencyState.DRAINING
    assert bench.arena.num_free == 30

    bench.cache.load_finished("a")
    assert bench.cache.state_of("a") is ResidencyState.ABSENT
    assert bench.arena.num_free == 32
    assert bench.pool.num_free == 8


@pytest.mark.parametrize("is_dropped", [False, True])
def test_a_refused_load_gives_back_pages_index_and_image(bench: Bench, is_dropped: bool) -> None:
    bench.put_in_arena("a", 3)
    bench.cache.set_pinned("a", True)
    bench.cache.load("a", anyone)
    if is_dropped:
        bench.cache.drop("a")

    bench.cache.load_refused("a")

    assert bench.cache.state_of("a") is ResidencyState.ABSENT
    assert (bench.pool.num_free, bench.arena.num_free, bench.cache.num_pinned) == (8, 32, 0)
    assert not bench.cache.take_unloads(), "an index that was never bound is not unbound"
    bench.make_resident("a")


def test_dropping_frees_device_and_arena_even_of_a_pinned_adapter(bench: Bench) -> None:
    bench.make_resident("a", 2)
    bench.operations.pin("a")

    bench.cache.drop("a")

    assert bench.cache.statuses() == []
    assert bench.arena.num_free == 32


def test_a_second_copy_of_an_image_is_freed(bench: Bench) -> None:
    bench.make_resident("a", 2)

    bench.put_in_arena("a", 2)

    assert bench.arena.num_free == 30


def test_a_resident_adapter_gets_its_copy_in_the_arena_back(bench: Bench) -> None:
    bench.make_resident("a", 2)
    bench.cache.evict_images(32, anyone)
    assert not bench.cache.status("a").is_in_arena

    bench.put_in_arena("a", 2)
    bench.operations.evict("a")

    assert bench.cache.state_of("a") is ResidencyState.IN_ARENA


def test_an_adapter_that_was_gone_altogether_gives_way_like_any_other(bench: Bench) -> None:
    bench.make_resident("a", 2)
    bench.cache.evict_images(32, anyone)
    bench.operations.evict("a")
    assert bench.cache.state_of("a") is ResidencyState.ABSENT
    bench.make_resident("a", 2)
    generation = bench.cache.status("a").generation

    assert bench.cache.reclaim(8, anyone) is Room.NOW

    assert bench.cache.status("a").state is ResidencyState.IN_ARENA
    assert bench.cache.status("a").generation == generation


def test_pins_are_limited_and_spare_from_eviction(bench: Bench) -> None:
    bench.make_resident("a", 3)
    bench.make_resident("b", 2)

    assert bench.operations.pin("a").is_pinned
    with pytest.raises(SaturatedError, match="needs 2 pages, 3 are pinned and 4 of 8 may be"):
        bench.operations.pin("b")
    with pytest.raises(AdapterInUseError):
        bench.operations.evict("a")
    assert bench.cache.reclaim(6, anyone) is Room.NO
    bench.operations.unpin("a")
    assert bench.cache.reclaim(6, anyone) is Room.NOW


def test_pins_leave_places_in_the_table() -> None:
    small = Bench(max_resident=3)
    small.make_resident("a")
    small.make_resident("b")
    small.operations.pin("a")

    with pytest.raises(SaturatedError, match="needs 1 places, 1 are pinned and 1 of 3 may be"):
        small.operations.pin("b")
    small.arena.close()


def test_what_is_not_held_cannot_be_operated_on(bench: Bench) -> None:
    bench.cache.want("a", None)

    for operation in (bench.operations.pin, bench.operations.unpin, bench.operations.evict):
        with pytest.raises(AdapterNotFoundError):
            operation("a")


def test_evicting_another_generation_is_a_conflict(bench: Bench) -> None:
    bench.make_resident("a")

    with pytest.raises(ConflictError):
        bench.operations.evict("a", require_generation=99)


def test_a_refusal_makes_a_wanted_adapter_absent_and_nothing_else(bench: Bench) -> None:
    bench.cache.want("a", None)
    bench.make_resident("b")

    bench.cache.image_refused("a")
    bench.cache.image_refused("b")
    bench.cache.image_refused("c")

    assert [status.digest for status in bench.cache.statuses()] == ["b"]


def test_the_load_estimate_follows_what_loads_take(bench: Bench) -> None:
    before = bench.cache.load_estimate_s
    bench.cache.want("a", None)
    bench.now_s += 20

    bench.make_resident("a")

    assert bench.cache.load_estimate_s > before


class AdapterCacheMachine(RuleBasedStateMachine):
    """Any history of wants, images, loads, leases, pins and evictions beside KV pages that come and go."""

    @initialize(num_pages=st.integers(2, 8), max_resident=st.integers(1, 4))
    def start(self, num_pages: int, max_resident: int) -> None:
        self.bench = Bench(num_pages=num_pages, max_resident=max_resident)
        self.leases: list[str] = []
        self.loading: list[str] = []
        self.step = 0

    digests = st.sampled_from("abcd")

    @rule(digest=digests)
    def want(self, digest: str) -> None:
        if self.bench.cache.state_of(digest) is ResidencyState.ABSENT:
            self.bench.cache.want(digest, None)

    @rule(digest=digests, num_pages=st.integers(1, 3))
    def arrive(self, digest: str, num_pages: int) -> None:
        known = self.bench.cache.num_pages_of(digest)  # an image's size is its digest's
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
            getattr(self.bench.operations if operation in ("evict", "pin", "unpin") else self.bench.cache, operation)(
                digest
            )
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
            status = self.bench.cache.status(digest)
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
            self.bench.cache.image_refused(digest)
        self.complete_step()
        assert self.bench.cache.statuses() == []
        assert self.bench.pool.num_free == self.bench.pool.num_pages
        assert self.bench.arena.num_free == self.bench.arena.num_slots
        self.bench.arena.close()


AdapterCacheMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAdapterCacheMachine = AdapterCacheMachine.TestCase
