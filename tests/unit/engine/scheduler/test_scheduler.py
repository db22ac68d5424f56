"""What the scheduler promises, on a fake runner that checks every plan."""

from __future__ import annotations

import numpy as np
from loraplex_common.errors import (
    InvalidParameterError,
    RequestTooLargeError,
)
from loraplex_engine.messages import FinishReason, Priority
from loraplex_engine.sampling_params import SamplingParams
from support.scheduler_rig import EOS, Rig, make_submission, solo


def test_a_request_gets_the_tokens_of_a_solo_run_and_ends_with_length(depth: int) -> None:
    rig = Rig(depth=depth)
    submission = make_submission(max_new_tokens=9)

    client = rig.submit(submission)
    rig.run()

    assert client.tokens == solo(submission, 9)
    assert len(client.tokens) == 9
    assert client.finish_reason is FinishReason.LENGTH
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
    assert client.finish_reason is FinishReason.STOP
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
    ended_by_eos = [client for client in clients if client.finish_reason is FinishReason.STOP]
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

    assert client.finish_reason is FinishReason.LENGTH


def test_without_a_limit_the_output_ends_at_max_model_len(depth: int) -> None:
    rig = Rig(depth=depth, max_model_len=24, num_pages=16)

    client = rig.submit(make_submission(max_new_tokens=None))
    rig.run()

    assert len(client.tokens) == 20


def test_without_a_limit_the_output_ends_where_the_pool_does() -> None:
    rig = Rig(max_model_len=64, num_pages=4, block_tokens=4)

    client = rig.submit(make_submission(max_new_tokens=None))
    rig.run()

    assert client.finish_reason is FinishReason.LENGTH
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

    assert rig.running_slots == [0]
    assert [r.submission.session_slot for r in rig.scheduler.queue] == [1]
    rig.run()
    assert all(len(client.tokens) == 13 for client in clients)


def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic() -> None:
    rig = Rig(num_pages=4, block_tokens=4)

    client = rig.submit(make_submission(max_new_tokens=20))
    rig.take_outputs()

    assert isinstance(client.error, RequestTooLargeError)
    assert "need 6 pages of 4 tokens" in str(client.error)
    assert "the pool has 4" in str(client.error)


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

    assert isinstance(client.error, InvalidParameterError)


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


def test_resumed_tokens_of_several_chunks_have_no_prompt_logprobs(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=12, block_tokens=4, max_num_batched_tokens=8)
    asks = SamplingParams(prompt_logprobs=0)

    client = rig.submit(make_submission(prompt=[3] * 4, resumed=list(range(20)), max_new_tokens=30, sampling=asks))
    rig.run()

    assert client.prompt_logprobs == [1, 2, 3]


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

    assert large.finish_reason is FinishReason.LENGTH
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


def test_a_plan_is_never_written_again() -> None:
    rig = Rig(depth=2)
    rig.submit(make_submission(slot=0))
    rig.submit(make_submission(slot=1))
    rig.turn()
    plan = rig.steps[0].plan  # type: ignore[attr-defined]
    copies = {name: np.array(getattr(plan, name)) for name in ("slots", "starts", "block_tables", "token_ids")}

    rig.run()

    assert all(np.array_equal(getattr(plan, name), copy) for name, copy in copies.items())
