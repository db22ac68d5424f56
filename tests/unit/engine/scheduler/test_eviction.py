"""One market: what gives way is what costs least to bring back, whichever kind it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex_engine.adapters.adapter import Adapter, Room
from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.adapters.arrival_rates import ArrivalRates
from loraplex_engine.adapters.cache import AdapterCache
from loraplex_engine.messages import ResidencyState
from loraplex_engine.pages.page_pool import PageOwner, PagePool
from loraplex_engine.pages.prefix_cache import PrefixCache
from loraplex_engine.scheduler.eviction import PageEviction
from loraplex_engine.scheduler.step_costs import StepCosts
from support.fake_adapters import fake_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_engine.pages.page_pool import Pages

BLOCK = 4
HALF_LIFE_S = 60.0


def anyone(_adapter: Adapter) -> bool:
    return True


class Bench:
    """Pool, adapters and prefixes without requests."""

    def __init__(self, num_pages: int = 8) -> None:
        self.now_s = 1000.0
        self.pool = PagePool(num_pages)
        self.arena = HostArena(64, 64)
        self.cache = AdapterCache(
            pool=self.pool,
            arena=self.arena,
            max_resident=16,
            emit=lambda _event: None,
            clock=lambda: self.now_s,
            half_life_s=HALF_LIFE_S,
        )
        self.prefix = PrefixCache(self.pool, half_life_s=HALF_LIFE_S)
        self.costs = StepCosts()
        self.eviction = PageEviction(
            pool=self.pool, cache=self.cache, prefix=self.prefix, costs=self.costs, block_tokens=BLOCK
        )

    def make_costs(self, *, block_s: float, page_s: float) -> None:
        """Measure what a block's tokens and an adapter's page cost."""
        self.costs.prefill_s_per_token = block_s / BLOCK
        self.cache.ranking.costs.copy_s_per_page = page_s

    def add_adapter(self, digest: str, num_pages: int = 1, arrivals: int = 1) -> None:
        for _ in range(arrivals):
            self.cache.states.count_arrival(digest)
        slots = self.arena.allocate(num_pages)
        assert slots is not None
        self.cache.image_arrived(fake_spec(digest), slots)
        assert self.cache.load(digest, anyone) is Room.NOW
        self.cache.load_finished(digest)

    def add_prefix(self, name: str, uses: int = 1) -> None:
        keys = [name.encode()]
        for _ in range(uses):
            pages = self.prefix.match(keys, 1)
            if len(pages):
                self.pool.share(pages)
            else:
                pages = self.pool.allocate(1, PageOwner.KV)
                self.prefix.publish(keys, pages)
            self.prefix.leave(keys, self.now_s)
            self.pool.release(pages, -1)

    def has_prefix(self, name: str) -> bool:
        return len(self.prefix.match([name.encode()], 1)) == 1

    def has_adapter(self, digest: str) -> bool:
        return self.cache.state_of(digest) is ResidencyState.RESIDENT


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.pool.check_integrity()
    bench.cache.check_integrity()
    bench.prefix.check_integrity()
    bench.arena.close()


@pytest.mark.parametrize(("block_s", "page_s", "goes"), [(0.01, 0.001, "adapter"), (0.001, 0.01, "prefix")])
def test_of_equal_demand_the_cheaper_to_bring_back_goes(bench: Bench, block_s: float, page_s: float, goes: str) -> None:
    bench.make_costs(block_s=block_s, page_s=page_s)
    bench.add_adapter("adapter")
    bench.add_prefix("prefix")

    assert bench.eviction.make_room(7, anyone) is Room.NOW

    assert bench.has_adapter("adapter") == (goes != "adapter")
    assert bench.has_prefix("prefix") == (goes != "prefix")


@pytest.mark.parametrize(("uses", "arrivals", "goes"), [(1, 3, "prefix"), (3, 1, "adapter")])
def test_of_equal_cost_the_less_asked_for_goes(bench: Bench, uses: int, arrivals: int, goes: str) -> None:
    bench.make_costs(block_s=0.01, page_s=0.01)
    bench.add_adapter("adapter", arrivals=arrivals)
    bench.add_prefix("prefix", uses=uses)

    bench.eviction.make_room(7, anyone)

    assert bench.has_adapter("adapter") == (goes != "adapter")
    assert bench.has_prefix("prefix") == (goes != "prefix")


def test_demand_that_has_faded_counts_for_less_than_new_demand(bench: Bench) -> None:
    bench.make_costs(block_s=0.01, page_s=0.01)
    bench.add_adapter("once-hot", arrivals=8)
    bench.now_s += 5 * HALF_LIFE_S
    bench.add_adapter("new", arrivals=1)

    bench.eviction.make_room(7, anyone)

    assert not bench.has_adapter("once-hot")
    assert bench.has_adapter("new")


def test_an_adapter_that_left_the_arena_is_worth_more(bench: Bench) -> None:
    bench.make_costs(block_s=0.01, page_s=0.001)
    bench.cache.ranking.costs.fetch_s = 1.0
    bench.add_adapter("far", arrivals=1)
    bench.cache.evict_images(64, anyone)
    assert not bench.cache.states.status("far").is_in_arena
    bench.add_adapter("in-arena", arrivals=2)
    bench.cache.ranking.costs.copy_s_per_page = 0.001

    bench.eviction.make_room(7, anyone)

    assert bench.has_adapter("far")
    assert not bench.has_adapter("in-arena")


def test_nothing_is_evicted_in_vain(bench: Bench) -> None:
    bench.add_adapter("leased", num_pages=4)
    bench.cache.lease("leased")
    bench.add_prefix("prefix")

    assert bench.eviction.make_room(5, anyone) is Room.NO

    assert bench.has_prefix("prefix")


def test_leased_and_pinned_adapters_never_go(bench: Bench) -> None:
    bench.add_adapter("leased", num_pages=2)
    bench.add_adapter("pinned", num_pages=2)
    bench.cache.lease("leased")
    bench.cache.states.set_pinned("pinned", True)

    assert bench.eviction.make_room(4, anyone) is Room.NOW
    assert bench.eviction.make_room(5, anyone) is Room.NO


def test_with_a_bound_only_what_is_worth_less_goes(bench: Bench) -> None:
    bench.make_costs(block_s=0.01, page_s=0.01)
    bench.add_adapter("hot", arrivals=16)
    bench.add_prefix("cold")
    bound = bench.cache.ranking.rates.octaves("hot") + np.log2(0.01) - 1

    assert bench.eviction.make_room(8, anyone, up_to=bound) is Room.NO
    assert bench.has_prefix("cold")
    assert bench.eviction.make_room(7, anyone, up_to=bound) is Room.NOW

    assert bench.has_adapter("hot")
    assert not bench.has_prefix("cold")


def test_arrival_rates_decay_and_are_bounded() -> None:
    rates = ArrivalRates(half_life_s=10.0, max_known=100)
    for second in range(1000):
        rates.count("steady", float(second))
    assert rates.per_s("steady", 999.0) == pytest.approx(1.0, rel=0.05)

    for number in range(1000):
        rates.count(f"once-{number}", 1000.0)

    assert len(rates) <= 100
    assert rates.octaves("steady") > rates.octaves("once-999")


class EvictionMachine(RuleBasedStateMachine):
    """Adapters and prefixes come, are used and give way; one that goes is worth no more than any that stays."""

    @initialize(num_pages=st.integers(4, 12), block_s=st.floats(1e-4, 1e-1), page_s=st.floats(1e-4, 1e-1))
    def start(self, num_pages: int, block_s: float, page_s: float) -> None:
        self.bench = Bench(num_pages)
        self.bench.make_costs(block_s=block_s, page_s=page_s)
        self.leases: list[str] = []
        self.held: list[Pages] = []

    digests = st.sampled_from("abcd")

    @rule(digest=digests, num_pages=st.integers(1, 3))
    def bring(self, digest: str, num_pages: int) -> None:
        cache, bench = self.bench.cache, self.bench
        cache.states.count_arrival(digest)
        if cache.state_of(digest) is ResidencyState.ABSENT:
            slots = bench.arena.allocate(num_pages)
            assert slots is not None
            cache.image_arrived(fake_spec(digest), slots)
        if cache.state_of(digest) is ResidencyState.IN_ARENA:
            pages = cache.states.num_pages_of(digest) or 0
            if bench.eviction.make_room(pages, anyone) is Room.NOW:
                measured_s = cache.ranking.costs.copy_s_per_page
                assert cache.load(digest, anyone) is Room.NOW
                cache.load_finished(digest)
                cache.ranking.costs.copy_s_per_page = measured_s  # the bench's clock teaches nothing

    @rule(name=st.sampled_from("pqrst"))
    def use_prefix(self, name: str) -> None:
        if self.bench.has_prefix(name) or self.bench.eviction.make_room(1, anyone) is Room.NOW:
            self.bench.add_prefix(name)

    @rule(digest=digests)
    def lease(self, digest: str) -> None:
        if self.bench.has_adapter(digest):
            self.bench.cache.lease(digest)
            self.leases.append(digest)

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.bench.cache.release(self.leases.pop(), -1)

    @rule(after_s=st.floats(0, 100))
    def wait(self, after_s: float) -> None:
        self.bench.now_s += after_s

    @rule(num_pages=st.integers(1, 6))
    def take_room(self, num_pages: int) -> None:
        bench = self.bench
        before = self._worths()
        free = bench.pool.num_free
        room = bench.eviction.make_room(num_pages, anyone)
        gone = {name: worth for name, worth in before.items() if name not in self._worths()}
        if room is Room.NO:
            assert not gone
            return
        assert bench.pool.num_free >= num_pages
        if num_pages <= free:
            assert not gone
        kept = [worth for name, worth in before.items() if name not in gone]
        if gone and kept:
            assert max(gone.values()) <= min(kept) + 1e-6
        self.held.append(bench.pool.allocate(num_pages, PageOwner.KV))

    @precondition(lambda self: self.held)
    @rule()
    def give_back(self) -> None:
        self.bench.pool.release(self.held.pop(), -1)

    def _worths(self) -> dict[str, float]:
        """Worth per page of everything that may go, computed from scratch."""
        bench = self.bench
        block_cost = np.log2(BLOCK * bench.costs.prefill_s_per_token)
        worths = {
            key.decode(): float(bench.prefix._cold.worth_of(np.array([page]))[0] + block_cost)
            for key, page in bench.prefix._pages.items()
            if bench.pool.is_cached(np.array([page]))[0]
        }
        for digest in "abcd":
            if bench.has_adapter(digest) and digest not in self.leases:
                worths[digest] = bench.cache.ranking.rates.octaves(digest) + float(
                    np.log2(bench.cache.ranking.costs.copy_s_per_page)
                )
        return worths

    @invariant()
    def accounts_are_whole(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.pool.check_integrity()
        self.bench.cache.check_integrity()
        self.bench.prefix.check_integrity()
        for digest in self.leases:
            assert self.bench.has_adapter(digest)

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.arena.close()


EvictionMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEvictionMachine = EvictionMachine.TestCase
