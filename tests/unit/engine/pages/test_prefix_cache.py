"""The prefix cache over the page pool: what is found, shared, kept and given up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex_engine.pages.page_pool import PageOwner, PagePool, Pages
from loraplex_engine.pages.prefix_cache import PrefixCache

HALF_LIFE_S = 10.0


def keys_of(text: str) -> list[bytes]:
    """Name each beginning of a text: a stand-in for `BlockKeys` whose names can be read."""
    return [text[: end + 1].encode() for end in range(len(text))]


class Bench:
    def __init__(self, num_pages: int = 8) -> None:
        self.pool = PagePool(num_pages)
        self.prefix = PrefixCache(self.pool, half_life_s=HALF_LIFE_S)

    def compute(self, text: str) -> Pages:
        """Have a sequence compute a text, sharing what is there; returns its pages."""
        found = self.prefix.match(keys_of(text), len(text))
        self.pool.share(found)
        pages = np.concatenate([found, self.pool.allocate(len(text) - len(found), PageOwner.KV)])
        self.prefix.publish(keys_of(text), pages)
        return pages

    def leave(self, text: str, pages: Pages, now_s: float, last_step: int = -1) -> None:
        self.prefix.leave(keys_of(text), now_s)
        self.pool.release(pages, last_step)

    def num_found(self, text: str) -> int:
        return len(self.prefix.match(keys_of(text), len(text)))

    def check(self) -> None:
        self.pool.check_integrity()
        self.prefix.check_integrity()


def test_equal_beginnings_share_pages_without_a_copy() -> None:
    bench = Bench()

    first = bench.compute("abcd")
    second = bench.compute("abxy")

    assert second[:2].tolist() == first[:2].tolist()
    assert set(second[2:].tolist()).isdisjoint(first.tolist())
    assert bench.pool.num_kv == 6
    bench.check()


def test_a_shared_page_stays_until_its_last_sequence_has_left() -> None:
    bench = Bench()
    first, second = bench.compute("ab"), bench.compute("ab")

    bench.leave("ab", first, 0.0)
    assert (bench.pool.num_kv, bench.pool.num_cached) == (2, 0)
    assert bench.prefix.evict(8, math.inf) == 0

    bench.leave("ab", second, 1.0)
    assert (bench.pool.num_kv, bench.pool.num_cached) == (0, 2)
    assert bench.num_found("abc") == 2


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    bench = Bench()
    bench.leave("abcdef", bench.compute("abcdef"), 0.0)

    for left in range(5, -1, -1):
        assert bench.prefix.evict(1, math.inf) == 1
        assert bench.num_found("abcdef") == left
    assert bench.pool.num_free == bench.pool.num_pages


def test_what_is_used_often_outlasts_what_was_used_last() -> None:
    bench = Bench()
    for moment in range(4):
        bench.leave("a", bench.compute("a"), float(moment))
    bench.leave("b", bench.compute("b"), 4.0)

    bench.prefix.evict(1, math.inf)

    assert (bench.num_found("a"), bench.num_found("b")) == (1, 0)


def test_use_fades_with_the_half_life() -> None:
    bench = Bench()
    for _ in range(4):
        bench.leave("a", bench.compute("a"), 0.0)  # four uses count as one after two half-lives

    bench.leave("b", bench.compute("b"), 2 * HALF_LIFE_S + 1)
    bench.prefix.evict(1, math.inf)

    assert (bench.num_found("a"), bench.num_found("b")) == (0, 1)


def test_nothing_worth_more_than_the_bound_is_evicted() -> None:
    bench = Bench()
    bench.leave("a", bench.compute("a"), 0.0)
    bench.leave("b", bench.compute("b"), 10 * HALF_LIFE_S)

    assert bench.prefix.evict(8, 5.0) == 1
    assert bench.num_found("b") == 1
    assert bench.prefix.least_worth == pytest.approx(10.0)


def test_an_evicted_page_is_free_only_after_the_last_step_that_may_read_it() -> None:
    bench = Bench(num_pages=2)
    bench.leave("ab", bench.compute("ab"), 0.0, last_step=3)

    bench.prefix.evict(2, math.inf)
    assert (bench.pool.num_free, bench.pool.num_retiring) == (0, 2)
    bench.pool.complete(3)

    assert bench.pool.num_free == 2


def test_a_block_computed_twice_has_one_page_and_the_other_is_freed() -> None:
    bench = Bench()
    first, second = bench.pool.allocate(1, PageOwner.KV), bench.pool.allocate(1, PageOwner.KV)
    bench.prefix.publish(keys_of("a"), first)
    bench.prefix.publish(keys_of("a"), second)

    bench.leave("a", first, 0.0)
    bench.leave("a", second, 0.0)

    assert (bench.pool.num_cached, bench.pool.num_free) == (1, 7)
    bench.check()


def test_eviction_is_in_order_of_worth_with_thousands_of_pages_that_come_back_in_between() -> None:
    rng = np.random.default_rng(0)
    bench = Bench(num_pages=4000)
    used: dict[str, list[float]] = {}
    now_s = 0.0
    for number in range(3000):
        text = chr(1000 + number)
        used[text] = [now_s]
        bench.leave(text, bench.compute(text), now_s)
        now_s += 0.01
    evicted_worth = -math.inf

    def worth(text: str) -> float:
        return float(np.logaddexp2.reduce(np.array(used[text]) / HALF_LIFE_S))

    for _ in range(300):
        text = rng.choice(list(used))
        used[text].append(now_s)
        bench.leave(text, bench.compute(text), now_s)
        before = set(used)
        bench.prefix.evict(5, math.inf)
        gone = [text for text in before if not bench.num_found(text)]
        least_kept = min(worth(text) for text in before if text not in gone)
        evicted_worth = max(worth(text) for text in gone)
        assert evicted_worth <= least_kept + 1e-6
        for text in gone:
            del used[text]
        now_s += 0.01


@dataclass
class _Sequence:
    text: str
    pages: Pages


class PrefixCacheMachine(RuleBasedStateMachine):
    """Any history of sequences that compute, share, leave and give way, with steps in flight."""

    @initialize(num_pages=st.integers(3, 16))
    def start(self, num_pages: int) -> None:
        self.bench = Bench(num_pages)
        self.running: list[_Sequence] = []
        self.contents: dict[int, str] = {}  # page -> beginning it holds
        self.now_s = 0.0
        self.step = 0

    @rule(text=st.text("ab", min_size=1, max_size=5))
    def compute(self, text: str) -> None:
        bench = self.bench
        found = bench.prefix.match(keys_of(text), len(text))
        for block, page in enumerate(found.tolist()):
            assert self.contents[page] == text[: block + 1], "a page of another beginning was found"
        bench.pool.share(found)
        missing = len(text) - len(found)
        bench.prefix.evict(max(0, missing - bench.pool.num_free), math.inf)
        if missing > bench.pool.num_free:
            bench.pool.release(found, -1)
            return
        pages = np.concatenate([found, bench.pool.allocate(missing, PageOwner.KV)])
        for block in range(len(found), len(text)):
            self.contents[int(pages[block])] = text[: block + 1]
        bench.prefix.publish(keys_of(text), pages)
        self.running.append(_Sequence(text, pages))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), after_s=st.floats(0, 30))
    def leave(self, data: st.DataObject, after_s: float) -> None:
        self.now_s += after_s
        sequence = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.bench.leave(sequence.text, sequence.pages, self.now_s, self.step)

    @rule(most=st.integers(1, 6))
    def evict(self, most: int) -> None:
        held = self.bench.pool.num_kv
        num_cached = self.bench.pool.num_cached
        assert self.bench.prefix.evict(most, math.inf) == min(most, num_cached)
        assert self.bench.pool.num_kv == held

    @rule()
    def complete(self) -> None:
        self.bench.pool.complete(self.step)
        self.step += 1

    @invariant()
    def accounts_are_whole_and_no_prefix_lost_its_beginning(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.check()
        held = [page for sequence in self.running for page in sequence.pages.tolist()]
        self.bench.pool.check_holds(np.array(held, dtype=np.int64))
        for key in self.bench.prefix._pages:
            text = key.decode()
            assert self.bench.num_found(text) == len(text)


PrefixCacheMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPrefixCacheMachine = PrefixCacheMachine.TestCase
