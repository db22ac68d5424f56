"""How often adapters and blocks were asked for lately: decayed counts that need no upkeep as time passes.

The count of a name that was asked for at moments t_j is ``sum of 2 ** (-(now - t_j) / half_life)``. It is kept in
*octaves*, as ``log2(sum of 2 ** (t_j / half_life))``. In octaves a count does not change between two moments, and
comparing the octaves of two names is comparing their counts at any time.
"""

from __future__ import annotations

import math
from typing import Final

from loraplex_engine.limits import DEFAULT_HALF_LIFE_S

MAX_KNOWN: Final = 1 << 17
_FORGOTTEN_AFTER: Final = 12.0  # half-lives: 1/4096 of a request


def log2_sum(first: float, second: float) -> float:
    """Return ``log2(2 ** first + 2 ** second)``."""
    high, low = (first, second) if first >= second else (second, first)
    return high if low == -math.inf else high + math.log2(1.0 + 2.0 ** (low - high))


class ArrivalRates:
    """Decayed counts by name.

    Args:
        half_life_s: Time in seconds after which an arrival counts half.
        max_known: Most names remembered; beyond it, the names asked for least are forgotten.
    """

    def __init__(self, *, half_life_s: float = DEFAULT_HALF_LIFE_S, max_known: int = MAX_KNOWN) -> None:
        if half_life_s <= 0:
            raise ValueError(f"half_life_s {half_life_s} is not positive")
        self.half_life_s = half_life_s
        self._max_known = max_known
        self._octaves: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._octaves)

    def count(self, name: str, now_s: float, weight: float = 1.0) -> float:
        """Count one arrival, or a hint of one with a ``weight`` below 1, and return the new octaves."""
        moment = now_s / self.half_life_s + math.log2(weight)
        octaves = self._octaves[name] = log2_sum(self._octaves.get(name, -math.inf), moment)
        if len(self._octaves) > self._max_known:
            self._forget(moment)
        return octaves

    def octaves(self, name: str) -> float:
        """Return a name's count in octaves; minus infinity if it was never asked for, or not for long."""
        return self._octaves.get(name, -math.inf)

    def per_s(self, name: str, now_s: float) -> float:
        """Return a name's arrivals per second: a steady rate r has a count of ``r * half_life / ln 2``."""
        return float(2.0 ** (self.octaves(name) - now_s / self.half_life_s)) * math.log(2.0) / self.half_life_s

    def _forget(self, moment: float) -> None:
        """Drop names that have faded, and the lesser half if that is not enough; rare, so linear cost is fine."""
        kept = {name: octaves for name, octaves in self._octaves.items() if octaves > moment - _FORGOTTEN_AFTER}
        if len(kept) > self._max_known // 2:
            best = sorted(kept, key=kept.__getitem__)[-(self._max_known // 2) :]
            kept = {name: kept[name] for name in best}
        self._octaves = kept
