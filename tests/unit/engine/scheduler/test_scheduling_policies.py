"""Which requests are admitted, and which are ended early: the policies on a whole scheduler."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common.errors import DeadlineError, SloUnreachableError
from loraplex_engine.limits import QueuePolicy
from loraplex_engine.messages import FinishReason
from support.scheduler_rig import Client, Rig, make_submission, solo

STEP_S = 0.01
TOKEN_S = 0.001


def teach_costs(rig: Rig) -> None:
    """Have steps and prefill measured."""
    rig.submit(make_submission(slot=9999, prompt=list(range(16)), max_new_tokens=4))
    rig.run()
    assert rig.scheduler.costs.is_measured


# --- fairness ---


def test_a_key_never_runs_more_requests_than_its_cap_and_others_take_the_places() -> None:
    rig = Rig(num_pages=64, max_num_seqs=6, max_running_per_key=2)
    for slot in range(8):
        rig.submit(make_submission(slot=slot, fairness_key="greedy", max_new_tokens=6))
    other = [rig.submit(make_submission(slot=10 + slot, fairness_key="other", max_new_tokens=6)) for slot in range(2)]

    while rig.scheduler.num_open:
        rig.turn()
        keys = [request.submission.fairness_key for request in rig.scheduler.batch.requests]
        assert keys.count("greedy") <= 2

    assert all(client.tokens == solo(client.submission, 6) for client in other)
    rig.check_finished()


def test_a_flood_of_one_key_delays_another_by_one_request_at_most() -> None:
    rig = Rig(num_pages=64, max_num_seqs=1)
    for slot in range(30):
        rig.submit(make_submission(slot=slot, fairness_key="flood", max_new_tokens=4))
    for _ in range(3):
        rig.turn()

    steady = rig.submit(make_submission(slot=100, fairness_key="steady", max_new_tokens=4))
    num_ended = sum(client.end is not None for client in rig.all_clients)
    while steady.end is None:
        rig.turn()

    assert sum(client.end is not None for client in rig.all_clients) - num_ended <= 2 + 1


def test_service_of_keys_that_always_wait_stays_within_the_bound() -> None:
    """Two keys with requests of different sizes get equal service, not equal numbers of requests."""
    rig = Rig(num_pages=128, max_num_seqs=4, max_num_batched_tokens=64)
    for slot in range(60):
        rig.submit(make_submission(slot=slot, prompt=[slot] * 20, fairness_key="large", max_new_tokens=20))
    for slot in range(240):
        rig.submit(make_submission(slot=1000 + slot, prompt=[slot % 50], fairness_key="small", max_new_tokens=4))
    shares = rig.scheduler.queue.shares
    # what one batch of either may cost: VTC's bound of 2 * max(prompt, outputs of all that run)
    bound = 4 * (20 + 2 * 20)

    for _ in range(300):
        rig.turn(check=False)
        if min(len(rig.scheduler.queue.eligible), 1):
            waiting = {request.submission.fairness_key for request in rig.scheduler.queue}
            if waiting == {"large", "small"}:
                assert abs(shares.service_of("large") - shares.service_of("small")) <= bound


def test_loading_an_adapter_is_charged_to_the_key_it_was_loaded_for() -> None:
    rig = Rig(num_pages=32)
    rig.submit(make_submission(slot=0, adapter="a", fairness_key="first", max_new_tokens=2))
    rig.deliver("a", 3)
    rig.run()

    assert rig.scheduler.queue.shares.service_of("first") == 3 * 4 + 4 + 2 * 2


def test_requests_without_a_key_share_one() -> None:
    rig = Rig(num_pages=64, max_num_seqs=1)
    clients = [
        rig.submit(make_submission(slot=slot, prompt=[slot] * (1 + slot), max_new_tokens=2)) for slot in range(5)
    ]
    order: list[int] = []
    while rig.scheduler.num_open:
        rig.turn()
        order += [slot for slot in rig.running_slots if slot not in order]

    assert order == [0, 1, 2, 3, 4]
    assert all(client.end is not None for client in clients)


# --- ends before their time ---


@pytest.mark.parametrize("policy", [QueuePolicy.SLO_ABORT, QueuePolicy.NEWEST_FIRST])
def test_who_cannot_meet_the_objective_any_more_is_ended_with_advice(policy: QueuePolicy) -> None:
    rig = Rig(max_num_seqs=1, num_pages=64, step_s=STEP_S, token_s=TOKEN_S, queue_policy=policy, ttft_slo_s=0.5)
    teach_costs(rig)
    rig.submit(make_submission(slot=0, max_new_tokens=60))
    rig.turn()
    late = rig.submit(make_submission(slot=1))
    rig.submit(make_submission(slot=2, prompt=[3] * 30))

    arrived_s = rig.now_s
    while late.end is None:
        rig.turn()

    assert isinstance(late.end.error, SloUnreachableError)
    assert late.end.error.retry_after_s is not None
    assert late.end.error.retry_after_s > 0
    assert "objective of 0.500 s" in late.end.error.message
    assert rig.now_s - arrived_s <= 0.5 + 2 * STEP_S
    assert rig.scheduler.counters.num_early_aborts >= 1


def test_who_cannot_have_a_token_before_its_deadline_is_ended_before_it_passes() -> None:
    rig = Rig(max_num_seqs=1, num_pages=64, step_s=STEP_S, token_s=TOKEN_S)
    teach_costs(rig)
    rig.submit(make_submission(slot=0, max_new_tokens=60))
    rig.turn()
    deadline_s = rig.now_s + 0.3
    late = rig.submit(make_submission(slot=1, prompt=[5] * 60, deadline_s=deadline_s, max_new_tokens=4))

    while late.end is None:
        rig.turn()

    assert isinstance(late.end.error, DeadlineError)
    assert "the client's deadline is in" in late.end.error.message
    assert rig.now_s < deadline_s - 60 * TOKEN_S + 2 * STEP_S


def test_nobody_is_ended_on_a_guess() -> None:
    rig = Rig(max_num_seqs=1, num_pages=64, queue_policy=QueuePolicy.SLO_ABORT, ttft_slo_s=0.5)
    client = rig.submit(make_submission(slot=0))
    rig.run()

    assert client.end is not None
    assert client.end.finish_reason is FinishReason.LENGTH


def test_with_fcfs_the_objective_ends_nobody() -> None:
    rig = Rig(max_num_seqs=1, num_pages=64, step_s=STEP_S, token_s=TOKEN_S, ttft_slo_s=0.05)
    teach_costs(rig)
    clients = [rig.submit(make_submission(slot=slot, max_new_tokens=20)) for slot in range(5)]
    rig.run()

    assert all(client.end is not None and client.end.error is None for client in clients)


def test_a_prefix_that_is_cached_does_not_count_against_a_request() -> None:
    rig = Rig(
        num_pages=64,
        max_num_batched_tokens=64,
        step_s=STEP_S,
        token_s=0.02,
        queue_policy=QueuePolicy.SLO_ABORT,
        ttft_slo_s=0.4,
    )
    prompt = [index % 40 for index in range(40)]
    rig.scheduler.costs.prefill_s_per_token = 0.0
    teach_costs(rig)
    first = rig.submit(make_submission(slot=0, prompt=prompt))  # 40 tokens take 0.8 s
    rig.run()
    assert first.end is not None
    assert isinstance(first.end.error, SloUnreachableError)

    rig.submit(make_submission(slot=1, prompt=prompt[:17]))
    rig.run()
    rig.submit(make_submission(slot=2, prompt=prompt[:33]))
    rig.run()
    again = rig.submit(make_submission(slot=3, prompt=prompt))
    rig.run()

    assert again.num_cached == 32
    assert again.tokens == solo(again.submission, 8)


@settings(max_examples=30, deadline=None)
@given(
    policy=st.sampled_from([QueuePolicy.SLO_ABORT, QueuePolicy.NEWEST_FIRST]),
    gaps=st.lists(st.floats(0, 0.05), min_size=20, max_size=60),
    keys=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_under_any_overload_every_request_has_its_first_token_or_its_end_within_the_objective(
    policy: QueuePolicy, gaps: list[float], keys: int, seed: int
) -> None:
    slo_s = 0.4
    rig = Rig(max_num_seqs=2, num_pages=64, step_s=STEP_S, token_s=TOKEN_S, queue_policy=policy, ttft_slo_s=slo_s)
    teach_costs(rig)
    rng = np.random.default_rng(seed)
    arrived: list[tuple[Client, float]] = []
    ended_s: dict[int, float] = {}
    due_s = rig.now_s
    pending = list(enumerate(gaps))
    while pending or rig.scheduler.num_open:
        while pending and due_s <= rig.now_s:
            slot, gap = pending.pop(0)
            submission = make_submission(
                slot=slot,
                prompt=[slot % 50] * int(rng.integers(1, 12)),
                fairness_key=str(slot % keys),
                max_new_tokens=12,
            )
            arrived.append((rig.submit(submission), rig.now_s))
            due_s += gap
        if not rig.turn():
            rig.now_s = max(rig.now_s + STEP_S, due_s)
        for client, _ in arrived:
            slot = client.submission.session_slot
            if slot not in ended_s and (client.tokens or client.end is not None):
                ended_s[slot] = rig.now_s
    longest_step_s = STEP_S + 16 * TOKEN_S
    for client, arrived_s in arrived:
        assert client.end is not None
        # the estimate does not know of steps that are longer than the average: at most one of them late
        assert ended_s[client.submission.session_slot] - arrived_s <= slo_s + 2 * longest_step_s


# --- admission that sees growth ---


def _preemptions(growth_quantile: float) -> int:
    rig = Rig(num_pages=16, block_tokens=4, max_num_seqs=8, growth_quantile=growth_quantile)
    clients = [rig.submit(make_submission(slot=slot, prompt=[slot] * 4, max_new_tokens=20)) for slot in range(12)]
    rig.run()
    assert all(client.tokens == solo(client.submission, 20) for client in clients)
    return rig.scheduler.counters.num_preemptions


def test_admission_that_reckons_with_growth_does_not_preempt_where_the_other_must() -> None:
    assert _preemptions(0.0) > 0
    assert _preemptions(0.9) == 0


def test_the_growth_reckoned_with_is_what_requests_draw_not_what_they_may() -> None:
    rig = Rig(num_pages=24, block_tokens=4, max_num_seqs=8, max_model_len=64, growth_quantile=0.9)
    stop = {slot: solo(make_submission(prompt=[slot] * 3, max_new_tokens=4), 4)[-1] for slot in range(40)}
    for slot in range(20):
        rig.submit(make_submission(slot=slot, prompt=[slot] * 3, max_new_tokens=60, stop_token_ids=(stop[slot],)))
        rig.run()

    for slot in range(20, 28):  # each may draw 60 tokens and take 16 pages; they draw 4 at most
        rig.submit(make_submission(slot=slot, prompt=[slot] * 3, max_new_tokens=60, stop_token_ids=(stop[slot],)))
    rig.turn()

    assert len(rig.scheduler.batch) >= 5
    rig.run()
    assert rig.scheduler.counters.num_preemptions == 0
