"""The CUDA backend with FP8 keys and values against transformers over a cache that keeps e4m3."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.base_model import load_base_model
from loraplex_engine.pool_geometry import choose_pool_geometry
from support.adapters import Recipe, write_adapter
from support.base_models import write_base_model
from support.cuda_rig import BASES, PLAIN_BASES, make_cuda_runner
from support.fp8_cache import Fp8Cache
from support.oracle import Oracle, adapter_image
from support.plans import Draw, Harness

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_FORCED, NUM_PAGES = 6, 512


@pytest.mark.parametrize(("dtype", "median", "most"), [("float32", 1e-4, 2e-2), ("bfloat16", 2e-2, 1e-1)])
def test_chunks_and_decode_steps_compute_what_transformers_computes_over_e4m3(
    tmp_path: Path, dtype: str, median: float, most: float
) -> None:
    # Keys and values of a byte: pages hold a tile with twice the layers.
    base = replace((BASES if dtype == "float32" else PLAIN_BASES)["gqa"], num_layers=8)
    model_dir = write_base_model(tmp_path / "base", base)
    adapter = write_adapter(tmp_path / "adapter", model_dir, Recipe(rank=8, seed=1))
    oracle, info = Oracle(model_dir, {"one": adapter}, make_cache=Fp8Cache), load_base_model(model_dir)
    runner = make_cuda_runner(model_dir, dtype, num_pages=NUM_PAGES, kv_dtype="fp8")
    harness = Harness(runner, choose_pool_geometry(info, dtype=dtype, kv_dtype="fp8"), NUM_PAGES)
    indices: dict[str | None, int] = {None: -1, "one": harness.load(*adapter_image(runner.geometry, info, adapter))}
    rng, added = np.random.default_rng(3), []
    for name, index in list(indices.items()) * 3:
        prompt = rng.integers(0, base.vocab_size, int(rng.integers(1, 70))).tolist()
        forced = oracle.greedy(prompt, NUM_FORCED, name)
        draw = Draw(num_logprobs=base.vocab_size)
        chunks = [len(prompt) // 3] if len(prompt) > 9 else []
        added.append((name, harness.add(prompt, adapter=index, forced=forced, chunks=chunks, draw=draw)))

    harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

    errors = []
    for name, sequence in added:
        truth = oracle.logits([*sequence.prompt, *sequence.forced], name)[len(sequence.prompt) - 1 :]
        for step, entry in enumerate(sequence.logprobs):
            row = truth[step].astype(np.float64)
            wanted = row - np.logaddexp.reduce(row)
            found = np.empty(base.vocab_size)
            found[entry.token_ids[1:]] = entry.logprobs[1:]
            errors.append(np.abs(found - wanted).max() / np.abs(truth[step]).max())
    print(f"{dtype}: relative error of logits, median {np.median(errors):.1e}, most {max(errors):.1e}")
    assert np.median(errors) < median
    assert max(errors) < most
    runner.close()
