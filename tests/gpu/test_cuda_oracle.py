"""The CUDA backend against transformers + peft in fp32 on random architectures, and a batch of strangers against rows alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.adapter_image import TILE_BYTES, pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.step import TokenLogprobs
from support.adapters import Recipe, random_recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.cuda_rig import BASES, PLAIN_BASES, Agreement, make_cuda_runner
from support.decoder_shapes import PROJECTIONS
from support.engine_harness import recipe_adapter
from support.oracle import Oracle, adapter_image
from support.plans import Draw, Harness, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_FORCED = 6
NUM_PAGES = 2048
MAX_RANK = 85
ROPES = (
    None,
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
)
SERVED_RANKS = (
    *(Recipe(rank=rank, seed=rank, strength=0.3) for rank in (1, 2, 3, 5, 8, 13, 16, 31, 32, 64, 85)),
    Recipe(rank=128, targets=("gate_proj", "up_proj"), seed=128, strength=0.3),
    Recipe(rank=255, targets=("o_proj", "down_proj"), seed=255, strength=0.3),
    Recipe(rank=256, targets=("q_proj", "o_proj", "down_proj"), seed=256, strength=0.3),
    Recipe(rank=7, rank_pattern={"q_proj": 200, "v_proj": 40, "gate_proj": 1}, seed=7, strength=0.3),
    Recipe(rank=8, rank_pattern={"q_proj": 256, "v_proj": 64, "gate_proj": 256, "up_proj": 200}, seed=9, strength=0.3),
    Recipe(rank=256, seed=257, strength=0.3),
)


def random_base(seed: int, dtype: str) -> TinyBase:
    """Draw an architecture that the kernels serve: heads of 64 or 128, pages of at least a tile."""
    rng = np.random.default_rng(seed)
    architecture = ("llama", "mistral", "qwen2", "qwen3")[seed % 4]
    heads, kv_heads = [(4, 2), (4, 4), (6, 2), (8, 1), (9, 3)][int(rng.integers(5))]
    head_dim = int(rng.choice([64, 128]))
    item = 4 if dtype == "float32" else 2
    min_layers = -(-TILE_BYTES // (2 * kv_heads * 16 * head_dim * item))
    return TinyBase(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=max(min_layers, int(rng.integers(1, 4))),
        hidden_size=heads * head_dim if architecture == "llama" else int(rng.choice([576, 640, heads * head_dim])),
        intermediate_size=int(rng.choice([768, 1104, 1536])),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=int(rng.choice([384, 397])),
        rope_scaling=ROPES[int(rng.integers(len(ROPES)))],
        sliding_window=24 if architecture == "mistral" else None,
        bias=bool(rng.integers(2)) if architecture in ("llama", "qwen3") else None,
        dtype="bfloat16",  # the same base weights in every run
        successor_logit=50.0 if dtype == "bfloat16" else 0.0,
        seed=seed,
    )


def as_logprobs(logits: NDArray[np.float32]) -> TokenLogprobs:
    """Return an oracle's logits as a runner reports them: the choice, then the whole vocabulary, best first."""
    order = np.argsort(-logits, kind="stable")
    listed = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    ids = np.concatenate([order[:1], order]).astype(np.int32)
    return TokenLogprobs(token_ids=ids, logprobs=listed[ids].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(8))
def test_random_models_and_adapters_equal_transformers_and_peft(tmp_path: Path, seed: int, dtype: str) -> None:
    base, rng = random_base(seed, dtype), np.random.default_rng(seed)
    model_dir = write_base_model(tmp_path / "base", base)
    recipes = [random_recipe(rng, base.num_layers, max_rank=MAX_RANK) for _ in range(2)]
    recipes.append(Recipe(rank=256, seed=seed))
    directories = {str(number): write_adapter(tmp_path / str(number), model_dir, r) for number, r in enumerate(recipes)}
    oracle = Oracle(model_dir, directories)
    info = load_base_model(model_dir)
    runner = make_cuda_runner(model_dir, dtype, num_pages=NUM_PAGES, max_num_batched_tokens=1024)
    harness = Harness(runner, choose_pool_geometry(info, dtype=dtype), NUM_PAGES)
    indices: dict[str | None, int] = {None: -1}
    for name, directory in directories.items():
        indices[name] = harness.load(*adapter_image(runner.geometry, info, directory))
    added: list[tuple[str | None, Sequence_]] = []
    for adapter, index in list(indices.items()) * 2:
        prompt = rng.integers(0, base.vocab_size, int(rng.integers(1, 70))).tolist()
        forced = oracle.greedy(prompt, NUM_FORCED, adapter)
        chunks = [len(prompt) // 3] if len(prompt) > 9 else []
        draw = Draw(num_logprobs=base.vocab_size)
        added.append((adapter, harness.add(prompt, adapter=index, forced=forced, chunks=chunks, draw=draw)))

    harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

    agreement = Agreement(dtype)
    for adapter, sequence in added:
        truth = oracle.logits([*sequence.prompt, *sequence.forced], adapter)[len(sequence.prompt) - 1 :]
        for step, token in enumerate(sequence.drawn):
            expected = as_logprobs(truth[step])
            agreement.choice(f"{base}, adapter {adapter}, step {step}", expected, token)
            agreement.logprobs(expected, sequence.logprobs[step])
    agreement.check(min_ties=1)
    runner.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gqa", "mha"])
def test_a_row_among_strangers_of_all_ranks_computes_what_it_computes_alone(
    tmp_path: Path, name: str, dtype: str
) -> None:
    model_dir = write_base_model(tmp_path, (BASES if dtype == "float32" else PLAIN_BASES)[name])
    info, rng, num_tokens = load_base_model(model_dir), np.random.default_rng(3), 12
    runner = make_cuda_runner(model_dir, dtype, num_pages=NUM_PAGES, max_num_seqs=160, max_num_batched_tokens=4096)
    harness = Harness(runner, choose_pool_geometry(info, dtype=dtype), NUM_PAGES)
    indices = [-1]
    for number, recipe in enumerate(SERVED_RANKS):
        spec, tensors = recipe_adapter(info, recipe, f"{number:064x}")
        indices.append(harness.load(spec, pack(runner.geometry, spec, tensors)))
    assert set(PROJECTIONS) == {m for recipe in SERVED_RANKS for m in recipe.targets}
    draw = Draw(num_logprobs=info.vocab_size)
    prompts = [rng.integers(0, info.vocab_size, int(rng.integers(1, 60))).tolist() for _ in range(3 * len(indices))]
    alone = [harness.add(p, adapter=indices[i % len(indices)], draw=draw) for i, p in enumerate(prompts)]
    for sequence in alone:
        harness.generate([sequence], num_tokens)
        harness.release([sequence])
    together = [
        harness.add(p, adapter=indices[i % len(indices)], draw=draw, forced=alone[i].drawn)
        for i, p in enumerate(prompts)
    ]

    harness.generate(together, num_tokens)

    agreement = Agreement(dtype)
    for row, (expected, found) in enumerate(zip(alone, together, strict=True)):
        for step in range(num_tokens):
            agreement.choice(f"row {row}, step {step}", expected.logprobs[step], found.drawn[step])
            agreement.logprobs(expected.logprobs[step], found.logprobs[step])
    agreement.check()
    runner.close()
