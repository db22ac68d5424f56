"""How requests spread over adapters: Punica's four patterns with its lengths, and Zipf's law.

Source: Chen et al., "Punica: Multi-Tenant LoRA Serving", arXiv:2310.18547, section 7, and its artifact.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_client.workload.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

POPULARITIES: Final = ("distinct", "uniform", "skewed", "identical")
SKEW: Final = 1.5
PUNICA_SEED: Final = 0xABCDABCD987


def group_sizes(popularity: str, num_requests: int) -> list[int]:
    """Return how many requests each adapter gets, most popular first.

    ``distinct``: one each. ``uniform``: ``ceil(sqrt(n))`` adapters with as equal shares as possible. ``skewed``: sizes
    ``floor(1.5 ** k)``, and one more for what is left. ``identical``: one adapter for all.

    Raises:
        ValueError: If the popularity is none of these.
    """
    if num_requests < 1:
        raise ValueError("at least one request is needed")
    match popularity:
        case "distinct":
            return [1] * num_requests
        case "identical":
            return [num_requests]
        case "uniform":
            groups = math.ceil(math.sqrt(num_requests))
            share, more = divmod(num_requests, groups)
            return [share + (index < more) for index in range(groups)]
        case "skewed":
            sizes, size = list[int](), 1.0
            while sum(sizes) + int(size) < num_requests:
                sizes.append(int(size))
                size *= SKEW
            return sorted([*sizes, num_requests - sum(sizes)], reverse=True)
    raise ValueError(f"{popularity!r} is none of {', '.join(POPULARITIES)}")


def punica_adapters(popularity: str, num_requests: int, *, seed: int = PUNICA_SEED) -> NDArray[np.int32]:
    """Return each request's adapter, int32 ``[n]``: the groups of `group_sizes` in random order."""
    sizes = group_sizes(popularity, num_requests)
    adapters: NDArray[np.int32] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    np.random.Generator(np.random.PCG64(seed)).shuffle(adapters)
    return adapters


def punica_sweep(popularity: str, *, num_requests: int = 320, max_len: int = 2048) -> Trace:
    """Return Punica's text-generation sweep: log-normal prompts, uniform totals, all at 0 (its loop is closed)."""
    generator = np.random.Generator(np.random.PCG64(PUNICA_SEED))
    lengths = np.exp(0.8 * generator.standard_normal(num_requests)) * 18.0 - 1.0
    prompt_tokens = np.maximum(np.minimum(lengths, max_len - 2), 1).astype(np.int32)
    total = np.maximum(prompt_tokens + 2, generator.integers(0, max_len, num_requests)).astype(np.int32)
    return Trace.of(
        np.zeros(num_requests),
        adapter=punica_adapters(popularity, num_requests),
        prompt_tokens=prompt_tokens,
        output_tokens=total - prompt_tokens,
    )


def zipf_adapters(
    num_adapters: int, num_requests: int, *, exponent: float = 1.0, generator: np.random.Generator
) -> NDArray[np.int32]:
    """Draw adapters with weights ``1 / (index + 1) ** exponent``, int32 ``[num_requests]``."""
    ends = np.cumsum(np.arange(1, num_adapters + 1, dtype=np.float64) ** -exponent)
    drawn = np.searchsorted(ends, generator.random(num_requests) * ends[-1], side="right")
    adapters: NDArray[np.int32] = np.minimum(drawn, num_adapters - 1).astype(np.int32)
    return adapters
