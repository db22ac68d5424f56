"""Which adapters come to the device, when and in which order: the policies on a whole scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_engine.messages import Priority, ResidencyState, WantImage
from loraplex_engine.scheduler.warming import Warming
from support.scheduler_rig import Rig, make_submission, solo

if TYPE_CHECKING:
    import pytest

STEP_S = 0.01


def test_the_store_hears_of_the_deadline_and_of_an_earlier_one() -> None:
    rig = Rig()
    rig.submit(make_submission(slot=0, adapter="a", deadline_s=rig.now_s + 50))
    rig.submit(make_submission(slot=1, adapter="a", deadline_s=rig.now_s + 90))
    rig.submit(make_submission(slot=2, adapter="a", deadline_s=rig.now_s + 20))
    rig.turn()

    wants = [event for event in rig.store_events if isinstance(event, WantImage)]
    assert wants == [WantImage("a", 150.0), WantImage("a", 120.0)]


def test_loads_are_handed_over_the_most_urgent_first() -> None:
    rig = Rig(num_pages=32, max_num_seqs=4)
    for slot, (digest, left_s) in enumerate([("late", 90.0), ("soon", 20.0), ("never", None), ("first", 10.0)]):
        deadline = {} if left_s is None else {"deadline_s": rig.now_s + left_s}
        rig.submit(make_submission(slot=slot, adapter=digest, **deadline))  # type: ignore[arg-type]
        rig.deliver(digest)

    rig.scheduler.schedule()

    assert [load.digest for load in rig.cache.loads.take_loads()] == ["first", "soon", "late", "never"]


def test_adapters_of_the_next_in_order_are_loaded_while_the_batch_is_full_but_not_of_the_whole_queue() -> None:
    rig = Rig(num_pages=64, num_arena_slots=64, max_num_seqs=1, loads_at_once=True)
    rig.submit(make_submission(slot=0, max_new_tokens=40))
    rig.turn()
    for slot in range(1, 31):
        rig.submit(make_submission(slot=slot, adapter=f"adapter-{slot}", max_new_tokens=2))
        rig.deliver(f"adapter-{slot}")
    for _ in range(5):
        rig.turn()

    resident = [s.digest for s in rig.cache.states.statuses() if s.state is ResidencyState.RESIDENT]
    assert "adapter-1" in resident
    assert 4 <= len(resident) <= 12
    rig.run()
    rig.check_finished()


def test_idle_room_keeps_likely_adapters_warm_and_gives_them_up_to_sequences_at_once() -> None:
    rig = Rig(num_pages=12, block_tokens=4, num_arena_slots=32, max_model_len=64, enable_prefix_cache=False)
    for slot in range(3):
        rig.submit(make_submission(slot=slot, adapter="a", max_new_tokens=1))
        rig.deliver("a", 4)
        rig.run()
    rig.operations.evict("a")
    rig.cache.states.count_arrival("a")
    rig.run()
    assert rig.cache.state_of("a") is ResidencyState.RESIDENT  # no request asked, but it is likely and there is room

    large = rig.submit(make_submission(slot=10, prompt=[1] * 30, max_new_tokens=18))  # 12 pages
    rig.turn()

    assert rig.running_slots == [10]
    rig.run()
    assert large.tokens == solo(large.submission, 18)
    assert rig.cache.warm.num_wasted_pages == 4


def test_a_warmed_adapter_that_is_used_counts_as_useful_and_one_asked_for_on_its_way_as_late() -> None:
    rig = Rig(num_pages=32, loads_at_once=False)
    rig.deliver("useful", 2, is_wanted=False)
    rig.turn()
    rig.runner.finish_load(rig.runner.loading[0])
    rig.turn()
    rig.submit(make_submission(slot=0, adapter="useful"))
    rig.run()
    assert rig.cache.warm.num_useful_pages == 2

    rig.deliver("late", 3, is_wanted=False)
    rig.turn()
    rig.submit(make_submission(slot=1, adapter="late"))
    rig.turn()

    assert rig.cache.warm.num_late_pages == 3
    rig.run()
    rig.check_finished()
    assert rig.cache.warm.num_wasted_pages == 0


def test_an_adapter_taken_off_by_an_operator_is_not_warmed_again_by_itself() -> None:
    rig = Rig(num_pages=32)
    rig.submit(make_submission(slot=0, adapter="a"))
    rig.deliver("a", 2)
    rig.run()

    rig.operations.evict("a")
    rig.run()

    assert rig.cache.state_of("a") is ResidencyState.IN_ARENA


def test_two_adapters_of_equal_worth_do_not_take_turns_in_one_place() -> None:
    rig = Rig(num_pages=6, num_arena_slots=32, enable_prefix_cache=False)
    for slot, digest in enumerate(["a", "b"] * 3):
        rig.submit(make_submission(slot=slot, adapter=digest, max_new_tokens=2))
        rig.deliver(digest, 4)
        rig.run()
    loads = len([state for digest in "ab" for state in rig.states_of(digest) if state is ResidencyState.LOADING])

    for _ in range(50):
        rig.turn()

    again = len([state for digest in "ab" for state in rig.states_of(digest) if state is ResidencyState.LOADING])
    assert again == loads


def test_claims_of_requests_further_back_never_keep_places_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order changes with every charge: the request that is first now gets its adapter although others claim theirs."""
    monkeypatch.setattr(Warming, "warm", lambda _self: None)
    rig = Rig(
        num_pages=2000, num_arena_slots=600, max_num_seqs=64, max_num_batched_tokens=256, max_resident_adapters=600
    )
    rng = np.random.default_rng(0)
    for slot in range(500):
        submission = make_submission(
            slot=slot,
            prompt=[slot % 50] * int(rng.integers(1, 60)),
            adapter=f"adapter-{slot}",
            fairness_key=str(slot % 64),
            max_new_tokens=1000,
        )
        rig.submit(submission)
        rig.deliver(f"adapter-{slot}")
    for _ in range(60):
        rig.turn(check=False)
        if len(rig.scheduler.batch) == 64:
            break

    assert len(rig.scheduler.batch) == 64


def test_adapters_of_one_recipe_share_what_is_known_of_their_modules() -> None:
    rig = Rig(num_pages=32)
    for digest in "abc":
        rig.deliver(digest, 1, is_wanted=False)
    rig.turn()
    (first, *others) = [adapter.spec.modules for adapter in rig.cache.states.all if adapter.spec]

    assert all(modules is first for modules in others)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.sampled_from([1, 2]))
def test_whoever_waits_in_a_thrashing_pool_is_served_within_a_bound(seed: int, depth: int) -> None:
    """A pool that holds two adapters, ten in use, tenants that flood: the victim's wait has a bound in steps."""
    rng = np.random.default_rng(seed)
    rig = Rig(
        num_pages=10,
        block_tokens=4,
        num_arena_slots=64,
        max_num_seqs=3,
        depth=depth,
        step_s=STEP_S,
        max_pass_over_s=0.2,
        loads_at_once=True,
        growth_quantile=float(rng.choice([0.0, 0.9])),
    )
    for number in range(10):
        rig.deliver(f"adapter-{number}", 2, is_wanted=False)
    victim_key = "victim"
    victim = None
    began_s = 0.0
    slot = 0
    for turn in range(3000):
        if turn == 40:
            victim = rig.submit(
                make_submission(
                    slot=100_000,
                    adapter="adapter-9",
                    prompt=[7] * 12,
                    max_new_tokens=8,
                    fairness_key=victim_key,
                    priority=Priority.NORMAL,
                )
            )
            began_s = rig.now_s
        if len(rig.scheduler.queue) < 12:
            rig.submit(
                make_submission(
                    slot=slot,
                    adapter=f"adapter-{rng.integers(0, 9)}",
                    prompt=[int(rng.integers(0, 50))] * int(rng.integers(1, 9)),
                    max_new_tokens=int(rng.integers(1, 12)),
                    fairness_key=f"tenant-{rng.integers(0, 3)}",
                )
            )
            slot += 1
        rig.turn(check=turn % 20 == 0)
        if victim is not None and victim.end is not None:
            break
    assert victim is not None
    assert victim.tokens == solo(victim.submission, 8)
    # a request of each other tenant before its turn, its reservation at the latest after max_pass_over_s, all that run
    # (twice 12 tokens at most: one may have been admitted just before), then its own tokens and its adapter's load
    assert rig.now_s - began_s <= 0.2 + (3 * 12 + 2 * 12 + 8 + 16) * STEP_S
