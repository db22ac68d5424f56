"""A whole engine on the CUDA backend: more adapters than the pool holds, pages reused under load, nothing left over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.base_model import load_base_model
from loraplex_engine.engine import EngineParams
from loraplex_engine.pool_geometry import choose_pool_geometry
from support.adapters import Recipe
from support.base_models import write_base_model
from support.cuda_rig import BASES, make_cuda_runner
from support.engine_harness import recipe_adapter, running_engine, torch_engine

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.cuda.runner import CudaRunner
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
    pool = choose_pool_geometry(load_base_model(model_dir), dtype="float32")
    params = EngineParams(
        geometry=load_base_model(model_dir).geometry(dtype="float32", page_bytes=pool.page_bytes),
        block_tokens=pool.block_tokens,
        pool_bytes=NUM_PAGES * pool.page_bytes,
        arena_bytes=400 * pool.page_bytes,
        eos_token_ids=(),
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_resident_adapters=64,
    )

    def make(params: EngineParams) -> CudaRunner:
        return make_cuda_runner(
            model_dir,
            "float32",
            num_pages=params.num_pages,
            max_num_seqs=params.max_num_seqs,
            max_model_len=params.max_model_len,
            max_num_batched_tokens=params.max_num_batched_tokens,
        )

    with running_engine(params, make) as harness:
        found = submit_all(harness, model_dir)
        harness.check_idle()
        counters = harness.engine.counters
    with torch_engine(model_dir, num_pages=400, num_arena_slots=400, max_model_len=128) as harness:
        expected = submit_all(harness, model_dir)

    print(counters)
    assert found == expected
