"""Adapters of every kind of part on the CUDA backend: batches of mixed kinds against the plain formula, loads and graphs."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.pool_geometry import choose_pool_geometry
from support.cuda_rig import BASES, Agreement, make_cuda_runner
from support.part_adapters import FAMILIES, GRAPHED, PartAdapter, PlainPath, random_adapter
from support.plans import Draw, Harness, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.step import StepPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_PAGES = 4096
NUM_TOKENS = 20
STRENGTH = {"float32": 0.2, "bfloat16": 0.06}
"""At 0.2 the formula of plain LoRA itself, rounded once per projection to bf16, is 6e-2 of the largest logit off fp32's."""
SCALABLE = ("LoRA", "SHiRA", "lora_bias")
"""Families without c and e, whose requests may have a scale."""


class PartRig:
    """A runner with one adapter of each family, in the order of `FAMILIES`.

    Args:
        model_dir: The base.
        dtype: Compute dtype.
        truth_of: Compute by the plain formula in fp32, step by step, no graphs, with an adapter's values as that dtype has
            them.
        options: Arguments of `make_cuda_runner`.
    """

    def __init__(self, model_dir: Path, dtype: str, *, truth_of: str | None = None, **options: Any) -> None:
        self.runner = make_cuda_runner(
            model_dir,
            "float32" if truth_of else dtype,
            num_pages=NUM_PAGES,
            max_num_seqs=48,
            max_num_batched_tokens=2048,
            **options,
        )
        self.harness = Harness(
            self.runner,
            choose_pool_geometry(load_base_model(model_dir), dtype="float32" if truth_of else dtype),
            NUM_PAGES,
        )
        self.adapters: dict[int, PartAdapter] = {}
        for number, parts in enumerate(FAMILIES.values()):
            adapter = random_adapter(self.runner.geometry, parts, number, STRENGTH[dtype], dtype)
            self.adapters[self.load(adapter)] = adapter
        if truth_of:
            self._compute_plainly(self.runner)

    def load(self, adapter: PartAdapter) -> int:
        return self.harness.load(adapter.spec, pack(self.runner.geometry, adapter.spec, adapter.tensors))

    def _compute_plainly(self, runner: CudaRunner) -> None:
        def plain(plan: StepPlan) -> LayerPath:
            return PlainPath.of_plan(runner._decoder.followers, runner.geometry, self.adapters, plan)

        runner._token_parts.prepare = plain  # type: ignore[method-assign]
        runner._launch_decode = runner._launch_mixed  # type: ignore[method-assign]

    def add(self, vocab: int, count: int, families: tuple[str | None, ...], draw: Draw) -> list[Sequence_]:
        """Add sequences that go round some families, with prompts of many lengths, some in chunks."""
        rng, names, rows = np.random.default_rng(3), list(FAMILIES), []
        for number in range(count):
            family = families[number % len(families)]
            prompt = rng.integers(0, vocab, int(rng.integers(1, 60))).tolist()
            rows.append(
                self.harness.add(
                    prompt,
                    adapter=-1 if family is None else names.index(family),
                    scale=0.5 if family in SCALABLE and number % 2 else 1.0,
                    chunks=[len(prompt) // 2] if len(prompt) > 20 and number % 3 == 0 else [],
                    draw=draw,
                )
            )
        return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "count", "families"),
    [
        ("gqa", 14, (*GRAPHED, None)),
        ("qwen2", 40, (*GRAPHED, None)),
        ("mha", 9, ("DoRA", "LoRA", None)),
        ("qwen2", 9, ("(IA)3", None)),
        ("gqa", 40, ("SHiRA", None, "SHiRA")),
        ("gqa", 9, ("FLoRA", None, "FLoRA")),
        ("qwen2", 40, (*FAMILIES, None)),
    ],
    ids=["all", "all, biased, many rows", "DoRA", "(IA)3, biased", "SHiRA", "FLoRA", "all and FLoRA, biased"],
)
def test_a_batch_of_any_kinds_equals_the_plain_formula(
    model_dirs: dict[str, Path], name: str, count: int, families: tuple[str | None, ...], dtype: str
) -> None:
    """Prompts, and steps with FLoRA, eagerly, other decode rows by graphs; probabilities of the whole vocabulary, teacher-forced.

    The truth is fp32.
    """
    model_dir, vocab = model_dirs[name if dtype == "float32" else f"{name}/plain/bfloat16"], BASES[name].vocab_size
    oracle = PartRig(model_dir, dtype, truth_of=dtype)
    truth = oracle.add(vocab, count, families, Draw(num_logprobs=vocab))
    oracle.harness.generate(truth, NUM_TOKENS)
    found = PartRig(model_dir, dtype)
    rows = found.add(vocab, count, families, Draw(num_logprobs=vocab))
    for row, true in zip(rows, truth, strict=True):
        row.forced = true.drawn

    found.harness.generate(rows, NUM_TOKENS)

    agreement = Agreement(dtype)
    for number, (row, true) in enumerate(zip(rows, truth, strict=True)):
        for position in range(NUM_TOKENS):
            what = f"{name}, {families[number % len(families)]}, position {position}"
            agreement.choice(what, true.logprobs[position], row.drawn[position])
            agreement.logprobs(true.logprobs[position], row.logprobs[position])
    agreement.check(min_ties=2)
    oracle.runner.close()
    found.runner.close()


@pytest.mark.parametrize("families", [GRAPHED, tuple(FAMILIES)], ids=["graphs", "FLoRA too"])
@pytest.mark.parametrize("dependent", [False, True])
def test_a_row_draws_alone_what_it_draws_among_other_kinds(
    model_dirs: dict[str, Path], dependent: bool, families: tuple[str, ...]
) -> None:
    rig = PartRig(model_dirs["gqa"], "float32", dependent_launch=dependent)
    vocab = BASES["gqa"].vocab_size
    together, apart = (rig.add(vocab, 14, (*families, None), Draw()) for _ in range(2))

    rig.harness.generate(together, NUM_TOKENS)
    for row in apart:
        rig.harness.generate([row], NUM_TOKENS)

    assert [row.drawn for row in together] == [row.drawn for row in apart]
    rig.runner.close()


@pytest.mark.parametrize(("count", "families"), [(14, GRAPHED), (40, GRAPHED), (14, tuple(FAMILIES))])
def test_steps_compute_the_same_bits_however_their_warps_get_on(
    model_dirs: dict[str, Path], count: int, families: tuple[str, ...]
) -> None:
    found, vocab = [], BASES["gqa"].vocab_size
    jittered = [{"jitter": True, "dependent_launch": dependent} for dependent in (True, False)]
    builds: list[dict[str, Any]] = [{}, *jittered]
    for options in builds:
        rig = PartRig(model_dirs["gqa"], "bfloat16", **options)
        rows = rig.add(vocab, count, (*families, None), Draw(num_logprobs=vocab))
        for row in rows:
            row.forced = list(range(7, 7 + NUM_TOKENS))
        rig.harness.generate(rows, NUM_TOKENS)
        found.append(np.array([entry.logprobs for row in rows for entry in row.logprobs]))
        rig.runner.close()

    assert np.isfinite(found[0]).all()
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_adapters_that_leave_and_come_back_elsewhere_draw_what_they_drew(model_dirs: dict[str, Path]) -> None:
    """Another kind at the same index in between; DoRA's c comes from the host the second time; the graphs stay."""
    rig = PartRig(model_dirs["qwen2"], "float32")
    vocab, families = BASES["qwen2"].vocab_size, GRAPHED
    graphs = len(rig.runner.graphs)
    before = rig.add(vocab, 12, families, Draw())
    rig.harness.generate(before, NUM_TOKENS)
    rig.harness.release(before)
    order = list(rig.adapters)

    for shift in (1, 0):
        for index in order:
            rig.runner.unload_adapter(index)
        for index in order:
            adapter = rig.adapters[order[(index + shift) % len(order)]]
            image = pack(rig.runner.geometry, adapter.spec, adapter.tensors)
            pages = np.array([rig.harness.free.pop() for _ in range(len(image))], dtype=np.int32)
            handle, done = rig.runner.load_adapter(index, adapter.spec, pages, image), threading.Event()
            handle.add_done_callback(done.set)
            assert done.wait(30)
            assert handle.is_done()
    after = rig.add(vocab, 12, families, Draw())
    rig.harness.generate(after, NUM_TOKENS)

    assert [row.drawn for row in before] == [row.drawn for row in after]
    assert rig.runner._loads._magnitudes.cache.num_bytes > 0
    assert len(rig.runner.graphs) == graphs
    rig.runner.close()


def test_steps_go_on_while_dora_adapters_load(model_dirs: dict[str, Path]) -> None:
    rig = PartRig(model_dirs["mha"], "bfloat16")
    rows = [rig.harness.add(range(5 + row), adapter=row % len(GRAPHED)) for row in range(8)]
    rig.harness.generate(rows, 2)
    alone = [list(row.drawn) for row in rows]
    handles = []
    for number in range(8):
        adapter = random_adapter(rig.runner.geometry, FAMILIES["DoRA"], 100 + number)
        image = pack(rig.runner.geometry, adapter.spec, adapter.tensors)
        pages = np.array([rig.harness.free.pop() for _ in range(len(image))], dtype=np.int32)
        handles.append(rig.runner.load_adapter(len(FAMILIES) + number, adapter.spec, pages, image))

    steps, deadline_s = 0, time.monotonic() + 60
    while not all(handle.is_done() for handle in handles):
        assert time.monotonic() < deadline_s
        if steps < 40:
            rig.harness.step(rows)
            steps += 1

    assert steps > 0
    assert all(row.drawn[:2] == first for row, first in zip(rows, alone, strict=True))
    rig.runner.close()
