"""What the scheduler promises, on a fake runner that checks every plan."""

from __future__ import annotations

import numpy as np
import pytest
from loraplex_common.errors import (
    AdapterLoadingError,
    AdapterNotFoundError,
    DeadlineError,
    DrainingError,
    InvalidParameterError,
    QueueTimeoutError,
    RequestTooLargeError,
)
from loraplex_engine.messages import FinishReason, Priority, ResidencyState, SamplingParams
from support.scheduler_rig import EOS, Client, Rig, make_submission, solo


@pytest.fixture(params=[1, 2], ids=["depth1", "depth2"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def reason(client: Client) -> FinishReason | None:
    assert client.end is not None
    return client.end.finish_reason


def error(client: Client) -> Exception | None:
    assert client.end is not None
    return client.end.error


def test_a_request_gets_the_tokens_of_a_solo_run_and_ends_with_length(depth: int) -> None:
    rig = Rig(depth=depth)
    submission = make_submission(max_new_tokens=9)

    client = rig.submit(submission)
    rig.run()

    assert client.tokens == solo(submission, 9)
    assert len(client.tokens) == 9
    assert reason(client) is FinishReason.LENGTH
    rig.check_finished()
    assert rig.pool.num_free + rig.pool.num_cached == rig.pool.num_pages


def test_requests_with_different_adapters_and_none_share_steps(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=32)
    submissions = [
        make_submission(slot=slot, adapter=a, prompt=[slot, 3]) for slot, a in enumerate(["a", None, "b", "a"])
    ]

    clients = [rig.submit(submission) for submission in submissions]
    assert rig.deliver("a", 3)
    assert rig.deliver("b", 2)
    rig.turn()
    rig.turn()
    rig.turn()

    assert len(rig.scheduler.batch) == 4
    rig.run()
    assert [client.tokens for client in clients] == [solo(submission, 8) for submission in submissions]
    assert rig.num_wants == 2
    rig.check_finished()


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_rows(depth: int) -> None:
    rig = Rig(depth=depth, max_num_batched_tokens=8, num_pages=32)
    short = rig.submit(make_submission(slot=0, max_new_tokens=12))
    rig.turn()
    long = make_submission(slot=1, prompt=list(range(30)), max_new_tokens=4)
    client = rig.submit(long)

    before = len(short.tokens)
    for _ in range(4):
        rig.turn()

    assert len(short.tokens) >= before + 3
    assert client.tokens == []
    rig.run()
    assert client.tokens == solo(long, 4)


def test_end_of_text_and_stop_ids_end_the_output_and_are_part_of_it(depth: int) -> None:
    rig = Rig(depth=depth, max_model_len=64, num_pages=64)
    plain = solo(make_submission(max_new_tokens=20), 20)
    stop = plain[5]
    submission = make_submission(max_new_tokens=20, stop_token_ids=(49, 48, 47, 46, 45, stop))

    client = rig.submit(submission)
    rig.run()

    assert client.tokens == solo(submission, 20)
    assert reason(client) is FinishReason.STOP
    assert client.end is not None
    assert client.end.stop_token_id == client.tokens[-1]


def test_eos_counts_unless_ignored_and_min_new_tokens_bans_it() -> None:
    rig = Rig(num_pages=64)
    submissions = []
    for slot in range(40):
        submissions.append(
            make_submission(slot=slot, prompt=[slot, 1], max_new_tokens=20, ignore_eos=False, min_new_tokens=slot % 5)
        )

    clients = [rig.submit(submission) for submission in submissions]
    rig.run()

    assert [client.tokens for client in clients] == [solo(submission, 20) for submission in submissions]
    ended_by_eos = [client for client in clients if reason(client) is FinishReason.STOP]
    assert ended_by_eos
    assert all(client.tokens[-1] == EOS for client in ended_by_eos)


def test_a_resumed_request_continues_at_its_position() -> None:
    whole = make_submission(max_new_tokens=8)
    outputs = solo(whole, 8)
    rig = Rig()

    client = rig.submit(make_submission(max_new_tokens=8, resumed=outputs[:3]))
    rig.run()

    assert client.tokens == outputs[3:]


def test_a_resumed_request_that_is_complete_ends_at_once() -> None:
    rig = Rig()

    client = rig.submit(make_submission(max_new_tokens=3, resumed=[1, 2, 3]))
    rig.take_outputs()

    assert reason(client) is FinishReason.LENGTH


def test_without_a_limit_the_output_ends_at_max_model_len(depth: int) -> None:
    rig = Rig(depth=depth, max_model_len=24, num_pages=16)

    client = rig.submit(make_submission(max_new_tokens=None))
    rig.run()

    assert len(client.tokens) == 20


def test_without_a_limit_the_output_ends_where_the_pool_does() -> None:
    rig = Rig(max_model_len=64, num_pages=4, block_tokens=4)

    client = rig.submit(make_submission(max_new_tokens=None))
    rig.run()

    assert reason(client) is FinishReason.LENGTH
    assert len(client.tokens) == 13  # 16 tokens in the pool and one that is never an input


def test_a_preempted_request_goes_on_with_the_same_tokens(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=6, block_tokens=4)
    submissions = [make_submission(slot=slot, prompt=[slot] * 4, max_new_tokens=12) for slot in range(4)]

    clients = [rig.submit(submission) for submission in submissions]
    rig.run()

    assert rig.scheduler.counters.num_preemptions > 0
    assert [client.tokens for client in clients] == [solo(submission, 12) for submission in submissions]
    rig.check_finished()


def test_the_latest_admitted_is_preempted_first() -> None:
    rig = Rig(num_pages=6, block_tokens=4)
    clients = [rig.submit(make_submission(slot=slot, prompt=[slot] * 4, max_new_tokens=13)) for slot in range(2)]

    while rig.scheduler.counters.num_preemptions == 0:
        rig.turn()

    assert [r.submission.session_slot for r in rig.scheduler.batch.requests] == [0]
    assert [r.submission.session_slot for r in rig.scheduler.queue] == [1]
    rig.run()
    assert all(len(client.tokens) == 13 for client in clients)


def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic() -> None:
    rig = Rig(num_pages=4, block_tokens=4)

    client = rig.submit(make_submission(max_new_tokens=20))
    rig.take_outputs()

    assert isinstance(error(client), RequestTooLargeError)
    assert "need 6 pages of 4 tokens" in str(error(client))
    assert "the pool has 4" in str(error(client))


def test_a_request_too_large_beside_its_adapter_is_refused_when_the_image_arrives() -> None:
    rig = Rig(num_pages=4, block_tokens=4)
    client = rig.submit(make_submission(max_new_tokens=8, adapter="a"))

    rig.deliver("a", 2)
    rig.take_outputs()

    assert isinstance(error(client), RequestTooLargeError)
    assert "the adapter 2 pages" in str(error(client))


def test_a_full_pool_queues_and_never_errs(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=4, block_tokens=4, max_num_seqs=16)
    submissions = [make_submission(slot=slot, prompt=[slot, 1, 2, 3, 4], max_new_tokens=6) for slot in range(30)]

    clients = [rig.submit(submission) for submission in submissions]
    rig.run()

    assert [client.tokens for client in clients] == [solo(submission, 6) for submission in submissions]


def test_a_prompt_that_fills_max_model_len_is_refused() -> None:
    rig = Rig(max_model_len=8, num_pages=8)

    client = rig.submit(make_submission(prompt=[1] * 8))
    rig.take_outputs()

    assert isinstance(error(client), InvalidParameterError)


def test_a_request_waiting_for_its_adapter_blocks_nobody(depth: int) -> None:
    rig = Rig(depth=depth)
    waiting = rig.submit(make_submission(slot=0, adapter="slow"))

    others = [rig.submit(make_submission(slot=slot)) for slot in range(1, 6)]
    rig.run()

    assert waiting.end is None
    assert all(reason(client) is FinishReason.LENGTH for client in others)
    rig.deliver("slow")
    rig.run()
    assert waiting.tokens == solo(waiting.submission, 8)


def test_a_refused_image_ends_only_the_requests_that_wait_for_it() -> None:
    rig = Rig()
    lost = [rig.submit(make_submission(slot=slot, adapter="nope")) for slot in range(2)]
    other = rig.submit(make_submission(slot=2))

    rig.refuse("nope")
    rig.run()

    assert all(isinstance(error(client), AdapterNotFoundError) for client in lost)
    assert reason(other) is FinishReason.LENGTH
    assert rig.cache.state_of("nope") is ResidencyState.ABSENT


def test_fail_fast_ends_at_once_with_an_estimate_and_brings_the_adapter() -> None:
    rig = Rig()
    client = rig.submit(make_submission(slot=0, adapter="a", fail_fast=True))
    rig.take_outputs()
    refusal = error(client)
    assert isinstance(refusal, AdapterLoadingError)
    assert refusal.retry_after_s is not None
    assert refusal.retry_after_s > 0

    rig.deliver("a", 2)
    rig.run()
    again = rig.submit(make_submission(slot=1, adapter="a", fail_fast=True))
    rig.run()

    assert reason(again) is FinishReason.LENGTH


def test_deadlines_end_waiting_and_running_requests(depth: int) -> None:
    rig = Rig(depth=depth)
    waiting = rig.submit(make_submission(slot=0, adapter="never", deadline_s=rig.now_s + 5))
    running = rig.submit(make_submission(slot=1, max_new_tokens=40, deadline_s=rig.now_s + 5))
    rig.turn()
    rig.turn()

    assert rig.scheduler.next_deadline_s == rig.now_s + 5
    rig.now_s += 6
    rig.turn()
    rig.run()

    assert isinstance(error(waiting), DeadlineError)
    assert isinstance(error(running), DeadlineError)
    rig.check_finished()


def test_the_queue_deadline_spares_who_has_had_a_place() -> None:
    rig = Rig(max_num_seqs=1)
    first = rig.submit(make_submission(slot=0, queue_deadline_s=rig.now_s + 5))
    second = rig.submit(make_submission(slot=1, queue_deadline_s=rig.now_s + 5))
    rig.turn()

    rig.now_s += 6
    rig.run()

    assert reason(first) is FinishReason.LENGTH
    timeout = error(second)
    assert isinstance(timeout, QueueTimeoutError)
    assert timeout.drop_reason == "rejected-ttl-expired"


def test_the_time_limit_cuts_the_output_without_an_error() -> None:
    rig = Rig()
    client = rig.submit(make_submission(max_new_tokens=50, time_limit_at_s=rig.now_s + 5))
    for _ in range(4):
        rig.turn()

    rig.now_s += 6
    rig.run()

    assert reason(client) is FinishReason.TIME_LIMIT
    assert client.tokens == solo(client.submission, 50)[: len(client.tokens)]
    assert client.tokens


def test_an_aborted_request_frees_pages_and_lease_within_a_step(depth: int) -> None:
    rig = Rig(depth=depth)
    client = rig.submit(make_submission(adapter="a", max_new_tokens=40))
    rig.deliver("a")
    for _ in range(4):
        rig.turn()
    assert rig.pool.num_kv > 0

    rig.scheduler.abort(1, 0)
    rig.turn()

    assert reason(client) is FinishReason.CANCELLED
    assert rig.pool.num_kv == 0
    assert rig.cache.status("a").num_leases == 0
    rig.run()
    assert rig.pool.num_free + rig.pool.num_cached == rig.pool.num_pages - 1


def test_aborting_what_has_ended_is_harmless() -> None:
    rig = Rig()
    client = rig.submit(make_submission(max_new_tokens=1))
    rig.run()

    rig.scheduler.abort(1, 0)
    rig.scheduler.abort(9, 9)
    rig.run()

    assert reason(client) is FinishReason.LENGTH


def test_a_closed_session_gets_nothing_more_and_others_go_on(depth: int) -> None:
    rig = Rig(depth=depth)
    gone = rig.submit(make_submission(slot=0, session_id=1))
    stays = rig.submit(make_submission(slot=0, session_id=2))
    rig.turn()

    rig.scheduler.close_session(1)
    seen = len(gone.tokens)
    rig.run()

    assert gone.end is None
    assert len(gone.tokens) == seen
    assert stays.tokens == solo(stays.submission, 8)
    assert rig.scheduler.num_open == 0


def test_a_session_cannot_use_a_slot_twice_at_once() -> None:
    rig = Rig()
    rig.submit(make_submission(slot=3))

    with pytest.raises(ValueError, match="has an open request 3 already"):
        rig.scheduler.submit(make_submission(slot=3))


def test_a_draining_scheduler_refuses_new_requests_and_finishes_old_ones() -> None:
    rig = Rig()
    old = rig.submit(make_submission(slot=0))

    rig.scheduler.start_draining()
    new = rig.submit(make_submission(slot=1))
    rig.run()

    assert reason(old) is FinishReason.LENGTH
    assert isinstance(error(new), DrainingError)


def test_a_failed_slot_ends_only_its_request(depth: int) -> None:
    rig = Rig(depth=depth)
    clients = [rig.submit(make_submission(slot=slot, max_new_tokens=6)) for slot in range(3)]
    rig.turn()
    slot = rig.scheduler.batch.requests[1].slot

    rig.runner.fail_slots = {slot: "logits are NaN"}
    rig.turn()
    rig.turn()
    rig.runner.fail_slots = {}
    rig.run()

    assert "logits are NaN" in str(error(clients[1]))
    assert clients[0].tokens == solo(clients[0].submission, 6)
    assert clients[2].tokens == solo(clients[2].submission, 6)


def test_logprobs_travel_with_their_tokens(depth: int) -> None:
    rig = Rig(depth=depth)
    plain = rig.submit(make_submission(slot=0))

    asked = rig.submit(make_submission(slot=1, sampling=SamplingParams(num_logprobs=2)))
    rig.run()

    assert asked.tokens == plain.tokens == solo(plain.submission, 8)


def test_prompt_logprobs_come_once_whole_and_first_even_after_preemption(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=6, block_tokens=4, max_num_batched_tokens=5)
    submissions = [
        make_submission(slot=slot, prompt=[slot] * 7, max_new_tokens=9, sampling=SamplingParams(prompt_logprobs=1))
        for slot in range(3)
    ]

    clients = [rig.submit(submission) for submission in submissions]
    rig.run()

    assert rig.scheduler.counters.num_preemptions > 0
    for client in clients:
        assert client.prompt_logprobs == list(range(1, 7))
        assert client.tokens == solo(client.submission, 9)


def test_a_higher_class_goes_first_but_an_old_batch_request_is_not_overtaken_for_ever() -> None:
    rig = Rig(max_num_seqs=1)
    rig.submit(make_submission(slot=0, max_new_tokens=2))
    rig.turn()
    batch = rig.submit(make_submission(slot=1, priority=Priority.BATCH, max_new_tokens=2))
    high = rig.submit(make_submission(slot=2, priority=Priority.HIGH, max_new_tokens=2))

    while high.end is None:
        rig.turn()
    assert batch.end is None

    rig.now_s += 61
    rig.submit(make_submission(slot=3, priority=Priority.HIGH, max_new_tokens=30))
    while batch.end is None:
        rig.turn()
    assert rig.clients[1, 3].end is None


def test_a_request_passed_over_too_long_gets_its_pages() -> None:
    rig = Rig(num_pages=8, block_tokens=4, max_num_seqs=8, max_pass_over_s=1.0)
    for slot in range(3):
        rig.submit(make_submission(slot=slot, prompt=[slot, 1], max_new_tokens=14))
    rig.turn()
    large = rig.submit(make_submission(slot=100, prompt=[5] * 28, max_new_tokens=2))

    slot = 200
    for _ in range(400):
        if large.end is not None:
            break
        rig.now_s += 0.05
        rig.submit(make_submission(slot=slot, prompt=[3], max_new_tokens=3))
        slot += 1
        rig.turn()

    assert reason(large) is FinishReason.LENGTH
    rig.run()
    rig.check_finished()


def test_small_requests_pass_a_large_one_before_the_bound() -> None:
    rig = Rig(num_pages=8, block_tokens=4, max_num_seqs=8, max_pass_over_s=1e9)
    rig.submit(make_submission(slot=0, prompt=[1] * 16, max_new_tokens=8))
    rig.turn()
    large = rig.submit(make_submission(slot=1, prompt=[5] * 28, max_new_tokens=2))

    small = rig.submit(make_submission(slot=2, prompt=[3], max_new_tokens=2))
    for _ in range(4):
        rig.turn()

    assert small.end is not None
    assert large.num_started == 0
    rig.run()
    assert large.tokens == solo(large.submission, 2)


@pytest.mark.parametrize("num_adapter_pages", [1, 2])
def test_a_pool_of_one_adapter_and_one_sequence_serves_many_adapters_in_turn(
    depth: int, num_adapter_pages: int
) -> None:
    rig = Rig(depth=depth, num_pages=3 + num_adapter_pages, block_tokens=4, loads_at_once=False)
    submissions = [make_submission(slot=slot, adapter=f"adapter-{slot % 5}", prompt=[slot] * 4) for slot in range(15)]

    clients = [rig.submit(submission) for submission in submissions]
    for digest in rig.wanted:
        rig.deliver(digest, num_adapter_pages)
    rig.run()

    assert [client.tokens for client in clients] == [solo(submission, 8) for submission in submissions]
    assert rig.num_wants == 5
    rig.check_finished()


def test_timings_add_up() -> None:
    rig = Rig()
    client = rig.submit(make_submission(adapter="a", max_new_tokens=3))
    rig.now_s += 2
    rig.deliver("a")
    rig.turn()
    rig.now_s += 1
    rig.run()

    assert client.end is not None
    assert client.end.adapter_load_s == pytest.approx(3)
    assert client.end.queue_s == pytest.approx(3)


def test_a_plan_is_never_written_again() -> None:
    rig = Rig(depth=2)
    rig.submit(make_submission(slot=0))
    rig.submit(make_submission(slot=1))
    rig.turn()
    plan = rig.steps[0].plan  # type: ignore[attr-defined]
    copies = {name: np.array(getattr(plan, name)) for name in ("slots", "starts", "block_tables", "token_ids")}

    rig.run()

    assert all(np.array_equal(getattr(plan, name), copy) for name, copy in copies.items())


def test_while_pages_are_reserved_adapters_are_still_asked_for() -> None:
    rig = Rig(num_pages=8, block_tokens=4, max_num_seqs=8, max_pass_over_s=0.5)
    rig.submit(make_submission(slot=0, max_new_tokens=24))
    rig.turn()
    rig.submit(make_submission(slot=1, prompt=[5] * 28, max_new_tokens=2))
    for _ in range(3):
        rig.turn()
        rig.now_s += 0.4
    rig.turn()

    passed_over = rig.submit(make_submission(slot=2, prompt=[1], max_new_tokens=1))
    rig.submit(make_submission(slot=3, adapter="a", fail_fast=True))
    rig.turn()

    assert passed_over.num_started == 0
    assert rig.wanted == ["a"]
    rig.deliver("a")
    rig.run()
    rig.check_finished()


def test_a_request_whose_adapter_was_deleted_is_preempted_last() -> None:
    rig = Rig(num_pages=7, block_tokens=4)
    plain = rig.submit(make_submission(slot=0, max_new_tokens=13))
    rig.turn()
    adapted = rig.submit(make_submission(slot=1, adapter="a", max_new_tokens=13))
    rig.deliver("a")
    while not adapted.tokens:
        rig.turn()

    rig.cache.drop("a")
    while rig.scheduler.counters.num_preemptions == 0:
        rig.turn()

    assert [r.submission.session_slot for r in rig.scheduler.batch.requests] == [1]
    rig.run()
    assert plain.tokens == solo(plain.submission, 13)
    assert adapted.tokens == solo(adapted.submission, 13)
    assert rig.cache.statuses() == []
