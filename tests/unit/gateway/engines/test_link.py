"""One link's bookkeeping, without a connection."""

from __future__ import annotations

import pytest
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.registry import EngineRecord
from loraplex_gateway.engines.link import EngineLink
from loraplex_gateway.engines.ticket import EngineLostError
from loraplex_gateway.engines.wire import Submission, WrongEngineError
from loraplex_gateway.types import Priority, Sampling, Stopping

RECORD = EngineRecord(
    engine_id="e1",
    target="127.0.0.1:1",
    base_model="tiny",
    base_fingerprint="00" * 32,
    max_model_len=512,
    vocab_size=384,
    num_pages=64,
    block_tokens=16,
    page_bytes=65536,
    max_image_pages=32,
)


def open_link() -> EngineLink:
    link = EngineLink(RECORD, gateway_id="g", max_buffered_tokens=100, on_change=lambda: None)
    link._receive(welcome())
    return link


def welcome(engine_id: str = "e1", base_fingerprint: str = "00" * 32) -> engine_pb2.SessionResponse:
    who = engine_pb2.SessionResponse.Welcome(engine_id=engine_id, base_fingerprint=base_fingerprint)
    return engine_pb2.SessionResponse(welcome=who)


def submission(request_id: str) -> Submission:
    return Submission(
        request_id=request_id, prompt_ids=(1,), sampling=Sampling(), stopping=Stopping(), priority=Priority.NORMAL
    )


def end_of(slot: int) -> engine_pb2.SessionResponse:
    finish = engine_pb2.EngineFinish(finish_reason=gateway_pb2.FINISH_REASON_STOP)
    return engine_pb2.SessionResponse(outputs=[engine_pb2.Output(slot=slot, finish=finish)])


@pytest.mark.parametrize("other", [{"engine_id": "e2"}, {"base_fingerprint": "11" * 32}, {"engine_id": ""}])
async def test_whoever_answers_in_the_place_of_a_listed_engine_gets_no_request(other: dict[str, str]) -> None:
    link = EngineLink(RECORD, gateway_id="g", max_buffered_tokens=100, on_change=lambda: None)

    with pytest.raises(WrongEngineError, match="answers at"):
        link._receive(welcome(**other))

    assert not link.is_candidate


async def test_an_abort_that_came_too_late_does_not_hit_the_slots_next_request() -> None:
    link = open_link()
    first = link.submit(submission("first"))
    link._outgoing.next_batch()
    link.release(first)  # the abort waits behind a pending write ...
    link._receive(end_of(first.slot))  # ... while the request ends by itself

    second = link.submit(submission("second"))
    batch = link._outgoing.next_batch()

    assert second.slot == first.slot
    assert batch is not None
    assert [submit.request_id for submit in batch.submits] == ["second"]
    assert list(batch.aborts) == []
    link.check_integrity()


async def test_a_request_that_the_engine_never_heard_of_is_not_aborted_there() -> None:
    link = open_link()

    link.release(link.submit(submission("gone")))

    assert link._outgoing.next_batch() is None
    link.check_integrity()


@pytest.mark.parametrize("is_sent", [True, False])
@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_lost_session_is_laid_only_to_requests_that_the_engine_was_sent(is_sent: bool, is_ours: bool) -> None:
    link = open_link()
    ticket = link.submit(submission("suspect"))
    if is_sent:
        link._outgoing.next_batch()

    link._reset("it is gone", is_ours=is_ours)

    with pytest.raises(EngineLostError) as caught:
        await ticket.next()
    assert caught.value.had_request == (is_sent and not is_ours)
