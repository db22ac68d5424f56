"""Plans of rows for tests of LoRA alone: only which row has which adapter and how many tokens matters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_engine.step import StepPlan
from support.plans import Draw, sampling_arrays

if TYPE_CHECKING:
    from collections.abc import Sequence


def make_plan(decode: Sequence[int], chunks: Sequence[tuple[int, int]]) -> StepPlan:
    """Return a step of decode rows with these adapters and of chunks of these (tokens, adapter)."""
    count = len(decode) + len(chunks)
    rows = np.arange(count, dtype=np.int32)
    num_tokens = np.array([1] * len(decode) + [tokens for tokens, _ in chunks], dtype=np.int32)
    return StepPlan(
        step_id=1,
        slots=rows,
        num_tokens=num_tokens,
        starts=np.zeros_like(rows),
        token_ids=np.zeros(num_tokens.sum(), dtype=np.int32),
        block_tables=np.zeros((count, 1), dtype=np.int32),
        adapters=np.array([*decode, *(adapter for _, adapter in chunks)], dtype=np.int32),
        adapter_scales=np.ones(count, dtype=np.float32),
        num_decode_rows=len(decode),
        sample_rows=rows,
        sampling=sampling_arrays([Draw()] * count, [0] * count),
    )
