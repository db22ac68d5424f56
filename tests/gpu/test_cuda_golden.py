"""The demo's real model and adapters on the GPU: golden.json's tokens, free-running, all cases in one batch.

In fp32 all cases. In bf16 the cases with wide margins: where at every position the best logit leads the second by more
than 4 bf16 ulp of the largest, by the fp32 run on the same GPU; below that rounding may decide (docs/testing.md).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.base_model import load_base_model
from loraplex_engine.pool_geometry import choose_pool_geometry
from support.cuda_rig import gap_and_limit, make_cuda_runner, make_torch_runner
from support.demo_model import DEMO_ADAPTERS, GOLDEN, smollm2_dir_if_there
from support.oracle import adapter_image
from support.plans import Draw, Harness, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.runners.torch.runner import TorchRunner

__all__ = ["smollm2_dir_if_there"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]
EOS = 2
NUM_PAGES = 320
MIN_WIDE_CASES = 12


def run_cases(
    model_dir: Path, runner: CudaRunner | TorchRunner, dtype: str, cases: list[dict[str, Any]], **fields: object
) -> list[Sequence_]:
    """Run cases in one batch, in random order and in chunks of random length, and close the runner."""
    info, rng = load_base_model(model_dir), np.random.default_rng(0)
    harness = Harness(runner, choose_pool_geometry(info, dtype=dtype), NUM_PAGES)
    adapters: dict[str | None, int] = {None: -1}
    for name, directory in DEMO_ADAPTERS.items():
        adapters[name] = harness.load(*adapter_image(runner.geometry, info, directory))
    sequences = [
        harness.add(case["prompt_ids"], adapter=adapters[case["adapter"]], chunks=[int(rng.integers(1, 12))], **fields)
        for case in cases
    ]
    harness.generate([sequences[index] for index in rng.permutation(len(cases))], 40, eos=EOS)
    runner.close()
    return sequences


def make_runner(model_dir: Path, backend: str, dtype: str) -> CudaRunner | TorchRunner:
    if backend == "torch":
        return make_torch_runner(model_dir, dtype, num_pages=NUM_PAGES)
    return make_cuda_runner(model_dir, dtype, num_pages=NUM_PAGES, max_num_batched_tokens=1024)


def check(cases: list[dict[str, Any]], sequences: list[Sequence_]) -> None:
    wrong = [
        f"{case['adapter']} {case['prompt']!r}: {sequence.drawn}, expected {case['token_ids']}"
        for case, sequence in zip(cases, sequences, strict=True)
        if sequence.drawn != case["token_ids"]
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)} differ:\n" + "\n".join(wrong)


@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_all_cases_in_one_fp32_batch_give_exactly_the_golden_tokens(smollm2_dir_if_there: Path, backend: str) -> None:
    model_dir = smollm2_dir_if_there

    check(CASES, run_cases(model_dir, make_runner(model_dir, backend, "float32"), "float32", CASES))


@pytest.fixture(scope="module")
def wide_cases(smollm2_dir_if_there: Path) -> list[dict[str, Any]]:
    """The cases that bf16 must get right, whatever the order of its sums."""
    model_dir = smollm2_dir_if_there
    everything = Draw(num_logprobs=load_base_model(model_dir).vocab_size)
    found = run_cases(model_dir, make_runner(model_dir, "torch", "float32"), "float32", CASES, draw=everything)
    wide = []
    for case, sequence in zip(CASES, found, strict=True):
        margins = [gap_and_limit("bfloat16", entry) for entry in sequence.logprobs[: len(sequence.drawn)]]
        if all(gap > limit for gap, limit in margins):
            wide.append(case)
    print(f"{len(wide)} of {len(CASES)} cases have wide margins: {[case['adapter'] for case in wide]}")
    return wide


@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_cases_with_wide_margins_give_the_golden_tokens_in_bf16(
    smollm2_dir_if_there: Path, wide_cases: list[dict[str, Any]], backend: str
) -> None:
    model_dir = smollm2_dir_if_there
    assert len(wide_cases) >= MIN_WIDE_CASES

    check(wide_cases, run_cases(model_dir, make_runner(model_dir, backend, "bfloat16"), "bfloat16", wide_cases))
