"""The host arena: shared memory, slots, and who waits for them."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_engine import arena as arena_module
from loraplex_engine.adapter_cache import AdapterCache
from loraplex_engine.arena import HEADER_BYTES, HostArena
from loraplex_engine.arena_grants import ArenaGrants
from loraplex_engine.messages import ResidencyState
from loraplex_engine.page_pool import PagePool
from loraplex_engine.request import Request, make_request
from loraplex_engine.waiting_queue import WaitingQueue
from support.fake_runner import fake_spec
from support.scheduler_rig import make_submission


def test_another_process_finds_nonce_and_slots_through_the_file() -> None:
    arena = HostArena(4, 64)
    with open(f"/proc/{os.getpid()}/fd/{arena.fd}", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        assert memory[:32] == arena.nonce
        memory[HEADER_BYTES + 2 * 64 : HEADER_BYTES + 3 * 64] = bytes(range(64))

    assert arena.view[2].tolist() == list(range(64))
    arena.close()


def test_slots_are_neighbours_if_there_is_a_gap_for_them() -> None:
    arena = HostArena(8, 64)
    first, second, third = arena.allocate(2), arena.allocate(3), arena.allocate(3)
    assert first is not None
    assert second is not None
    assert third is not None
    arena.free(first)
    arena.free(third)

    slots = arena.allocate(3)

    assert slots == (5, 6, 7)
    assert np.shares_memory(arena.pages(slots), arena.view)
    arena.close()


@given(
    operations=st.lists(st.tuples(st.booleans(), st.integers(1, 7)), max_size=60), window=st.sampled_from([1, 4, 64])
)
def test_an_allocation_is_of_neighbours_wherever_there_is_such_a_gap(
    operations: list[tuple[bool, int]], window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena_module, "_WINDOW_SLOTS", window)
        arena = HostArena(24, 64)
        held: list[tuple[int, ...]] = []
        for frees, size in operations:
            if frees and held:
                arena.free(held.pop(size % len(held)))
                continue
            taken = {slot for slots in held for slot in slots}
            gaps = [start for start in range(25 - size) if taken.isdisjoint(range(start, start + size))]
            slots = arena.allocate(size)
            assert (slots is None) == (24 - len(taken) < size)
            if slots is not None:
                assert taken.isdisjoint(slots)
                assert len(set(slots)) == size
                assert not gaps or slots == tuple(range(slots[0], slots[0] + size))
                held.append(slots)
            arena.check_integrity()
        arena.close()


def test_scattered_slots_serve_too() -> None:
    arena = HostArena(4, 64)
    every = arena.allocate(4)
    assert every is not None
    arena.free([0, 2])
    slots = arena.allocate(2)
    assert slots == (0, 2)
    arena.view[0], arena.view[2] = 7, 9

    pages = arena.pages(slots)

    assert pages[:, 0].tolist() == [7, 9]
    arena.close()


def test_an_arena_without_room_says_none() -> None:
    arena = HostArena(2, 64)

    assert arena.allocate(3) is None
    assert arena.num_free == 2
    arena.close()


def test_freeing_twice_raises() -> None:
    arena = HostArena(2, 64)
    slots = arena.allocate(1)
    assert slots is not None
    arena.free(slots)

    with pytest.raises(RuntimeError, match="freed twice"):
        arena.free(slots)
    arena.check_integrity()
    arena.close()


def test_closing_twice_and_under_a_view_is_harmless() -> None:
    arena = HostArena(2, 64)
    view = arena.view
    fd = arena.fd

    arena.close()
    arena.close()

    view[0] = 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class Bench:
    """A cache over an arena of four slots, and a queue."""

    def __init__(self) -> None:
        self.arena = HostArena(4, 64)
        self.now_s = 0.0
        self.queue = WaitingQueue()
        self.cache = AdapterCache(
            pool=PagePool(8), arena=self.arena, max_resident=8, emit=lambda _: None, clock=lambda: self.now_s
        )
        self.grants = ArenaGrants(cache=self.cache, arena=self.arena, queue=self.queue)

    def ask(self, digest: str, num_pages: int, *, is_wanted: bool = True) -> Future[tuple[int, ...] | None]:
        self.now_s += 1
        if is_wanted and self.cache.state_of(digest) is ResidencyState.ABSENT:
            self.cache.want(digest, None)
        future: Future[tuple[int, ...] | None] = Future()
        self.grants.ask(digest, num_pages, is_wanted=is_wanted, future=future)
        return future

    def wait_with(self, digest: str) -> Request:
        """Let a request wait with an adapter."""
        request = make_request(make_submission(adapter=digest), number=0, now_s=0.0, max_model_len=64)
        self.queue.add(request)
        return request

    def hold(self, digest: str, num_pages: int) -> None:
        slots = self.ask(digest, num_pages).result(0)
        assert slots is not None
        self.cache.image_arrived(fake_spec(digest), slots)


def test_a_wanted_image_takes_the_place_of_the_one_least_recently_used() -> None:
    bench = Bench()
    bench.hold("old", 2)
    bench.hold("new", 2)

    slots = bench.ask("wanted", 2).result(0)

    assert slots is not None
    assert bench.cache.state_of("old") is ResidencyState.ABSENT
    assert bench.cache.state_of("new") is ResidencyState.IN_ARENA
    bench.arena.close()


def test_an_image_that_a_request_waits_with_stays_and_the_demand_waits() -> None:
    bench = Bench()
    bench.hold("a", 3)
    waiting = bench.wait_with("a")

    future = bench.ask("b", 2)
    assert not future.done()

    bench.queue.remove(waiting)
    bench.grants.serve()
    assert future.result(0) is not None
    bench.arena.close()


def test_an_image_being_loaded_is_locked_and_a_resident_one_only_loses_its_copy() -> None:
    bench = Bench()
    bench.hold("a", 3)
    bench.cache.load("a", lambda _: False)

    future = bench.ask("b", 2)
    assert not future.done()

    bench.cache.load_finished("a")
    bench.grants.serve()
    assert future.result(0) is not None
    assert bench.cache.state_of("a") is ResidencyState.RESIDENT
    assert not bench.cache.status("a").is_in_arena
    bench.arena.close()


def test_an_unsolicited_image_gets_idle_room_or_nothing() -> None:
    bench = Bench()
    bench.hold("a", 3)

    assert bench.ask("guess", 2, is_wanted=False).result(0) is None
    assert bench.ask("guess", 1, is_wanted=False).result(0) is not None
    assert bench.ask("a", 1, is_wanted=False).result(0) is None
    bench.arena.close()


def test_a_cancelled_demand_makes_way_for_the_next() -> None:
    bench = Bench()
    bench.hold("a", 4)
    waiting = bench.wait_with("a")
    first, second = bench.ask("b", 4), bench.ask("c", 1)

    first.cancel()
    bench.queue.remove(waiting)
    bench.grants.serve()

    assert second.result(0) is not None
    assert bench.arena.num_free == 3
    bench.arena.close()


def test_a_demand_that_can_never_be_met_gets_nothing() -> None:
    bench = Bench()

    assert bench.ask("huge", 5).result(0) is None
    bench.arena.close()


def test_ending_resolves_every_demand() -> None:
    bench = Bench()
    bench.hold("a", 4)
    bench.wait_with("a")
    future = bench.ask("b", 1)

    bench.grants.cancel()

    assert future.result(0) is None
    bench.arena.close()
