"""Requests that share blocks, on a fake runner that checks which request wrote what it reads."""

from __future__ import annotations

import numpy as np
import pytest
from loraplex_engine.messages import FinishReason
from loraplex_engine.sampling_params import SamplingParams
from support.scheduler_rig import Client, Rig, make_submission, solo

LONG = [10 + index % 7 for index in range(16)]  # four blocks of four


def check(rig: Rig, *clients: Client) -> None:
    """Compare with solo runs, which know of no cache."""
    for client in clients:
        assert client.end is not None
        assert client.end.error is None
        assert client.tokens == solo(client.submission, len(client.tokens))
    rig.check_finished()


def test_a_repeated_prompt_is_found_but_for_its_last_token(depth: int) -> None:
    rig = Rig(depth=depth)
    first = rig.submit(make_submission(slot=0, prompt=LONG))
    rig.run()
    computed = rig.runner.num_tokens

    second = rig.submit(make_submission(slot=1, prompt=LONG))
    rig.run()

    assert (first.num_cached, second.num_cached) == (0, 12)  # the fourth block holds the last token
    assert rig.runner.num_tokens - computed <= 4 + 8
    check(rig, first, second)


def test_a_next_turn_finds_prompt_and_answer(depth: int) -> None:
    rig = Rig(depth=depth)
    first = rig.submit(make_submission(slot=0, prompt=LONG[:6], max_new_tokens=9))
    rig.run()

    follow_up = LONG[:6] + first.tokens + [3, 1]
    second = rig.submit(make_submission(slot=1, prompt=follow_up))
    rig.run()

    # 6 + 9 tokens, of which the last was drawn but never an input: three full blocks of the 14 computed
    assert second.num_cached == 12
    check(rig, first, second)


def test_sharers_run_at_once_in_the_same_pages(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=32, max_num_seqs=8, max_num_batched_tokens=64)
    rig.submit(make_submission(slot=0, prompt=LONG, max_new_tokens=40))
    rig.turn()
    rig.turn()
    rig.turn()
    alone = rig.pool.num_kv

    clients = [rig.submit(make_submission(slot=slot, prompt=[*LONG, slot], max_new_tokens=12)) for slot in range(1, 5)]
    rig.turn()

    assert rig.pool.num_kv <= alone + 4 * 2 + 1  # each has its own last block and one to grow into
    rig.run()
    check(rig, *clients)
    assert [client.num_cached for client in clients] == [16] * 4


def test_nothing_is_shared_across_adapters_scales_and_salts() -> None:
    rig = Rig(num_pages=64)
    variants: list[dict[str, object]] = [
        {},
        {"cache_salt": "tenant"},
        {"adapter": "a"},
        {"adapter": "a", "adapter_scale": 0.5},
        {"adapter": "a", "cache_salt": "tenant"},
        {"adapter": "b"},
    ]
    clients = []
    for slot, fields in enumerate(variants * 2):
        clients.append(rig.submit(make_submission(slot=slot, prompt=LONG, **fields)))  # type: ignore[arg-type]
        for digest in rig.wanted:
            rig.deliver(digest)
        rig.run()

    assert [client.num_cached for client in clients] == [0] * 6 + [12] * 6
    check(rig, *clients)


def test_a_base_request_ignores_the_scale_it_does_not_use() -> None:
    rig = Rig()
    rig.submit(make_submission(slot=0, prompt=LONG))
    rig.run()

    again = rig.submit(make_submission(slot=1, prompt=LONG, adapter_scale=0.5))
    rig.run()

    assert again.num_cached == 12


def test_a_request_that_asks_for_prompt_logprobs_computes_all_of_its_prompt_and_leaves_it_to_others(depth: int) -> None:
    rig = Rig(depth=depth)
    asked = SamplingParams(prompt_logprobs=1)
    clients = [
        rig.submit(make_submission(slot=0, prompt=LONG)),
        rig.submit(make_submission(slot=1, prompt=LONG, sampling=asked)),
        rig.submit(make_submission(slot=2, prompt=[9, *LONG], sampling=asked)),
        rig.submit(make_submission(slot=3, prompt=[9, *LONG])),
    ]
    found = []
    for slot, client in enumerate(clients):
        rig.run()
        found.append(client.num_cached)
        del slot

    later = rig.submit(make_submission(slot=4, prompt=[9, *LONG]))
    rig.run()

    assert found[1] == found[2] == 0
    assert len(clients[1].prompt_logprobs) == len(LONG) - 1
    assert later.num_cached == 16
    check(rig, *clients, later)


def test_without_the_cache_nothing_is_kept() -> None:
    rig = Rig(enable_prefix_cache=False)
    for slot in range(2):
        client = rig.submit(make_submission(slot=slot, prompt=LONG))
        rig.run()
        assert client.num_cached == 0

    assert rig.pool.num_free == rig.pool.num_pages


def test_a_preempted_request_finds_its_own_blocks_again(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=12, block_tokens=4, max_num_batched_tokens=64)
    submissions = [make_submission(slot=slot, prompt=[slot] * 12, max_new_tokens=20) for slot in range(3)]

    clients = [rig.submit(submission) for submission in submissions]
    rig.run()

    counters = rig.scheduler.counters
    assert counters.num_preemptions > 0
    assert counters.num_cached_tokens > 0
    check(rig, *clients)


def test_the_block_of_a_speculative_token_is_not_kept() -> None:
    rig = Rig(depth=2, block_tokens=4)
    # 4 + 4 tokens fill two blocks only if the token after the stop, drawn in vain, were counted
    stop = solo(make_submission(max_new_tokens=4), 4)[-1]
    client = rig.submit(make_submission(max_new_tokens=20, stop_token_ids=(stop,)))

    rig.run()

    assert client.end is not None
    assert client.end.finish_reason is FinishReason.STOP
    num_confirmed = 4 + len(client.tokens) - 1
    assert rig.pool.num_cached == num_confirmed // 4


def test_blocks_of_a_row_that_went_wrong_are_not_shared(depth: int) -> None:
    rig = Rig(depth=depth)
    rig.runner.fail_slots = {rig.scheduler.batch.state.num_free - 4: "logits are NaN"}
    broken = rig.submit(make_submission(slot=0, prompt=LONG))
    rig.run()
    rig.runner.fail_slots = {}

    again = rig.submit(make_submission(slot=1, prompt=LONG))
    rig.run()

    assert broken.end is not None
    assert broken.end.error is not None
    assert again.num_cached == 0
    check_tokens = solo(again.submission, 8)
    assert again.tokens == check_tokens


def test_an_aborted_prefill_leaves_the_chunks_that_were_done() -> None:
    rig = Rig(max_num_batched_tokens=8, num_pages=32)
    rig.submit(make_submission(slot=0, prompt=LONG * 2))
    rig.turn()
    rig.turn()

    rig.scheduler.abort(1, 0)
    rig.turn()
    again = rig.submit(make_submission(slot=1, prompt=LONG * 2))
    rig.run()

    assert again.num_cached == 16
    assert again.tokens == solo(again.submission, 8)


def test_cached_pages_make_room_for_whoever_needs_them(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=8, block_tokens=4)
    for slot in range(6):
        rig.submit(make_submission(slot=slot, prompt=[slot] * 16, max_new_tokens=12))
        rig.run()
    assert rig.pool.num_cached > 0

    large = rig.submit(make_submission(slot=10, prompt=[9] * 20, max_new_tokens=12))
    rig.run()

    check(rig, large)
    assert rig.scheduler.prefix.num_evicted > 0


def test_tokens_of_a_request_taken_from_the_cache_do_not_count_against_its_fairness_key() -> None:
    rig = Rig()
    rig.submit(make_submission(slot=0, prompt=LONG, fairness_key="first"))
    rig.run()
    rig.submit(make_submission(slot=1, prompt=LONG, fairness_key="second"))
    rig.run()

    shares = rig.scheduler.queue.shares
    assert shares.service_of("first") == 16 + 2 * 8
    assert shares.service_of("second") - shares.service_of("first") == pytest.approx(4 + 2 * 8)  # lifted on arrival


def test_found_pages_survive_making_room_for_the_rest() -> None:
    """Room for a request's new pages must not be made of the pages it has just found."""
    rig = Rig(num_pages=8, block_tokens=4, max_model_len=32)
    rig.submit(make_submission(slot=0, prompt=LONG, max_new_tokens=1))
    rig.run()
    assert rig.pool.num_cached == 4

    tail = np.arange(12).tolist()
    longer = rig.submit(make_submission(slot=1, prompt=[*LONG, *tail], max_new_tokens=4))
    rig.run()

    assert longer.num_cached == 16
    check(rig, longer)
