"""Steps of many decode rows and several chunks, the decode rows' LoRA by the decode kernels or by the prefill kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_engine.step import NO_ADAPTER
from support.cuda_rig import (
    BASES,
    MAX_LOGIT_ERROR,
    Agreement,
    CudaRig,
    add_sequences,
    make_cuda_runner,
    make_rig,
    make_torch_runner,
)
from support.plans import Draw

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.step import StepPlan
    from support.plans import Sequence_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
DTYPE = "bfloat16"
VOCAB = BASES["gqa"].vocab_size
NUM_ROWS = 48  # 40 of them with an adapter
CHUNKS = (1, 9, 23, 30, 64, 89)  # tokens of each late sequence's chunks
NUM_CHUNKS = 12
PROMPT_TOKENS = 90
NUM_PAGES = 2048
NEVER = 1 << 30
MOST_EARLIER = 35  # runs of decode rows beside the first prompts, whose steps must not differ


def make_runner(model_dir: Path, **options: Any) -> CudaRunner:
    return make_cuda_runner(
        model_dir, DTYPE, max_num_seqs=64, num_pages=NUM_PAGES, max_num_batched_tokens=4096, **options
    )


def add_late(rig: CudaRig, draw: Draw) -> list[Sequence_]:
    """Add sequences whose prompts come in chunks of many lengths, one token included."""
    rng = np.random.default_rng(3)
    return [
        rig.harness.add(
            rng.integers(0, VOCAB, PROMPT_TOKENS).tolist(),
            adapter=rig.adapters[(number + 1) % len(rig.adapters)],
            scale=0.75,
            chunks=[length] * min(NUM_CHUNKS, (PROMPT_TOKENS - 1) // length),
            draw=draw,
        )
        for number, length in enumerate(CHUNKS)
    ]


def drive(rig: CudaRig, forced: Sequence[list[int]] = ()) -> list[Sequence_]:
    """Decode many rows, then beside the chunks of late ones; every row reports the whole vocabulary's probabilities."""
    draw = Draw(num_logprobs=VOCAB)
    rows, late = add_sequences(rig, VOCAB, NUM_ROWS, draw=draw), add_late(rig, draw)
    for sequence, tokens in zip([*rows, *late], forced, strict=False):
        sequence.forced = tokens
    rig.harness.generate(rows, 2)
    while not all(sequence.is_decoding for sequence in late):
        rig.harness.step([*rows, *late])
    return [*rows, *late]


def compare(truth: Sequence[Sequence_], found: Sequence[Sequence_]) -> None:
    agreement = Agreement(DTYPE)
    for row, (true, own) in enumerate(zip(truth, found, strict=True)):
        for position, (expected, listed) in enumerate(zip(true.logprobs, own.logprobs, strict=True)):
            agreement.choice(f"row {row}, adapter {true.adapter}, position {position}", expected, own.drawn[position])
            agreement.logprobs(expected, listed)
    agreement.check()


@pytest.mark.parametrize(
    ("name", "options"),
    [("gqa", {}), ("gqa", {"arch": "compute_80"}), ("mha", {"dependent_launch": False}), ("qwen2", {})],
    ids=["gqa", "sm_80", "mha independent", "qwen2"],
)
def test_decode_rows_beside_chunks_are_the_torch_backends_by_either_kernel(
    model_dirs: dict[str, Path], name: str, options: dict[str, Any]
) -> None:
    model_dir = model_dirs[f"{name}/plain"]
    oracle = make_rig(
        model_dir, make_torch_runner(model_dir, DTYPE, num_pages=NUM_PAGES, max_num_seqs=64), DTYPE, num_pages=NUM_PAGES
    )
    truth = drive(oracle)
    oracle.runner.close()
    found = []

    for min_decode_runs in (NEVER, MOST_EARLIER + 1):
        rig = make_rig(
            model_dir, make_runner(model_dir, min_decode_runs=min_decode_runs, **options), DTYPE, num_pages=NUM_PAGES
        )
        found.append(drive(rig, [sequence.drawn for sequence in truth]))
        rig.runner.close()

    segments, groups = found
    compare(truth, segments)
    compare(truth, groups)
    compare(segments, groups)
    differ = [
        not np.array_equal(one.logprobs[-1].logprobs, two.logprobs[-1].logprobs)
        for one, two in zip(*found, strict=True)
    ]
    assert any(differ), "both settings took the same kernels"


def logits_of(runner: CudaRunner, plan: StepPlan) -> torch.Tensor:
    runner.launch(plan).wait()
    torch.cuda.synchronize()
    return runner._decoder.work.logits[: len(plan.sample_rows)].clone()


@pytest.mark.parametrize("adapted", ["all", "decode rows", "chunks"])
def test_a_mixed_step_computes_the_same_bits_again_and_leaves_those_of_graphs_alone(
    model_dirs: dict[str, Path], adapted: str
) -> None:
    model_dir, found = model_dirs["gqa/plain"], list[list[torch.Tensor]]()

    for min_decode_runs in (NEVER, MOST_EARLIER + 1):
        runner = make_runner(model_dir, min_decode_runs=min_decode_runs)
        rig = make_rig(model_dir, runner, DTYPE, num_pages=NUM_PAGES)
        rows, late = add_sequences(rig, VOCAB, NUM_ROWS, forced=list(range(9))), add_late(rig, Draw())
        for sequence in {"all": [], "decode rows": late, "chunks": rows}[adapted]:
            sequence.adapter = NO_ADAPTER
        rig.harness.generate(rows, 2)
        decode, mixed = rig.harness.plan(rows), rig.harness.plan([*rows, *late])
        decode_logits, mixed_logits = logits_of(runner, decode), logits_of(runner, mixed)

        for _ in range(3):
            assert torch.equal(logits_of(runner, decode), decode_logits)
            assert torch.equal(logits_of(runner, mixed), mixed_logits)
        found.append([decode_logits.float(), mixed_logits.float()])
        runner.close()

    (decode_logits, segments), (same_logits, groups) = found
    assert torch.equal(decode_logits, same_logits), "pure decode steps do not depend on the setting"
    assert torch.isfinite(groups).all()
    assert (groups - segments).abs().max() < MAX_LOGIT_ERROR[DTYPE] * segments.abs().max()
    assert torch.equal(groups, segments) is (adapted == "chunks")
