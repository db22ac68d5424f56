"""What holding pages costs, in page-seconds: each page's second is shared equally by the sequences that hold the page.

Every page has a clock that runs at 1 / (number of sequences that hold it) while any do. A sequence's page-seconds are how
far the clocks of its pages went while it held them, so that those of all sequences add up to the integral of the pages held
over time. Clocks are brought up to date only when a page changes hands: a step that gives out no page spends nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


class Integral:
    """The integral of a number over time.

    One thread sets the number, and one reads.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._state = (clock(), 0.0, 0)  # since when, the integral until then, the number since
        self._shown = 0.0

    def set(self, number: int) -> None:
        """Note that the number changes now."""
        since_s, total, before = self._state
        now_s = self._clock()
        self._state = (now_s, total + before * (now_s - since_s), number)

    def read(self) -> float:
        """Return the integral until now; never less than before, though the number may change while it is read."""
        since_s, total, number = self._state
        self._shown = max(self._shown, total + number * max(0.0, self._clock() - since_s))
        return self._shown


class PageClocks:
    """The clock of each page.

    Args:
        num_pages: Pages of the pool.
        clock: Seconds, monotonic.
    """

    def __init__(self, num_pages: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._readings = np.zeros(num_pages)
        self._since_s = np.zeros(num_pages)

    def start(self, pages: NDArray[np.intp]) -> None:
        """Set pages that one sequence has just got to zero."""
        self._readings[pages] = 0.0
        self._since_s[pages] = self._clock()

    def turn(self, pages: NDArray[np.intp], num_sequences: NDArray[np.int32]) -> float:
        """Bring pages that are about to change hands up to date.

        Args:
            pages: Page ids, each at most once.
            num_sequences: How many sequences have held each of them until now, parallel to ``pages``.

        Returns:
            The sum of their clocks, in seconds.
        """
        now_s = self._clock()
        elapsed_s = now_s - self._since_s[pages]
        readings = self._readings[pages] + np.where(num_sequences > 0, elapsed_s / np.maximum(num_sequences, 1), 0.0)
        self._readings[pages] = readings
        self._since_s[pages] = now_s
        return float(readings.sum())
