"""The page pool's accounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex_engine.pages.page_pool import PageOwner, PagePool

if TYPE_CHECKING:
    from loraplex_engine.pages.page_pool import Pages


def test_pages_are_distinct_and_counted_by_owner() -> None:
    pool = PagePool(10)

    kv, adapter = pool.allocate(4, PageOwner.KV), pool.allocate(3, PageOwner.ADAPTER)

    assert len({*kv.tolist(), *adapter.tolist()}) == 7
    assert (pool.num_free, pool.num_kv, pool.num_adapter, pool.num_retiring) == (3, 4, 3, 0)
    pool.check_integrity()


def test_a_retired_page_is_free_only_after_its_last_step() -> None:
    pool = PagePool(4)
    pages = pool.allocate(4, PageOwner.KV)

    pool.retire(pages[:2], last_step=7)
    pool.complete(6)
    assert (pool.num_free, pool.num_retiring) == (0, 2)

    pool.complete(7)
    assert (pool.num_free, pool.num_retiring) == (2, 0)


def test_a_page_whose_last_step_is_done_is_free_at_once() -> None:
    pool = PagePool(4)
    pool.complete(3)

    pool.retire(pool.allocate(4, PageOwner.ADAPTER), last_step=3)

    assert pool.num_free == 4


def test_asking_for_more_than_is_free_raises() -> None:
    pool = PagePool(2)

    with pytest.raises(RuntimeError, match="3 pages asked for, 2 free"):
        pool.allocate(3, PageOwner.KV)


def test_retiring_a_page_twice_raises() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2, PageOwner.KV)
    pool.retire(pages, last_step=5)

    with pytest.raises(RuntimeError, match="not all held"):
        pool.retire(pages, last_step=5)


def test_retiring_pages_of_both_kinds_at_once_raises() -> None:
    pool = PagePool(4)
    mixed = np.concatenate([pool.allocate(1, PageOwner.KV), pool.allocate(1, PageOwner.ADAPTER)])

    with pytest.raises(RuntimeError, match="not all held by one owner"):
        pool.retire(mixed, last_step=0)


def test_a_lost_page_is_noticed() -> None:
    pool = PagePool(4)
    pool.allocate(1, PageOwner.KV)
    pool._owners[pool._free[0]] = PageOwner.KV

    with pytest.raises(RuntimeError, match="accounted"):
        pool.check_integrity()


class PagePoolMachine(RuleBasedStateMachine):
    """Any history of allocations, retirements and finished steps."""

    @initialize(num_pages=st.integers(1, 20))
    def start(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.held: list[Pages] = []
        self.retiring: dict[int, int] = {}  # page -> step
        self.completed = -1

    @rule(share=st.floats(0, 1), owner=st.sampled_from([PageOwner.KV, PageOwner.ADAPTER]))
    def allocate(self, share: float, owner: PageOwner) -> None:
        pages = self.pool.allocate(int(share * self.pool.num_free), owner)
        in_use = {page for other in self.held for page in other.tolist()} | set(self.retiring)
        assert in_use.isdisjoint(pages.tolist())
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), ahead=st.integers(-1, 4))
    def retire(self, data: st.DataObject, ahead: int) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.retire(pages, self.completed + ahead)
        if ahead > 0:
            self.retiring.update(dict.fromkeys(pages.tolist(), self.completed + ahead))

    @rule(steps=st.integers(1, 3))
    def complete(self, steps: int) -> None:
        self.completed += steps
        self.pool.complete(self.completed)
        # the pool may keep a page a little longer than its own step, never shorter
        self.retiring = {page: step for page, step in self.retiring.items() if step > self.completed}

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for pages in self.held:
                self.pool.retire(pages, self.completed + 1)
            self.pool.complete(self.completed + 100)
            assert self.pool.num_free == self.pool.num_pages


PagePoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPagePoolMachine = PagePoolMachine.TestCase
