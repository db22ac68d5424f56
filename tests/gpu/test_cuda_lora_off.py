"""A backend without LoRA is the same backend for requests without an adapter, and less of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.cuda.part_variants import PART_VARIANTS
from loraplex_engine.runners.cuda.runner import CudaRunner
from loraplex_engine.runners.runner_config import RunnerConfig
from support.base_models import write_base_model
from support.cuda_rig import BASES
from support.plans import Harness

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_TOKENS = 12


def generate(model_dir: Path, max_resident_adapters: int) -> tuple[list[list[int]], int]:
    """Return tokens of three sequences and the number of graphs."""
    info = load_base_model(model_dir)
    geometry = choose_pool_geometry(info, dtype="bfloat16")
    limits = EngineLimits(
        pool=geometry,
        num_pages=64,
        max_num_seqs=8,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_resident_adapters=max_resident_adapters,
    )
    config = RunnerConfig(info=info, limits=limits, device="cuda:0")
    runner = CudaRunner(config, WeightReader(model_dir, dtype=torch.bfloat16, device=torch.device("cuda", 0)))
    harness = Harness(runner, geometry, 64)
    sequences = [harness.add(list(range(5, 5 + length))) for length in (1, 17, 40)]
    tokens, num_graphs = harness.generate(sequences, NUM_TOKENS), len(runner.graphs)
    runner.close()
    return tokens, num_graphs


def test_a_backend_without_lora_draws_the_same_tokens_with_a_graph_for_each_bucket(tmp_path: Path) -> None:
    model_dir = write_base_model(tmp_path / "base", BASES["gqa"])

    without, few = generate(model_dir, 0)
    with_lora, many = generate(model_dir, 16)

    assert without == with_lora
    assert many == (3 + len(PART_VARIANTS) + 1) * few  # of plain LoRA, other parts, several adapters a row
