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
from support.cuda_rig import BASES, PLAIN_BASES, make_cuda_runner, make_torch_runner
from support.fp8_cache import Fp8Cache
from support.oracle import Oracle, adapter_image
from support.plans import Draw, Harness

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.runners.torch.runner import TorchRunner
    from support.plans import Sequence_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_FORCED, NUM_PAGES = 6, 512
MAX_ERRORS = 1e-4, 2e-2
"""Median and largest error of logits in fp32."""
LARGEST_RATIO = 1.25
"""In bf16, the median error is at most so many times the torch backend's."""


class Case:
    """A base, an adapter, and what transformers computes over e4m3."""

    def __init__(self, folder: Path, dtype: str) -> None:
        # Pages of e4m3 hold a tile with twice the heads.
        base = replace((BASES if dtype == "float32" else PLAIN_BASES)["gqa"], num_heads=8, num_kv_heads=4)
        self.model_dir, self.dtype, self.vocab_size = write_base_model(folder / "base", base), dtype, base.vocab_size
        self.info = load_base_model(self.model_dir)
        self.adapter = write_adapter(folder / "adapter", self.model_dir, Recipe(rank=8, seed=1))
        self.oracle = Oracle(self.model_dir, {"one": self.adapter}, make_cache=Fp8Cache)

    def errors(self, runner: CudaRunner | TorchRunner) -> list[float]:
        """Each position's error of a log probability, over the largest logit of the row."""
        geometry = choose_pool_geometry(self.info, dtype=self.dtype, kv_dtype="fp8")
        harness, rng, added = Harness(runner, geometry, NUM_PAGES), np.random.default_rng(3), []
        image = adapter_image(runner.geometry, self.info, self.adapter)
        indices: dict[str | None, int] = {None: -1, "one": harness.load(*image)}
        for name, index in list(indices.items()) * 3:
            prompt = rng.integers(0, self.vocab_size, int(rng.integers(1, 70))).tolist()
            forced = self.oracle.greedy(prompt, NUM_FORCED, name)
            chunks = [len(prompt) // 3] if len(prompt) > 9 else []
            draw = Draw(num_logprobs=self.vocab_size)
            added.append((name, harness.add(prompt, adapter=index, forced=forced, chunks=chunks, draw=draw)))
        harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)
        runner.close()
        return [error for name, sequence in added for error in self._errors_of(name, sequence)]

    def _errors_of(self, name: str | None, sequence: Sequence_) -> list[float]:
        logits = self.oracle.logits([*sequence.prompt, *sequence.forced], name)[len(sequence.prompt) - 1 :]
        errors = []
        for row, entry in zip(logits.astype(np.float64), sequence.logprobs, strict=True):
            found = np.empty(self.vocab_size)
            found[entry.token_ids[1:]] = entry.logprobs[1:]
            errors.append(float(np.abs(found - (row - np.logaddexp.reduce(row))).max() / np.abs(row).max()))
        return errors


def test_chunks_and_decode_steps_compute_what_transformers_computes_over_e4m3(tmp_path: Path) -> None:
    case = Case(tmp_path, "float32")

    errors = case.errors(make_cuda_runner(case.model_dir, "float32", num_pages=NUM_PAGES, kv_dtype="fp8"))

    assert np.median(errors) < MAX_ERRORS[0]
    assert max(errors) < MAX_ERRORS[1]


def test_in_bf16_they_are_as_near_to_it_as_the_torch_backend(tmp_path: Path) -> None:
    case = Case(tmp_path, "bfloat16")

    own = case.errors(make_cuda_runner(case.model_dir, "bfloat16", num_pages=NUM_PAGES, kv_dtype="fp8"))
    peer = case.errors(make_torch_runner(case.model_dir, "bfloat16", num_pages=NUM_PAGES, kv_dtype="fp8"))

    print(
        f"error of logits, median {np.median(own):.1e}, most {max(own):.1e}; torch {np.median(peer):.1e}, {max(peer):.1e}"
    )
    assert np.median(own) < LARGEST_RATIO * np.median(peer)
    assert max(own) < 2 * LARGEST_RATIO * max(peer)
