"""Dense families on the CUDA backend: in fp32 what the torch backend computes, in bf16 as near to that as its bf16 is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.base_model import load_base_model
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.cuda.decode_lora import MAX_ROWS_BESIDE
from support.cuda_rig import Agreement, make_cuda_runner, make_torch_runner
from support.families import GPU_FAMILIES, VOCAB_SIZE, family_dir, write_family_adapter
from support.oracle import adapter_image
from support.plans import Draw, Harness

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
NUM_TOKENS, NUM_PAGES = 10, 1024
OUTSIDE = ["lm_head", "embed_tokens"]
ROWS = {"beside": 9, "in line": MAX_ROWS_BESIDE + 3}
REPORTS = Draw(num_logprobs=VOCAB_SIZE)


@pytest.fixture(params=GPU_FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    """A family with a tiny model that the kernels compute."""
    return str(request.param)


@pytest.fixture
def adapters(tmp_path: Path, name: str) -> list[Path]:
    """One of every projection, of lm_head and the embedding where they are not one, and one of every second projection."""
    info = load_base_model(family_dir(name))
    projections = [each.name for each in info.layers[0]]
    outside = [] if info.config.get("tie_word_embeddings") else OUTSIDE
    return [
        write_family_adapter(tmp_path / "all", name, [*projections, *outside], rank=8, seed=1),
        write_family_adapter(tmp_path / "some", name, projections[::2], rank=16, seed=2),
    ]


def run(
    runner: CudaRunner | TorchRunner, name: str, adapters: list[Path], forced: list[list[int]], draw: Draw = REPORTS
) -> list[Sequence_]:
    """Generate as many tokens for each sequence of ``forced``, with mixed adapters, scales and chunked prompts."""
    info = load_base_model(family_dir(name))
    geometry = choose_pool_geometry(info, dtype=runner.geometry.dtype)
    harness, rng = Harness(runner, geometry, NUM_PAGES), np.random.default_rng(7)
    images = (adapter_image(runner.geometry, info, each, family_dir(name)) for each in adapters)
    indices = [-1, *(harness.load(*image) for image in images)]
    rows = []
    for number, tokens in enumerate(forced):
        prompt = rng.integers(0, VOCAB_SIZE, int(rng.integers(1, 60))).tolist()
        rows.append(
            harness.add(
                prompt,
                adapter=indices[number % len(indices)],
                scale=0.5 if number % 2 else 1.0,
                chunks=[len(prompt) // 3] if len(prompt) > 20 else [],
                forced=tokens,
                draw=draw,
            )
        )
    harness.generate(rows, NUM_TOKENS)
    runner.close()
    return rows


def truth_of(name: str, adapters: list[Path], num_rows: int) -> list[Sequence_]:
    runner = make_torch_runner(family_dir(name), "float32", num_pages=NUM_PAGES, max_num_seqs=num_rows)
    return run(runner, name, adapters, [[] for _ in range(num_rows)])


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_a_family_in_fp32_is_the_torch_backends(name: str, adapters: list[Path], rows: int) -> None:
    """The whole vocabulary's probabilities of every position, and the choices of the graphs."""
    truth = truth_of(name, adapters, rows)
    forced, agreement = [each.drawn for each in truth], Agreement("float32")

    reporting = run(cuda(name, "float32", rows), name, adapters, forced)
    greedy = run(cuda(name, "float32", rows), name, adapters, forced, Draw())

    for number, (expected, found, drawn) in enumerate(zip(truth, reporting, greedy, strict=True)):
        for position in range(NUM_TOKENS):
            what = f"{name}, row {number}, position {position}"
            agreement.choice(what, expected.logprobs[position], drawn.drawn[position])
            agreement.logprobs(expected.logprobs[position], found.logprobs[position])
    agreement.check(min_ties=1)


def cuda(name: str, dtype: str, rows: int) -> CudaRunner:
    return make_cuda_runner(
        family_dir(name), dtype, num_pages=NUM_PAGES, max_num_seqs=rows, max_num_batched_tokens=2048
    )


def table(rows: list[Sequence_]) -> NDArray[np.float32]:
    """Return the log probabilities of all positions, by token."""
    found = np.zeros((len(rows) * NUM_TOKENS, VOCAB_SIZE), dtype=np.float32)
    entries = (entry for row in rows for entry in row.logprobs[:NUM_TOKENS])
    for place, entry in zip(found, entries, strict=True):
        place[entry.token_ids[1:]] = entry.logprobs[1:]
    return found


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_a_family_in_bf16_is_as_near_to_fp32_as_the_torch_backend(name: str, adapters: list[Path], rows: int) -> None:
    truth = truth_of(name, adapters, rows)
    forced, expected = [each.drawn for each in truth], table(truth)
    peer = make_torch_runner(family_dir(name), "bfloat16", num_pages=NUM_PAGES, max_num_seqs=rows)

    own, others = (table(run(each, name, adapters, forced)) for each in (cuda(name, "bfloat16", rows), peer))

    errors = [float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) for found in (own, others)]
    print(f"{name}, {rows} rows: error {errors[0]:.2e}, torch backend {errors[1]:.2e}")
    assert errors[0] < 1.25 * errors[1]
