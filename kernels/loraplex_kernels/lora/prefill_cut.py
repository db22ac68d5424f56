"""Decides how a step of LoRA at prefill is cut: CTAs of a cluster, CTAs per multiprocessor, shares of a tile's outputs.

The model's constants are fitted to 760 times on an H100 (benchmarks/NOTES.md); on average, its choices take 0.7 % more
time than the fastest.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_kernels.lora.items import OpShape

CLUSTERS: Final = (8, 4, 2)
RESIDENCIES: Final = (3, 2)
"""CTAs per SM to choose from: with fewer CTAs the ring is longer, and more of it is on its way at a time."""
RESIDENT_CLUSTERS: Final = {3: {8: 46, 4: 81, 2: 198, 1: 396}, 2: {8: 29, 4: 60, 2: 132, 1: 264}}
"""Clusters that an H100 holds at once, by CTAs per SM; clusters of 8 and 4 do not fill its GPCs."""
START_SLOTS: Final = {3: 1.0, 2: 6.0}
"""Cost of a CTA's start, in slots at three CTAs per SM."""
SLOT_COST: Final = {3: 1.0, 2: 0.6}
CHUNK_COST: Final = 1.5  # relative to a step of columns, as y is read and written
LAST_WAVE: Final = 0.85  # cost of a nearly empty wave, relative to a full one
MOST_WAVES: Final = 3  # of two CTAs per SM; more were not timed
CHUNK: Final = 64  # outputs of a chunk
WAVE: Final = 132  # multiprocessors of an H100: with fewer CTAs, a tile's outputs are shared out to more


def choose_cut(
    num_items: int, shape: OpShape, clusters: tuple[int, ...], residencies: tuple[int, ...] = RESIDENCIES
) -> tuple[int, int]:
    """Return the cheapest numbers of CTAs of a cluster and of CTAs per SM, by the waves in which the clusters run.

    Each of the N = ``num_items * shares`` items takes a cluster, and R clusters are resident at once:

        [0, full * R)    full waves
        [full * R, N)    the last wave, if not empty: it costs from `LAST_WAVE` of a full one up to 1

    Args:
        num_items: Adapted slices of tiles.
        shape: Shape of the op.
        clusters: Sizes of cluster to choose from.
        residencies: Numbers of CTAs per SM to choose from.
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

    Every share computes h anew, so a share pays only with at least two chunks per CTA.
    """
    most = min(WAVE // max(num_items * cluster, 1), min(shape.outputs) // (2 * CHUNK * cluster))
    return 1 << max(most, 1).bit_length() - 1
