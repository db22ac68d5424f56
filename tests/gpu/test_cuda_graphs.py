"""Captured decode steps depend on nothing but their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_engine.runners.cuda.decode_lora import MAX_ROWS_BESIDE
from support.cuda_rig import add_sequences, make_cuda_runner, make_rig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

JITTERED_STEPS = 2000

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


@pytest.mark.parametrize("rows", [14, MAX_ROWS_BESIDE + 3], ids=["beside", "in line"])
def test_a_graph_computes_the_same_bits_beside_a_copy_and_behind_a_prefill(
    model_dirs: dict[str, Path], rows: int
) -> None:
    model_dir, dtype = model_dirs["gqa/plain"], "bfloat16"
    runner = make_cuda_runner(
        model_dir, dtype, max_num_seqs=rows + 8, num_pages=1024, max_num_batched_tokens=4096, dependent_launch=True
    )
    rig = make_rig(model_dir, runner, dtype, num_pages=1024)
    sequences = add_sequences(rig, 384, rows)
    rig.harness.generate(sequences, 3)
    fed = runner._decoder.last_sampled.clone()
    rig.harness.step(sequences)
    inputs, bucket = runner._buffers.inputs.clone(), runner.graphs.bucket(rows)
    copied = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    received, side = torch.empty_like(copied, device="cuda"), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def logits(disturb: Callable[[], object]) -> torch.Tensor:
        disturb()
        with torch.inference_mode(), torch.cuda.stream(runner._stream):
            runner._buffers.inputs.copy_(inputs)
            runner._decoder.last_sampled.copy_(fed)
            runner.graphs.replay(bucket, len(runner._decode_lora.variants) - 1)
            found = runner._decoder.work.logits[:rows].clone()
        torch.cuda.synchronize()
        return found

    def copy() -> None:
        with torch.cuda.stream(side):
            received.copy_(copied, non_blocking=True)

    alone = logits(lambda: None)
    late = rig.harness.add(range(80), adapter=rig.adapters[1])
    assert torch.isfinite(alone).all()
    assert torch.equal(logits(lambda: None), alone)
    assert torch.equal(logits(copy), alone)
    assert torch.equal(logits(lambda: runner.launch(rig.harness.plan([late]))), alone)
    runner.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [9, MAX_ROWS_BESIDE + 3], ids=["beside", "in line"])
def test_a_graph_computes_the_same_bits_however_its_warps_get_on(
    model_dirs: dict[str, Path], dtype: str, rows: int
) -> None:
    model_dir = model_dirs["gqa/plain"]
    runner = make_cuda_runner(
        model_dir,
        dtype,
        max_num_seqs=rows,
        num_pages=1024,
        max_num_batched_tokens=2048,
        dependent_launch=True,
        jitter=True,
    )
    rig = make_rig(model_dir, runner, dtype, num_pages=1024)
    sequences = add_sequences(rig, 384, rows)
    rig.harness.generate(sequences, 3)
    fed = runner._decoder.last_sampled.clone()
    rig.harness.step(sequences)
    bucket, different = runner.graphs.bucket(rows), torch.zeros((), dtype=torch.int64, device="cuda")
    assert bucket > rows, "padding is part of what may go wrong"

    with torch.inference_mode(), torch.cuda.stream(runner._stream):
        first = None
        for _ in range(JITTERED_STEPS):
            runner._decoder.last_sampled.copy_(fed)
            runner.graphs.replay(bucket, len(runner._decode_lora.variants) - 1)
            found = runner._decoder.work.logits[:rows]
            first = found.clone() if first is None else first
            different += (found != first).any()
    torch.cuda.synchronize()

    assert different.item() == 0
    runner.close()
