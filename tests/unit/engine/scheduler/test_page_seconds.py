"""Page-seconds of requests: a page's seconds are shared equally, and all of them add up to the pool's own integral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_engine.pages.page_pool import PageOwner, PagePool
from support.scheduler_rig import Rig, make_submission

if TYPE_CHECKING:
    from loraplex_engine.messages import Ended


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


class TestPool:
    def test_a_page_of_one_sequence_costs_the_seconds_that_it_is_held(self) -> None:
        clock = Clock()
        pool = PagePool(8, clock)

        first = pool.allocate(2, PageOwner.KV)
        clock.now_s = 3.0
        more = pool.allocate(1, PageOwner.KV)
        clock.now_s = 5.0

        assert pool.release(np.concatenate([first, more]), -1) == 2 * 5.0 + 2.0
        assert pool.page_seconds[PageOwner.KV].read() == 12.0

    def test_a_shared_page_costs_each_of_its_sequences_an_equal_part(self) -> None:
        clock = Clock()
        pool = PagePool(8, clock)
        page = pool.allocate(1, PageOwner.KV)
        pool.publish(page)

        clock.now_s = 4.0
        before = pool.share(page)
        clock.now_s = 10.0
        second = pool.release(page, -1) - before
        clock.now_s = 11.0
        first = pool.release(page, -1)

        assert (first, second) == (4.0 + 3.0 + 1.0, 3.0)
        assert first + second == pool.page_seconds[PageOwner.KV].read()

    def test_a_cached_page_costs_no_sequence(self) -> None:
        clock = Clock()
        pool = PagePool(8, clock)
        page = pool.allocate(1, PageOwner.KV)
        pool.publish(page)
        pool.release(page, -1)

        clock.now_s = 100.0
        before = pool.share(page)
        clock.now_s = 101.0

        assert pool.release(page, -1) - before == 1.0
        assert pool.page_seconds[PageOwner.CACHED].read() == 100.0

    def test_a_page_that_is_used_again_begins_at_zero(self) -> None:
        clock = Clock()
        pool = PagePool(1, clock)
        page = pool.allocate(1, PageOwner.KV)
        clock.now_s = 7.0
        pool.release(page, -1)

        page = pool.allocate(1, PageOwner.KV)
        clock.now_s = 9.0

        assert pool.release(page, -1) == 2.0


class Integrated:
    """Adds up the pool's pages over time from outside, turn by turn."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.kv = self.leased = 0.0

    def turn(self, *, pause_s: float = 0.0) -> bool:
        rig = self.rig
        rig.step_s = 0.0
        has_step = rig.turn()
        statuses = rig.cache.states.statuses()
        self.kv += rig.pool.num_kv * pause_s
        self.leased += sum(status.num_pages for status in statuses if status.num_leases) * pause_s
        rig.now_s += pause_s
        return has_step


def ends(rig: Rig) -> list[Ended]:
    return [client.end for client in rig.all_clients if client.end is not None]


class TestRequests:
    @pytest.mark.parametrize("seed", range(3))
    def test_requests_page_seconds_add_up_to_the_pools_own_integral(self, seed: int) -> None:
        rig = Rig(num_pages=24, max_num_seqs=6)  # small: requests are preempted
        random, integrated = np.random.default_rng(seed), Integrated(rig)
        adapters = [None, "a" * 64, "b" * 64]

        for number in range(60):
            prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9][: int(random.integers(1, 10))]  # equal beginnings: blocks are shared
            adapter = adapters[int(random.integers(3))]
            length = int(random.integers(1, 30))
            rig.submit(make_submission(slot=number, prompt=prompt, adapter=adapter, max_new_tokens=length))
            for digest in rig.wanted:
                rig.deliver(digest, num_pages=3)
            if number % 7 == 6:
                rig.scheduler.abort(1, number - int(random.integers(3)))
            for _ in range(int(random.integers(4))):
                integrated.turn(pause_s=float(random.exponential(0.02)))
        while rig.scheduler.num_open:
            for digest in rig.wanted:
                rig.deliver(digest, num_pages=3)
            integrated.turn(pause_s=0.01)

        assert rig.scheduler.counters.num_preemptions > 0
        assert rig.scheduler.counters.num_cached_tokens > 0
        assert len(ends(rig)) == 60
        assert sum(end.kv_page_s for end in ends(rig)) == pytest.approx(integrated.kv, rel=1e-9)
        assert rig.pool.page_seconds[PageOwner.KV].read() == pytest.approx(integrated.kv, rel=1e-9)
        assert sum(end.adapter_page_s for end in ends(rig)) == pytest.approx(integrated.leased, rel=1e-9)
        assert rig.scheduler.book.leases.total.read() == pytest.approx(integrated.leased, rel=1e-9)
        assert all(end.kv_page_s >= 0 and end.adapter_page_s >= 0 for end in ends(rig))

    def test_a_request_that_never_ran_has_used_nothing(self) -> None:
        rig = Rig()
        client = rig.submit(make_submission(adapter="a" * 64))

        rig.now_s += 10.0
        rig.scheduler.abort(1, 0)
        rig.take_outputs()

        assert client.end is not None
        assert (client.end.kv_page_s, client.end.adapter_page_s) == (0.0, 0.0)

    def test_two_requests_of_one_adapter_share_its_seconds(self) -> None:
        rig = Rig()
        digest = "a" * 64
        clients = [rig.submit(make_submission(slot=slot, adapter=digest, max_new_tokens=5)) for slot in range(2)]
        rig.turn()
        rig.deliver(digest, num_pages=4)
        integrated = Integrated(rig)
        while rig.scheduler.num_open:
            integrated.turn(pause_s=0.5)

        first, second = (client.end for client in clients)
        assert first is not None
        assert second is not None
        assert first.adapter_page_s == pytest.approx(second.adapter_page_s)
        assert first.adapter_page_s + second.adapter_page_s == pytest.approx(integrated.leased)
