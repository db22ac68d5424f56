"""Pairs of runners over one tiny model: the CUDA backend and the torch backend it must agree with."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.decode_runs import MIN_DECODE_RUNS
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.cuda.runner import CudaRunner
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from support.adapters import Recipe
from support.base_models import TinyBase
from support.engine_harness import recipe_adapter, running_engine
from support.plans import Harness

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_engine.constraints.types import MaskFiller
    from loraplex_engine.step import TokenLogprobs
    from numpy.typing import NDArray
    from support.engine_harness import EngineHarness
    from support.plans import Sequence_

MAX_TIES = 0.005
TIE_GAP_FP32 = 1e-4
TIE_ULPS_BF16 = 4
MIN_MEDIAN_GAP = 0.01
"""Share of the largest logit: what docs/testing.md asks of random test models."""
MAX_LOGIT_ERROR = {"float32": 1e-4, "bfloat16": 4e-2}

BASES = {  # with KV pages of at least a tile, 32 KiB, in bf16
    "gqa": TinyBase(hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, head_dim=64, num_layers=4),
    "mha": TinyBase(hidden_size=512, intermediate_size=1024, num_heads=4, num_kv_heads=4, head_dim=128, num_layers=3),
    "qwen2": TinyBase(
        architecture="qwen2",
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        num_layers=4,
    ),
    "qwen3": TinyBase(
        architecture="qwen3", hidden_size=256, intermediate_size=768, num_heads=4, num_kv_heads=2, head_dim=128
    ),
    "window": TinyBase(
        architecture="mistral",
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        num_layers=4,
        sliding_window=24,
    ),
}
PLAIN_BASES = {name: replace(base, successor_logit=50.0) for name, base in BASES.items()}
"""The same bases, with a clear next token at nineteen of twenty positions, for comparisons in bf16 (ADR 12)."""
RECIPES = (
    Recipe(rank=8, seed=1, strength=0.3),
    Recipe(rank=16, targets=("q_proj", "v_proj"), seed=2, strength=0.3),
    Recipe(rank=33, targets=("o_proj", "down_proj"), seed=3, strength=0.3),
    Recipe(rank=4, rank_pattern={"gate_proj": 64, "q_proj": 1}, layers=(1,), seed=4, strength=0.3),
    Recipe(rank=64, alpha=16, use_rslora=True, seed=5, strength=0.3),
)


@dataclass(frozen=True, slots=True)
class CudaRig:
    """A runner with its harness and the table indices of its adapters, `NO_ADAPTER` first."""

    runner: CudaRunner | TorchRunner
    harness: Harness
    adapters: list[int]


def images(model_dir: Path, runner: CudaRunner | TorchRunner) -> list[tuple[AdapterSpec, NDArray[np.uint8]]]:
    """Return spec and image of every recipe."""
    info, found = load_base_model(model_dir), []
    for number, recipe in enumerate(RECIPES):
        spec, tensors = recipe_adapter(info, recipe, f"{number:064x}")
        found.append((spec, pack(runner.geometry, spec, tensors)))
    return found


def make_cuda_runner(
    model_dir: Path,
    dtype: str,
    *,
    num_pages: int = 512,
    max_num_seqs: int = 40,
    max_model_len: int = 256,
    max_num_batched_tokens: int = 512,
    arch: str | None = None,
    dependent_launch: bool | None = None,
    min_decode_runs: int = MIN_DECODE_RUNS,
    jitter: bool = False,
    kv_dtype: str = "",
    weight_form: WeightForm = WeightForm.WHOLE,
) -> CudaRunner:
    """Build the CUDA backend over a model directory."""
    info = load_base_model(model_dir)
    limits = EngineLimits(
        pool=choose_pool_geometry(info, dtype=dtype, kv_dtype=kv_dtype),
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        max_resident_adapters=64,
    )
    config = RunnerConfig(
        info=info,
        limits=limits,
        device="cuda:0",
        arch=arch,
        dependent_launch=dependent_launch,
        min_decode_runs=min_decode_runs,
        jitter=jitter,
        weight_form=weight_form,
    )
    reader = WeightReader(model_dir, dtype=DTYPES[dtype], device=torch.device("cuda", 0), form=weight_form)
    return CudaRunner(config, reader)


@contextmanager
def cuda_engine(
    model_dir: Path,
    dtype: str,
    *,
    num_pages: int,
    max_model_len: int = 128,
    max_num_batched_tokens: int = 64,
    eos_token_ids: tuple[int, ...] = (),
    filler: MaskFiller | None = None,
) -> Iterator[EngineHarness]:
    """Run an engine on the CUDA backend."""
    limits = EngineLimits(
        pool=choose_pool_geometry(load_base_model(model_dir), dtype=dtype),
        num_pages=num_pages,
        num_arena_slots=400,
        eos_token_ids=eos_token_ids,
        max_model_len=max_model_len,
        max_num_seqs=16,
        max_num_batched_tokens=max_num_batched_tokens,
        max_resident_adapters=64,
    )

    def make(limits: EngineLimits) -> CudaRunner:
        return make_cuda_runner(
            model_dir,
            dtype,
            num_pages=limits.num_pages,
            max_num_seqs=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )

    with running_engine(limits, make, filler) as harness:
        yield harness


def make_torch_runner(
    model_dir: Path,
    dtype: str,
    *,
    num_pages: int = 512,
    max_num_seqs: int = 40,
    kv_dtype: str = "",
    weight_form: WeightForm = WeightForm.WHOLE,
) -> TorchRunner:
    """Build the torch backend on the same GPU."""
    info = load_base_model(model_dir)
    pool = choose_pool_geometry(info, dtype=dtype, kv_dtype=kv_dtype)
    limits = EngineLimits(pool=pool, num_pages=num_pages, max_num_seqs=max_num_seqs, max_model_len=256)
    return TorchRunner(
        RunnerConfig(info=info, limits=limits, device="cuda", weight_form=weight_form),
        WeightReader(model_dir, dtype=DTYPES[dtype], device=torch.device("cuda"), form=weight_form),
    )


def make_rig(model_dir: Path, runner: CudaRunner | TorchRunner, dtype: str, *, num_pages: int = 512) -> CudaRig:
    """Load every recipe's adapter."""
    harness = Harness(runner, choose_pool_geometry(load_base_model(model_dir), dtype=dtype), num_pages)
    loaded = [harness.load(spec, image) for spec, image in images(model_dir, runner)]
    return CudaRig(runner, harness, [-1, *loaded])


def add_sequences(rig: CudaRig, vocab_size: int, count: int, **fields: object) -> list[Sequence_]:
    """Add sequences of many lengths, adapters, scales and ways to cut the prompt; the same ones for every rig."""
    rng, sequences = np.random.default_rng(7), []
    for number in range(count):
        prompt = rng.integers(0, vocab_size, int(rng.integers(1, 90))).tolist()
        sequences.append(
            rig.harness.add(
                prompt,
                adapter=rig.adapters[number % len(rig.adapters)],
                scale=1.0 if number % 2 else 0.5,
                chunks=[len(prompt) // 3] * (number % 3) if len(prompt) >= 9 else [],
                **fields,
            )
        )
    return sequences


def largest_logit(entry: TokenLogprobs) -> float:
    """Return the largest logit's size, from log probabilities of the whole vocabulary: logits but for their mean."""
    listed = entry.logprobs[1:]
    return float(np.abs(listed - listed.mean()).max())


def gap_and_limit(dtype: str, entry: TokenLogprobs) -> tuple[float, float]:
    """Return the lead of the best logit over the second, and the lead below which another choice counts as a tie."""
    ulp = 2.0 ** (np.floor(np.log2(largest_logit(entry))) - 7)
    return float(entry.logprobs[1] - entry.logprobs[2]), TIE_GAP_FP32 if dtype == "float32" else TIE_ULPS_BF16 * ulp


@dataclass(slots=True)
class Agreement:
    """Tallies choices and errors against the oracle's probabilities (docs/testing.md)."""

    dtype: str
    positions: int = 0
    gaps: list[float] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    error: float = 0.0

    def choice(self, what: str, oracle: TokenLogprobs, token: int) -> None:
        """Compare a drawn token with the oracle's."""
        self.positions += 1
        gap, limit = gap_and_limit(self.dtype, oracle)
        self.gaps.append(gap / largest_logit(oracle))
        choice = int(oracle.token_ids[0])  # drawn greedily; not always the first listed if the best two are equal
        if token == choice:
            return
        note = f"{what}: drew {token}, oracle {choice}, gap {gap:.2e}, limit {limit:.2e}"
        (self.ties if gap < limit else self.mismatches).append(note)

    def logprobs(self, oracle: TokenLogprobs, found: TokenLogprobs) -> None:
        """Compare the whole vocabulary's probabilities."""
        truth, own = np.zeros(len(oracle.token_ids) - 1), np.full(len(oracle.token_ids) - 1, np.nan)
        truth[oracle.token_ids[1:]], own[found.token_ids[1:]] = oracle.logprobs[1:], found.logprobs[1:]
        self.error = max(self.error, float(np.abs(own - truth).max() / largest_logit(oracle)))

    def check(self, *, min_ties: int = 0) -> None:
        """Assert agreement; ties are shown.

        Args:
            min_ties: Ties that are accepted whatever their share, for too few positions to make one rare.
        """
        for tie in self.ties:
            print("tie", tie)
        print(
            f"{self.dtype}: {self.positions} positions, {len(self.ties)} ties, logit error {self.error:.2e}, "
            f"median gap {np.median(self.gaps):.1%}"
        )
        assert not self.mismatches, f"{len(self.mismatches)} of {self.positions}: " + "\n".join(self.mismatches[:10])
        assert len(self.ties) <= max(min_ties, MAX_TIES * self.positions)
        assert np.median(self.gaps) > MIN_MEDIAN_GAP
        assert self.error < MAX_LOGIT_ERROR[self.dtype], self.error
