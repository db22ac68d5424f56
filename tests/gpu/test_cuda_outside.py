"""Adapters of the embedding and of lm_head on the CUDA backend: against the torch backend, beside others, over loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, pack
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.low_rank import LowRank
from loraplex_common.token_rows import Rows
from loraplex_common.vectors import OutVector
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.step import SlotSetup, TokenLogprobs
from support.cuda_rig import BASES, MAX_LOGIT_ERROR, Agreement, largest_logit, make_cuda_runner, make_torch_runner
from support.plans import Draw, Harness, Sequence_
from support.random_outside import Outside, draw_outside

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.runners.torch.runner import TorchRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_PAGES, NUM_TOKENS = 1024, 12
VOCAB = BASES["gqa"].vocab_size
ADDED = (VOCAB, VOCAB + 200)
ADAPTERS = (
    Outside(embed=(8, ()), head=(16, ()), inner_rank=8, strength=0.1),
    Outside(embed=(0, (7, 41, *ADDED)), head=(0, (2, 41, *ADDED)), inner_rank=4, strength=0.5),
    Outside(inner_rank=16, strength=0.1),
    Outside(embed=(5, (9,)), head=(0, tuple(range(0, VOCAB, 3))), strength=0.5),
)
SCALABLE = (0, 2)


class OutsideRig:
    """A runner with `ADAPTERS`; their values are as ``dtype`` has them."""

    def __init__(self, model_dir: Path, runner: CudaRunner | TorchRunner, dtype: str) -> None:
        self.runner, self._dtype = runner, dtype
        geometry = choose_pool_geometry(load_base_model(model_dir), dtype=runner.geometry.dtype)
        self.harness = Harness(runner, geometry, NUM_PAGES)
        self.adapters = [self.load(number) for number in range(len(ADAPTERS))]

    def load(self, number: int) -> int:
        spec, tensors = draw_outside(self.runner.geometry, ADAPTERS[number], number, self._dtype)
        return self.harness.load(spec, pack(self.runner.geometry, spec, tensors))

    def add(self, count: int, draw: Draw, *, prompt_logprobs: int = -1) -> list[Sequence_]:
        """Add sequences that go round the adapters and none, with prompts of many lengths, some in chunks."""
        rng, rows = np.random.default_rng(4), []
        for number in range(count):
            kind = number % (len(ADAPTERS) + 1)
            prompt = rng.integers(0, VOCAB, int(rng.integers(1, 50))).tolist()
            if kind == 1:
                prompt[::3] = [ADDED[number % 2]] * len(prompt[::3])
            none = np.zeros(0, np.int32)
            setup = SlotSetup(slot=0, prompt_token_ids=none, output_token_ids=none, prompt_logprobs=prompt_logprobs)
            rows.append(
                self.harness.add(
                    prompt,
                    adapter=self.adapters[kind] if kind < len(ADAPTERS) else -1,
                    scale=0.5 if kind in SCALABLE and number % 2 else 1.0,
                    chunks=[len(prompt) // 2] if len(prompt) > 20 and number % 3 == 0 else [],
                    draw=draw,
                    setup=setup if prompt_logprobs >= 0 else None,
                )
            )
        return rows


def finite(entry: TokenLogprobs) -> TokenLogprobs:
    """What is listed of tokens that can be drawn."""
    kept = np.isfinite(entry.logprobs)
    return TokenLogprobs(token_ids=entry.token_ids[kept], logprobs=entry.logprobs[kept])


def logit_error(expected: TokenLogprobs, found: TokenLogprobs) -> float:
    """Return the largest difference of the listed tokens' probabilities, as a share of the largest logit."""
    truth, own = (
        dict(zip(each.token_ids[1:].tolist(), each.logprobs[1:].tolist(), strict=True)) for each in (expected, found)
    )
    return float(max(abs(truth[token] - own[token]) for token in truth)) / largest_logit(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [5, 35])
def test_tokens_and_logits_are_the_torch_backends(model_dirs: dict[str, Path], dtype: str, count: int) -> None:
    """Prompts eagerly, decode rows by graphs; the whole vocabulary and the added tokens, teacher-forced; truth in fp32."""
    model_dir = model_dirs["gqa" if dtype == "float32" else "gqa/plain/bfloat16"]
    oracle = OutsideRig(model_dir, make_torch_runner(model_dir, "float32", num_pages=NUM_PAGES), dtype)
    runner = make_cuda_runner(model_dir, dtype, num_pages=NUM_PAGES, max_num_batched_tokens=1024)
    own = OutsideRig(model_dir, runner, dtype)
    draw = Draw(num_logprobs=VOCAB + 256)
    truth, rows = oracle.add(count, draw), own.add(count, draw)
    oracle.harness.generate(truth, NUM_TOKENS)
    for row, true in zip(rows, truth, strict=True):
        row.forced = true.drawn

    own.harness.generate(rows, NUM_TOKENS)

    agreement = Agreement(dtype)
    for number, (row, true) in enumerate(zip(rows, truth, strict=True)):
        for position in range(NUM_TOKENS):
            expected, found = finite(true.logprobs[position]), finite(row.logprobs[position])
            assert set(expected.token_ids.tolist()) == set(found.token_ids.tolist())
            assert (max(expected.token_ids) >= VOCAB) == (number % 5 == 1), "only its adapter's rows have added tokens"
            agreement.error = max(agreement.error, logit_error(expected, found))
            if dtype == "float32":  # random rows of lm_head are no plain choices for bf16
                agreement.choice(f"row {number}, position {position}", expected, row.drawn[position])
    if dtype == "float32":
        agreement.check(min_ties=2)
    assert agreement.error < MAX_LOGIT_ERROR[dtype]
    oracle.runner.close()
    own.runner.close()


@pytest.mark.parametrize("dependent", [False, True])
def test_rows_draw_alone_what_they_draw_together_and_no_graph_is_added(
    model_dirs: dict[str, Path], dependent: bool
) -> None:
    rig = OutsideRig(
        model_dirs["gqa"],
        make_cuda_runner(model_dirs["gqa"], "float32", num_pages=NUM_PAGES, dependent_launch=dependent),
        "float32",
    )
    greedy, warm = Draw(), Draw(temperature=0.8, top_p=0.95, seed=7)
    for draw in (greedy, warm):
        together, apart = (rig.add(10, draw) for _ in range(2))
        rig.harness.generate(together, NUM_TOKENS)
        for row in apart:
            rig.harness.generate([row], NUM_TOKENS)
        assert [row.drawn for row in together] == [row.drawn for row in apart]
    rig.runner.close()


def test_prompt_probabilities_are_the_torch_backends(model_dirs: dict[str, Path]) -> None:
    model_dir, found = model_dirs["gqa"], []
    for runner in (
        make_torch_runner(model_dir, "float32", num_pages=NUM_PAGES),
        make_cuda_runner(model_dir, "float32", num_pages=NUM_PAGES),
    ):
        rig = OutsideRig(model_dir, runner, "float32")
        rows = rig.add(10, Draw(), prompt_logprobs=3)
        rig.harness.generate(rows, 2)
        found.append([entry for row in rows for entry in row.prompt_logprobs])
        runner.close()

    assert len(found[0]) == len(found[1]) > 100
    for expected, own in zip(*found, strict=True):
        assert expected.token_ids[0] == own.token_ids[0]
        np.testing.assert_allclose(own.logprobs, expected.logprobs, atol=2e-3)


def test_masked_rows_beside_added_tokens_draw_what_their_masks_allow(model_dirs: dict[str, Path]) -> None:
    runner = make_cuda_runner(model_dirs["gqa"], "float32", num_pages=NUM_PAGES)
    rig = OutsideRig(model_dirs["gqa"], runner, "float32")
    rows = rig.add(5, Draw(temperature=2.0, seed=3))
    rows[0].allowed, rows[1].allowed, rows[4].allowed = (5, 6), (ADDED[1],), (7,)

    rig.harness.generate(rows, NUM_TOKENS)

    assert set(rows[0].drawn) <= {5, 6}
    assert set(rows[1].drawn) == {ADDED[1]}
    assert set(rows[4].drawn) == {7}
    assert all(max(row.drawn) < VOCAB for row in (rows[0], rows[2], rows[3]))
    runner.close()


def test_an_adapter_that_comes_back_elsewhere_draws_what_it_drew(model_dirs: dict[str, Path]) -> None:
    runner = make_cuda_runner(model_dirs["gqa"], "float32", num_pages=NUM_PAGES)
    rig = OutsideRig(model_dirs["gqa"], runner, "float32")
    graphs, before = len(runner.graphs), rig.add(10, Draw())
    rig.harness.generate(before, NUM_TOKENS)
    rig.harness.release(before)

    for index in rig.adapters:
        runner.unload_adapter(index)
    rig.adapters = [rig.load(number) for number in (3, 2, 1, 0)][::-1]
    after = rig.add(10, Draw())
    rig.harness.generate(after, NUM_TOKENS)

    assert [row.drawn for row in before] == [row.drawn for row in after]
    assert len(runner.graphs) == graphs
    runner.close()


def test_what_the_kernels_do_not_compute_there_is_refused_with_the_remedy(model_dirs: dict[str, Path]) -> None:
    runner = make_cuda_runner(model_dirs["gqa"], "float32", num_pages=NUM_PAGES)
    outside = runner.geometry.num_decoder_layers

    for number, wanted in enumerate(ADAPTERS):
        runner.check_adapter(draw_outside(runner.geometry, wanted, number)[0])
    for part, message in (
        (OutVector(is_magnitude=True), r"lm_head: parts of kind 'out_vector' .* train lm_head with plain LoRA"),
        (LowRank(300, 1.0), r"lm_head: rank 300 exceeds the 256 .* serve it with --backend torch"),
        (Rows(1, VOCAB + 256), r"--max-added-tokens 257"),
    ):
        with pytest.raises(AdapterIncompatibleError, match=message):
            runner.check_adapter(AdapterSpec("ab" * 32, (ModuleSpec(outside, "lm_head", (part,)),)))
    runner.close()
