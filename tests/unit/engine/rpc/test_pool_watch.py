"""What a stream of changes tells of a pool is the pool."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.v1 import engine_pb2
from loraplex_common.pool_view import PoolView
from loraplex_engine.loop.pool_reading import Phase, PoolReading, ReadAdapter, ReadRequest
from loraplex_engine.messages import ResidencyState
from loraplex_engine.pages.page_pool import PageOwner
from loraplex_engine.rpc.pool_watch import PoolChanges

NUM_PAGES = 24
HALF_LIFE_S = 60.0


def request(number: int, pages: list[int], phase: Phase = Phase.DECODE) -> ReadRequest:
    return ReadRequest(
        number=number,
        request_id=f"r-{number}",
        phase=phase,
        digests=(),
        fairness_key="me",
        num_prompt=4,
        num_computed=16 * len(pages),
        num_outputs=len(pages),
        num_pages=len(pages),
        age_s=1.5,
    )


def adapter(digest: str, pages: list[int], octaves: float = 0.0) -> ReadAdapter:
    return ReadAdapter(
        digest=digest,
        state=ResidencyState.RESIDENT,
        pages=np.array(pages, dtype=np.intp),
        is_pinned=False,
        num_leases=1,
        generation=1,
        max_rank=8,
        octaves=octaves,
        per_s=0.5,
    )


def reading(kv: dict[int, list[int]], adapters: dict[str, list[int]], cached: list[int]) -> PoolReading:
    """Return a reading: number -> pages of requests, digest -> pages of adapters, pages of cached blocks."""
    owners = np.full(NUM_PAGES, PageOwner.FREE, dtype=np.int8)
    blocks = np.full((len(kv), max(map(len, kv.values()), default=0)), -1, dtype=np.int32)
    for row, pages in enumerate(kv.values()):
        owners[pages] = PageOwner.KV
        blocks[row, : len(pages)] = pages
    for pages in adapters.values():
        owners[pages] = PageOwner.ADAPTER
    owners[cached] = PageOwner.CACHED
    return PoolReading(
        owners=owners,
        running=np.array(list(kv), dtype=np.int64),
        blocks=blocks,
        num_blocks=np.array([len(pages) for pages in kv.values()], dtype=np.int32),
        requests=[request(number, pages) for number, pages in kv.items()],
        num_requests=len(kv),
        adapters=[adapter(digest, pages) for digest, pages in adapters.items()],
        num_adapters=len(adapters),
        half_life_s=HALF_LIFE_S,
    )


@st.composite
def pools(draw: st.DrawFn) -> PoolReading:
    """A pool whose pages are dealt out to requests 0 to 3, adapters a to c, and cached blocks; the rest is free."""
    holders = draw(
        st.lists(st.sampled_from([0, 1, 2, 3, "a", "b", "c", "cached", None]), min_size=NUM_PAGES, max_size=NUM_PAGES)
    )
    of = {holder: [page for page, each in enumerate(holders) if each == holder] for holder in set(holders)}
    kv = {number: pages for number, pages in of.items() if isinstance(number, int)}
    adapters = {name: pages for name, pages in of.items() if name in ("a", "b", "c")}
    return reading(kv, {str(name): pages for name, pages in adapters.items()}, of.get("cached", []))


def check(view: PoolView, read: PoolReading) -> None:
    assert view.owners.tolist() == read.owners.tolist()
    assert sorted(view.requests) == sorted(each.number + 1 for each in read.requests)
    for row, number in enumerate(read.running.tolist()):
        pages = read.blocks[row, : read.num_blocks[row]]
        assert (view.holders[pages] == number + 1).all()
        assert view.requests[number + 1].num_pages == len(pages)
    numbers = {held.adapter.digest: holder for holder, held in view.adapters.items()}
    assert sorted(numbers) == sorted(each.digest for each in read.adapters)
    for each in read.adapters:
        assert (view.holders[each.pages] == numbers[each.digest]).all()


@given(st.lists(pools(), min_size=1, max_size=6))
def test_a_view_that_takes_in_all_changes_is_the_pool(readings: list[PoolReading]) -> None:
    changes, view, late = PoolChanges(), PoolView(), PoolView()
    for each in readings:
        view.apply(changes.since_last(each))
        check(view, each)
    late.apply(view.snapshot())
    check(late, readings[-1])


def test_a_pool_in_which_nothing_happens_is_told_once() -> None:
    changes = PoolChanges()
    pool = reading({7: [1, 2]}, {"a": [4]}, [9])

    first, second = changes.since_last(pool), changes.since_last(pool)

    assert first.snapshot
    assert first.num_pages == NUM_PAGES
    assert second == engine_pb2.PoolChange()


def test_progress_travels_as_numbers_and_a_new_phase_as_the_whole_request() -> None:
    changes = PoolChanges()
    changes.since_last(reading({7: [1, 2]}, {}, []))

    change = changes.since_last(reading({7: [1, 2, 3]}, {}, []))

    assert not change.requests
    assert (list(change.progress_holders), list(change.progress_pages)) == ([8], [3])
    assert (list(change.run_starts), list(change.run_lengths)) == ([3], [1])


def test_how_often_an_adapter_is_asked_for_fades_without_messages() -> None:
    now = [0.0]
    view = PoolView(lambda: now[0])
    view.apply(PoolChanges().since_last(reading({}, {"a": [1]}, [])))
    (holder,) = view.adapters

    now[0] = HALF_LIFE_S

    assert view.requests_per_s(holder) == 0.25
    assert view.snapshot().adapters[0].requests_per_s == 0.25


def test_a_change_of_pages_that_the_pool_does_not_have_is_refused() -> None:
    view = PoolView()
    view.apply(engine_pb2.PoolChange(snapshot=True, num_pages=4))
    beyond = engine_pb2.PoolChange(run_starts=[3], run_lengths=[2], run_owners=[1], run_holders=[1])

    with pytest.raises(ValueError, match="pages 3 to 5 of a pool of 4"):
        view.apply(beyond)
