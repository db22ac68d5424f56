"""Requests and the adapters they wait for."""

from __future__ import annotations

import pytest
from loraplex_common.errors import (
    AdapterLoadingError,
    AdapterNotFoundError,
    RequestTooLargeError,
)
from loraplex_engine.messages import FinishReason, ResidencyState
from support.scheduler_rig import Rig, make_submission, solo


def test_a_request_waiting_for_its_adapter_blocks_nobody(depth: int) -> None:
    rig = Rig(depth=depth)
    waiting = rig.submit(make_submission(slot=0, adapter="slow"))

    others = [rig.submit(make_submission(slot=slot)) for slot in range(1, 6)]
    rig.run()

    assert waiting.end is None
    assert all(client.finish_reason is FinishReason.LENGTH for client in others)
    rig.deliver("slow")
    rig.run()
    assert waiting.tokens == solo(waiting.submission, 8)


def test_a_refused_image_ends_only_the_requests_that_wait_for_it() -> None:
    rig = Rig()
    lost = [rig.submit(make_submission(slot=slot, adapter="nope")) for slot in range(2)]
    other = rig.submit(make_submission(slot=2))

    rig.refuse("nope")
    rig.run()

    assert all(isinstance(client.error, AdapterNotFoundError) for client in lost)
    assert other.finish_reason is FinishReason.LENGTH
    assert rig.cache.state_of("nope") is ResidencyState.ABSENT


def test_fail_fast_ends_at_once_with_an_estimate_and_brings_the_adapter() -> None:
    rig = Rig()
    client = rig.submit(make_submission(slot=0, adapter="a", fail_fast=True))
    rig.take_outputs()
    refusal = client.error
    assert isinstance(refusal, AdapterLoadingError)
    assert refusal.retry_after_s is not None
    assert refusal.retry_after_s > 0

    rig.deliver("a", 2)
    rig.run()
    again = rig.submit(make_submission(slot=1, adapter="a", fail_fast=True))
    rig.run()

    assert again.finish_reason is FinishReason.LENGTH


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

    assert rig.running_slots == [1]
    rig.run()
    assert plain.tokens == solo(plain.submission, 13)
    assert adapted.tokens == solo(adapted.submission, 13)
    assert rig.cache.states.statuses() == []


def test_a_request_too_large_beside_its_adapter_is_refused_when_the_image_arrives() -> None:
    rig = Rig(num_pages=4, block_tokens=4)
    client = rig.submit(make_submission(max_new_tokens=8, adapter="a"))

    rig.deliver("a", 2)
    rig.take_outputs()

    assert isinstance(client.error, RequestTooLargeError)
    assert "the adapter 2 pages" in str(client.error)


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
