"""Measures what it takes to fetch and to copy an adapter on this machine, while adapters come."""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 0.2
"""Weight of the newest measurement in a moving average."""
_PRIOR_COPY_S_PER_PAGE: Final = 1e-4  # 2 MiB at 20 GB/s
_PRIOR_FETCH_S: Final = 0.1
_LEAST_S: Final = 1e-9
_RESIDENT_WEIGHT: Final = 0.25
_PRIOR_RESIDENT_S: Final = 1.0


class CopyCosts:
    """Moving averages of the times of loads.

    Copies share one stream. So a load's time starts with its order, or with the end of the load before if that was
    later.

    Attributes:
        copy_s_per_page: Seconds to copy a page from the arena to the device.
        fetch_s: Seconds from asking the store for an image until the arena has it.
        resident_s: Seconds from asking the store for an image until the adapter can be leased.
    """

    def __init__(self) -> None:
        self.copy_s_per_page = _PRIOR_COPY_S_PER_PAGE
        self.fetch_s = _PRIOR_FETCH_S
        self.resident_s = _PRIOR_RESIDENT_S
        self._has_copy = False
        self._has_fetch = False
        self._last_done_s = 0.0

    def copied(self, num_pages: int, *, began_s: float, done_s: float) -> None:
        """Add a finished copy."""
        took_s = (done_s - max(began_s, self._last_done_s)) / num_pages
        self._last_done_s = done_s
        if took_s > 0:
            self.copy_s_per_page += (_WEIGHT if self._has_copy else 1.0) * (took_s - self.copy_s_per_page)
            self._has_copy = True

    def fetched(self, took_s: float) -> None:
        """Add an image that came from the store."""
        self.fetch_s += (_WEIGHT if self._has_fetch else 1.0) * (took_s - self.fetch_s)
        self._has_fetch = True

    def became_resident(self, took_s: float) -> None:
        """Add an adapter that was wanted and can be leased now."""
        self.resident_s += _RESIDENT_WEIGHT * (took_s - self.resident_s)

    def return_s_per_page(self, num_pages: int, *, is_in_arena: bool) -> float:
        """Return the seconds, per page, to bring an adapter of ``num_pages`` back to the device."""
        fetch_s = 0.0 if is_in_arena else self.fetch_s / max(1, num_pages)
        return max(_LEAST_S, self.copy_s_per_page + fetch_s)
