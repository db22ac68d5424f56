"""Adapters that add tokens, over a whole stack: text in, text out, as transformers + peft with the adapter's folder."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_client import Finished
from loraplex_common.errors import InvalidParameterError
from support.adapters import Recipe, write_adapter
from support.added_tokens import NUM_TOKENS, extended_by_transformers, padded_base_dir, saved
from support.generation import read_tokens, start
from support.oracle import Oracle
from support.outside_adapters import OutsideTruth
from support.stack import Stack, assert_idle, running_stack
from support.stack_fixtures import import_all
from support.store_rig import tiny_base_dir
from tokenizers import AddedToken
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

ROWS = 384
NUM_NEW = 24
PROMPTS = {"one": "the <one-1> quick <one-70>brown", "two": "the <one-1> quick <two-3>"}


def names_of(adapter: str) -> list[AddedToken]:
    """Return a token for each row that the base's tokenizer leaves unused: nearly every output draws some."""
    return [AddedToken(f"<{adapter}-{n}>", normalized=False) for n in range(ROWS - NUM_TOKENS)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(PROMPTS):
        write_adapter(root / name, padded_base_dir(), Recipe(seed=seed, base_model_name_or_path="padded"))
        saved(extended_by_transformers(padded_base_dir(), names_of(name)), root / name)
    write_adapter(root / "plain", padded_base_dir(), Recipe(seed=7, base_model_name_or_path="padded"))
    with running_stack(tmp_path_factory.mktemp("stack"), padded_base_dir(), root) as running:
        import_all(running)
        yield running


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


async def test_two_adapters_answers_in_one_batch_are_those_of_transformers_and_peft(stack: Stack) -> None:
    oracle = Oracle(stack.model, {name: stack.import_root / name for name in PROMPTS})
    client = stack.client()
    try:
        streams = [start(client, name, NUM_NEW, prompt=text) for name, text in 3 * [*PROMPTS.items()]]
        events = await asyncio.gather(*(_read(stream) for stream in streams))
        plain = await read_tokens(start(client, "plain", NUM_NEW, prompt=PROMPTS["one"]))
    finally:
        await client.close()

    for n, (name, prompt) in enumerate(PROMPTS.items()):
        tokenizer = tokenizer_of(stack.import_root / name)
        ids = tokenizer.encode(prompt)
        assert max(ids) >= NUM_TOKENS, "the prompt has an added token"
        expected = oracle.greedy(ids, NUM_NEW, name)
        assert max(expected) >= NUM_TOKENS, "the output draws one"
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert f"<{name}-" in text
        assert events[n::2] == 3 * [(expected, text)], name
    assert len(plain) == NUM_NEW
    await assert_idle(stack.engines[0])


async def _read(stream: Any) -> tuple[list[int], str]:
    tokens, text = [], ""
    async for event in stream:
        tokens += event.token_ids
        text += getattr(event, "text", "")
    return tokens, text


async def test_an_id_behind_all_rows_is_refused_by_name(stack: Stack) -> None:
    client = stack.client()
    try:
        for adapter in ("one", "plain", None):
            with pytest.raises(
                InvalidParameterError, match=f"holds {ROWS}; token ids of this model are 0 to {ROWS - 1}"
            ):
                await read_tokens(start(client, adapter, 4, prompt_token_ids=[5, ROWS]))
        assert await client.detokenize([NUM_TOKENS], adapter="one") == "<one-0>"
        assert await client.detokenize([NUM_TOKENS]) == ""
    finally:
        await client.close()


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, OutsideTruth]]:
    """A stack over a base model whose tokenizer has a token for each row, and adapters with rows and tokens behind them."""
    base, root = tiny_base_dir(), tmp_path_factory.mktemp("beyond")
    truth = OutsideTruth(base, ["saved", "saved", "trained"])
    for name, adapter in truth.adapters.items():
        tokens = [AddedToken(f"<{name}:{n}>", normalized=False) for n in range(len(adapter.added))]
        adapter.model.save_pretrained(root / name)
        saved(extended_by_transformers(base, tokens), root / name)
    write_adapter(root / "plain", base, Recipe(seed=7, base_model_name_or_path="tiny"))
    with running_stack(tmp_path_factory.mktemp("stack"), base, root) as running:
        import_all(running)
        yield running, truth


async def test_tokens_behind_all_rows_are_read_and_drawn_as_peft_does(beyond: tuple[Stack, OutsideTruth]) -> None:
    stack, truth = beyond
    client = stack.client()
    prompts = {name: f"the <{name}:1> quick<{name}:0> brown" for name in truth.adapters}
    try:
        streams = [start(client, name, NUM_NEW, prompt=text) for name, text in 3 * [*prompts.items()]]
        events = await asyncio.gather(*(_read(stream) for stream in streams))
        hot = [read_tokens(start(client, "plain", NUM_NEW, temperature=2.0, seed=seed)) for seed in range(4)]
        strangers = await asyncio.gather(*hot)
    finally:
        await client.close()

    num_drawn = 0
    for n, (name, prompt) in enumerate(prompts.items()):
        tokenizer = tokenizer_of(stack.import_root / name)
        ids = tokenizer.encode(prompt)
        assert max(ids) >= ROWS
        expected = truth.greedy(ids, NUM_NEW, name)
        assert events[n::3] == 3 * [(expected, tokenizer.decode(expected, skip_special_tokens=True))], name
        num_drawn += sum(token >= ROWS for token in expected)
    assert num_drawn > 0
    assert max(token for tokens in strangers for token in tokens) < ROWS
    await assert_idle(stack.engines[0])


async def test_an_id_is_taken_from_the_adapter_that_has_it_alone(beyond: tuple[Stack, OutsideTruth]) -> None:
    stack, _ = beyond
    client = stack.client()
    biased: dict[str, Any] = {"logit_bias": {ROWS: 100.0}}
    try:
        assert await read_tokens(start(client, "saved-0", 3, **biased)) == 3 * [ROWS]
        stopped = [event async for event in start(client, "saved-0", 9, stop_token_ids=[ROWS], **biased)]
        for adapter, own in (("plain", ""), (None, ""), ("saved-0", f" and {ROWS}, {ROWS + 1}, {ROWS + 2}, which")):
            bad = ROWS if not own else ROWS + 3
            with pytest.raises(InvalidParameterError, match=f"holds {bad}; token ids of this model are 0 to 383{own}"):
                await read_tokens(start(client, adapter, 4, prompt_token_ids=[5, bad]))
    finally:
        await client.close()

    assert isinstance(stopped[-1], Finished)
    assert stopped[-1].stop_token_id == ROWS
