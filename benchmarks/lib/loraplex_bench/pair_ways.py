"""Ways to compute ``y = (W + s B A) x``, and what each moves and multiplies; after RunLoRA (arXiv:2312.03415), for inference.

RunLoRA picks, per layer, the order of products that costs the fewest operations: ``(x A) B`` beside ``x W``, or ``x (W + A B)``.
Legend: N = rows, I = inputs, O = outputs, r = rank.

| way | operations | bytes of weights |
| --- | --- | --- |
| apart: W x, then B (A x) | 2 N I O + 2 N r (I + O) | W, A, B |
| formed: W + BA for this product, then x | 2 r I O + I O + 2 N I O | W, A, B; writes and reads W + BA |
| beside: BA made ahead, a product of its own | 4 N I O | W, BA |
| merged: W + BA made ahead, in the place of W | 2 N I O | W + BA |
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

ITEM_BYTES: Final = 2


class Ceilings(NamedTuple):
    """What a device reaches: operations and bytes a second."""

    flops_per_s: float
    bytes_per_s: float


H200: Final = Ceilings(788e12, 4.21e12)
"""bf16 GEMM of 8192^3, and a copy that reads and writes; measured."""


class Way(Enum):
    """See the module's table."""

    APART = "apart"
    FORMED = "formed"
    BESIDE = "beside"
    MERGED = "merged"


class PairShape(NamedTuple):
    """A projection, the rank of its pair, and the rows that have it."""

    columns: int
    outputs: int
    rank: int
    rows: int


class Cost(NamedTuple):
    """Operations and bytes of one product with a pair."""

    flops: int
    num_bytes: int

    def seconds(self, ceilings: Ceilings = H200) -> float:
        """Return the least time: whichever of the two takes longer."""
        return max(self.flops / ceilings.flops_per_s, self.num_bytes / ceilings.bytes_per_s)


def cost_of(way: Way, shape: PairShape) -> Cost:
    """Return what a way costs in bf16, x and y included."""
    columns, outputs, rank, rows = shape
    weights, pair = columns * outputs, rank * (columns + outputs)
    product, activations = 2 * rows * weights, rows * (columns + outputs)
    flops, items = {
        Way.APART: (product + 2 * rows * pair, weights + pair),
        Way.FORMED: (2 * rank * weights + weights + product, 3 * weights + pair),
        Way.BESIDE: (2 * product, 2 * weights),
        Way.MERGED: (product, weights),
    }[way]
    return Cost(flops, ITEM_BYTES * (items + activations))


def rank_bound(columns: int, outputs: int) -> float:
    """Return the rank below which a pair costs less than a product with BA made ahead, in operations and in bytes alike."""
    return columns * outputs / (columns + outputs)


def rows_bound(columns: int, outputs: int, rank: int) -> float:
    """Return the rows of one adapter above which forming W + BA takes fewer operations than the pair."""
    return rank_bound(columns, outputs) * (2 * rank + 1) / (2 * rank)


def saved_by_merging(shapes: list[PairShape], ceilings: Ceilings = H200) -> float:
    """Return the share of the time of some products that merging saves at most, where all rows have the adapter."""
    apart, merged = (sum(cost_of(way, shape).seconds(ceilings) for shape in shapes) for way in (Way.APART, Way.MERGED))
    return 1 - merged / apart
