"""How a step of LoRA at prefill is cut: CTAs of a cluster, CTAs that share a multiprocessor, shares of a tile's outputs.

The model's constants are fitted to 760 times on an H100 (benchmarks/NOTES.md); its picks take 0.7 % more than the fastest on average.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_kernels.lora.items import OpShape

CLUSTERS: Final = (8, 4, 2)
RESIDENCIES: Final = (3, 2)
"""CTAs per SM to choose from: with fewer the ring is longer, and more of it is on its way at a time."""
RESIDENT_CLUSTERS: Final = {3: {8: 46, 4: 81, 2: 198, 1: 396}, 2: {8: 29, 4: 60, 2: 132, 1: 264}}
"""Clusters that an H100 holds at once, by CTAs per SM; those of 8 and 4 do not fill its GPCs."""
START_SLOTS: Final = {3: 1.0, 2: 6.0}
"""What a CTA's start costs, counted in slots at three CTAs per SM."""
SLOT_COST: Final = {3: 1.0, 2: 0.6}
CHUNK_COST: Final = 1.5  # of a step of columns: y is read and written
LAST_WAVE: Final = 0.85  # what a nearly empty one costs of a full one
MOST_WAVES: Final = 3  # of two CTAs per SM: what was timed
CHUNK: Final = 64  # outputs
WAVE: Final = 132  # multiprocessors of an H100: with fewer CTAs, a tile's outputs are shared out to more


def choose_cut(
    num_items: int, shape: OpShape, clusters: tuple[int, ...], residencies: tuple[int, ...] = RESIDENCIES
) -> tuple[int, int]:
    """Return how many CTAs should share an item and an SM: what the fewest and fullest waves of clusters make cheapest.

    Args:
        num_items: Adapted slices of tiles.
        shape: The op's.
        clusters: Sizes to choose from.
        residencies: CTAs per SM to choose from.
    """

    def cost(cut: tuple[int, int]) -> float:
        cluster, ctas_per_sm = cut
        shares, resident = num_shares(num_items, shape, cluster), RESIDENT_CLUSTERS[ctas_per_sm][cluster]
        if ctas_per_sm < max(residencies) and num_items * shares > MOST_WAVES * resident:
            return float("inf")
        full, rest = divmod(num_items * shares, resident)
        waves = full + (LAST_WAVE + (1 - LAST_WAVE) * rest / resident if rest else 0)
        slots = (shape.columns + CHUNK_COST * max(shape.outputs) / shares) / (64 * cluster)
        return waves * (START_SLOTS[ctas_per_sm] + SLOT_COST[ctas_per_sm] * slots)

    return min(itertools.product(clusters, residencies), key=cost)


def num_shares(num_items: int, shape: OpShape, cluster: int) -> int:
    """Return into how many items a tile's outputs of a slice are cut, a power of two: as many as fill the GPU once.

    Every share computes h anew, so two chunks per CTA are the least that pays.
    """
    most = min(WAVE // max(num_items * cluster, 1), min(shape.outputs) // (2 * CHUNK * cluster))
    return 1 << max(most, 1).bit_length() - 1
