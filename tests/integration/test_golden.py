"""The demo's golden outputs: real weights, five very different adapters and the base in one batch, token for token."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest
from support.demo_model import find_demo_model
from support.stack import Stack, StackFlags, assert_idle, read_metrics, running_stack
from support.stack_fixtures import DEMO_DIR, golden_cases, import_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_client import AsyncClient

pytestmark = pytest.mark.integration

MAX_NEW_TOKENS = 40
# Pages of 720 KiB: 51 in the pool and 42 in the arena. The five adapters take 27, 8, 8, 8 and 2, a sequence up to 5.
SMALL_POOL = "36MiB"
SMALL_ARENA = "30MiB"
# Without growth reckoned with, requests are admitted that have to be preempted later.
PRESSURE = ("--max-num-seqs", "32", "--growth-quantile", "0")


@pytest.fixture
async def client(smol_stack: Stack) -> AsyncIterator[AsyncClient]:
    import_all(smol_stack)
    client = smol_stack.client()
    yield client
    await client.close()


async def generate(client: AsyncClient, case: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    result = await client.generate_once(
        prompt_token_ids=case["prompt_ids"],
        adapter=case["adapter"],
        temperature=0.0,
        max_new_tokens=MAX_NEW_TOKENS,
        skip_special_tokens=False,
        timeout=200,
    )
    return result.token_ids, "eos" if result.finished.stop_token_id is not None else "length"


async def assert_golden(client: AsyncClient, cases: list[dict[str, Any]]) -> None:
    """Submit all cases at once and compare each with what transformers and PEFT gave alone."""
    results = await asyncio.gather(*(generate(client, case) for case in cases))

    wrong = [
        f"{case['adapter']} {case['prompt']!r}: {tokens} ({finish}), expected {case['token_ids']} ({case['finish']})"
        for case, (tokens, finish) in zip(cases, results, strict=True)
        if (list(tokens), finish) != (case["token_ids"], case["finish"])
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases differ:\n" + "\n".join(wrong)


async def test_all_golden_cases_at_once_give_exactly_the_golden_tokens(smol_stack: Stack, client: AsyncClient) -> None:
    await assert_golden(client, golden_cases())
    await assert_idle(smol_stack.engines[0])


@pytest.mark.parametrize("seed", [1, 2])
async def test_order_and_mixture_change_no_token(smol_stack: Stack, client: AsyncClient, seed: int) -> None:
    rng = random.Random(seed)
    cases = golden_cases()
    rng.shuffle(cases)

    await assert_golden(client, cases[: rng.randint(8, 20)])
    await assert_idle(smol_stack.engines[0])


async def test_evictions_and_preemptions_in_between_change_no_token(tmp_path: Path) -> None:
    flags = StackFlags(engine=("--pool-bytes", SMALL_POOL, "--arena-bytes", SMALL_ARENA, *PRESSURE))
    with running_stack(tmp_path, find_demo_model(), DEMO_DIR / "adapters", flags) as stack:
        import_all(stack)
        client = stack.client()

        # Half of the cases: where so few run at a time, a step reads all weights for few tokens.
        cases = golden_cases()
        await assert_golden(client, [case for case in cases if case["adapter"]][::2])  # adapters fight for room
        await assert_golden(client, 2 * [case for case in cases if not case["adapter"]])  # sequences do

        await client.close()
        await assert_idle(stack.engines[0])
        counters = read_metrics(stack.engines[0])
    assert counters["vllm:num_preemptions_total"] > 0
    assert counters["loraplex_engine_adapter_evictions_total"] > 0
