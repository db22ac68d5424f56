"""Structured outputs on the CUDA backend: those of the torch backend, whatever runs beside them, and no wait of the host."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.base_model import load_base_model
from loraplex_engine.constraints.compiler import Constraints, make_constraints
from loraplex_engine.messages import FinishReason
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.sampling_params import SamplingParams
from support.base_models import write_base_model
from support.cuda_rig import BASES, cuda_engine, make_cuda_runner, make_torch_runner
from support.engine_harness import torch_engine
from support.plans import Draw, Harness
from support.structured import EOS, VOCAB_SIZE, WANTED, check_valid, jobs_of, submit_all
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from support.plans import Sequence_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
MAX_TIED = 1
"""Outputs that may differ between backends: logits differ in their last bits, so perturbed ones may tie."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(
        tmp_path_factory.mktemp("structured") / "base", replace(BASES["gqa"], vocab_size=VOCAB_SIZE)
    )


@pytest.fixture(scope="module")
def constraints(model_dir: Path) -> Constraints:
    return make_constraints(model_dir, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)


def test_outputs_are_valid_those_of_the_torch_backend_and_the_same_alone(
    model_dir: Path, constraints: Constraints
) -> None:
    jobs = jobs_of(64)
    with cuda_engine(model_dir, "float32", num_pages=400, eos_token_ids=EOS, filler=constraints.filler) as harness:
        found = harness.wait(submit_all(harness, constraints, jobs))
        alone = [harness.wait(submit_all(harness, constraints, [job]))[0] for job in jobs[::5]]
        harness.check_idle()
        assert not harness.crashes
    with torch_engine(model_dir, max_model_len=128, eos_token_ids=EOS, filler=constraints.filler) as harness:
        expected = harness.wait(submit_all(harness, constraints, jobs))

    others = sum(mine.tokens != theirs.tokens for mine, theirs in zip(found, expected, strict=True))
    assert others <= MAX_TIED
    assert [each.tokens for each in alone] == [each.tokens for each in found[::5]]
    assert check_valid(jobs, found, Tokenizer.from_file(str(model_dir / "tokenizer.json"))) >= 32


def test_probabilities_are_those_among_the_allowed_tokens(model_dir: Path, constraints: Constraints) -> None:
    job: dict[str, object] = {"wanted": WANTED[2], "sampling": SamplingParams(temperature=1.0, num_logprobs=20)}
    with cuda_engine(model_dir, "float32", num_pages=100, eos_token_ids=EOS, filler=constraints.filler) as harness:
        (generation,) = harness.wait(submit_all(harness, constraints, [job]))

    assert generation.end is not None
    assert generation.end.finish_reason is FinishReason.STOP
    for entry in generation.logprobs:
        assert np.exp(entry.logprobs[1:].astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-4)


def sequences_on(harness: Harness) -> list[Sequence_]:
    """Return masked and plain sequences, greedy and random, of several lengths."""
    rng = np.random.default_rng(3)
    sequences = []
    for number in range(24):
        allowed = tuple(sorted(rng.choice(VOCAB_SIZE, 12, replace=False).tolist())) if number % 3 else ()
        draw = Draw(temperature=float(number % 2), seed=number, num_logprobs=1 if number % 5 == 0 else -1)
        prompt = rng.integers(0, VOCAB_SIZE, int(rng.integers(1, 20))).tolist()
        sequences.append(harness.add(prompt, draw=draw, allowed=allowed))
    return sequences


def test_masked_rows_beside_plain_ones_draw_what_the_torch_backend_draws(model_dir: Path) -> None:
    geometry = choose_pool_geometry(load_base_model(model_dir), dtype="float32")
    tokens = []
    for make in (make_cuda_runner, make_torch_runner):
        harness = Harness(make(model_dir, "float32"), geometry, 512)
        sequences = sequences_on(harness)
        tokens.append(harness.generate(sequences, 12))
        assert all(set(each.drawn) <= set(each.allowed) for each in sequences if each.allowed)
        harness.runner.close()

    assert sum(mine != theirs for mine, theirs in zip(*tokens, strict=True)) <= MAX_TIED


def test_neither_the_launch_nor_the_draw_of_a_masked_step_waits_for_the_device(model_dir: Path) -> None:
    runner = make_cuda_runner(model_dir, "bfloat16")
    harness = Harness(runner, choose_pool_geometry(load_base_model(model_dir), dtype="bfloat16"), 512)
    sequences = sequences_on(harness)
    for _ in range(3):  # prompts, and buffers of the sizes that later steps have
        harness.step(sequences)
    torch.cuda.synchronize()

    plan = harness.plan(sequences)
    torch.cuda.set_sync_debug_mode("error")
    try:
        handle = runner.launch(plan)
        harness.fill(handle.masks, plan, sequences)
        handle.draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    harness.absorb(sequences, handle.wait())

    assert all(set(each.drawn) <= set(each.allowed) for each in sequences if each.allowed)
    runner.close()


def test_a_step_cannot_be_launched_or_read_before_the_masked_step_before_it_is_drawn(model_dir: Path) -> None:
    runner = make_cuda_runner(model_dir, "float32")
    harness = Harness(runner, choose_pool_geometry(load_base_model(model_dir), dtype="float32"), 512)
    masked, plain = harness.add([1, 2, 3], allowed=(4, 5)), harness.add([6, 7])
    plan = harness.plan([masked])
    handle = runner.launch(plan)

    assert not handle.is_done()
    with pytest.raises(RuntimeError, match="awaits masks"):
        handle.wait()
    with pytest.raises(RuntimeError, match="before the step before it was drawn"):
        runner.launch(harness.plan([plain]))
    harness.fill(handle.masks, plan, [masked])
    handle.draw()
    assert set(handle.wait().token_ids.tolist()) <= {4, 5}
    with pytest.raises(RuntimeError, match="awaits no masks"):
        handle.draw()
    runner.close()
