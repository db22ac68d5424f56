"""A whole engine on the CUDA backend: more adapters than the pool holds, pages reused under load, nothing left over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterIncompatibleError, SaturatedError
from loraplex_engine.limits import SchedulingPolicy
from loraplex_engine.runners.cuda import kernel_setup
from loraplex_kernels.lora.tables import MAX_RANK
from support.adapters import Recipe
from support.base_models import write_base_model
from support.cuda_rig import BASES, cuda_engine
from support.engine_harness import recipe_adapter, torch_engine

if TYPE_CHECKING:
    from pathlib import Path

    from support.engine_harness import EngineHarness

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_ADAPTERS = 12
NUM_REQUESTS = 60
NUM_PAGES = 40


def submit_all(harness: EngineHarness, model_dir: Path) -> list[list[int]]:
    info, rng = load_base_model(model_dir), np.random.default_rng(5)
    digests = [f"{number:064x}" for number in range(NUM_ADAPTERS)]
    for number, digest in enumerate(digests):
        recipe = Recipe(rank=int(2 ** (number % 5)), seed=number, strength=0.4)
        harness.add_adapter(*recipe_adapter(info, recipe, digest))
    requests = [
        harness.submit(
            rng.integers(0, 384, int(rng.integers(2, 60))).tolist(),
            adapter=digests[number % NUM_ADAPTERS] if number % 4 else None,
            max_new_tokens=int(rng.integers(1, 24)),
        )
        for number in range(NUM_REQUESTS)
    ]
    harness.wait(requests)
    assert not harness.crashes
    return [request.tokens for request in requests]


def test_an_engine_with_more_adapters_than_its_pool_holds_answers_as_the_cpu_does(tmp_path: Path) -> None:
    model_dir = write_base_model(tmp_path / "base", BASES["gqa"])
    with cuda_engine(model_dir, "float32", num_pages=NUM_PAGES) as harness:
        found = submit_all(harness, model_dir)
        harness.check_idle()
        counters = harness.engine.counters
    with torch_engine(model_dir, num_pages=400, num_arena_slots=400, max_model_len=128) as harness:
        expected = submit_all(harness, model_dir)

    print(counters)
    assert found == expected


def test_shared_prefixes_give_the_tokens_of_an_engine_that_shares_nothing(tmp_path: Path) -> None:
    model_dir = write_base_model(tmp_path / "base", BASES["gqa"])
    recipe, digest = Recipe(rank=8, seed=1, strength=0.4), "a" * 64
    beginning = [(7 * index) % 300 + 4 for index in range(64)]
    prompts = [beginning, beginning, [*beginning, 5, 6, 7], beginning[:40], [*beginning[:32], 9, 9]]
    jobs = [(prompt, adapter) for adapter in (None, digest) for prompt in prompts]

    def answers(harness: EngineHarness) -> tuple[list[list[int]], list[int]]:
        harness.add_adapter(*recipe_adapter(load_base_model(model_dir), recipe, digest))
        tokens, cached = [], []
        for prompt, adapter in jobs:
            (generation,) = harness.wait([harness.submit(prompt, adapter=adapter, max_new_tokens=20)])
            assert generation.start is not None
            tokens.append(generation.tokens)
            cached.append(generation.start.cached_tokens)
        harness.check_idle()
        return tokens, cached

    with cuda_engine(model_dir, "float32", num_pages=200) as harness:
        found, cached = answers(harness)
    with torch_engine(model_dir, max_model_len=128, policy=SchedulingPolicy(enable_prefix_cache=False)) as harness:
        expected, nothing = answers(harness)

    assert found == expected
    assert sum(nothing) == 0
    assert cached[0] == cached[len(prompts)] == 0  # an adapter finds nothing of the base's
    assert all(count > 0 for count in (*cached[1 : len(prompts)], *cached[len(prompts) + 1 :]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_the_kernels_cannot_take_end_their_own_request_and_no_other(tmp_path: Path, dtype: str) -> None:
    model_dir = write_base_model(tmp_path / "base", BASES["gqa"])
    info = load_base_model(model_dir)
    targets = (
        ("q_proj", "k_proj", "v_proj") if dtype == "bfloat16" else ("q_proj",)
    )  # in fp32 a tile holds 1,024 stacked
    with cuda_engine(model_dir, dtype, num_pages=400) as harness:
        for digest, rank in (("a" * 64, MAX_RANK + 1), ("b" * 64, MAX_RANK)):
            harness.add_adapter(*recipe_adapter(info, Recipe(rank=rank, targets=targets, seed=rank), digest))

        refused, *served = harness.wait(
            [harness.submit(range(2, 30), adapter=digest) for digest in ("a" * 64, "b" * 64, None)]
        )

        assert refused.end is not None
        assert isinstance(refused.end.error, AdapterIncompatibleError)
        assert f"{MAX_RANK + 1} (q_proj)" in refused.end.error.message
        assert "--backend torch" in refused.end.error.message
        assert all(generation.end is not None and generation.end.error is None for generation in served)
        assert served[0].tokens != served[1].tokens
        assert not harness.crashes
        harness.check_idle()


def test_a_full_tile_table_ends_the_request_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_setup, "tile_capacity", lambda *_args, **_fields: 1)
    model_dir = write_base_model(tmp_path / "base", BASES["gqa"])
    with cuda_engine(model_dir, "bfloat16", num_pages=200) as harness:
        harness.add_adapter(*recipe_adapter(load_base_model(model_dir), Recipe(rank=8), "a" * 64))

        (refused,) = harness.wait([harness.submit([1, 2, 3], adapter="a" * 64)])
        (served,) = harness.wait([harness.submit([1, 2, 3])])

        assert refused.end is not None
        assert isinstance(refused.end.error, SaturatedError)
        assert served.end is not None
        assert served.end.error is None
        assert not harness.crashes
        harness.check_idle()
