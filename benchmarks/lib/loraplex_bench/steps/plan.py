"""Hand-made steps for a runner: decode rows at one context, and whole prompts beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from loraplex_engine.step import FROM_DEVICE, SamplingArrays, StepPlan

if TYPE_CHECKING:
    from loraplex_engine.pool_geometry import PoolGeometry
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """What a step computes; decode rows come first.

    Attributes:
        num_decode: Sequences with one token each.
        context: Tokens each of them has in the pool.
        num_prompts: Whole prompts beside them.
        prompt_tokens: Length of each prompt.
    """

    num_decode: int
    context: int = 320
    num_prompts: int = 0
    prompt_tokens: int = 256

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return self.num_decode + self.num_prompts

    def num_pages(self, pool: PoolGeometry) -> int:
        """Return the KV pages that all its sequences take."""
        return self.num_decode * pool.num_blocks(self.context + 1) + self.num_prompts * pool.num_blocks(
            self.prompt_tokens
        )


def greedy(count: int) -> SamplingArrays:
    """Return the settings of rows that take their likeliest token."""
    zeros, ints = np.zeros(count, dtype=np.float32), np.zeros(count, dtype=np.int32)
    return SamplingArrays(
        temperature=zeros,
        top_k=ints,
        top_p=zeros + 1,
        min_p=zeros,
        repetition_penalty=zeros + 1,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        seed=np.zeros(count, dtype=np.uint64),
        position=ints,
        num_logprobs=ints - 1,
        ban_stops=np.zeros(count, dtype=np.bool_),
    )


def make_plan(size: StepSize, pool: PoolGeometry, adapters: NDArray[np.int32], *, step_id: int = 0) -> StepPlan:
    """Return a step over pages ``[0, size.num_pages)``.

    Args:
        size: What it computes.
        pool: Shape of a page.
        adapters: int32 ``[rows]``; indices of the runner's table, or ``NO_ADAPTER``.
        step_id: Must rise.
    """
    decode_blocks, prompt_blocks = pool.num_blocks(size.context + 1), pool.num_blocks(size.prompt_tokens)
    width = max(decode_blocks if size.num_decode else 0, prompt_blocks if size.num_prompts else 0)
    blocks = np.array([decode_blocks] * size.num_decode + [prompt_blocks] * size.num_prompts, dtype=np.int32)
    firsts = np.cumsum(blocks) - blocks
    tables = (firsts[:, None] + np.arange(width)).astype(np.int32)
    tables[np.arange(width) >= blocks[:, None]] = -1
    prompts = np.random.default_rng(1).integers(10, 200, size.num_prompts * size.prompt_tokens).astype(np.int32)
    rows = np.arange(size.num_rows, dtype=np.int32)
    return StepPlan(
        step_id=step_id,
        slots=rows,
        num_tokens=np.array([1] * size.num_decode + [size.prompt_tokens] * size.num_prompts, dtype=np.int32),
        starts=np.array([size.context] * size.num_decode + [0] * size.num_prompts, dtype=np.int32),
        token_ids=np.concatenate([np.full(size.num_decode, FROM_DEVICE, dtype=np.int32), prompts]),
        block_tables=tables,
        adapters=adapters.astype(np.int32),
        adapter_scales=np.ones(size.num_rows, dtype=np.float32),
        num_decode_rows=size.num_decode,
        sample_rows=rows,
        sampling=greedy(size.num_rows),
    )
