"""A load test of a real stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_client.load import LoadTest
from loraplex_client.workload import ConversationShape, SloraParams, conversations, slora_trace
from support.base_models import TinyBase
from support.stack import Stack, assert_idle, read_metrics
from support.stack_fixtures import TINY_RECIPES, import_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_client import AsyncClient

pytestmark = pytest.mark.integration

NAMES = tuple(TINY_RECIPES)
VOCAB_SIZE = TinyBase().vocab_size
HITS = "vllm:prefix_cache_hits_total"


@pytest.fixture
async def client(tiny_stack: Stack) -> AsyncIterator[AsyncClient]:
    import_all(tiny_stack)
    client = tiny_stack.client()
    yield client
    await client.close()
    await assert_idle(tiny_stack.engines[0])


async def test_a_trace_over_several_adapters_comes_back_whole(client: AsyncClient) -> None:
    trace = slora_trace(
        SloraParams(num_adapters=len(NAMES), rate=20, duration_s=2, prompt_range=(4, 32), output_range=(2, 16))
    )

    result = await LoadTest(client, trace, NAMES, vocab_size=VOCAB_SIZE).run()

    result.measured.require_complete()
    assert (result.measured.first_s <= result.measured.last_s).all()
    assert (result.measured.ttft_s > 0).all()
    assert result.measured.output_tokens_per_s > 0


async def test_later_turns_of_a_conversation_find_the_earlier_ones_cached(
    tiny_stack: Stack, client: AsyncClient
) -> None:
    shape = ConversationShape(
        num_conversations=4,
        rate=10,
        num_adapters=len(NAMES),
        think_s=0.01,
        token_s=0.001,
        user_range=(40, 60),
        output_range=(4, 9),
        max_model_len=240,
    )
    trace = conversations(shape)
    before = read_metrics(tiny_stack.engines[0])[HITS]

    result = await LoadTest(client, trace, NAMES, vocab_size=VOCAB_SIZE, seed=5).run()

    result.measured.require_complete()
    assert (result.measured.due_s == trace.arrival_s)[trace.turn == 0].all()
    found = read_metrics(tiny_stack.engines[0])[HITS] - before
    assert found >= trace.prefix_tokens.sum() / 2 > 0  # all but the last, partly filled block of each turn before


async def test_what_is_open_at_the_limit_is_cancelled(client: AsyncClient) -> None:
    trace = slora_trace(
        SloraParams(num_adapters=len(NAMES), rate=30, duration_s=1, prompt_range=(4, 9), output_range=(200, 201))
    )

    result = await LoadTest(client, trace, NAMES, vocab_size=VOCAB_SIZE).run(limit_s=0.3)

    assert result.measured.num_unfinished > 0
    is_late = trace.arrival_s > 0.5
    assert is_late.any()
    assert np.isnan(result.lag_s[is_late]).all(), "sent after the limit"
    # The fixture waits until the engine is idle.
