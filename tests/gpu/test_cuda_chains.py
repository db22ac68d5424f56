"""Rows that add several weighted adapters up, and ranks above 256, on the CUDA backend: against the plain formula, and alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_common.low_rank import LowRank
from loraplex_engine.pool_geometry import choose_pool_geometry
from support.cuda_rig import BASES, Agreement, make_cuda_runner
from support.list_plans import ListHarness
from support.part_adapters import FAMILIES, PartAdapter, SummedPath, random_adapter
from support.plans import Draw, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.part_kind import Part
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.step import StepPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_PAGES: Final = 4096
NUM_TOKENS: Final = 16
STRENGTH: Final = {"float32": 0.1, "bfloat16": 0.03}
PAIRS: Final[tuple[tuple[Part, ...], ...]] = tuple((LowRank(rank, 1.0),) for rank in (8, 16, 5, 64))
WIDE: Final[tuple[tuple[Part, ...], ...]] = tuple((LowRank(rank, 1.0),) for rank in (8, 256, 320, 340))
"""In fp32 a tile holds a stacked rank of 1024."""
WIDEST: Final[tuple[tuple[Part, ...], ...]] = tuple((LowRank(rank, 1.0),) for rank in (8, 320, 512, 300))
ADDED: Final = (FAMILIES["LoRA"], FAMILIES["lora_bias"], FAMILIES["SHiRA"], FAMILIES["LoRA"])


class ListRig:
    """A runner with one adapter of each of some parts; rows go round lists of them."""

    def __init__(
        self, model_dir: Path, dtype: str, parts: tuple[tuple[Part, ...], ...], *, truth: bool = False, **options: Any
    ) -> None:
        own = "float32" if truth else dtype
        self.runner = make_cuda_runner(
            model_dir, own, num_pages=NUM_PAGES, max_num_seqs=48, max_num_batched_tokens=2048, **options
        )
        geometry = choose_pool_geometry(load_base_model(model_dir), dtype=own)
        self.harness = ListHarness(self.runner, geometry, NUM_PAGES)
        self.adapters: dict[int, PartAdapter] = {}
        for number, each in enumerate(parts):
            rank = max([8, *(part.rank for part in each if isinstance(part, LowRank))])
            strength = STRENGTH[dtype] * (8 / rank) ** 0.5  # so that a delta's size does not depend on its rank
            adapter = random_adapter(self.runner.geometry, each, number, strength, dtype)
            self.adapters[number] = adapter
            if not truth:  # whose tiles may hold less
                image = pack(self.runner.geometry, adapter.spec, adapter.tensors)
                assert self.harness.load(adapter.spec, image) == number
        if truth:
            self._compute_plainly(self.runner)

    def _compute_plainly(self, runner: CudaRunner) -> None:
        def plain(plan: StepPlan) -> LayerPath:
            return SummedPath.of_plan_with_lists(runner._decoder.followers, runner.geometry, self.adapters, plan)

        runner._token_parts.prepare = plain  # type: ignore[method-assign]
        runner._launch_decode = runner._launch_mixed  # type: ignore[method-assign]

    def add(self, vocab: int, count: int, longest: int, draw: Draw) -> list[Sequence_]:
        """Add sequences with lists of up to ``longest`` adapters, some of one, some of none, and prompts of many lengths."""
        rng, rows = np.random.default_rng(5), []
        for number in range(count):
            order = rng.permutation(len(self.adapters))[: number % (longest + 1)].tolist()
            entries = [(index, float(rng.uniform(-1, 1.5))) for index in order]
            prompt = rng.integers(0, vocab, int(rng.integers(1, 60))).tolist()
            chunks = [len(prompt) // 2] if len(prompt) > 20 and number % 3 == 0 else []
            rows.append(self.harness.add_list(prompt, entries, chunks=chunks, draw=draw))
        return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "count", "parts", "longest"),
    [
        ("gqa", 14, PAIRS, 3),
        ("qwen2", 40, PAIRS, 4),
        ("gqa", 14, ADDED, 3),
        ("gqa", 12, WIDE, 1),
        ("mha", 40, WIDE, 2),
    ],
    ids=["few rows", "many rows", "b and S too", "rank 340", "lists of rank 340"],
)
def test_a_batch_of_lists_equals_the_weighted_sum(
    model_dirs: dict[str, Path], name: str, count: int, parts: tuple[tuple[Part, ...], ...], longest: int, dtype: str
) -> None:
    """Prompts eagerly, decode rows by graphs if all are pairs; probabilities of the whole vocabulary, teacher-forced."""
    model_dir, vocab = model_dirs[name if dtype == "float32" else f"{name}/plain/bfloat16"], BASES[name].vocab_size
    oracle, draw = ListRig(model_dir, dtype, parts, truth=True), Draw(num_logprobs=vocab)
    truth = oracle.add(vocab, count, longest, draw)
    oracle.harness.generate(truth, NUM_TOKENS)
    found = ListRig(model_dir, dtype, parts)
    rows = found.add(vocab, count, longest, draw)
    for row, true in zip(rows, truth, strict=True):
        row.forced = true.drawn

    found.harness.generate(rows, NUM_TOKENS)

    agreement = Agreement(dtype)
    for number, (row, true) in enumerate(zip(rows, truth, strict=True)):
        for position in range(NUM_TOKENS):
            agreement.choice(f"{name}, row {number}, position {position}", true.logprobs[position], row.drawn[position])
            agreement.logprobs(true.logprobs[position], row.logprobs[position])
    agreement.check(min_ties=2)
    oracle.runner.close()
    found.runner.close()


def test_ranks_of_512_in_bf16_equal_the_formula(model_dirs: dict[str, Path]) -> None:
    model_dir, vocab = model_dirs["mha/plain/bfloat16"], BASES["mha"].vocab_size
    oracle, draw = ListRig(model_dir, "bfloat16", WIDEST, truth=True), Draw(num_logprobs=vocab)
    truth = oracle.add(vocab, 16, 3, draw)
    oracle.harness.generate(truth, NUM_TOKENS)
    found = ListRig(model_dir, "bfloat16", WIDEST)
    rows = found.add(vocab, 16, 3, draw)
    for row, true in zip(rows, truth, strict=True):
        row.forced = true.drawn

    found.harness.generate(rows, NUM_TOKENS)

    agreement = Agreement("bfloat16")
    for number, (row, true) in enumerate(zip(rows, truth, strict=True)):
        for position in range(NUM_TOKENS):
            agreement.choice(f"row {number}, position {position}", true.logprobs[position], row.drawn[position])
            agreement.logprobs(true.logprobs[position], row.logprobs[position])
    agreement.check(min_ties=2)
    oracle.runner.close()
    found.runner.close()


@pytest.mark.parametrize("parts", [PAIRS, ADDED], ids=["pairs", "b and S too"])
@pytest.mark.parametrize("dependent", [False, True])
def test_a_row_draws_alone_what_it_draws_among_others(
    model_dirs: dict[str, Path], dependent: bool, parts: tuple[tuple[Part, ...], ...]
) -> None:
    rig, vocab = ListRig(model_dirs["gqa"], "float32", parts, dependent_launch=dependent), BASES["gqa"].vocab_size
    together, apart = (rig.add(vocab, 14, 4, Draw()) for _ in range(2))

    rig.harness.generate(together, NUM_TOKENS)
    for row in apart:
        rig.harness.generate([row], NUM_TOKENS)

    assert [row.drawn for row in together] == [row.drawn for row in apart]
    rig.runner.close()


@pytest.mark.parametrize("count", [14, 40])
def test_steps_compute_the_same_bits_however_their_warps_get_on(model_dirs: dict[str, Path], count: int) -> None:
    found, vocab = [], BASES["gqa"].vocab_size
    builds: list[dict[str, Any]] = [{}, *({"jitter": True, "dependent_launch": each} for each in (True, False))]
    for options in builds:
        rig = ListRig(model_dirs["gqa"], "bfloat16", PAIRS, **options)
        rows = rig.add(vocab, count, 4, Draw(num_logprobs=vocab))
        for row in rows:
            row.forced = list(range(7, 7 + NUM_TOKENS))
        rig.harness.generate(rows, NUM_TOKENS)
        found.append(np.array([entry.logprobs for row in rows for entry in row.logprobs]))
        rig.runner.close()

    assert np.isfinite(found[0]).all()
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
