"""Which kernels compute LoRA for a step's decode rows, as runner and simulator agree on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_DECODE_RUNS: Final = 64
"""Least runs of decode rows for which the decode kernels cost less than a segment for each (benchmarks/NOTES.md)."""


def count_runs(adapters: NDArray[np.int32]) -> int:
    """Return how many runs of one adapter the rows make; rows without an adapter are left out.

    Args:
        adapters: int32 ``[N]``; adapter of each row, `NO_ADAPTER` for none.
    """
    return int(np.count_nonzero(np.diff(adapters[adapters != NO_ADAPTER], prepend=np.int32(-2))))


def takes_decode_kernels(num_runs: int, *, has_prefill: bool, min_runs: int = MIN_DECODE_RUNS) -> bool:
    """Tell whether a step's decode rows go through the decode kernels of LoRA, not as segments of the prefill kernel.

    Args:
        num_runs: Runs as `count_runs` counts them.
        has_prefill: Whether the step has prefill chunks; without any, decode rows always take the decode kernels.
        min_runs: Least runs for the decode kernels beside prefill chunks.
    """
    return num_runs >= max(1, min_runs if has_prefill else 1)
