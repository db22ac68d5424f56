"""The CUDA backend over FP8 weights against the torch backend, which is held against transformers on the CPU.

Both quantise activations alike, and a number that falls on the other side of a tie changes all that follows; so what is compared
is how near each is, in bf16, to the torch backend in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.runners.cuda import fp8_few_rows
from support.base_models import write_base_model
from support.cuda_rig import BASES, add_sequences, make_cuda_runner, make_rig, make_torch_runner
from support.plans import Draw
from support.quantised import fp8, write_quantised

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.runners.torch.runner import TorchRunner
    from numpy.typing import NDArray
    from support.plans import Sequence_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
BASE = BASES["gqa"]
NUM_TOKENS, NUM_PAGES, NUM_ROWS = 6, 2048, (5, 70)
"""Sequences: few enough for the narrowest kernel, and for the widest; all prompts in one step are more than ours take."""
LARGEST_RATIO = 1.25
BLOCKS: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module", params=["outputs", "blocks"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a scale for each output, made on load, or for each block, as its checkpoint has them."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = write_base_model(folder / "whole", BASE)
    if request.param == "outputs":
        return whole
    return write_quantised(whole, folder / "blocks", fp8((128, 128), "weight_scale_inv"), BLOCKS)


def run(
    model_dir: Path, runner: CudaRunner | TorchRunner, num_rows: int, forced: list[list[int]] | None = None
) -> tuple[list[Sequence_], NDArray[np.float32]]:
    """Return sequences of many adapters and none, and the log probabilities of all that was drawn, by token."""
    rig = make_rig(model_dir, runner, runner.geometry.dtype, num_pages=NUM_PAGES)
    rows = add_sequences(rig, BASE.vocab_size, num_rows, draw=Draw(num_logprobs=BASE.vocab_size))
    for row, tokens in zip(rows, forced or [], strict=forced is not None):
        row.forced.extend(tokens)
    rig.harness.generate(rows, NUM_TOKENS)
    runner.close()
    entries = [entry for row in rows for entry in row.logprobs[:NUM_TOKENS]]
    found = np.zeros((len(entries), BASE.vocab_size), dtype=np.float32)
    for place, entry in zip(found, entries, strict=True):
        place[entry.token_ids[1:]] = entry.logprobs[1:]
    return rows, found


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_steps_over_fp8_weights_are_as_near_to_fp32_as_the_torch_backends(model_dir: Path, num_rows: int) -> None:
    sizes: dict[str, Any] = {"num_pages": NUM_PAGES, "max_num_seqs": num_rows, "weight_form": WeightForm.FP8}
    truth, expected = run(model_dir, make_torch_runner(model_dir, "float32", **sizes), num_rows)
    forced = [row.drawn for row in truth]

    own = make_cuda_runner(model_dir, "bfloat16", max_num_batched_tokens=2048, **sizes)
    peer = make_torch_runner(model_dir, "bfloat16", **sizes)
    tables = [run(model_dir, runner, num_rows, forced)[1] for runner in (own, peer)]

    errors = [float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) for found in tables]
    print(f"{num_rows} rows, our products on {fp8_few_rows.ARCH}: error {errors[0]:.2e}, torch backend {errors[1]:.2e}")
    assert errors[0] < LARGEST_RATIO * errors[1]
