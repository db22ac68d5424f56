"""What a page is worth: the measure by which adapters and cached blocks are compared at an eviction.

The engine uses `ExpectedCost` (`scheduler.eviction`); benchmarks put other systems' rules in its place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAST_S: Final = 1e-12


class PageWorth(Protocol):
    """Values pages, in octaves; moments are times in half-lives."""

    def of_adapter(self, *, octaves: float, cost_s: float, used: float) -> float:
        """Return an adapter's worth per page.

        Args:
            octaves: How often the adapter was asked for lately (`ArrivalRates`).
            cost_s: Seconds to bring one of its pages.
            used: Moment of the adapter's last use.
        """
        ...

    def of_blocks(self, worth: NDArray[np.float64], moment: float) -> NDArray[np.float64]:
        """Return the worth of blocks after one more use of each, without `block_cost`."""
        ...

    def block_cost(self, cost_s: float) -> float:
        """Return what the seconds to recompute a block add to the block's worth."""
        ...


class ExpectedCost:
    """Values a page at its rate of use times the seconds it takes to bring back."""

    def of_adapter(self, *, octaves: float, cost_s: float, used: float) -> float:
        """Return rate times cost, in octaves; the moment of the last use does not matter."""
        del used
        return octaves + math.log2(cost_s)

    def of_blocks(self, worth: NDArray[np.float64], moment: float) -> NDArray[np.float64]:
        """Add one more use."""
        counted: NDArray[np.float64] = np.logaddexp2(worth, moment)
        return counted

    def block_cost(self, cost_s: float) -> float:
        """Return the seconds in octaves."""
        return math.log2(max(_LEAST_S, cost_s))


EXPECTED_COST: Final = ExpectedCost()
