"""What became of images that came before a request asked for them: useful, late and wasted bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter

from loraplex_engine.messages import ResidencyChanged, ResidencyState

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class PrefetchMetrics:
    """Follows unsolicited images from event to event.

    *Useful*: leased after it came. *Late*: asked for while it was still on its way. *Wasted*: evicted without a lease.

    Args:
        registry: The registry that the metric is added to.
        page_bytes: Bytes of one page of an image.
    """

    def __init__(self, registry: CollectorRegistry, page_bytes: int) -> None:
        self._bytes = Counter(
            "loraplex_engine_prefetch_bytes",
            "Bytes of images that came unsolicited, by what became of them.",
            ["result"],
            registry=registry,
        )
        for result in ("useful", "late", "wasted"):
            self._bytes.labels(result)
        self._page_bytes = page_bytes
        self._known: set[str] = set()
        self._late: set[str] = set()
        self._unused: set[str] = set()

    def changed(self, event: ResidencyChanged, *, is_under_way: bool) -> None:
        """Count one residency event.

        Args:
            event: The event.
            is_under_way: Whether an unsolicited image is being transferred for this adapter.
        """
        digest = event.digest
        if event.state is ResidencyState.WANTED and is_under_way:
            self._late.add(digest)
        elif event.state is ResidencyState.IN_ARENA and digest in self._late:
            self._count("late", event)
            self._late.discard(digest)
        elif event.state is ResidencyState.IN_ARENA and digest not in self._known:
            self._unused.add(digest)
        if digest in self._unused and event.num_leases:
            self._count("useful", event)
            self._unused.discard(digest)
        if event.state is not ResidencyState.ABSENT:
            self._known.add(digest)
            return
        if digest in self._unused:
            self._count("wasted", event)
        for digests in (self._known, self._late, self._unused):
            digests.discard(digest)

    def _count(self, result: str, event: ResidencyChanged) -> None:
        self._bytes.labels(result).inc(event.num_pages * self._page_bytes)
