"""Shared prefixes on the real model: the tokens of a request never depend on what others left in the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import SchedulingPolicy
from support.adapters import Recipe
from support.base_models import write_base_model
from support.engine_harness import EngineHarness, recipe_adapter, torch_engine

if TYPE_CHECKING:
    from pathlib import Path

RECIPES = {
    "wide": Recipe(rank=16, seed=2),
    "only-down-of-layer-0": Recipe(rank=8, seed=3, targets=("down_proj",), layers=(0,)),
}
PROMPT = [(7 * index) % 60 + 4 for index in range(70)]
NEW_TOKENS = 20
NO_CACHE = SchedulingPolicy(enable_prefix_cache=False)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"))


def _add_adapters(harness: EngineHarness, base_dir: Path) -> None:
    for digest, recipe in RECIPES.items():
        harness.add_adapter(*recipe_adapter(load_base_model(base_dir), recipe, digest))


def _turns(answer: list[int]) -> list[list[int]]:
    """A prompt, itself, a longer one, a shorter one, and the next turn of its conversation."""
    return [PROMPT, PROMPT, [*PROMPT, 9, 8, 7], PROMPT[:40], [*PROMPT, *answer, 11, 12]]


@pytest.mark.parametrize("emulate_async", [False, True], ids=["depth1", "depth2"])
def test_hits_give_the_tokens_of_an_engine_without_a_cache(base_dir: Path, emulate_async: bool) -> None:
    adapters = [None, *RECIPES]
    with torch_engine(base_dir, policy=NO_CACHE) as plain:
        _add_adapters(plain, base_dir)
        first = {a: plain.generate([PROMPT], adapter=a, max_new_tokens=NEW_TOKENS)[0] for a in adapters}
        expected = {
            a: [plain.generate([turn], adapter=a, max_new_tokens=NEW_TOKENS)[0] for turn in _turns(first[a])]
            for a in adapters
        }

    with torch_engine(base_dir, emulate_async=emulate_async, max_num_batched_tokens=32) as harness:
        _add_adapters(harness, base_dir)
        for adapter in adapters:
            found = []
            for turn, tokens in zip(_turns(first[adapter]), expected[adapter], strict=True):
                generation = harness.submit(turn, adapter=adapter, max_new_tokens=NEW_TOKENS)
                harness.wait([generation])
                assert generation.tokens == tokens
                assert generation.start is not None
                found.append(generation.start.cached_tokens)
            assert found == [0, 64, 64, 32, 80], adapter
        harness.check_idle()


def test_an_adapter_that_touches_only_down_of_layer_0_never_hits_the_bases_prefix(base_dir: Path) -> None:
    with torch_engine(base_dir) as harness:
        _add_adapters(harness, base_dir)
        base = harness.submit(PROMPT, max_new_tokens=NEW_TOKENS)
        harness.wait([base])

        adapted = harness.submit(PROMPT, adapter="only-down-of-layer-0", max_new_tokens=NEW_TOKENS)
        again = harness.submit(PROMPT, max_new_tokens=NEW_TOKENS)
        harness.wait([adapted, again])

        assert adapted.start is not None
        assert adapted.start.cached_tokens == 0
        assert again.start is not None
        assert again.start.cached_tokens == 64
        assert again.tokens == base.tokens != adapted.tokens


def test_requests_that_share_pages_while_they_run_are_each_their_own(base_dir: Path) -> None:
    prompts = [[*PROMPT[:48], 4 + tail, 5 + tail] for tail in range(6)]
    with torch_engine(base_dir, policy=NO_CACHE) as plain:
        expected = [plain.generate([prompt], max_new_tokens=NEW_TOKENS)[0] for prompt in prompts]

    with torch_engine(base_dir, emulate_async=True) as harness:
        harness.generate([PROMPT[:48]], max_new_tokens=1)
        generations = [harness.submit(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
        harness.wait(generations)

        assert [generation.tokens for generation in generations] == expected
        assert all(g.start is not None and g.start.cached_tokens == 48 for g in generations)
