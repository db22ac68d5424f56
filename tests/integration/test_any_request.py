"""Every mix of legal values of every option is answered as asked, and hurts no other request."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_engine.rpc import wire
from support.any_request import MAX_MODEL_LEN
from support.base_models import write_base_model
from support.engine_harness import torch_engine
from support.request_campaign import BASE, run_campaign, serving

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex.v1 import engine_pb2, gateway_pb2
    from loraplex_engine.messages import Submission
    from loraplex_engine.step import TokenLogprobs

pytestmark = pytest.mark.integration

NUM_REQUESTS = int(os.environ.get("LORAPLEX_TEST_REQUESTS", "2000"))
POISON_TOP = 7
SEED = int(os.environ.get("LORAPLEX_TEST_SEED", "12"))


async def test_two_thousand_random_requests_are_answered_as_asked_and_disturb_no_stranger(tmp_path: Path) -> None:
    tally = await run_campaign(tmp_path, num_requests=NUM_REQUESTS, seed=SEED)

    assert not tally.wrong, f"{len(tally.wrong)} wrong of {NUM_REQUESTS} with seed {SEED}: {tally.wrong[:3]}"
    assert tally.num_requests == NUM_REQUESTS
    assert tally.num_strangers >= NUM_REQUESTS // 50, "strangers' streams ran all the while"
    assert tally.num_preemptions > 0, "the pool was too large to be a test"
    assert tally.ends.keys() >= {"FINISH_REASON_STOP", "FINISH_REASON_LENGTH"}


async def test_so_they_are_with_two_steps_in_flight(tmp_path: Path) -> None:
    tally = await run_campaign(tmp_path, num_requests=300, seed=SEED + 1, is_async=True)

    assert not tally.wrong, tally.wrong[:3]


async def test_so_they_are_with_keys_and_values_of_fp8(tmp_path: Path) -> None:
    tally = await run_campaign(tmp_path, num_requests=300, seed=SEED + 2, kv_dtype="fp8")

    assert not tally.wrong, tally.wrong[:3]
    assert tally.num_preemptions > 0, "the pool was too large to be a test"


async def test_news_that_cannot_be_sent_ends_its_request_and_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = wire.position_logprobs

    def broken(entry: TokenLogprobs) -> gateway_pb2.PositionLogprobs:
        if len(entry.token_ids) == 1 + POISON_TOP:
            raise ValueError("a bug")
        return encode(entry)

    monkeypatch.setattr(wire, "position_logprobs", broken)
    with torch_engine(write_base_model(tmp_path / "tiny", BASE), max_model_len=MAX_MODEL_LEN) as harness:
        async with serving(harness) as client:
            alone = await client.finish(await client.submit(0, [5, 6], 20))

            stranger = await client.submit(0, [5, 6], 20)
            poison = [
                await client.submit(1, [5, 6], 20, logprobs=POISON_TOP),
                await client.submit(2, [5, 6], 20, prompt_logprobs=POISON_TOP),
            ]
            errors = [await client.fail(outcome) for outcome in poison]
            again = await client.submit(1, [5, 6], 20, logprobs=0)

            assert await client.finish(stranger) == await client.finish(again) == alone
            assert all(error.reason == "INTERNAL" and error.metadata["error_id"] for error in errors)
        harness.check_idle()


async def test_a_submission_that_cannot_be_read_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = wire.submission

    def broken(submit: engine_pb2.Submit, **fields: Any) -> Submission:
        if submit.request_id == "poison":
            raise OverflowError("a bug")
        return read(submit, **fields)

    monkeypatch.setattr(wire, "submission", broken)
    with torch_engine(write_base_model(tmp_path / "tiny", BASE), max_model_len=MAX_MODEL_LEN) as harness:
        async with serving(harness) as client:
            error = await client.fail(await client.submit(1, [5], 4, request_id="poison"))

            assert error.reason == "INTERNAL"
            assert len(await client.finish(await client.submit(1, [5], 4))) == 4
