"""The whole engine on the torch backend: batched with strangers, evicted and preempted equals alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_common.base_model import load_base_model
from support.adapters import Recipe
from support.base_models import write_base_model
from support.engine_harness import EngineHarness, recipe_adapter, torch_engine

if TYPE_CHECKING:
    from pathlib import Path

RECIPES = {
    "plain": Recipe(rank=8, seed=1),
    "wide": Recipe(rank=32, seed=2, use_rslora=True, targets=("q_proj", "v_proj", "down_proj")),
    "thin": Recipe(rank=1, seed=3, layers=(1,)),
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"))


def _add_adapters(harness: EngineHarness, base_dir: Path) -> None:
    for digest, recipe in RECIPES.items():
        harness.add_adapter(*recipe_adapter(load_base_model(base_dir), recipe, digest))


@pytest.fixture(scope="module")
def alone(base_dir: Path) -> dict[tuple[str | None, int], list[int]]:
    """Outputs of each prompt with each adapter, one request at a time in a roomy engine."""
    with torch_engine(base_dir) as harness:
        _add_adapters(harness, base_dir)
        return {
            (adapter, length): harness.generate([_prompt(length)], adapter=adapter, max_new_tokens=20)[0]
            for adapter in (None, *RECIPES)
            for length in (1, 5, 30)
        }


def _prompt(length: int) -> list[int]:
    return [(7 * index + length) % 60 + 4 for index in range(length)]


def test_adapters_change_the_output(alone: dict[tuple[str | None, int], list[int]]) -> None:
    assert len({tuple(alone[adapter, 30]) for adapter in (None, *RECIPES)}) == 4


@pytest.mark.parametrize("emulate_async", [False, True], ids=["depth1", "depth2"])
@pytest.mark.parametrize("is_tight", [False, True], ids=["roomy", "tight"])
def test_mixed_requests_equal_solo_runs(
    base_dir: Path, alone: dict[tuple[str | None, int], list[int]], emulate_async: bool, is_tight: bool
) -> None:
    with torch_engine(base_dir, emulate_async=emulate_async, max_num_batched_tokens=24) as probe:
        _add_adapters(probe, base_dir)
        sizes = [len(image) for _, image in probe.images.values()]
    num_pages = max(sizes) + 5 if is_tight else 256

    with torch_engine(
        base_dir, num_pages=num_pages, emulate_async=emulate_async, max_num_batched_tokens=24, max_num_seqs=8
    ) as harness:
        _add_adapters(harness, base_dir)
        jobs = [key for _ in range(2) for key in alone]
        generations = [harness.submit(_prompt(length), adapter=adapter, max_new_tokens=20) for adapter, length in jobs]
        harness.wait(generations)

        assert [generation.tokens for generation in generations] == [alone[job] for job in jobs]
        harness.check_idle()
