"""The time of the collectives of one step of a tensor-parallel engine, from figures of the link between its ranks.

A step adds up hidden states twice in a layer and once behind the embedding, begins with a broadcast of token ids, and ends with the
logits of all ranks on rank 0 (docs/adr/0045-tensor-parallel-ranks.md). Rings, with N ranks and b bytes at each:

    all-reduce    latency + 2 (N - 1) / N * b / bandwidth
    gather        latency +   (N - 1)     * b / bandwidth
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_engine.simulation.shapes import ModelShape

LOGIT_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLink:
    """What connects the GPUs of one host.

    Attributes:
        bytes_per_s: What one GPU sends to another, in bytes per second; a data sheet's rate of one direction.
        latency_s: A collective of a few bytes, in seconds; assumed, until one is measured.
    """

    bytes_per_s: float
    latency_s: float


class StepCollectives:
    """Gives the seconds that collectives of one step take.

    Args:
        shape: The model, with its degree; of degree 1 there are none.
        link: The link.
    """

    def __init__(self, shape: ModelShape, link: RankLink) -> None:
        ranks, info = shape.tp_degree, shape.info
        num_sums = 2 * info.num_layers + 1
        is_group = ranks > 1
        self.fixed_s = (num_sums + 2) * link.latency_s if is_group else 0.0
        sum_bytes = info.hidden_size * shape.item_bytes
        self.token_s = num_sums * 2 * (ranks - 1) / ranks * sum_bytes / link.bytes_per_s
        self.sampled_s = (ranks - 1) * shape.rank_vocabulary * LOGIT_BYTES / link.bytes_per_s

    def seconds(self, num_tokens: int, num_sampled: int) -> float:
        """Return the time of a step with so many tokens, of which so many have logits."""
        return self.fixed_s + num_tokens * self.token_s + num_sampled * self.sampled_s
