"""Ranks of a group compute on the CUDA backend, kernels on the CPU, what the torch backend computes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.step import NO_ADAPTER
from support.adapters import random_recipe
from support.base_models import TinyBase, write_base_model
from support.engine_harness import recipe_adapter
from support.families import VOCAB_SIZE, family_dir, write_family_adapter
from support.host_decoder import BUCKET, CPU, NUM_PAGES, NUM_SLOTS
from support.host_ranks import HostRanks
from support.oracle import read_adapter
from support.part_adapters import FAMILIES, random_adapter
from support.plans import Draw, Harness

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loraplex_common.adapter_image import AdapterSpec, Tensors
    from support.plans import Sequence_

    Adapter = tuple[AdapterSpec, Tensors]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built"),
]

VOCAB = 385
"""Divided by no number of ranks."""
BASE = TinyBase(
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_layers=2,
    vocab_size=VOCAB,
)
MAX_ERROR = 1e-4


class Alone:
    """The torch backend on one rank, of the same steps."""

    def __init__(self, model_dir: Path) -> None:
        info = load_base_model(model_dir)
        self.pool_geometry = choose_pool_geometry(info, dtype="float32")
        limits = EngineLimits(pool=self.pool_geometry, num_pages=NUM_PAGES, max_num_seqs=NUM_SLOTS, max_model_len=128)
        reader = WeightReader(model_dir, dtype=torch.float32, device=CPU)
        self.runner = TorchRunner(RunnerConfig(info=info, limits=limits), reader)

    def load(self, harness: Harness, spec: AdapterSpec, tensors: Tensors) -> int:
        return harness.load(spec, pack(self.runner.geometry, spec, tensors))


def log_probs(harness: Harness, group: list[Sequence_], vocab: int) -> torch.Tensor:
    """Run a step of the torch backend; return the log probabilities of all tokens for each row that samples."""
    result = harness.step(group)
    listed = torch.full((len(result.slots), vocab), float("nan"))
    for row, entry in result.logprobs.items():
        listed[row, entry.token_ids[1:]] = torch.from_numpy(entry.logprobs[1:])
    return listed


def check_steps(
    model_dir: Path, ranks: HostRanks, adapters: list[Adapter | None], *, vocab: int = VOCAB, scale: float = 0.5
) -> None:
    """Run a prompt, prompts beside a decode row, and decode rows alone; compare all logits of all steps.

    Args:
        model_dir: The base.
        ranks: What is checked.
        adapters: The adapter of each row; None for the base alone.
        vocab: Its tokens.
        scale: The factor of every second row on its adapter.
    """
    alone, draw = Alone(model_dir), Draw(num_logprobs=vocab)

    def run(runner: Any, loader: Alone | HostRanks, step: Callable[[Harness, list[Sequence_]], Any]) -> list[Any]:
        harness = Harness(runner, loader.pool_geometry, NUM_PAGES)
        rows = []
        for number, adapter in enumerate(adapters):
            index = NO_ADAPTER if adapter is None else loader.load(harness, *adapter)
            prompt = range(17 * number, 17 * number + 5 + number)
            factor, chunks = (scale, [2]) if number % 2 else (1.0, [])
            rows.append(harness.add(prompt, adapter=index, scale=factor, chunks=chunks, draw=draw))
        found = [step(harness, group) for group in (rows[:1], rows, rows, rows)]
        return [found, [row.drawn for row in rows]]

    _, drawn = run(ranks, ranks, Harness.step)
    expected, truth = run(alone.runner, alone, lambda harness, group: log_probs(harness, group, vocab))

    assert drawn == truth
    for step, (own, listed) in enumerate(zip(ranks.steps, expected, strict=True)):
        assert (own.log_softmax(-1) - listed).abs().max() < MAX_ERROR, step
    first, *others = (runner.decoder.work.hidden[: len(adapters)] for runner in ranks.runners)
    for other in others:
        assert torch.equal(other, first), "ranks have the same residual stream"
    ranks.close()
    alone.runner.close()


@pytest.mark.parametrize(
    ("architecture", "degree", "max_rows_beside"),
    [("llama", 2, BUCKET), ("qwen3", 2, 0), ("qwen2", 4, BUCKET), ("qwen3", 4, 0)],
    ids=["beside", "in line", "shared heads, beside", "shared heads, in line"],
)
def test_steps_of_any_ranks_and_targets_have_the_logits_of_one_rank(
    tmp_path: Path, architecture: Any, degree: int, max_rows_beside: int
) -> None:
    model_dir = write_base_model(tmp_path / "base", replace(BASE, architecture=architecture))
    ranks = HostRanks(model_dir, degree, tmp_path, torch.float32, max_rows_beside=max_rows_beside)
    info, rng = load_base_model(model_dir), np.random.default_rng(degree)
    recipes = [random_recipe(rng, BASE.num_layers) for _ in range(2)]
    adapters = [recipe_adapter(info, recipe, f"{number:064x}") for number, recipe in enumerate(recipes)]

    check_steps(model_dir, ranks, [*adapters, None])

    assert any(ranks.runners[0].variants), "decode steps with LoRA had no graph"


@pytest.mark.parametrize(
    ("degree", "families"),
    [
        (2, ["DoRA", "lora_bias", None, "everything"]),
        (4, ["everything", "(IA)3", "DoRA"]),
        (2, ["FLoRA", "SHiRA"]),
    ],
    ids=["two ranks", "shared heads", "outside of graphs"],
)
def test_adapters_of_every_part_have_the_logits_of_one_rank(
    tmp_path: Path, degree: int, families: list[str | None]
) -> None:
    model_dir = write_base_model(tmp_path / "base", replace(BASE, architecture="qwen2", num_layers=1))
    ranks = HostRanks(model_dir, degree, tmp_path, torch.float32)
    whole = load_base_model(model_dir).geometry(dtype="float32", page_bytes=4096)
    drawn = [None if each is None else random_adapter(whole, FAMILIES[each], n) for n, each in enumerate(families)]

    check_steps(model_dir, ranks, [None if each is None else (each.spec, each.tensors) for each in drawn])


@pytest.mark.parametrize("name", ["gemma2 on the host shim", "granite on the host shim"])
def test_branches_that_change_before_they_join_have_the_logits_of_one_rank(tmp_path: Path, name: str) -> None:
    """Behind a norm, and times a factor: what is changed has to be the sum of all ranks."""
    model_dir = family_dir(name)
    info = load_base_model(model_dir)
    folder = write_family_adapter(tmp_path / "all", name, [each.name for each in info.layers[0]], rank=5, seed=1)
    ranks = HostRanks(model_dir, 2, tmp_path, torch.float32)

    check_steps(model_dir, ranks, [read_adapter(info, folder, model_dir), None], vocab=VOCAB_SIZE)
