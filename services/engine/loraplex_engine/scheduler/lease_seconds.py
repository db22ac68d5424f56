"""What running requests' adapters cost, in page-seconds: each adapter's pages are shared equally by its leases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_engine.pages.page_seconds import Integral

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.scheduler.request import Request


@dataclass(slots=True)
class _Leased:
    """An adapter that running requests lease.

    Attributes:
        reading: Page-seconds of one lease that had been there all the time.
    """

    num_pages: int
    since_s: float
    num_leases: int = 0
    reading: float = 0.0


class LeaseSeconds:
    """Counts page-seconds of leased adapters; those of adapters without a lease are no request's.

    Args:
        num_pages_of: Returns how many pages an adapter takes.
        clock: Seconds, monotonic.

    Attributes:
        total: Integral over time of the pages of all leased adapters.
    """

    def __init__(self, num_pages_of: Callable[[str], int | None], clock: Callable[[], float]) -> None:
        self._num_pages_of = num_pages_of
        self._clock = clock
        self._leased: dict[str, _Leased] = {}
        self._num_pages = 0
        self.total = Integral(clock)

    def begin(self, request: Request) -> None:
        """Note that a request has leased its adapters."""
        for digest in request.digests:
            leased = self._leased.get(digest)
            if leased is None:
                leased = self._leased[digest] = _Leased(self._num_pages_of(digest) or 0, self._clock())
                self._set_total(leased.num_pages)
            self._turn(leased)
            leased.num_leases += 1
            request.adapter_page_s -= leased.reading

    def end(self, request: Request) -> None:
        """Note that a request returns its leases: its page-seconds are counted."""
        for digest in request.digests:
            leased = self._leased[digest]
            self._turn(leased)
            leased.num_leases -= 1
            request.adapter_page_s += leased.reading
            if not leased.num_leases:
                del self._leased[digest]
                self._set_total(-leased.num_pages)

    def _turn(self, leased: _Leased) -> None:
        now_s = self._clock()
        if leased.num_leases:
            leased.reading += leased.num_pages * (now_s - leased.since_s) / leased.num_leases
        leased.since_s = now_s

    def _set_total(self, change: int) -> None:
        self._num_pages += change
        self.total.set(self._num_pages)
