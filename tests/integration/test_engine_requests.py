"""Requests of a session with an engine on its own: what they give, how they end, what they are refused for."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import duration_pb2
from loraplex.v1 import engine_pb2_grpc, gateway_pb2
from loraplex_common.errors import (
    DeadlineError,
    InvalidParameterError,
    NotSupportedError,
    RequestTooLargeError,
    StoreUnavailableError,
)
from support.engine_sessions import EngineSessionClient
from support.lone_engine import DIGEST, LENGTH, PROMPT, is_idle, running_engine
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


async def test_a_request_runs_to_its_length(session: EngineSessionClient) -> None:
    outcome = await session.submit(0, PROMPT, max_new_tokens=8)

    tokens = await session.finish(outcome)

    assert len(tokens) == 8
    assert outcome.first_sequence == 0
    assert outcome.started is not None
    assert outcome.finish is not None
    assert outcome.finish.finish_reason == LENGTH
    assert outcome.finish.timings.prefill.ToNanoseconds() > 0


async def test_a_slot_is_free_again_after_the_end(session: EngineSessionClient) -> None:
    first = await session.finish(await session.submit(4, PROMPT))

    second = await session.finish(await session.submit(4, PROMPT))

    assert first == second


async def test_a_batch_gives_what_each_request_gives_alone(session: EngineSessionClient) -> None:
    prompts = [[10 + n, 20 + n, 30 + 2 * n] * (n + 1) for n in range(12)]
    alone = [await session.finish(await session.submit(0, prompt, 12)) for prompt in prompts]

    outcomes = [await session.submit(100 + n, prompt, 12) for n, prompt in enumerate(prompts)]
    together = [await session.finish(outcome) for outcome in outcomes]

    assert together == alone


async def test_a_resumed_request_continues_where_it_was_cut(session: EngineSessionClient) -> None:
    whole = await session.finish(await session.submit(0, PROMPT, 10))

    outcome = await session.submit(1, PROMPT, 10, resumed_token_ids=whole[:4])
    rest = await session.finish(outcome)

    assert (outcome.first_sequence, rest) == (4, whole[4:])


async def test_a_seed_decides_what_is_drawn(session: EngineSessionClient) -> None:
    async def draw(slot: int, seed: int) -> list[int]:
        sampling = gateway_pb2.SamplingParams(temperature=1.0, seed=seed)
        return await session.finish(await session.submit(slot, PROMPT, 16, sampling=sampling))

    first, again, other = await asyncio.gather(draw(1, 42), draw(2, 42), draw(3, 43))

    assert first == again != other


async def test_a_stop_token_ends_the_output_and_is_part_of_it(session: EngineSessionClient) -> None:
    tokens = await session.finish(await session.submit(0, PROMPT, 10))
    stop = tokens[3]
    stopping = gateway_pb2.StoppingParams(max_new_tokens=10, stop_token_ids=[stop], ignore_eos=True)

    outcome = await session.submit(1, PROMPT, stopping=stopping)

    assert await session.finish(outcome) == tokens[: tokens.index(stop) + 1]
    assert outcome.finish is not None
    assert (outcome.finish.finish_reason, outcome.finish.stop_token_id) == (gateway_pb2.FINISH_REASON_STOP, stop)


async def test_probabilities_come_with_the_tokens_and_the_prompts_with_the_start(session: EngineSessionClient) -> None:
    outcome = await session.submit(0, PROMPT, 4, logprobs=2, prompt_logprobs=1)

    tokens = await session.finish(outcome)

    assert [entry.chosen.token_id for entry in outcome.logprobs] == tokens
    assert all(entry.top[0].token_id == entry.chosen.token_id and len(entry.top) == 2 for entry in outcome.logprobs)
    assert all(entry.top[0].logprob <= 0 for entry in outcome.logprobs)
    assert outcome.started is not None
    assert [entry.chosen.token_id for entry in outcome.started.prompt_logprobs] == PROMPT[1:]


async def test_an_aborted_request_ends_as_cancelled_and_frees_its_pages(
    session: EngineSessionClient, stub: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    outcome = await session.submit(0, PROMPT, 400)
    await asyncio.wait_for(outcome.has_tokens.wait(), 20)

    await session.abort(0)
    await session.finish(outcome)

    assert outcome.finish is not None
    assert outcome.finish.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED
    await eventually(lambda: is_idle(stub))


async def test_an_abort_of_an_unknown_slot_disturbs_nobody(session: EngineSessionClient) -> None:
    await session.abort(77)

    assert len(await session.finish(await session.submit(0, PROMPT))) == 8


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [1] * 600}, "prompt_token_ids"),
        ({"prompt_token_ids": [384]}, "prompt_token_ids[0]"),
        ({"sampling": gateway_pb2.SamplingParams(seed=1, temperature=math.nan)}, "sampling.temperature"),
        ({"sampling": gateway_pb2.SamplingParams(seed=1, top_p=7.0)}, "sampling.top_p"),
        ({"stopping": gateway_pb2.StoppingParams(max_new_tokens=0)}, "stopping.max_new_tokens"),
        ({"adapter_digest": "no digest"}, "adapter_digest"),
    ],
)
async def test_a_bad_field_ends_its_own_request_only(
    session: EngineSessionClient, fields: dict[str, Any], field: str
) -> None:
    neighbour = await session.submit(1, PROMPT, 20)

    error = await session.fail(await session.submit(2, **({"prompt": PROMPT} | fields)))

    assert isinstance(error, InvalidParameterError)
    assert error.field == field
    assert len(await session.finish(neighbour)) == 20


async def test_a_field_of_a_newer_gateway_ends_its_own_request_only(session: EngineSessionClient) -> None:
    neighbour = await session.submit(1, PROMPT, 20)
    newer = gateway_pb2.SamplingParams(seed=1)
    newer.MergeFromString(b"\xfa\x3f\x01x")

    error = await session.fail(await session.submit(2, PROMPT, sampling=newer))

    assert isinstance(error, NotSupportedError)
    assert "sampling.1023" in error.message
    assert len(await session.finish(neighbour)) == 20


async def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    sizes = ("--pool-bytes", "131072", "--arena-bytes", "131072")
    with running_engine(tmp_path, *sizes) as process:
        async with EngineSessionClient(process.grpc) as session:
            error = await session.fail(await session.submit(0, PROMPT, 500))
            tokens = await session.finish(await session.submit(1, PROMPT, 8))

    assert isinstance(error, RequestTooLargeError)
    assert "pages" in error.message
    assert len(tokens) == 8


async def test_a_deadline_that_has_passed_fails_the_request(session: EngineSessionClient) -> None:
    error = await session.fail(await session.submit(0, PROMPT, time_left=duration_pb2.Duration(seconds=0)))

    assert isinstance(error, DeadlineError)


async def test_a_time_limit_ends_the_output_normally(session: EngineSessionClient) -> None:
    outcome = await session.submit(0, PROMPT, 400, time_limit=duration_pb2.Duration(nanos=50_000_000))

    tokens = await session.finish(outcome)

    assert outcome.finish is not None
    assert outcome.finish.finish_reason in (gateway_pb2.FINISH_REASON_TIME_LIMIT, LENGTH)
    assert len(tokens) <= 400


async def test_an_adapter_without_a_store_is_unavailable(session: EngineSessionClient) -> None:
    error = await session.fail(await session.submit(0, PROMPT, adapter_digest=DIGEST))

    assert isinstance(error, StoreUnavailableError)
