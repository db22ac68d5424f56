"""Which images get slots of the host arena, and in which order."""

from __future__ import annotations

import itertools
from concurrent.futures import Future

from loraplex_engine.adapters.adapter import PATIENCE_S
from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.adapters.cache import AdapterCache
from loraplex_engine.loop.arena_grants import ArenaGrants
from loraplex_engine.messages import AdapterTerm, ResidencyState
from loraplex_engine.pages.page_pool import PagePool
from loraplex_engine.scheduler.request import Request, make_request
from loraplex_engine.scheduler.waiting_queue import WaitingQueue
from support.fake_adapters import fake_spec
from support.scheduler_rig import make_submission


class Bench:
    """A cache over an arena of four slots, and a queue."""

    def __init__(self) -> None:
        self.arena = HostArena(4, 64)
        self.now_s = 0.0
        self.queue = WaitingQueue()
        self.numbers = itertools.count()
        self.cache = AdapterCache(
            pool=PagePool(8), arena=self.arena, max_resident=8, emit=lambda _: None, clock=lambda: self.now_s
        )
        self.grants = ArenaGrants(cache=self.cache, arena=self.arena, queue=self.queue)

    def ask(
        self,
        digest: str,
        num_pages: int,
        *,
        is_wanted: bool = True,
        is_expected: bool = False,
        deadline_s: float | None = None,
    ) -> Future[tuple[int, ...] | None]:
        self.now_s += 1
        if is_wanted and self.cache.state_of(digest) is ResidencyState.ABSENT:
            self.cache.states.want(digest, deadline_s)
        future: Future[tuple[int, ...] | None] = Future()
        self.grants.ask(digest, num_pages, is_wanted=is_wanted, is_expected=is_expected, future=future)
        return future

    def wait_with(self, digest: str, *more: str) -> Request:
        """Let a request wait with an adapter, or with several."""
        submission = make_submission(adapter=digest, more_adapters=tuple(AdapterTerm(each) for each in more))
        request = make_request(submission, number=next(self.numbers), now_s=0.0, max_model_len=64)
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


def test_images_that_wait_for_others_give_way_to_the_request_that_waits_longest() -> None:
    bench = Bench()
    first, second = bench.wait_with("a", "b"), bench.wait_with("c", "d")
    bench.hold("a", 2)
    bench.hold("c", 2)

    last = bench.ask("d", 2)
    assert not last.done(), "neither its own request's image nor that of the oldest request is evicted for it"
    other = bench.ask("b", 2)

    slots = other.result(0)
    assert slots is not None
    assert bench.cache.state_of("c") is ResidencyState.ABSENT
    assert not last.done()
    bench.cache.image_arrived(fake_spec("b"), slots)
    bench.grants.serve()
    assert not last.done(), "all images of the oldest request have come: they stay"
    bench.queue.remove(first)
    bench.grants.serve()
    assert last.result(0) is not None
    bench.queue.remove(second)
    bench.arena.close()


def test_the_image_of_a_request_that_lacks_no_other_gives_way_to_none() -> None:
    bench = Bench()
    bench.wait_with("a", "b")
    bench.wait_with("c")
    bench.hold("c", 3)

    assert not bench.ask("b", 2).done()
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
    assert not bench.cache.states.status("a").is_in_arena
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


def test_the_image_needed_first_gets_the_first_room_and_the_others_follow_in_the_order_they_came() -> None:
    bench = Bench()
    held = [bench.wait_with(digest) for digest in "abcd"]
    for digest in "abcd":
        bench.hold(digest, 1)
    demands = {
        "none": bench.ask("none", 1),
        "late": bench.ask("late", 1, deadline_s=bench.now_s + 9),
        "soon": bench.ask("soon", 1, deadline_s=bench.now_s + 2),
        "next": bench.ask("next", 1),
    }

    granted = []
    for request in held:
        bench.queue.remove(request)
        bench.grants.serve()
        granted += [digest for digest, demand in demands.items() if demand.done() and digest not in granted]

    assert granted == ["soon", "late", "none", "next"]
    bench.arena.close()


def test_a_deadline_that_comes_earlier_moves_the_demand_forward() -> None:
    bench = Bench()
    held = bench.wait_with("a")
    bench.hold("a", 4)
    first, second = bench.ask("b", 4), bench.ask("c", 4)

    bench.cache.asked_for("c", bench.now_s + 1)
    bench.queue.remove(held)
    bench.grants.serve()

    assert (first.done(), second.done()) == (False, True)
    bench.arena.close()


def test_images_needed_earlier_pass_another_no_longer_than_its_patience() -> None:
    bench = Bench()
    held = bench.wait_with("first")
    bench.hold("first", 4)
    patient = bench.ask("patient", 4)
    asked_s = bench.now_s

    for index in range(100):  # each wants the room that the one before it leaves, and cannot wait
        digest = f"urgent-{index}"
        urgent = bench.ask(digest, 4, deadline_s=bench.now_s + 1.5)
        bench.queue.remove(held)
        bench.grants.serve()
        if patient.done():
            break
        bench.cache.image_arrived(fake_spec(digest), urgent.result(0) or ())
        held = bench.wait_with(digest)

    assert PATIENCE_S - 1 <= bench.now_s - asked_s <= PATIENCE_S + 1
    bench.arena.close()


def test_an_image_that_nobody_here_heard_of_gets_nothing_and_disturbs_nobody() -> None:
    bench = Bench()
    held = bench.wait_with("a")
    bench.hold("a", 4)
    wanted = bench.ask("b", 2)
    stray: Future[tuple[int, ...] | None] = Future()

    bench.grants.ask("stray", 1, is_wanted=True, future=stray)
    bench.queue.remove(held)
    bench.grants.serve()

    assert stray.result(0) is None
    assert wanted.result(0) is not None
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


def test_an_expected_image_takes_the_room_of_images_that_no_request_waits_with() -> None:
    bench = Bench()
    bench.hold("idle", 2)
    bench.hold("awaited", 2)
    bench.wait_with("awaited")

    assert bench.ask("unsolicited", 2, is_wanted=False).result(0) is None
    slots = bench.ask("new", 2, is_wanted=False, is_expected=True).result(0)

    assert slots is not None
    assert bench.cache.state_of("idle") is ResidencyState.ABSENT
    assert bench.cache.state_of("awaited") is ResidencyState.IN_ARENA
    assert bench.ask("newer", 3, is_wanted=False, is_expected=True).result(0) is None
    assert bench.ask("too large", 5, is_wanted=False, is_expected=True).result(0) is None
    assert bench.cache.state_of("awaited") is ResidencyState.IN_ARENA


def test_an_expected_image_takes_no_room_that_a_wanted_one_waits_for() -> None:
    bench = Bench()
    bench.hold("awaited", 4)
    waiting = bench.wait_with("awaited")
    wanted = bench.ask("wanted", 2)
    bench.wait_with("wanted")
    bench.queue.remove(waiting)

    assert bench.ask("new", 2, is_wanted=False, is_expected=True).result(0) is None
    assert not wanted.done()
    bench.grants.serve()
    assert wanted.result(0) is not None
