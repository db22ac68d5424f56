"""Virtual token counters: which key is next, what is saved up, what is forgotten."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_engine.scheduler.fair_shares import OUTPUT_WEIGHT, FairShares


def backlog(shares: FairShares, key: str) -> int:
    """Have one request of a key wait, eligible."""
    index = shares.enter(key)
    shares.wait(index)
    shares.become_eligible(index)
    return index


def clear(shares: FairShares, index: int) -> None:
    """Let a key's one waiting request end."""
    shares.cease_to_be_eligible(index)
    shares.cease_to_wait(index)
    shares.leave(index)


def test_a_key_that_comes_back_is_lifted_to_the_lowest_that_waits() -> None:
    shares = FairShares()
    busy, busier = backlog(shares, "busy"), backlog(shares, "busier")
    shares.charge(busy, 100)
    shares.charge(busier, 500)

    late = backlog(shares, "late")

    assert shares.service(late) == 100


def test_a_key_keeps_what_it_owes_when_it_comes_back() -> None:
    shares = FairShares()
    backlog(shares, "idle")
    greedy = backlog(shares, "greedy")
    shares.charge(greedy, 1000)
    clear(shares, greedy)

    assert shares.service(backlog(shares, "greedy")) == 1000


def test_with_nobody_waiting_the_last_that_left_sets_the_level() -> None:
    shares = FairShares()
    last = backlog(shares, "last")
    clear(shares, last)
    shares.charge_outputs(np.array([last, last], dtype=np.int32))  # it still runs

    assert shares.service(backlog(shares, "new")) == 2 * OUTPUT_WEIGHT


def test_parked_requests_neither_set_the_level_nor_lose_their_place() -> None:
    shares = FairShares()
    parked = shares.enter("parked")
    shares.wait(parked)  # it waits for its adapter
    busy = backlog(shares, "busy")
    shares.charge(busy, 100)

    new = backlog(shares, "new")
    shares.become_eligible(parked)

    assert shares.service(new) == 100
    assert shares.service(parked) == 0


def test_keys_without_requests_are_forgotten_only_when_nothing_is_lost_by_it() -> None:
    shares = FairShares()
    busy = backlog(shares, "busy")
    debtor = backlog(shares, "debtor")
    shares.charge(debtor, 10_000)
    clear(shares, debtor)

    for number in range(5000):
        shares.charge(busy, 1)
        clear(shares, backlog(shares, f"passing-{number}"))

    assert len(shares) < 300
    assert shares.service_of("debtor") == 10_000


def test_a_cap_counts_running_requests_of_its_key_alone() -> None:
    shares = FairShares(max_running_per_key=2)
    first, other = shares.enter("first"), shares.enter("other")
    shares.run(first)
    assert not shares.is_capped(first)
    shares.run(first)

    assert shares.is_capped(first)
    assert not shares.is_capped(other)
    shares.cease_to_run(first)
    assert not shares.is_capped(first)


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=5),
    num_rounds=st.integers(10, 200),
)
def test_services_of_keys_that_always_wait_differ_by_one_request_at_most(
    costs: list[tuple[int, int]], num_rounds: int
) -> None:
    """Theorem 4.4 of VTC: the difference is bounded by what one request can cost, however long it goes on."""
    shares = FairShares()
    keys = [backlog(shares, f"key-{number}") for number in range(len(costs))]
    most = max(prompt + OUTPUT_WEIGHT * outputs for prompt, outputs in costs)
    for _ in range(num_rounds):
        chosen = min(keys, key=shares.service)
        prompt, outputs = costs[keys.index(chosen)]
        shares.charge(chosen, prompt)
        shares.charge_outputs(np.array([chosen], dtype=np.int32), outputs)
        services = [shares.service(key) for key in keys]
        assert max(services) - min(services) <= most
