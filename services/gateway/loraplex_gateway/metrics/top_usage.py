"""Usage by tenant and adapter for Prometheus: the greatest users have series of their own, all others share one.

A user is a pair of tenant and adapter. The pairs that are shown change while counters must only rise. So a pair that comes in
begins at zero, what it used before stays in ``other``, and what a pair that leaves was shown with goes there: the sum over all
series is always all that was used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loraplex_common.auth import ANYBODY
from loraplex_common.exposition import OTHER, private
from prometheus_client import Counter
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loraplex_common.usage_records import UsageRecord
    from prometheus_client import CollectorRegistry

SHOWN: Final = 50
"""Pairs of tenant and adapter with series of their own."""
KNOWN: Final = 20 * SHOWN
"""Pairs that are weighed against each other; beyond them, the one with the least weight is forgotten."""
HALF_LIFE_S: Final = 3600.0
SEVERAL: Final = "(several)"

Pair = tuple[str, str]
_TOKENS: Final = ("input", "cached", "output")
_PAGES: Final = ("kv", "adapter")


@dataclass(slots=True)
class _Used:
    """Tokens by kind, then page-seconds by owner."""

    values: list[float] = field(default_factory=lambda: [0.0] * 5)

    def add(self, values: Sequence[float]) -> None:
        self.values = [mine + more for mine, more in zip(self.values, values, strict=True)]


class TopUsage(Collector):
    """Counts what ended requests used.

    Args:
        registry: Where it is registered.
        clock: Seconds, monotonic.

    Attributes:
        num_dropped: Records that were not written to the ledger.
    """

    def __init__(self, registry: CollectorRegistry, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._faded_at = clock()
        self._weights: dict[Pair, float] = {}
        self._shown: dict[Pair, _Used] = {}
        self._other = _Used()
        self.num_dropped = Counter(
            "loraplex_gateway_usage_records_dropped_total",
            "Usage records that Valkey did not get; the log has them.",
            registry=registry,
        )
        registry.register(self)

    def add(self, record: UsageRecord) -> None:
        """Count a request's record, or the part of it that is new."""
        pair = (record.tenant, _name_of(record.adapter))
        tokens = (record.input_tokens, record.cached_tokens, record.output_tokens)  # in the order of _TOKENS
        weight = record.input_tokens + 2.0 * record.output_tokens
        if pair not in self._weights and len(self._weights) >= KNOWN:
            self._forget_least()
        self._weights[pair] = self._weights.get(pair, 0.0) + weight
        shown = self._shown.get(pair)
        if shown is None and len(self._shown) < SHOWN:
            shown = self._shown[pair] = _Used()
        (shown or self._other).add((*tokens, record.kv_page_s, record.adapter_page_s))

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Name the metrics, so that second ones of their names are refused."""
        yield from self._families()

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Show the state of this moment."""
        self._choose()
        tokens, pages = self._families()
        for (tenant, adapter), used in [*self._shown.items(), ((OTHER, OTHER), self._other)]:
            labels = [_private(tenant), _private(adapter) if adapter else adapter]
            for kind, value in zip(_TOKENS, used.values[:3], strict=True):
                tokens.add_metric([*labels, kind], value)
            for owner, value in zip(_PAGES, used.values[3:], strict=True):
                pages.add_metric([*labels, owner], value)
        yield tokens
        yield pages

    @staticmethod
    def _families() -> tuple[CounterMetricFamily, CounterMetricFamily]:
        return (
            CounterMetricFamily(
                "loraplex_gateway_usage_tokens",
                "Tokens of ended requests, by who asked and for what: the greatest users, then `other`.",
                labels=["tenant", "adapter", "kind"],
            ),
            CounterMetricFamily(
                "loraplex_gateway_usage_page_seconds",
                "Page-seconds of ended requests, by who asked and for what: the greatest users, then `other`.",
                labels=["tenant", "adapter", "owner"],
            ),
        )

    def _choose(self) -> None:
        """Show the pairs of the greatest weight; what those that leave were shown with goes to the others."""
        self._fade()
        ranked = sorted(self._weights, key=lambda pair: self._weights[pair], reverse=True)[:SHOWN]
        for pair in [pair for pair in self._shown if pair not in set(ranked)]:
            self._other.add(self._shown.pop(pair).values)
        for pair in ranked:
            self._shown.setdefault(pair, _Used())

    def _fade(self) -> None:
        now = self._clock()
        fade = 0.5 ** ((now - self._faded_at) / HALF_LIFE_S)
        self._faded_at = now
        self._weights = {pair: weight * fade for pair, weight in self._weights.items()}

    def _forget_least(self) -> None:
        hidden = [pair for pair in self._weights if pair not in self._shown]
        del self._weights[min(hidden, key=lambda pair: self._weights[pair])]


def _private(value: str) -> str:
    return value if value in (OTHER, ANYBODY.name, SEVERAL) else private(value)


def _name_of(adapter: str) -> str:
    """Return an adapter's name without label, revision or weight."""
    if " + " in adapter or "*" in adapter:
        return SEVERAL
    return adapter.partition("@")[0].partition(":")[0]
