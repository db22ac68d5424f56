"""Adapters with texts of their own beside others and the base, in one batch of a real engine."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_client import Finished, FinishReason
from loraplex_common.errors import InvalidParameterError
from support.adapter_texts import PIRATE, POET
from support.adapters import write_adapter
from support.generation import greedy, start
from support.oracle import Oracle
from support.stack import Stack, assert_idle
from support.stack_fixtures import TINY_RECIPES
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_client import AsyncClient

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "the quick"}]


@pytest.fixture
async def client(tiny_stack: Stack) -> AsyncIterator[AsyncClient]:
    client = tiny_stack.client()
    yield client
    for name in [adapter.name async for adapter in client.adapters.list(prefix="texts-")]:
        await client.adapters.delete(name)
    await client.close()
    await assert_idle(tiny_stack.engines[0])


async def upload(stack: Stack, client: AsyncClient, tmp_path: Path, name: str, **texts: str) -> None:
    """Import the weights of tiny-a under a name, with texts beside them."""
    folder = write_adapter(tmp_path / name, stack.model, TINY_RECIPES["tiny-a"])
    for file, text in texts.items():
        (folder / file.replace("__", ".")).write_text(text)
    await client.adapters.upload(name, folder)


def rendered(stack: Stack, template: str | None) -> list[int]:
    """Return what transformers makes of the conversation."""
    tokenizer: Any = AutoTokenizer.from_pretrained(stack.model)
    ids = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(ids)


async def test_conversations_of_two_templates_and_the_bases_share_a_batch(
    tiny_stack: Stack, client: AsyncClient, tmp_path: Path
) -> None:
    templates = {"texts-pirate": PIRATE, "texts-poet": POET, "texts-plain": None}
    for name, template in templates.items():
        await upload(tiny_stack, client, tmp_path, name, **({"chat_template__jinja": template} if template else {}))
    cases: list[tuple[str | None, str | None]] = [*templates.items(), (None, None)]
    alone = [await greedy(client, name, prompt_token_ids=rendered(tiny_stack, template)) for name, template in cases]

    together = await asyncio.gather(*(greedy(client, name, messages=MESSAGES) for name, _ in 3 * cases))

    assert together == 3 * alone
    assert len({tuple(tokens) for tokens in alone}) == 4


async def test_an_engine_stops_at_the_adapters_stop_token_and_the_bases_goes_on(
    tiny_stack: Stack, client: AsyncClient, tmp_path: Path
) -> None:
    await upload(tiny_stack, client, tmp_path, "texts-plain")
    tokens = await greedy(client, "texts-plain", 24)
    stop = tokens[5]
    first = tokens.index(stop)
    generation = json.dumps({"eos_token_id": [stop], "temperature": 0.0})
    await upload(tiny_stack, client, tmp_path, "texts-stops", generation_config__json=generation)

    *_, finished = [event async for event in start(client, "texts-stops", 24, ignore_eos=False, temperature=None)]
    ignoring = await greedy(client, "texts-stops", 24)
    later = await greedy(client, "texts-stops", 24, ignore_eos=False, min_new_tokens=first + 4)

    assert isinstance(finished, Finished)
    assert (finished.finish_reason, finished.stop_token_id) == (FinishReason.STOP, stop)
    assert finished.usage.output_tokens == first + 1
    assert ignoring == tokens
    assert later[:first] == tokens[:first]
    assert stop not in later[: first + 4]


async def test_an_activated_adapter_applies_from_its_last_invocation_on_and_a_prompt_without_one_is_refused(
    tiny_stack: Stack, client: AsyncClient, tmp_path: Path
) -> None:
    invocation, prompt = [7, 9, 8], [11, 12, 7, 9, 8, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 7, 9, 8, 11]
    recipe = replace(TINY_RECIPES["tiny-a"], config={"alora_invocation_tokens": invocation})
    folder = write_adapter(tmp_path / "judge", tiny_stack.model, recipe)
    await client.adapters.upload("texts-judge", folder)
    await upload(tiny_stack, client, tmp_path, "texts-plain")
    oracle = Oracle(tiny_stack.model, {"judge": folder})

    answers = await asyncio.gather(
        *(
            greedy(client, name, 12, prompt_token_ids=prompt)
            for name in ("texts-judge", None, "texts-judge", "texts-plain")
        )
    )

    assert answers[0] == answers[2] == oracle.greedy(prompt, 12, "judge")
    assert answers[1] == oracle.greedy(prompt, 12)
    assert len({tuple(answer) for answer in answers}) == 3
    with pytest.raises(
        InvalidParameterError, match=r"texts-judge is activated by the tokens \[7, 9, 8\].*do not contain"
    ):
        await greedy(client, "texts-judge", 12, prompt_token_ids=[7, 9, 11])
