"""The S-LoRA paper's synthetic trace, bit for bit.

Source: Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", arXiv:2311.03285, and its artifact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraplex_client.workload.trace import NO_ADAPTER, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class SloraParams:
    """What the trace depends on.

    Attributes:
        num_adapters: N; with 0 the same requests go to the base model.
        alpha: Exponent of the popularity; 1 is uniform, less crowds requests at low indices.
        rate: Requests per second.
        cv: Coefficient of variation of the gaps; 1 is Poisson.
        duration_s: The trace holds ``int(rate * duration_s)`` requests.
        prompt_range: Half-open range of prompt lengths.
        output_range: Half-open range of output lengths.
    """

    num_adapters: int = 200
    alpha: float = 1.0
    rate: float = 20.0
    cv: float = 1.0
    duration_s: float = 60.0
    prompt_range: tuple[int, int] = (8, 512)
    output_range: tuple[int, int] = (8, 512)
    seed: int = 42

    def __post_init__(self) -> None:
        if self.num_adapters < 0 or min(self.alpha, self.rate, self.cv, self.duration_s) <= 0:
            raise ValueError("adapters must not be negative; alpha, rate, cv and duration must be above 0")


def slora_trace(params: SloraParams) -> Trace:
    """Return the trace; lengths are uniform, gaps gamma distributed, popularity a power law."""
    generator = np.random.RandomState(params.seed)  # the legacy generator, and the order of the draws, are the trace
    total = int(params.rate * params.duration_s)
    adapter = (generator.power(params.alpha, total) * params.num_adapters).astype(int)
    prompt_tokens = generator.randint(*params.prompt_range, total)
    output_tokens = generator.randint(*params.output_range, total)
    variance = params.cv * params.cv
    gaps = generator.gamma(1.0 / variance, variance / params.rate, total)
    return Trace.of(
        np.cumsum(gaps),
        adapter=adapter if params.num_adapters else NO_ADAPTER,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
