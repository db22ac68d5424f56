"""How requests end other than by their last token: deadlines, aborts, closed sessions, failures."""

from __future__ import annotations

import pytest
from loraplex_common.errors import (
    DeadlineError,
    DrainingError,
    QueueTimeoutError,
)
from loraplex_engine.messages import FinishReason
from support.scheduler_rig import Rig, make_submission, solo


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

    assert isinstance(waiting.error, DeadlineError)
    assert isinstance(running.error, DeadlineError)
    rig.check_finished()


def test_the_queue_deadline_spares_who_has_had_a_place() -> None:
    rig = Rig(max_num_seqs=1)
    first = rig.submit(make_submission(slot=0, queue_deadline_s=rig.now_s + 5))
    second = rig.submit(make_submission(slot=1, queue_deadline_s=rig.now_s + 5))
    rig.turn()

    rig.now_s += 6
    rig.run()

    assert first.finish_reason is FinishReason.LENGTH
    timeout = second.error
    assert isinstance(timeout, QueueTimeoutError)
    assert timeout.drop_reason == "rejected-ttl-expired"


def test_the_time_limit_cuts_the_output_without_an_error() -> None:
    rig = Rig()
    client = rig.submit(make_submission(max_new_tokens=50, time_limit_at_s=rig.now_s + 5))
    for _ in range(4):
        rig.turn()

    rig.now_s += 6
    rig.run()

    assert client.finish_reason is FinishReason.TIME_LIMIT
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

    assert client.finish_reason is FinishReason.CANCELLED
    assert rig.pool.num_kv == 0
    assert rig.cache.states.status("a").num_leases == 0
    rig.run()
    assert rig.pool.num_free + rig.pool.num_cached == rig.pool.num_pages - 1


def test_aborting_what_has_ended_is_harmless() -> None:
    rig = Rig()
    client = rig.submit(make_submission(max_new_tokens=1))
    rig.run()

    rig.scheduler.abort(1, 0)
    rig.scheduler.abort(9, 9)
    rig.run()

    assert client.finish_reason is FinishReason.LENGTH


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

    assert old.finish_reason is FinishReason.LENGTH
    assert isinstance(new.error, DrainingError)


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

    assert "logits are NaN" in str(clients[1].error)
    assert clients[0].tokens == solo(clients[0].submission, 6)
    assert clients[2].tokens == solo(clients[2].submission, 6)
