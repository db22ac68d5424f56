"""Residency: states, leases, generations, eviction, pins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import AdapterInUseError, AdapterNotFoundError, ConflictError, SaturatedError
from loraplex_engine.adapters.adapter import TRANSITIONS, Adapter, Room
from loraplex_engine.messages import ResidencyState, WantImage
from support.adapter_cache_bench import AdapterCacheBench, anyone

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def bench() -> Iterator[AdapterCacheBench]:
    bench = AdapterCacheBench()
    yield bench
    bench.cache.check_integrity()
    bench.pool.check_integrity()
    bench.arena.check_integrity()
    bench.arena.close()


def test_an_adapter_goes_from_wanted_to_resident(bench: AdapterCacheBench) -> None:
    bench.cache.states.want("a", 5.0)
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


def test_only_a_resident_adapter_can_be_leased(bench: AdapterCacheBench) -> None:
    bench.put_in_arena("a")

    with pytest.raises(RuntimeError, match="cannot be leased"):
        bench.cache.lease("a")


def test_a_leased_adapter_is_not_evicted(bench: AdapterCacheBench) -> None:
    bench.make_resident("a", 4)
    bench.cache.lease("a")

    assert bench.cache.reclaim(5, anyone) is Room.NO
    bench.cache.release("a", last_step=-1)
    assert bench.cache.reclaim(5, anyone) is Room.NOW
    assert bench.states("a")[-1] is ResidencyState.IN_ARENA


def test_returning_a_lease_that_was_not_taken_raises(bench: AdapterCacheBench) -> None:
    bench.make_resident("a")

    with pytest.raises(RuntimeError, match="no lease"):
        bench.cache.release("a", last_step=0)


def test_the_least_recently_used_goes_first_and_none_in_vain(bench: AdapterCacheBench) -> None:
    for digest in "abc":
        bench.make_resident(digest, 2)
    bench.cache.lease("a")
    bench.cache.release("a", last_step=-1)

    assert bench.cache.reclaim(100, anyone) is Room.NO
    assert bench.cache.states.num_resident == 3
    assert bench.cache.reclaim(4, anyone) is Room.NOW

    assert bench.cache.state_of("b") is ResidencyState.IN_ARENA
    assert bench.cache.state_of("a") is bench.cache.state_of("c") is ResidencyState.RESIDENT


def test_pages_of_an_adapter_that_a_step_reads_come_soon(bench: AdapterCacheBench) -> None:
    bench.make_resident("a", 6)
    index = bench.cache.lease("a")
    bench.cache.release("a", last_step=3)

    assert bench.cache.reclaim(8, anyone) is Room.SOON
    assert bench.cache.loads.take_unloads() == []
    bench.pool.complete(3)
    bench.cache.complete(3)

    assert bench.cache.reclaim(8, anyone) is Room.NOW
    assert bench.cache.loads.take_unloads() == [index]


def test_a_full_table_evicts_for_its_index(bench: AdapterCacheBench) -> None:
    small = AdapterCacheBench(max_resident=1)
    small.make_resident("a")
    small.put_in_arena("b")

    assert small.cache.load("b", lambda _: False) is Room.NO
    assert small.cache.load("b", anyone) is Room.NOW

    assert small.cache.state_of("a") is ResidencyState.IN_ARENA
    small.arena.close()


def test_an_evicted_adapter_comes_back_from_the_arena_as_a_new_generation(bench: AdapterCacheBench) -> None:
    bench.make_resident("a")
    first = bench.cache.states.status("a").generation

    bench.operations.evict("a")
    assert bench.cache.load("a", anyone) is Room.NOW

    assert bench.cache.states.status("a").generation > first
    assert not any(isinstance(event, WantImage) for event in bench.events)


def test_evicting_a_leased_adapter_drains_it(bench: AdapterCacheBench) -> None:
    bench.make_resident("a", 2)
    bench.cache.lease("a")

    status = bench.operations.evict("a")
    assert status.state is ResidencyState.DRAINING
    with pytest.raises(RuntimeError, match="cannot be leased"):
        bench.cache.lease("a")

    bench.cache.release("a", last_step=-1)
    assert bench.cache.state_of("a") is ResidencyState.IN_ARENA
    assert bench.pool.num_adapter == 0


def test_dropping_an_adapter_that_is_being_loaded_waits_for_the_load(bench: AdapterCacheBench) -> None:
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
def test_a_refused_load_gives_back_pages_index_and_image(bench: AdapterCacheBench, is_dropped: bool) -> None:
    bench.put_in_arena("a", 3)
    bench.cache.states.set_pinned("a", True)
    bench.cache.load("a", anyone)
    if is_dropped:
        bench.cache.drop("a")

    bench.cache.load_refused("a")

    assert bench.cache.state_of("a") is ResidencyState.ABSENT
    assert (bench.pool.num_free, bench.arena.num_free, bench.cache.states.num_pinned) == (8, 32, 0)
    assert not bench.cache.loads.take_unloads(), "an index that was never bound is not unbound"
    bench.make_resident("a")


def test_dropping_frees_device_and_arena_even_of_a_pinned_adapter(bench: AdapterCacheBench) -> None:
    bench.make_resident("a", 2)
    bench.operations.pin("a")

    bench.cache.drop("a")

    assert bench.cache.states.statuses() == []
    assert bench.arena.num_free == 32


def test_a_second_copy_of_an_image_is_freed(bench: AdapterCacheBench) -> None:
    bench.make_resident("a", 2)

    bench.put_in_arena("a", 2)

    assert bench.arena.num_free == 30


def test_a_resident_adapter_gets_its_copy_in_the_arena_back(bench: AdapterCacheBench) -> None:
    bench.make_resident("a", 2)
    bench.cache.evict_images(32, anyone)
    assert not bench.cache.states.status("a").is_in_arena

    bench.put_in_arena("a", 2)
    bench.operations.evict("a")

    assert bench.cache.state_of("a") is ResidencyState.IN_ARENA


def test_an_adapter_that_was_gone_altogether_gives_way_like_any_other(bench: AdapterCacheBench) -> None:
    bench.make_resident("a", 2)
    bench.cache.evict_images(32, anyone)
    bench.operations.evict("a")
    assert bench.cache.state_of("a") is ResidencyState.ABSENT
    bench.make_resident("a", 2)
    generation = bench.cache.states.status("a").generation

    assert bench.cache.reclaim(8, anyone) is Room.NOW

    assert bench.cache.states.status("a").state is ResidencyState.IN_ARENA
    assert bench.cache.states.status("a").generation == generation


def test_pins_are_limited_and_spare_from_eviction(bench: AdapterCacheBench) -> None:
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
    small = AdapterCacheBench(max_resident=3)
    small.make_resident("a")
    small.make_resident("b")
    small.operations.pin("a")

    with pytest.raises(SaturatedError, match="needs 1 places, 1 are pinned and 1 of 3 may be"):
        small.operations.pin("b")
    small.arena.close()


def test_what_is_not_held_cannot_be_operated_on(bench: AdapterCacheBench) -> None:
    bench.cache.states.want("a", None)

    for operation in (bench.operations.pin, bench.operations.unpin, bench.operations.evict):
        with pytest.raises(AdapterNotFoundError):
            operation("a")


def test_evicting_another_generation_is_a_conflict(bench: AdapterCacheBench) -> None:
    bench.make_resident("a")

    with pytest.raises(ConflictError):
        bench.operations.evict("a", require_generation=99)


def test_a_refusal_makes_a_wanted_adapter_absent_and_nothing_else(bench: AdapterCacheBench) -> None:
    bench.cache.states.want("a", None)
    bench.make_resident("b")

    bench.cache.states.image_refused("a")
    bench.cache.states.image_refused("b")
    bench.cache.states.image_refused("c")

    assert [status.digest for status in bench.cache.states.statuses()] == ["b"]


def test_the_load_estimate_follows_what_loads_take(bench: AdapterCacheBench) -> None:
    before = bench.cache.ranking.costs.resident_s
    bench.cache.states.want("a", None)
    bench.now_s += 20

    bench.make_resident("a")

    assert bench.cache.ranking.costs.resident_s > before
